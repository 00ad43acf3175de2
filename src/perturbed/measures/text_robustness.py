"""Text classifiers under word substitution, and how far their token states share one direction."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.errors import PlanError, nearest
from perturbed.features.components import principal_directions, zero_padding
from perturbed.inputs.text_attack import Attacked, Substitutes, Words, substitute_words, swaps
from perturbed.measures.robustness import margin

Encode = Callable[[Sequence[Words]], Batch]
By = Literal["substitutes", "swaps"]


def mean_cosine(states: Tensor, real: Tensor) -> Tensor:
    """Mean cosine between two different real tokens of each text [B]: 0 for spread-out directions, 1 for a common one.

    Args:
        states: token states [B, T, D].
        real: which tokens are not padding [B, T]; at least two of each text.
    """
    units = zero_padding(torch.nn.functional.normalize(states.double(), dim=-1), real)
    number = real.sum(1).double()
    pairs = units.sum(1).pow(2).sum(-1) - units.pow(2).sum((1, 2))  # ordered pairs of different tokens
    cosines: Tensor = pairs / (number * (number - 1))
    return cosines


def first_share(states: Tensor, real: Tensor) -> Tensor:
    """Share of the squared length of each text's token states that lies along its first direction [B], in [1/T, 1]."""
    rows = zero_padding(states, real).double()
    share: Tensor = torch.linalg.eigvalsh(rows @ rows.mT)[:, -1] / rows.pow(2).sum((1, 2))
    return share


def mean_pooled(states: Tensor, real: Tensor) -> Tensor:
    """Mean [B, D] of the real tokens' states [B, T, D]."""
    return zero_padding(states, real).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def displacement_share(states: Tensor, real: Tensor, moved: Tensor, moved_real: Tensor) -> Tensor:
    """Share of the squared displacement of each text's mean state that lies along the text's first direction [B].

    Args:
        states: token states of the texts [B, T, D].
        real: which tokens are not padding [B, T].
        moved: token states of the altered texts [B, T', D].
        moved_real: which of those are not padding [B, T'].
    """
    shift = (mean_pooled(moved, moved_real) - mean_pooled(states, real)).double()
    along = (principal_directions(states, real, 1)[:, 0].double() * shift).sum(-1)
    return along.pow(2) / shift.pow(2).sum(-1)


def _fact(run: Run, name: str, what: str) -> Any:
    found = run.ctx.facts.get(name)
    if found is None:
        raise PlanError(f"a measure of text robustness wants the fact {name!r}: give the plan's facts {what}")
    return found


def _encode(run: Run) -> Encode:
    return _fact(run, "encode", "a function from texts as words to a batch")  # type: ignore[no-any-return]


def some_texts(run: Run, name: str, number: int) -> list[tuple[Words, int]]:
    """Held-out texts as words with their labels, drawn anew for each seed and the same in all of its arms.

    Raises:
        PlanError: the plan states no fact ``texts``.
    """
    found: Sequence[tuple[Words, int]] = _fact(run, "texts", "a function that gives pairs of words and label")()
    order = torch.randperm(len(found), generator=run.ctx.once(f"{name} texts", every="run")).tolist()
    return [found[i] for i in order[:number]]


def attack(run: Run, words: Words, label: int, substitutes: Substitutes, share: float) -> Attacked:
    """``substitute_words`` on the run's whole predictor, with at most ``share`` of the words replaced (rounded up)."""
    encode = _encode(run)

    def score(tried: Sequence[Words]) -> Tensor:
        return margin(run.predict(encode(tried)).cpu(), torch.full((len(tried),), label))

    return substitute_words(words, score, substitutes, most=math.ceil(share * len(words)))


@torch.no_grad()
def pooled_states(run: Run, texts: Sequence[Words], where: str) -> tuple[Tensor, Tensor]:
    """What the module of a glob gives for texts, after any feature of the plan [B, T, D], and which tokens are real.

    Raises:
        PlanError: the glob does not match exactly one module.
    """
    names = dict(run.ctx.bare.named_modules())
    hit = [name for name in names if fnmatch.fnmatchcase(name, where)]
    if len(hit) != 1:
        raise PlanError(f"where={where!r} matches {len(hit)} modules, not one: {nearest(where, names)}")
    held: list[Tensor] = []

    def keep(module: object, args: object, output: Any) -> None:
        held.append((output if isinstance(output, Tensor) else output[0]).cpu())

    handle = names[hit[0]].register_forward_hook(keep)
    batch = _encode(run)(texts)
    try:
        run.predict(batch)
    finally:
        handle.remove()
    return held[0], batch["attention_mask"] != 0


@dataclass(frozen=True)
class WordAttack:
    """Measure: accuracy when each text may be altered by a greedy word substitution that queries the whole predictor.

    Wants the facts ``texts`` (a function that gives texts as words, with labels), ``encode`` (from such texts to a
    batch) and ``substitutes`` (of a word). Gives ``accuracy_attacked``; ``accuracy_before`` on the same texts;
    ``attack_success``, the share of rightly classified texts that fall; ``queries`` and ``words_changed``, means over
    the texts that were attacked and over those that fell; with ``where`` also ``displacement_share``, over those that
    fell: the part of the mean state's squared displacement along the first direction of the text's states, both as they
    are pooled, after any feature of the plan.

    Args:
        texts: how many are attacked, drawn by the seed.
        share: most words to replace, as a share of the text's.
        by: ``substitutes`` takes the plan's fact of that name, ``swaps`` exchanges neighbouring letters.
        where: glob of the module whose output is the token states [B, T, D] that are pooled; empty for none.
        suffix: put after each name.
    """

    texts: int = 48
    share: float = 0.2
    by: By = "substitutes"
    where: str = ""
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.by not in get_args(By):
            raise PlanError(f"WordAttack: no by={self.by!r}: {nearest(self.by, get_args(By))}")
        if self.texts < 1 or not 0 <= self.share <= 1:
            raise PlanError(f"{self!r}: texts must be at least 1, and share in [0, 1]")

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares, each in [0, 1], and the counts; NaN where nothing was attacked or nothing fell."""
        chosen = some_texts(run, "attacked", self.texts)
        source = swaps if self.by == "swaps" else _fact(run, "substitutes", "a function of a word")
        found = [attack(run, words, label, source, self.share) for words, label in chosen]
        tried = [a for a in found if a.changed or not a.success]  # rightly classified before
        fell = [(words, a) for (words, _), a in zip(chosen, found, strict=True) if a.success and a.changed]
        scores = {
            "accuracy_attacked": 1 - sum(a.success for a in found) / len(found),
            "accuracy_before": len(tried) / len(found),
            "attack_success": _mean([float(a.success) for a in tried]),
            "queries": _mean([float(a.queries) for a in tried]),
            "words_changed": _mean([float(a.changed) for _, a in fell]),
        }
        if self.where:
            scores["displacement_share"] = self._along(run, fell)
        return {f"{name}{self.suffix}": value for name, value in scores.items()}

    def _along(self, run: Run, fell: list[tuple[Words, Attacked]]) -> float:
        if not fell:
            return math.nan
        before = pooled_states(run, [words for words, _ in fell], self.where)
        after = pooled_states(run, [a.words for _, a in fell], self.where)
        return float(displacement_share(*before, *after).mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class TokenGeometry:
    """Measure: how far the token states that are pooled share one direction, after any feature of the plan.

    Gives ``mean_cosine`` and ``first_share``. Wants the facts ``texts`` and ``encode``, as ``WordAttack`` does.

    Args:
        texts: how many are read, drawn by the seed.
        where: glob of the module whose output is the token states [B, T, D]; it must match exactly one.
    """

    texts: int = 48
    where: str = "*encoder"

    def __call__(self, run: Run) -> dict[str, float]:
        """The means over texts."""
        words = [w for w, _ in some_texts(run, "geometry", self.texts)]
        states, real = pooled_states(run, words, self.where)
        return {
            "mean_cosine": float(mean_cosine(states, real).mean()),
            "first_share": float(first_share(states, real).mean()),
        }
