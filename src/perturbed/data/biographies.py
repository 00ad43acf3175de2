"""Made-up one-line biographies with a secret code each, to be inserted and later asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from perturbed.core.context import Ctx
from perturbed.core.plan import Plan, Site
from perturbed.data.insertion import Example, check_copies, insert_into, repeated
from perturbed.errors import PlanError, nearest

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "r", "s", "st", "t", "v", "z")
VOWELS = ("a", "e", "i", "o", "u", "ai", "ei", "ou")
CODAS = ("", "l", "m", "n", "r", "s", "th", "x")
TOWNS = ("burg", "by", "ford", "ham", "stad", "ton", "vik", "wick")
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGITS = 6
POPULATION = "biographies"
Codes = Literal["scored", "other"]


@dataclass(frozen=True)
class Biography:
    """One person.

    Args:
        prefix: the text up to the code.
        code: ``DIGITS`` digits.
        suffix: the text after it.
        decoys: other codes drawn in the same way, none equal to ``code``.
        other: one more, neither ``code`` nor a decoy.
    """

    prefix: str
    code: str
    suffix: str
    decoys: tuple[str, ...]
    other: str

    def text(self, codes: Codes = "scored") -> str:
        """The whole line, with the code or with the ``other`` one."""
        return self.prefix + (self.code if codes == "scored" else self.other) + self.suffix


def draw_biographies(count: int, candidates: int, generator: torch.Generator) -> list[Biography]:
    """``count`` people, all drawn in the same way: name, town, code, licence, and codes to compare with.

    Args:
        count: how many.
        candidates: codes of each person that are compared, the true one included.
        generator: of the draws.
    """

    def pick(options: tuple[str, ...] | str) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def word(syllables: int) -> str:
        return "".join(pick(ONSETS) + pick(VOWELS) + pick(CODAS) for _ in range(syllables)).capitalize()

    def person() -> Biography:
        name, town = f"{word(1)} {word(2)}", word(1) + pick(TOWNS)
        drawn: dict[int, None] = {}
        while len(drawn) <= candidates:
            drawn[int(torch.randint(10**DIGITS, (), generator=generator))] = None
        code, *decoys, other = (f"{number:0{DIGITS}d}" for number in drawn)
        licence = pick(LETTERS) + pick(LETTERS)
        return Biography(f"{name} of {town}, code ", code, f", licence {licence}.", tuple(decoys), other)

    return [person() for _ in range(count)]


@dataclass(frozen=True)
class Population:
    """The people of a seed, put at random into duplication levels; the same in every arm and stage.

    Args:
        people: how many at each level.
        levels: copies of each person's line.
        candidates: codes that are compared for each, the true one included.
    """

    people: tuple[int, ...]
    levels: tuple[int, ...]
    candidates: int

    def __post_init__(self) -> None:
        check_copies(self, self.people)
        check_copies(self, self.levels)
        if len(self.people) != len(self.levels):
            raise PlanError(f"{len(self.people)} group sizes for {len(self.levels)} levels: give one each")
        if not 2 <= self.candidates < 10**DIGITS:
            raise PlanError(f"candidates={self.candidates} must be at least 2 (the true code and another), below 10^6")

    def told(self) -> dict[str, Any]:
        """Who is drawn, as an artifact tells it to measures."""
        return {"people": list(self.people), "levels": list(self.levels), "candidates": self.candidates}

    def __call__(self, ctx: Ctx) -> tuple[list[Biography], list[int]]:
        """The people, and the group (index into ``levels``) of each."""
        generator = ctx.streams.once("biographies", every="run")
        drawn = draw_biographies(sum(self.people), self.candidates, generator)
        groups = torch.tensor([g for g, n in enumerate(self.people) for _ in range(n)])
        shuffled = groups[torch.randperm(len(groups), generator=generator)]
        return drawn, [int(g) for g in shuffled]


@dataclass(frozen=True)
class BiographyInsertions:
    """Insert made-up biographies, each as often as its randomly assigned level says.

    Args:
        people: how many at each level.
        levels: copies at each level, 0 for those that are only measured.
        candidates: codes that a measure of the same population compares.
        codes: ``scored`` inserts the codes that are measured, ``other`` the same lines with codes that are not.
        begin: share of the steps before the first insertion.
        end: share of the steps at the last one.
        stage: glob of the stages to act in.
    """

    people: tuple[int, ...] = (24, 24, 12, 6)
    levels: tuple[int, ...] = (0, 4, 16, 64)
    candidates: int = 100
    codes: Codes = "scored"
    begin: float = 0.0
    end: float = 1.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("data",)
    REQUIRES: ClassVar[dict[str, object]] = {"modality": "language", "tokenizer": ...}
    OFF: ClassVar = {"levels": (0, 0, 0, 0)}
    STRONG: ClassVar = {"people": (0, 0, 1, 0)}

    def __post_init__(self) -> None:
        if self.codes not in get_args(Codes):
            raise PlanError(f"BiographyInsertions: no codes {self.codes!r}: {nearest(self.codes, get_args(Codes))}")
        Population(self.people, self.levels, self.candidates)

    def __call__(self, plan: Plan) -> Plan:
        """The plan whose stages see the biographies."""
        return insert_into(plan, self.stage, self.examples, self.begin, self.end)

    def examples(self, ctx: Ctx) -> list[tuple[int, Example]]:
        """Every copy, as the person's index and tokens."""
        population = Population(self.people, self.levels, self.candidates)
        ctx.artifacts[POPULATION] = population.told()
        drawn, groups = population(ctx)
        return repeated(ctx, [b.text(self.codes) for b in drawn], [self.levels[g] for g in groups])
