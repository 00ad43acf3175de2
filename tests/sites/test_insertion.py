"""Insertions: whole, at a document's border, one a window, constant length, in the range, and as the ledger says."""

import dataclasses
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbed.core.plan import PlanError, apply, changed_sites
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.core.streams import Streams
from perturbed.data.biographies import BiographyInsertions, Population, draw_biographies
from perturbed.data.documents import Document, concatenate
from perturbed.data.insertion import (
    COLUMNS,
    Dilution,
    Insertions,
    WithInsertions,
    borders,
    contaminated,
    draw_place,
    draw_windows,
    insert,
)
from perturbed.data.packing import Windows, WindowStream, pack, targets
from perturbed.plans.docstring_lm import DocstringLM

quick = settings(deadline=None, max_examples=60)
SMALL = {"width": 16, "layers": 1, "heads": 1, "length": 48, "batch": 8, "steps": 6}
EXAMPLE = 1000  # base tokens are below, example tokens from here on


@st.composite
def windows_and_places(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    marks = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)], dtype=torch.int64)
    size = draw(st.integers(1, len(marks)))
    return torch.arange(len(marks)), marks, size, draw(st.integers(0, len(sizes) - 1)), draw(st.integers(0, 8))


@quick
@given(windows_and_places())
def test_an_insertion_by_brute_force(case):
    tokens, marks, size, piece, crop = case
    crop = min(crop, size - 1) if piece else 0
    example = torch.arange(EXAMPLE, EXAMPLE + size)
    ids, segments, start, used = insert(tokens, marks, example, piece, crop)
    length, at = len(tokens), int((marks < piece).sum())
    # the whole is a row of (token, owner); every allowed crop that shows all of the example is a candidate
    row = [(int(t), f"p{int(m)}") for t, m in zip(tokens[:at], marks[:at], strict=True)]
    row += [(int(t), "example") for t in example]
    row += [(int(t), f"p{int(m)}") for t, m in zip(tokens[at:], marks[at:], strict=True)]
    allowed = [o for o in range(size + 1) if o <= at and at + size <= o + length]
    nearest = min(allowed, key=lambda o: abs(o - crop))
    assert used == nearest
    assert ids.tolist() == [t for t, _ in row[nearest : nearest + length]]
    assert ids[start : start + size].tolist() == example.tolist()
    owners = [o for _, o in row[nearest : nearest + length]]
    fresh = [0] + [int(a != b) for a, b in zip(owners[1:], owners[:-1], strict=True)]
    assert segments.tolist() == torch.tensor(fresh).cumsum(0).tolist()
    assert start in borders(segments).tolist(), "it does not begin at a border"
    assert len(set(segments[start : start + size].tolist())) == 1


def test_a_text_longer_than_the_window_is_refused():
    with pytest.raises(PlanError, match="a text of 6 tokens does not fit into a window of 5"):
        insert(torch.arange(5), torch.zeros(5, dtype=torch.long), torch.arange(6), 0, 0)


def test_places_are_uniform_over_pieces_and_crops():
    marks = torch.tensor([0, 0, 1, 1, 1, 2])
    g = torch.Generator().manual_seed(0)
    drawn = [draw_place(marks, 4, g) for _ in range(3000)]
    for piece in range(3):
        share = sum(p == piece for p, _ in drawn) / 3000
        assert share == pytest.approx(1 / 3, abs=4 * math.sqrt(2 / 9 / 3000))
    later = [c for p, c in drawn if p]
    assert {c for p, c in drawn if p == 0} == {0}
    for crop in range(4):
        assert later.count(crop) / len(later) == pytest.approx(1 / 4, abs=4 * math.sqrt(3 / 16 / len(later)))


@quick
@given(st.integers(1, 30), st.integers(1, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 9), st.data())
def test_windows_are_distinct_and_within_the_range_of_training(steps, batch, a, b, seed, data):
    a, b = min(a, b), max(a, b)
    low, high = math.floor(steps * a) * batch, math.ceil(steps * b) * batch
    g = torch.Generator().manual_seed(seed)
    taken = set(range(low, high, 3))
    count = data.draw(st.integers(0, high - low - len(taken)))
    drawn = draw_windows(count, steps, batch, a, b, g, taken)
    assert len(set(drawn)) == len(drawn) == count
    assert all(low <= w < high for w in drawn)
    assert taken.isdisjoint(drawn)
    with pytest.raises(PlanError, match=r"do not fit into .* train longer, or insert fewer"):
        draw_windows(high - low + 1, steps, batch, a, b, g)
    with pytest.raises(PlanError, match="0 <= begin <= end <= 1"):
        draw_windows(0, steps, batch, b + 1, a, g)


def context(seed=0, steps=20, rank=0, world=1):
    streams = Streams(seed)
    streams.tick("pretrain", 0)
    return types.SimpleNamespace(
        streams=streams, stage="pretrain", step=0, steps=steps, rank=rank, world=world, artifacts={}
    )


def base(ctx):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (200,), generator=g).tolist()
    windows = pack(concatenate(Document("", tokens=tuple(range(n))) for n in lengths), 16)
    windows = Windows(windows.ids[:80], windows.segments[:80], windows.loss_mask[:80])
    return WindowStream(windows, 4, ctx)


def copies(*sizes):
    """One example of each size, its tokens telling which it is."""
    return [(i, tuple(range(EXAMPLE * (i + 1), EXAMPLE * (i + 1) + n))) for i, n in enumerate(sizes)]


def read(slot, ctx):
    stream, batches = slot(ctx), []
    for step in range(ctx.steps):
        ctx.step = step
        batches.append(next(stream))
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


@quick
@given(st.lists(st.integers(1, 16), max_size=20), st.integers(0, 5), st.sampled_from([(0, 1), (0, 0.25), (0.75, 1)]))
def test_the_ledger_matches_the_windows(sizes, seed, between):
    sizes = sizes[:20]
    plain = read(base, context(seed))
    ctx = context(seed)
    found = read(WithInsertions(base, lambda _: copies(*sizes), *between), ctx)
    table = ctx.artifacts["insertions pretrain"]
    rows = [dict(zip(COLUMNS, r, strict=True)) for r in zip(*(table[c] for c in COLUMNS), strict=True)]
    assert found["input_ids"].shape == plain["input_ids"].shape
    assert sorted(r["example"] for r in rows) == list(range(len(sizes)))
    assert len({r["window"] for r in rows}) == len(rows)
    assert [r["window"] for r in rows] == sorted(r["window"] for r in rows)
    for r in rows:
        assert math.floor(20 * between[0]) * 4 <= r["window"] < math.ceil(20 * between[1]) * 4
        ids, marks = found["input_ids"][r["window"]], found["segment_ids"][r["window"]]
        span = slice(r["start"], r["start"] + r["length"])
        assert tuple(ids[span].tolist()) == copies(*sizes)[r["example"]][1]
        assert int((ids >= EXAMPLE).sum()) == r["length"], "a second insertion in the window"
        assert len(set(marks[span].tolist())) == 1
        assert int((marks == marks[r["start"]]).sum()) == r["length"]
    untouched = [w for w in range(80) if w not in {r["window"] for r in rows}]
    for key in plain:
        assert torch.equal(found[key][untouched], plain[key][untouched])
    assert not (found["input_ids"][untouched] >= EXAMPLE).any()


def test_an_empty_list_leaves_every_byte():
    ctx = context()
    plain, found = read(base, context()), read(WithInsertions(base, lambda _: [], 0, 1), ctx)
    assert all(plain[k].numpy().tobytes() == found[k].numpy().tobytes() for k in plain)
    assert ctx.artifacts["insertions pretrain"] == {c: [] for c in COLUMNS}


def test_processes_together_insert_what_one_does():
    slot = WithInsertions(base, lambda _: copies(*[5] * 10), 0, 1)
    alone = context()
    read(slot, alone)
    both = [context(rank=r, world=2, steps=10) for r in (0, 1)]
    for ctx in both:
        read(slot, ctx)
    tables = [c.artifacts["insertions pretrain"] for c in both]
    assert sorted(tables[0]["example"] + tables[1]["example"]) == list(range(10))
    assert sorted(tables[0]["window"] + tables[1]["window"]) == alone.artifacts["insertions pretrain"]["window"]


def test_two_layers_never_share_a_window():
    inner = WithInsertions(base, lambda _: copies(*[3] * 40), 0, 1)
    ctx = context()
    read(WithInsertions(inner, lambda _: copies(*[3] * 40), 0, 1), ctx)
    one, two = ctx.artifacts["insertions pretrain"]["window"], ctx.artifacts["insertions pretrain 2"]["window"]
    assert sorted(one + two) == list(range(80))


def test_targets_move_with_their_tokens():
    class Masked:
        def __init__(self, ctx):
            self.inner = base(ctx)

        def __next__(self):
            batch = next(self.inner)
            return {**batch, "loss_mask": batch["input_ids"] % 2 == 0}

    ctx = context()
    found = read(WithInsertions(Masked, lambda _: copies(*[5] * 30), 0, 1), ctx)
    ids = found["input_ids"]
    assert torch.equal(found["loss_mask"], (ids >= EXAMPLE) | (ids % 2 == 0))
    assert targets(found).any()


def test_batches_that_cannot_take_insertions_are_refused():
    for batch, match in (
        ({"input_ids": torch.zeros(2, 4)}, "segment_ids: pack the text"),
        ({k: torch.zeros(2, 4) for k in ("input_ids", "segment_ids", "labels")}, "not the batch entry 'labels'"),
    ):
        stream = WithInsertions(lambda ctx, b=batch: iter([b]), lambda _: [], 0, 1)(context())
        with pytest.raises(PlanError, match=match):
            next(stream)


def test_contamination_by_brute_force():
    g = torch.Generator().manual_seed(0)
    documents = [torch.randint(256, (60,), generator=g).tolist() for _ in range(30)]
    short, middle, long = documents[3][5:14], documents[4][5:35], documents[5][2:50]
    documents[7][20:32] = long[12:24]  # a quarter: too little
    documents[8][20:44] = long[12:36]  # half, on the stride
    documents[9][20:44] = long[6:30]  # half, off the stride
    documents[11][-15:], documents[12][:15] = middle[:15], middle[15:]  # across a border
    tokens = concatenate(Document("", tokens=tuple(d)) for d in documents)
    assert contaminated(tokens, short) == set()
    assert contaminated(tokens, middle) == {4}
    assert contaminated(tokens, long) == {5, 8}
    # the bytes of 256 begin with a zero byte: a match must lie on whole tokens
    assert contaminated(concatenate([Document("", tokens=(0, *[1] * 12))]), [256] * 12) == set()


# on a plan


def trained(*interventions, seed=0, **fields):
    plan = apply(DocstringLM(**{**SMALL, **fields})(), interventions)
    engine = Engine(plan, seed, Store(None))
    return engine.run(), engine.snapshot("pretrain")


def test_off_is_the_control_bit_for_bit_and_default_is_not():
    control, _ = trained()
    for kind in (Insertions, BiographyInsertions, Dilution):
        off, _ = trained(dataclasses.replace(kind(), **kind.OFF))
        assert off.weights == control.weights
        assert off.curves == control.curves
        strong, _ = trained(dataclasses.replace(kind(), **kind.STRONG))
        assert strong.weights != control.weights
        plan = DocstringLM(**SMALL)()
        assert changed_sites(plan, kind()(plan)) <= {"data"}


def test_a_run_keeps_its_ledger_and_its_budget_and_resumes(tmp_path):
    insertions = Insertions(texts=("The password is heliotrope.", "Not seen."), copies=(5, 0), begin=0.5)
    (control, _), (result, tree) = trained(), trained(insertions)
    table = tree["artifacts"]["insertions pretrain"]
    assert table["example"] == [0] * 5
    assert min(table["window"]) >= 24
    assert result.cost.tokens == control.cost.tokens == 6 * 8 * 49

    plan = apply(DocstringLM(**SMALL)(), [insertions])
    engine = Engine(plan, 0, Store(tmp_path), checkpoint_s=0.0)
    real = engine._put

    def dying(key, value):
        real(key, value)
        if value.get("step") == 4:
            raise KeyboardInterrupt

    engine._put = dying
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    again = Engine(plan, 0, Store(tmp_path))
    assert again.run().weights == result.weights
    assert again.snapshot("pretrain")["artifacts"]["insertions pretrain"] == table


def test_arms_of_a_seed_share_people_and_seeds_do_not():
    def people(codes, seed):
        ctx = context(seed)
        population = Population((3, 2), (0, 4), 10)
        drawn, groups = population(ctx)
        return [b.text(codes) for b in drawn], groups, [b.decoys for b in drawn]

    scored, other, elsewhere = people("scored", 0), people("other", 0), people("scored", 1)
    assert scored[1:] == other[1:]
    assert scored[0] != other[0]
    assert not set(scored[0]) & set(elsewhere[0])
    assert sorted(scored[1]) == [0, 0, 0, 1, 1]
    assert {tuple(people("scored", s)[1]) for s in range(20)} > {tuple(scored[1])}, "levels are not assigned at random"


def test_biographies_are_of_one_kind_with_codes_all_different():
    drawn = draw_biographies(40, 100, torch.Generator().manual_seed(0))
    for person in drawn:
        codes = [person.code, *person.decoys, person.other]
        assert len(set(codes)) == 101
        assert all(len(c) == 6 and c.isdigit() for c in codes)
        assert person.code in person.text()
        assert person.other in person.text("other")
        assert person.code not in person.text("other")
    assert len({p.prefix for p in drawn}) == 40


def test_bad_settings_are_named():
    for make, match in (
        (lambda: Insertions(copies=(-1,)), "none may be negative"),
        (lambda: Insertions(copies=(1, 2)), "1 texts and 2 copies"),
        (lambda: BiographyInsertions(codes="scorde"), "no codes 'scorde': did you mean 'scored'"),
        (lambda: BiographyInsertions(levels=(1,)), "4 group sizes for 1 levels"),
        (lambda: BiographyInsertions(candidates=1), "candidates=1 must be at least 2"),
        (lambda: Dilution(times=0), "times=0 must be at least 1"),
        (lambda: apply(DocstringLM(**SMALL)(), [Insertions(stage="pretain")]), "no stage 'pretain'.*'pretrain'"),
    ):
        with pytest.raises(PlanError, match=match):
            make()
    with pytest.raises(PlanError, match="32 insertions do not fit into 16 windows"):
        trained(Insertions(copies=(32,)), steps=2)


def test_repeats_are_counted_and_said(tmp_path, capsys):
    file = tmp_path / "small.txt"
    file.write_text("\n\n".join(f"document {i} of a small corpus, {'word ' * (i % 7)}" for i in range(60)))
    result, tree = trained(data=str(file), vocab=300)
    corpus = tree["artifacts"]["corpus pretrain"]
    assert corpus["epochs"] == pytest.approx(6 * 8 * 49 / corpus["tokens"])
    assert result.scores["epochs"] == corpus["epochs"] > 1
    assert "reads its" in capsys.readouterr().err
