"""Whether a language model solves problems step by step, and what its numbers depend on."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.data.vocabulary import END
from perturbed.data.worked_solutions import Chains, Problem, answer_of, as_document, draw_problems, padded, tokenizer
from perturbed.errors import PlanError
from perturbed.measures.language import text_loss

Predict = Callable[[Batch], Tensor]


def plain(ids: Tensor) -> Batch:
    """Rows [B, T] that are read as one text each, from left to right."""
    return {"input_ids": ids, "segment_ids": torch.zeros_like(ids)}


@torch.no_grad()
def continue_greedily(predict: Predict, ids: Tensor, first: Tensor, end: int) -> Tensor:
    """Greedy decoding of many rows at once, from a guess.

    Each pass puts at every place of the continuation the likeliest token after what stood before it. Whatever was
    right up to some token is then right one token further, so the passes come to rest, after the continuation's length
    at most, in what decoding token by token gives (Jacobi decoding, Santilli et al. 2023). From a good guess a few do.

    Args:
        predict: logits [B, T, V] of a batch of a causal model.
        ids: prompts, each followed by a guess up to the end of the row [B, T].
        first: where each continuation begins [B], at least 1.
        end: token that closes a continuation.

    Returns:
        [B, T]: the prompts, each followed by its continuation, which goes on with ``end`` from its first ``end`` on.
    """
    ids = ids.clone()
    free = torch.arange(ids.shape[1]) >= first[:, None]
    active = torch.arange(len(ids))
    for _ in range(ids.shape[1] + 1):
        if not len(active):
            break
        known, open_ = ids[active], free[active]
        likeliest = predict(plain(known))[:, :-1].argmax(-1).cpu()
        new = known.clone()
        new[:, 1:] = torch.where(open_[:, 1:], likeliest, known[:, 1:])
        new[((new == end) & open_).cumsum(1) > 0] = end
        ids[active] = new
        active = active[(new != known).any(1)]
    return ids


def held_out_problems(run: Run, number: int, longer: int = 0) -> list[Problem]:
    """Problems that no stage trains on: those of a seed, the same for all of its arms.

    Args:
        run: of a plan with the fact ``chains``.
        number: how many.
        longer: sums that each has more than the plan's.

    Raises:
        PlanError: the plan does not have the fact.
    """
    told = run.ctx.facts.get("chains")
    if not isinstance(told, Chains):
        raise PlanError("problems are drawn as the fact chains says: give the plan's facts more={'chains': Chains(…)}")
    chains = Chains(told.shortest + longer, told.longest + longer, told.largest)
    return draw_problems(chains, number, "test", run.ctx.once("held-out problems", every="run"))


@dataclass(frozen=True)
class FinalAnswers:
    """Measure: problems solved by greedy decoding from the question.

    Args:
        number: problems.
        longer: sums that each has more than those the model is tuned on.
        room: tokens that a solution may be longer than the longest right one.
        suffix: put after each name.
    """

    number: int = 256
    longer: int = 0
    room: int = 8
    suffix: str = ""

    def __call__(self, run: Run) -> dict[str, float]:
        """The numbers.

        Returns:
            ``accuracy``: share whose answer is right; ``flawless``: share whose every token is; ``solution_loss``: nats
            per token of the right solutions, each read after the right ones before it.
        """
        problems = held_out_problems(run, self.number, self.longer)
        documents = [as_document(p, solution_only=True) for p in problems]
        first = torch.tensor([len(p.question) for p in problems])
        rows = padded(documents, max(len(d.tokens) for d in documents) + self.room)
        end = tokenizer().get_vocab()[END]
        found = solutions(continue_greedily(run.predict, rows["input_ids"], first, end), first, end)
        loss, _ = text_loss(run.predict, [rows])
        scores = {
            "accuracy": _share([answer_of(s) == p.answer for s, p in zip(found, problems, strict=True)]),
            "flawless": _share([s == p.solution for s, p in zip(found, problems, strict=True)]),
            "solution_loss": loss,
        }
        return {f"{name}{self.suffix}": value for name, value in scores.items()}


def solutions(ids: Tensor, first: Tensor, end: int) -> list[str]:
    """The text of each row [B, T] from its place in ``first`` [B] up to its first ``end``; all of it where none is."""
    texts = []
    for row, start in zip(ids.tolist(), first.tolist(), strict=True):
        written = row[start:]
        texts.append(tokenizer().decode(written[: written.index(end)] if end in written else written))
    return texts


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


@torch.no_grad()
def flips(predict: Predict, ids: Tensor, changed: Tensor, numeric: Tensor) -> tuple[Tensor, Tensor]:
    """Which predictions of number tokens another number earlier in the text would change.

    Args:
        predict: logits [B, T, V] of a batch of a causal model.
        ids: texts [B, T].
        changed: the same with one other token each [B, T].
        numeric: which tokens are asked for [B, T], bool; those up to the changed one do not count.

    Returns:
        Whether the likeliest token differs, and how far it is behind the changed one, of each one asked for [N].

    Raises:
        ValueError: a row differs in another number of tokens than one.
    """
    if not bool(((ids != changed).sum(1) == 1).all()):
        raise ValueError("each row of changed must differ from ids in one token")
    differs = torch.stack([predict(plain(x))[:, :-1].argmax(-1).cpu() for x in (ids, changed)])
    place = torch.arange(ids.shape[1])
    distance = place - (ids != changed).int().argmax(1, keepdim=True)
    asked = (numeric & (distance > 0))[:, 1:]
    return (differs[0] != differs[1])[asked], distance[:, 1:][asked]


@dataclass(frozen=True)
class Dependency:
    """Measure: how often a number in the solution would be predicted otherwise, had one earlier digit been another.

    Held-out problems with their right solutions, one random digit of which is changed: once in the question
    (``dependency_question``), once in the solution (``dependency_solution``). With ``_far`` behind the name, of numbers
    ``far`` or more tokens behind it only.

    Args:
        number: problems.
        far: least distance in tokens.
    """

    number: int = 128
    far: int = 16

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares, each in [0, 1]."""
        problems = held_out_problems(run, self.number)
        rows = padded([as_document(p, solution_only=True) for p in problems])
        ids, in_solution, told = rows["input_ids"], rows["loss_mask"], rows["segment_ids"] == 0
        known = tokenizer().get_vocab()
        digits = torch.tensor([known[d] for d in string.digits])
        numeric = torch.isin(ids, digits)
        rng, scores = run.ctx.rng("changed digits", every="run"), {}
        for part, eligible in (("question", ~in_solution & told), ("solution", in_solution)):
            changed = change_one(ids, eligible & numeric, digits, rng)
            flipped, distance = flips(run.predict, ids, changed, numeric & in_solution)
            scores[f"dependency_{part}"] = flipped.double().mean().item()
            scores[f"dependency_{part}_far"] = flipped[distance >= self.far].double().mean().item()
        return scores


def change_one(ids: Tensor, eligible: Tensor, among: Tensor, generator: torch.Generator) -> Tensor:
    """One eligible token of each row [B, T], at random, replaced by another of ``among`` [K], at random.

    Args:
        ids: rows; eligible tokens are all in ``among``.
        eligible: which may be replaced [B, T], bool; at least one in each row.
        among: what it may become.
        generator: of the draws.
    """
    place = torch.multinomial(eligible.double(), 1, generator=generator)
    old = (among == ids.gather(1, place)).int().argmax(1, keepdim=True)
    shift = torch.randint(1, len(among), old.shape, generator=generator)
    return ids.scatter(1, place, among[(old + shift) % len(among)])
