"""Worked solutions: every line right by independent arithmetic, no problem on both sides, targets where they belong."""

import re
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbed.core.plan import PlanError
from perturbed.core.streams import Streams
from perturbed.data.documents import Document, held_out
from perturbed.data.packing import targets
from perturbed.data.vocabulary import END
from perturbed.data.worked_solutions import (
    CHARACTERS,
    HELD_OUT,
    MASK,
    Chains,
    Problem,
    WorkedSolutions,
    as_document,
    draw_problems,
    legal_sums,
    padded,
    tokenizer,
)

quick = settings(deadline=None, max_examples=60)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def worked_out(question):
    """The solution by Python's own arithmetic, each sum in brackets so that no operator comes before another."""
    first, *rest = re.fullmatch(r"(\d)((?:[-+*]\d)+)\?", question).groups()
    lines, value = [], int(first)
    for operator, operand in re.findall(r"([-+*])(\d)", rest[0]):
        after = eval(f"({value}){operator}{operand}")
        lines.append(f"{value}{operator}{operand}={after}")
        value = after
    return ";".join([*lines, f"#{value}"])


@quick
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(0, 3), st.integers(9, 99))
def test_solutions_are_right_and_stay_in_range(seed, shortest, more, largest):
    problem = Chains(shortest, shortest + more, largest).draw(generator(seed))
    assert problem.solution == worked_out(problem.question)
    results = [int(n) for n in re.findall(r"=(\d+)", problem.solution)]
    assert shortest <= len(results) <= shortest + more
    assert all(0 <= n <= largest for n in results)
    assert problem.answer == str(results[-1])


def test_precedence_would_give_other_answers():
    drawn = draw_problems(Chains(3, 3, 30), 60, "train", generator())
    assert any(int(p.answer) != eval(p.question[:-1]) for p in drawn)


@given(st.integers(0, 60), st.integers(9, 60))
def test_legal_sums_are_all_that_stay_in_range(value, largest):
    value = min(value, largest)
    listed = {f"{value}{op}{n}" for sums in legal_sums(value, largest) for op, n in sums}
    every = {f"{value}{op}{n}" for op in "+-*" for n in range(1, 10) if op != "*" or (n > 1 and value)}
    assert listed == {text for text in every if 0 <= eval(text) <= largest}


def test_lengths_and_operators_come_equally_often():
    drawn = [Chains(1, 3, 99).draw(generator(seed)) for seed in range(900)]
    counts = [sum(p.solution.count("=") == n for p in drawn) for n in (1, 2, 3)]
    assert all(240 < c < 360 for c in counts)  # 300 each, standard deviation 14
    firsts = [p.solution[1] for p in drawn]
    assert all(240 < firsts.count(op) < 360 for op in "+-*")


def test_sides_share_no_problem_and_none_comes_twice():
    chains = Chains(1, 1, 20)  # few enough to meet again
    train, test = (draw_problems(chains, n, side, generator(n)) for n, side in ((60, "train"), (20, "test")))
    assert {p.question for p in train}.isdisjoint(p.question for p in test)
    assert all(held_out(p.question, HELD_OUT) for p in test)
    assert len({p.question for p in train}) == 60
    with pytest.raises(PlanError, match="different problems of 500"):
        draw_problems(chains, 500, "test", generator())


@pytest.mark.parametrize("sizes", [(0, 1, 20), (3, 2, 20), (1, 2, 8)])
def test_impossible_chains_are_refused(sizes):
    with pytest.raises(PlanError, match="Chains"):
        Chains(*sizes)


def test_tokenizer_is_one_token_a_character_and_comes_back():
    made = tokenizer()
    text = "7-3*4?7-3=4;4*4=16;#16"
    ids = made.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert made.decode(ids) == text
    assert (made.eos_token, made.eos_token_id, made.mask_token) == (END, 0, MASK)
    assert len(made) == len(CHARACTERS) + 2


def test_documents_have_the_tokens_of_the_tokenizer_and_learn_the_solution():
    problem = Problem("7-3?", "7-3=4;#4")
    whole, part = (as_document(problem, solution_only=only) for only in (False, True))
    assert list(part.tokens) == [*tokenizer().encode("7-3?7-3=4;#4", add_special_tokens=False), 0]
    assert part.loss_mask == (False,) * 4 + (True,) * 9  # the end is learnt too
    assert all(whole.loss_mask)


def test_filling_is_never_a_target():
    rows = padded([Document("", tokens=(5, 6, 0)), Document("", tokens=(7, 0), loss_mask=(False, True))], 5)
    assert rows["input_ids"].tolist() == [[5, 6, 0, 0, 0], [7, 0, 0, 0, 0]]
    assert targets(rows).tolist() == [[True, True, False, False], [True, False, False, False]]
    with pytest.raises(PlanError, match="3 tokens and a row 2"):
        padded([Document("", tokens=(5, 6, 0))], 2)


def context(seed, stage="finetune"):
    streams = Streams(seed)
    streams.tick(stage, 0)
    return types.SimpleNamespace(streams=streams, once=streams.once, step=0, stage=stage, rank=0, world=1)


def test_problems_belong_to_the_seed_and_the_stage_and_each_comes_once_an_epoch():
    slot = WorkedSolutions(Chains(2, 2, 20), 12, 4)
    ctx = context(1)
    stream, epoch = slot(ctx), []
    for ctx.step in range(3):
        epoch.append(next(stream)["input_ids"])
    epoch = torch.cat(epoch)
    assert len(epoch.unique(dim=0)) == 12
    again, other, elsewhere = (slot(context(*at)) for at in ((1,), (2,), (1, "pretrain")))
    assert torch.equal(again.arrays["input_ids"], stream.arrays["input_ids"])
    for changed in (other, elsewhere):
        rows = {tuple(r) for r in changed.arrays["input_ids"].tolist()}
        assert len(rows & {tuple(r) for r in epoch.tolist()}) < 6
