"""Arithmetic problems with worked solutions: chains of sums, of a difficulty that can be set.

A question is a chain of sums, read from left to right without precedence; the solution works it out sum by sum, with
the results so far, and ends with the answer::

    7-3*4+2?    ->    7-3=4;4*4=16;16+2=18;#18

What has to be learnt is where in the question the next sum stands, to carry the result into it, and to work it out.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch
from perturbed.data.arrays import EpochStream
from perturbed.data.documents import Document, held_out
from perturbed.data.vocabulary import END
from perturbed.errors import PlanError

CHARACTERS = string.digits + "+-*=;?#"
MASK = "<|mask|>"
VOCABULARY = (END, *CHARACTERS, MASK)
ANSWER = "#"
HELD_OUT = 0.2
Side = Literal["train", "test"]
Sum = tuple[str, int]


@dataclass(frozen=True)
class Problem:
    """One problem.

    Args:
        question: ends with a question mark.
        solution: the sums that lead to the answer, and the answer after ``#``.
    """

    question: str
    solution: str

    @property
    def answer(self) -> str:
        """What comes after the last ``#``."""
        return answer_of(self.solution)


def answer_of(solution: str) -> str:
    """What a solution gives after its last ``#``; nothing where it has none."""
    return solution.rpartition(ANSWER)[2] if ANSWER in solution else ""


def legal_sums(value: int, largest: int) -> list[list[Sum]]:
    """By operator, the sums of ``value`` and a digit (of 2 … 9 for ``*``) whose result is in 0 … ``largest``.

    Operators that have none are left out.
    """
    found = [
        [("+", n) for n in range(1, 10) if value + n <= largest],
        [("-", n) for n in range(1, 10) if value >= n],
        [("*", n) for n in range(2, 10) if value and value * n <= largest],
    ]
    return [sums for sums in found if sums]


def result(value: int, operator: str, operand: int) -> int:
    """The value of one sum."""
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


@dataclass(frozen=True)
class Chains:
    """Which problems are drawn.

    Args:
        shortest: sums in a problem, at least; how many is drawn for each problem.
        longest: the same, at most.
        largest: no result is above it; none is below 0.
    """

    shortest: int
    longest: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.shortest <= self.longest:
            raise PlanError(f"{self!r}: a chain has 1 <= shortest <= longest sums")
        if self.largest < 9:
            raise PlanError(f"{self!r}: largest must be at least 9, so that every digit can begin a chain")

    def draw(self, generator: torch.Generator) -> Problem:
        """One problem: equally likely lengths, first digits 1 … 9, and at each sum operators, then operands."""
        chances = iter(torch.rand(2 * self.longest + 2, generator=generator).tolist())

        def pick(options: Sequence[Any]) -> Any:
            return options[int(next(chances) * len(options))]

        value = pick(range(1, 10))
        question, steps = str(value), []
        for _ in range(pick(range(self.shortest, self.longest + 1))):
            operator, operand = pick(pick(legal_sums(value, self.largest)))
            after = result(value, operator, operand)
            question += f"{operator}{operand}"
            steps.append(f"{value}{operator}{operand}={after}")
            value = after
        return Problem(f"{question}?", ";".join([*steps, f"{ANSWER}{value}"]))


def draw_problems(chains: Chains, count: int, side: Side, generator: torch.Generator) -> list[Problem]:
    """``count`` different problems of one side of the split, which the hash of the question decides.

    Raises:
        PlanError: so many different ones were not found in 20 draws each.
    """
    found: dict[str, Problem] = {}
    for _ in range(20 * count):
        if len(found) == count:
            break
        problem = chains.draw(generator)
        if held_out(problem.question, HELD_OUT) == (side == "test"):
            found.setdefault(problem.question, problem)
    if len(found) < count:
        raise PlanError(f"{chains!r} gave {len(found)} different problems of {count}: ask for fewer, or lengthen them")
    return list(found.values())


@functools.cache
def tokenizer() -> Any:
    """A Transformers tokenizer of one token a character; the end of a text is 0."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, mask_token=MASK, clean_up_tokenization_spaces=False
    )


def as_document(problem: Problem, *, solution_only: bool) -> Document:
    """A problem with its tokens: question, solution, end.

    Args:
        problem: to be encoded.
        solution_only: whether solution and end alone are targets, or the question too.
    """
    ids = tokenizer().get_vocab()
    question, text = len(problem.question), problem.question + problem.solution
    tokens = (*(ids[c] for c in text), ids[END])
    mask = tuple(i >= question or not solution_only for i in range(len(tokens)))
    return Document(text, tokens=tokens, loss_mask=mask)


def padded(documents: Sequence[Document], length: int | None = None) -> Batch:
    """Encoded documents as rows of one length, filled up on the right with their end token.

    Args:
        documents: one a row.
        length: of a row; None for that of the longest document.

    Returns:
        ``input_ids``, ``segment_ids`` [B, T], the filling being a segment of its own (1), and ``loss_mask`` [B, T],
        bool, False there.

    Raises:
        PlanError: a document is longer than a row.
    """
    longest = max(len(d.tokens) for d in documents)
    length = length or longest
    if longest > length:
        raise PlanError(f"a document has {longest} tokens and a row {length}: lengthen the rows")
    ids, segments, targets = [], [], []
    for document in documents:
        size = len(document.tokens)
        left = length - size
        ids.append([*document.tokens, *document.tokens[-1:] * left])
        segments.append([0] * size + [1] * left)
        targets.append([*(document.loss_mask or [True] * size), *[False] * left])
    return {
        "input_ids": torch.tensor(ids), "segment_ids": torch.tensor(segments), "loss_mask": torch.tensor(targets)
    }  # fmt: skip


@dataclass(frozen=True)
class WorkedSolutions:
    """Data slot: epochs of problems of the training side, drawn once for each stage and seed, one to a row.

    Args:
        chains: which problems.
        problems: how many.
        batch: of them in a batch.
        solution_only: whether the questions are no targets.
    """

    chains: Chains
    problems: int
    batch: int
    solution_only: bool = True

    def __call__(self, ctx: Ctx) -> EpochStream:
        """The stream of a stage: ``input_ids``, ``segment_ids`` and ``loss_mask`` [B, T]."""
        drawn = draw_problems(self.chains, self.problems, "train", ctx.once("problems"))
        rows = padded([as_document(p, solution_only=self.solution_only) for p in drawn])
        return EpochStream(rows, self.batch, ctx)
