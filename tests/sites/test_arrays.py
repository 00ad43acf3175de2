from __future__ import annotations

from itertools import chain

import pytest
import torch
from vision_toys import ctx_of, move

from perturbed.data.arrays import Epochs, EpochStream
from perturbed.errors import PlanError

N, BATCH = 23, 5
ARRAYS = {"pixels": torch.arange(N).float().view(N, 1), "labels": torch.arange(N)}


def rows(stream: EpochStream, steps: range) -> list[list[int]]:
    found = []
    for step in steps:
        move(stream.order.ctx, step)
        found.append(next(stream)["labels"].tolist())
    return found


def test_an_epoch_visits_each_example_at_most_once_and_epochs_differ() -> None:
    batches = rows(EpochStream(ARRAYS, BATCH, ctx_of()), range(8))
    first, second = (list(chain(*batches[low : low + 4])) for low in (0, 4))
    for epoch in (first, second):
        assert len(set(epoch)) == len(epoch) == 20
        assert set(epoch) <= set(range(N))
    assert first != second


def test_every_example_has_its_turn() -> None:
    seen = list(chain(*rows(EpochStream(ARRAYS, BATCH, ctx_of()), range(80))))
    assert set(seen) == set(range(N))
    assert min(seen.count(i) for i in range(N)) >= 10  # of 20 epochs; 3 of 23 sit out each


def test_entries_stay_together() -> None:
    batch = next(EpochStream(ARRAYS, BATCH, ctx_of()))
    assert batch["pixels"].squeeze(1).tolist() == batch["labels"].tolist()


def test_a_batch_is_a_function_of_seed_stage_and_step() -> None:
    straight = rows(EpochStream(ARRAYS, BATCH, ctx_of()), range(9))
    again = EpochStream(ARRAYS, BATCH, ctx_of())
    again.load_state_dict(EpochStream(ARRAYS, BATCH, ctx_of()).state_dict())
    assert rows(again, range(6, 9)) == straight[6:]
    busy = ctx_of()
    stream = EpochStream(ARRAYS, BATCH, busy)
    torch.rand(100, generator=busy.rng("something else"))
    assert rows(stream, range(9)) == straight
    assert rows(EpochStream(ARRAYS, BATCH, ctx_of(seed=1)), range(9)) != straight
    assert rows(EpochStream(ARRAYS, BATCH, ctx_of(stage="pretrain")), range(9)) != straight


def test_processes_share_out_the_batches_of_one() -> None:
    alone = rows(EpochStream(ARRAYS, BATCH, ctx_of()), range(8))
    two = [rows(EpochStream(ARRAYS, BATCH, ctx_of(rank=rank, world=2)), range(4)) for rank in (0, 1)]
    assert [batch for pair in zip(*two, strict=True) for batch in pair] == alone


def test_unfit_arrays_are_refused() -> None:
    with pytest.raises(PlanError, match=r"23 examples for batches of 24.*between 1 and 23"):
        EpochStream(ARRAYS, 24, ctx_of())
    with pytest.raises(PlanError, match="between 1 and 11"):
        EpochStream(ARRAYS, 12, ctx_of(world=2))
    with pytest.raises(PlanError, match="one length"):
        EpochStream({**ARRAYS, "labels": torch.arange(3)}, BATCH, ctx_of())


def test_the_slot_reads_its_source_when_the_stage_begins() -> None:
    calls = []

    def source() -> dict[str, torch.Tensor]:
        calls.append(1)
        return ARRAYS

    slot = Epochs(source, BATCH)
    assert not calls
    assert len(next(slot(ctx_of()))["labels"]) == BATCH
