"""Reasoning: decoding equals token by token, answers as they are written, flips of models whose ways are known."""

import string
import types

import pytest
import torch
import torch.nn.functional as F

from perturbed.core.plan import Facts, PlanError
from perturbed.core.run import threads
from perturbed.core.streams import Streams
from perturbed.data.worked_solutions import Chains, Problem, answer_of, as_document, draw_problems, padded, tokenizer
from perturbed.measures.reasoning import (
    Dependency,
    FinalAnswers,
    change_one,
    continue_greedily,
    flips,
    held_out_problems,
    plain,
    solutions,
)
from perturbed.objectives.language import causal_logits
from perturbed.plans.docstring_lm import Llama

VOCAB = len(tokenizer())
IDS = tokenizer().get_vocab()
CHAINS = Chains(2, 2, 20)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def llama(seed):
    torch.manual_seed(seed)
    model = Llama(width=16, layers=2, heads=2, vocab=VOCAB, length=128)(None).eval()
    for p in model.parameters():
        p.data.mul_(6)
    return lambda batch: causal_logits(model, batch)


def by_hand(predict, prompt, end, length):
    ids = list(prompt)
    while len(ids) < length:
        ids.append(int(predict(plain(torch.tensor([ids])))[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids + [end] * (length - len(ids))


@pytest.mark.parametrize("seed", range(4))
def test_decoding_all_at_once_equals_decoding_token_by_token(seed):
    predict, length = llama(seed), 20
    g = torch.Generator().manual_seed(seed)
    first = torch.tensor([1, 3, 6, 6, 9])
    ids = torch.randint(0, VOCAB, (5, length), generator=g)
    with torch.no_grad():
        # an end that some of these models write
        written = [by_hand(predict, ids[0, :1], -1, length)[k] for k in (4, 9)]
        for end in (*written, VOCAB - 1):
            found = continue_greedily(predict, ids, first, end)
            for row, start in enumerate(first.tolist()):
                assert found[row].tolist() == by_hand(predict, ids[row, :start].tolist(), end, length)


def test_a_right_guess_takes_one_pass_and_no_guess_changes_the_result():
    predict, calls = llama(1), []

    def counted(batch):
        calls.append(len(batch["input_ids"]))
        return predict(batch)

    ids, first = torch.randint(0, VOCAB, (3, 16), generator=torch.Generator().manual_seed(0)), torch.tensor([4, 4, 4])
    found = continue_greedily(counted, ids, first, 0)
    assert len(calls) <= 13
    calls.clear()
    assert torch.equal(continue_greedily(counted, found, first, 0), found)
    assert calls == [3]


class Knows:
    """Writes the right solution of known problems, with an error where one is wanted."""

    def __init__(self, problems, spoil=lambda i, text: text):
        self.rows = {p.question: spoil(i, p.solution) for i, p in enumerate(problems)}

    def __call__(self, batch):
        logits = torch.zeros(*batch["input_ids"].shape, VOCAB)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            text = "".join(tokenizer().convert_ids_to_tokens(ids))
            question = text[: text.index("?") + 1]
            for at, char in enumerate([*self.rows[question], tokenizer().eos_token]):
                if len(question) + at <= len(ids):
                    logits[row, len(question) + at - 1, IDS[char]] = 20.0
        return logits


def run(predict, seed=0, **facts):
    streams, facts = Streams(seed), Facts(modality="language", target="next-token", more=facts or {"chains": CHAINS})
    return types.SimpleNamespace(
        predict=predict, ctx=types.SimpleNamespace(once=streams.once, rng=streams.rng, facts=facts)
    )  # fmt: skip


def test_accuracy_counts_answers_and_flawless_whole_solutions():
    problems = held_out_problems(run(None), 20)
    right = FinalAnswers(number=20)(run(Knows(problems)))
    assert (right["accuracy"], right["flawless"]) == (1, 1)
    assert right["solution_loss"] < 1e-3

    def spoil(i, text):  # five wrong ways to a right answer, five wrong answers, one without any, one that never ends
        ways = {10: text.partition("#")[0], 11: text + "+" * 99}
        return ways.get(i, "1-1=1;" + text[text.rindex("#") :] if i < 5 else text + "7" if i < 10 else text)

    spoilt = FinalAnswers(number=20, room=6, suffix="_x")(run(Knows(problems, spoil)))
    assert spoilt["accuracy_x"] == 1 - 7 / 20
    assert spoilt["flawless_x"] == 1 - 12 / 20
    assert spoilt["solution_loss_x"] > 0.5


def test_held_out_problems_are_never_trained_on_and_belong_to_the_seed():
    once, again, other = (held_out_problems(run(None, seed), 30) for seed in (0, 0, 1))
    assert once == again != other
    trained = draw_problems(CHAINS, 300, "train", torch.Generator().manual_seed(0))
    assert {p.question for p in once + other}.isdisjoint(p.question for p in trained)


def test_longer_problems_have_more_sums_and_a_plan_without_the_fact_is_told():
    assert {p.solution.count("=") for p in held_out_problems(run(None), 20, longer=2)} == {4}
    with pytest.raises(PlanError, match="fact chains"):
        held_out_problems(run(None, other=1), 5)


@pytest.mark.parametrize(("text", "answer"), [("1+2=3;#3", "3"), ("1+2=3;", ""), ("#1#12", "12"), ("", ""), ("#", "")])
def test_answer_is_what_comes_after_the_last_mark(text, answer):
    assert answer_of(text) == answer


def test_solutions_end_at_the_first_end():
    ids = torch.tensor([[5, 6, 0, 7], [5, 6, 7, 8]])
    assert solutions(ids, torch.tensor([1, 2]), 0) == [tokenizer().decode([6]), tokenizer().decode([7, 8])]


def looks_back(distance):
    """A model that writes again the token so many places before."""

    def predict(batch):
        ids = batch["input_ids"]
        seen = torch.zeros_like(ids)
        seen[:, distance:] = ids[:, : ids.shape[1] - distance]
        return F.one_hot(seen, VOCAB).float()

    return predict


def test_flips_are_where_the_changed_token_is_read():
    ids = torch.arange(1, 11)[None]
    changed = ids.clone()
    changed[0, 2] = 15
    numeric = torch.ones_like(ids, dtype=torch.bool)
    flipped, distance = flips(looks_back(3), ids, changed, numeric)
    assert distance.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert distance[flipped].tolist() == [4]  # what is predicted at 5 is the token at 6
    flipped, distance = flips(looks_back(3), ids, changed, numeric & (torch.arange(10) > 6))
    assert not flipped.any()
    assert distance.tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="one token"):
        flips(looks_back(3), ids, ids, numeric)


def test_dependency_of_models_that_read_near_or_nothing():
    measure = Dependency(number=40, far=8)
    nothing = measure(run(lambda batch: torch.zeros(*batch["input_ids"].shape, VOCAB)))
    assert set(nothing.values()) == {0.0}
    near = measure(run(looks_back(1)))
    assert near["dependency_solution"] > 0.05
    assert near["dependency_solution_far"] == near["dependency_question_far"] == 0


def test_dependency_is_of_the_numbers_of_the_solution_behind_the_changed_digit():
    """Against a model that writes again what stood two places before, digit by digit."""
    found, digits = Dependency(number=30, far=4)(run(looks_back(1))), torch.tensor([IDS[d] for d in string.digits])
    problems = held_out_problems(run(None), 30)
    rows = padded([as_document(p, solution_only=True) for p in problems])
    ids, rng = rows["input_ids"], run(None).ctx.rng("changed digits", every="run")
    in_question = torch.arange(ids.shape[1]) < torch.tensor([[len(p.question)] for p in problems])
    for part, eligible in (("question", in_question), ("solution", rows["loss_mask"])):
        places = (change_one(ids, eligible & torch.isin(ids, digits), digits, rng) != ids).int().argmax(1).tolist()
        asked, far, hits = 0, 0, 0
        for problem, changed in zip(problems, places, strict=True):
            for at, char in enumerate(problem.solution, len(problem.question)):
                if char.isdigit() and at > changed:
                    asked += 1
                    far += at - changed >= 4
                    hits += at - 2 == changed
        assert 0 < hits < asked > far > 0
        assert found[f"dependency_{part}"] == pytest.approx(hits / asked)
        assert found[f"dependency_{part}_far"] == 0


def test_one_digit_of_each_row_becomes_another_digit():
    problems = draw_problems(CHAINS, 50, "train", torch.Generator().manual_seed(0))
    rows = padded([as_document(p, solution_only=True) for p in problems])
    digits = torch.tensor([IDS[d] for d in string.digits])
    ids, eligible = rows["input_ids"], torch.isin(rows["input_ids"], digits) & ~rows["loss_mask"]
    changed = change_one(ids, eligible, digits, torch.Generator().manual_seed(1))
    differs = changed != ids
    assert (differs.sum(1) == 1).all()
    assert eligible[differs].all()
    assert torch.isin(changed[differs], digits).all()
    assert len(set(differs.int().argmax(1).tolist())) > 1
    assert isinstance(problems[0], Problem)
