"""Few examples: the same ones in every arm and stage of a seed, others for other seeds, none changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vision_toys import ctx_of, move, run

from perturbed.core.plan import Plan, Stage, apply, no_data
from perturbed.data.arrays import Epochs, EpochStream
from perturbed.data.examples import Batches, Table, TableStream
from perturbed.data.subset import FewExamples, SomeExamples, some_rows
from perturbed.errors import PlanError
from perturbed.objectives.certified import FlatTraining
from perturbed.plans.digits import Digits

N = 60


def whole() -> dict[str, Tensor]:
    return {"pixels": 10.0 * torch.arange(N).view(N, 1), "labels": torch.arange(N)}


def stacked(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def seen(slot: Epochs | Batches | SomeExamples, seed: int = 0, stage: str = "finetune", steps: int = 40) -> set[int]:
    ctx = ctx_of(seed, stage)
    stream, found = slot(ctx), set()
    for step in range(steps):
        move(ctx, step)
        batch = next(stream)
        assert torch.equal(batch["pixels"][:, 0], 10.0 * batch["labels"])
        found |= set(batch["labels"].tolist())
    return found


def few(share: float = 0.25) -> SomeExamples:
    return SomeExamples(Epochs(whole, 5), share)


def test_a_share_of_distinct_examples_in_their_order() -> None:
    rows = some_rows(N, 0.25, ctx_of())
    assert len(set(rows.tolist())) == len(rows) == 15
    assert torch.equal(rows, rows.sort().values)
    assert 0 <= int(rows.min()) <= int(rows.max()) < N
    assert seen(few()) == set(rows.tolist())
    assert len(some_rows(N, 1e-9, ctx_of())) == 1


def test_every_example_is_as_likely() -> None:
    counts = torch.zeros(N)
    for seed in range(400):
        counts[some_rows(N, 0.25, ctx_of(seed))] += 1
    spread = (400 * 0.25 * 0.75) ** 0.5
    assert ((counts - 100).abs() < 4.5 * spread).all()
    assert counts.std() > 0.5 * spread  # and not the same for all seeds


def test_stages_and_steps_share_the_examples_and_seeds_do_not() -> None:
    assert seen(few(), stage="pretrain") == seen(few(), stage="finetune")
    assert seen(few(), seed=1) != seen(few(), seed=0)
    late = move(ctx_of(), 7)
    assert torch.equal(some_rows(N, 0.25, late), some_rows(N, 0.25, ctx_of()))
    one, two = (set(some_rows(N, share, ctx_of()).tolist()) for share in (0.1, 0.3))
    assert one < two


def test_the_whole_is_the_same_stream() -> None:
    streams = SomeExamples(Epochs(whole, 5), 1.0)(ctx_of()), EpochStream(whole(), 5, ctx_of())
    assert all(torch.equal(a, b) for a, b in zip(next(streams[0]).values(), next(streams[1]).values(), strict=True))


def test_a_table_read_by_index_gives_the_same_examples() -> None:
    rows = [dict(zip(whole(), values, strict=True)) for values in zip(*whole().values(), strict=True)]
    slot = SomeExamples(Batches(Table(rows, stacked), 5), 0.25)
    assert isinstance(slot(ctx_of()), TableStream)
    assert seen(slot) == seen(few())


def small() -> Plan:
    return Digits(model="mlp", batch=16, pretrain_steps=3, finetune_steps=3, held_out=1000)()


def test_arms_see_the_same_few_examples_in_all_stages() -> None:
    plans = [apply(small(), arm) for arm in ([FewExamples()], [FewExamples(), FlatTraining()])]
    found = []
    for plan in plans:
        for stage in plan.stages:
            stream = stage.data(ctx_of(5, stage.name))
            assert isinstance(stream, EpochStream)
            found.append(stream.arrays["pixels"])
    assert len(found) == 4
    assert len(found[0]) == 80
    assert all(torch.equal(found[0], other) for other in found)


def test_a_run_on_fewer_examples_is_another_as_long_and_the_test_set_is_whole() -> None:
    control, treated = run(small()), run(apply(small(), [FewExamples()]))
    assert control.weights != treated.weights
    assert control.cost.examples == treated.cost.examples
    assert run(apply(small(), [FewExamples(share=1.0)])).weights == control.weights


@pytest.mark.parametrize("share", [0.0, 1.1, -0.5])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(PlanError, match="FewExamples: share"):
        FewExamples(share=share)


def test_data_without_examples_and_too_small_shares_are_refused() -> None:
    twice = [FewExamples(), FewExamples()]
    with pytest.raises(PlanError, match="SomeExamples, of which no part"):
        apply(small(), twice)
    with pytest.raises(PlanError, match="batches of 16"):
        run(apply(small(), [FewExamples(share=0.01)]))


def test_a_stage_without_data_stays_as_it_is() -> None:
    plan = small()
    treated = apply(plan.insert(Stage(name="merge", steps=0), after="finetune"), [FewExamples()])
    assert treated.stage("merge").data is no_data
    assert isinstance(treated.stage("finetune").data, SomeExamples)
