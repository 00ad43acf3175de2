"""Packing: every token once, no attention, no prediction and no position across documents; windows by the clock."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbed.core.run import threads
from perturbed.core.streams import Streams
from perturbed.data.documents import Document, concatenate
from perturbed.data.packing import WindowStream, attention_mask, lay_out, pack, position_ids, targets
from perturbed.errors import PlanError
from perturbed.objectives.language import causal_logits, next_token_loss, token_losses
from perturbed.plans.docstring_lm import Llama

quick = settings(deadline=None, max_examples=40)
DOCUMENTS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=12), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def corpus(rows):
    return concatenate(Document("", tokens=tuple(row)) for row in rows)


def llama():
    torch.manual_seed(0)
    return Llama(width=16, layers=2, heads=2, vocab=60, length=32)(None).eval()


@quick
@given(DOCUMENTS, st.integers(1, 9))
def test_packing_cuts_the_documents_end_to_end_and_marks_their_borders(rows, length):
    windows = pack(corpus(rows), length)
    flat = [t for row in rows for t in row]
    owner = [d for d, row in enumerate(rows) for _ in row]
    full = len(flat) // length * length
    assert windows.ids.flatten().tolist() == flat[:full]
    for w, marks in enumerate(windows.segments.tolist()):
        expected, seen = [], []
        for d in owner[w * length : (w + 1) * length]:
            seen += [d] if d not in seen else []
            expected.append(seen.index(d))
        assert marks == expected


@quick
@given(DOCUMENTS, st.integers(1, 9))
def test_positions_masks_and_targets_by_brute_force(rows, length):
    segments = pack(corpus(rows), length).segments.long()
    places, seen = position_ids(segments), attention_mask(segments)
    wanted = targets({"segment_ids": segments})
    for b, marks in enumerate(segments.tolist()):
        for i in range(length):
            assert places[b, i] == sum(marks[j] == marks[i] for j in range(i))
            assert [bool(x) for x in seen[b, 0, i]] == [marks[j] == marks[i] and j <= i for j in range(length)]
            if i:
                assert bool(wanted[b, i - 1]) == (marks[i - 1] == marks[i])


def test_parts_of_a_document_are_segments_and_masked_tokens_no_targets():
    document = Document("", tokens=(1, 2, 3, 4), segments=(0, 0, 1, 1), loss_mask=(True, False, True, True))
    windows = pack(concatenate([document, Document("", tokens=(5, 6))]), 6)
    batch = windows.batch(torch.tensor([0]))
    assert batch["segment_ids"].tolist() == [[0, 0, 1, 1, 2, 2]]
    assert targets(batch).tolist() == [[False, False, True, False, True]]


def test_a_document_is_read_as_if_it_were_alone():
    model, g = llama(), torch.Generator().manual_seed(1)
    one, two = torch.randint(60, (9,), generator=g), torch.randint(60, (11,), generator=g)
    marks = torch.tensor([[0] * 9 + [1] * 11])
    packed = {"input_ids": torch.cat([one, two])[None], "segment_ids": marks}
    other = {"input_ids": torch.cat([one.flip(0) + 1 - 1, two])[None], "segment_ids": marks}
    alone = {"input_ids": two[None], "segment_ids": torch.zeros(1, 11, dtype=torch.long)}
    with torch.no_grad():
        both, changed, single = (causal_logits(model, b)[0] for b in (packed, other, alone))
        plain = model(input_ids=packed["input_ids"]).logits[0]
    assert not torch.allclose(both[:9], changed[:9])
    assert torch.equal(both[9:], changed[9:]), "another document in the window moved this one's logits"
    torch.testing.assert_close(both[9:], single, atol=1e-6, rtol=0)
    assert (plain[9:] - single).abs().max() > 1e-3, "the test would not notice attention across documents"


def test_loss_is_the_mean_over_documents_tokens_and_never_across_a_border():
    model, g = llama(), torch.Generator().manual_seed(2)
    ids = torch.randint(60, (1, 12), generator=g)
    batch = {"input_ids": ids, "segment_ids": torch.tensor([[0] * 5 + [1] * 7])}
    with torch.no_grad():
        total = 0.0
        for part in (ids[:, :5], ids[:, 5:]):
            log_p = model(input_ids=part).logits.log_softmax(-1)
            total -= sum(float(log_p[0, i, part[0, i + 1]]) for i in range(part.shape[1] - 1))
        found = float(next_token_loss(model, batch, None))
        losses, _ = token_losses(causal_logits(model, batch), batch)
    assert found == pytest.approx(total / 10, abs=1e-5)
    assert found != pytest.approx(float(losses.mean()), abs=1e-3), "the border's prediction must not count"


@quick
@given(DOCUMENTS, st.integers(2, 6), st.integers(1, 30), st.integers(0, 99))
def test_layout_fills_the_budget_and_reads_no_token_twice_in_an_epoch(rows, length, windows, seed):
    tokens = corpus(rows)
    tokens.ids.copy_(torch.arange(len(tokens.ids)))
    if len(tokens.ids) < length:
        with pytest.raises(PlanError, match=f"do not fill a window of {length}"):
            lay_out(tokens, length, windows, lambda e: torch.Generator())
        return
    epochs = []

    def generator(epoch):
        epochs.append(epoch)
        return torch.Generator().manual_seed(1000 * seed + epoch)

    found = lay_out(tokens, length, windows, generator)
    assert found.ids.shape == (windows, length)
    assert epochs == list(range(-(-windows // (len(tokens.ids) // length))))
    assert int(found.ids.flatten().bincount().max()) <= len(epochs)
    again = lay_out(tokens, length, windows, generator)
    assert torch.equal(found.ids, again.ids)
    assert torch.equal(found.segments, again.segments)


def test_layout_shuffles_documents_and_windows():
    tokens = corpus([[d] * 5 for d in range(200)])
    one, two = (lay_out(tokens, 10, 100, lambda e, s=s: torch.Generator().manual_seed(s)) for s in (1, 2))
    assert sorted(one.ids.flatten().tolist()) == sorted(two.ids.flatten().tolist()) == sorted(list(range(200)) * 5)
    assert not torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, tokens.ids.view(-1, 10))


def test_stream_finds_its_place_by_the_clock_and_ranks_share_the_windows():
    windows = pack(corpus([list(range(48))]), 4)  # 12 windows
    seen = []
    for rank in (0, 1):
        ctx = types.SimpleNamespace(step=0, rank=rank, world=2)
        stream = WindowStream(windows, 3, ctx)
        for ctx.step in (1, 0):
            seen.append((ctx.step, rank, next(stream)["input_ids"]))
    ordered = torch.cat([ids for _, _, ids in sorted(seen, key=lambda s: s[:2])])
    assert torch.equal(ordered, windows.ids.long())
    ctx.step = 2
    assert torch.equal(next(stream)["input_ids"], windows.ids[3:6].long()), "beyond the end it starts again"


def test_each_seed_has_an_order_of_its_own():
    names = [Streams(seed).once("documents of epoch 0").initial_seed() for seed in (0, 1)]
    assert names[0] != names[1]
