"""Text classifiers under word substitution, and how far their token states share one direction."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbed.core.plan import Batch
from perturbed.core.run import Run
from perturbed.errors import PlanError, nearest
from perturbed.features.components import principal_directions, zero_padding
from perturbed.inputs.text_attack import Attacked, Substitutes, Words, substitute_words, swaps
from perturbed.measures.robustness import margin

Encode = Callable[[Sequence[Words]], Batch]


def mean_cosine(states: Tensor, real: Tensor) -> Tensor:
    """Mean cosine between two different real tokens of each text [B]: 0 for spread-out directions, 1 for a common one.

    Args:
        states: token states [B, T, D].
        real: which tokens are not padding [B, T]; at least two of each text.
    """
    units = zero_padding(torch.nn.functional.normalize(states.double(), dim=-1), real)
    number = real.sum(1).double()
    pairs: Tensor = units.sum(1).pow(2).sum(-1) - number  # every ordered pair, less each token with itself
    return pairs / (number * (number - 1))


def first_share(states: Tensor, real: Tensor) -> Tensor:
    """Share of the squared length of each text's token states that lies along its first direction [B], in [1/T, 1]."""
    rows = zero_padding(states, real).double()
    return torch.linalg.eigvalsh(rows @ rows.mT)[:, -1] / rows.pow(2).sum((1, 2))


def mean_pooled(states: Tensor, real: Tensor) -> Tensor:
    """Mean [B, D] of the real tokens' states [B, T, D]."""
    mask = real.unsqueeze(-1).to(states.dtype)
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1)


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


def _fact(run: Run, name: str, what: str) -> object:
    found = run.ctx.facts.get(name)
    if found is None:
        raise PlanError(f"a measure of text robustness wants the fact {name!r}: give the plan's facts {what}")
    return found


def texts(run: Run, name: str, number: int) -> list[tuple[Words, int]]:
    """Held-out texts as words with their labels, drawn anew for each seed and the same in all of its arms."""
    source: Callable[[], Sequence[tuple[Words, int]]] = _fact(run, "texts", "a function that gives (words, label)")  # type: ignore[assignment]
    found = source()
    order = torch.randperm(len(found), generator=run.ctx.once(f"{name} texts", every="run")).tolist()
    return [found[i] for i in order[:number]]


def attack(run: Run, words: Words, label: int, substitutes: Substitutes, share: float) -> Attacked:
    """``substitute_words`` on the run's whole predictor, with at most ``share`` of the words replaced (rounded up)."""
    encode: Encode = _fact(run, "encode", "a function from texts as words to a batch")  # type: ignore[assignment]

    def score(tried: Sequence[Words]) -> Tensor:
        logits = run.predict(encode(tried)).cpu()
        return margin(logits, torch.full((len(tried),), label))

    return substitute_words(words, score, substitutes, most=math.ceil(share * len(words)))


@dataclass(frozen=True)
class WordAttack:
    """Measure: accuracy when each text may be altered by a greedy word substitution that queries the whole predictor.

    Wants the facts ``texts`` (a function that gives texts as words, with labels), ``encode`` (from such texts to a
    batch) and ``substitutes`` (of a word). Gives ``accuracy_attacked``; ``attack_success``, the share of rightly
    classified texts that fall; ``accuracy_before`` on the same texts; ``queries`` and ``words_changed``, means over
    the texts that were attacked and over those that fell.

    Args:
        texts: how many are attacked, drawn by the seed.
        share: most words to replace, as a share of the text's.
        by: ``substitutes`` takes the plan's fact of that name, ``swaps`` exchanges neighbouring letters.
        suffix: put after each name.
    """

    texts: int = 48
    share: float = 0.2
    by: str = "substitutes"
    suffix: str = ""

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares, each in [0, 1], and the counts; NaN where nothing was attacked or nothing fell."""
        source: Substitutes = (
            swaps if self.by == "swaps" else _fact(run, "substitutes", "a function of a word")  # type: ignore[assignment]
        )
        chosen = texts(run, "attacked", self.texts)
        found = [attack(run, words, label, source, self.share) for words, label in chosen]
        tried = [a for a in found if a.changed or not a.success]  # rightly classified before
        fell = [a for a in tried if a.success]
        scores = {
            "accuracy_attacked": 1 - sum(a.success for a in found) / len(found),
            "accuracy_before": len(tried) / len(found),
            "attack_success": _mean([float(a.success) for a in tried]),
            "queries": _mean([float(a.queries) for a in tried]),
            "words_changed": _mean([float(a.changed) for a in fell]),
        }
        return {f"{name}{self.suffix}": value for name, value in scores.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class TokenGeometry:
    """Measure: how far the token states that are pooled share one direction, and how attacks move them.

    States are read where they are pooled, after any feature of the plan. Gives ``mean_cosine``, ``first_share`` and,
    for texts altered in ``share`` of their words at random by the plan's ``substitutes``, ``displacement_share``: the
    part of the mean state's squared displacement along the first direction.

    Args:
        texts: how many are read, drawn by the seed.
        share: words to replace, as a share of the text's.
        where: glob of the module whose output is the token states [B, T, D]; it must match exactly one.
    """

    texts: int = 48
    share: float = 0.2
    where: str = "*encoder"

    def __call__(self, run: Run) -> dict[str, float]:
        """The means over texts."""
        encode: Encode = _fact(run, "encode", "a function from texts as words to a batch")  # type: ignore[assignment]
        substitutes: Substitutes = _fact(run, "substitutes", "a function of a word")  # type: ignore[assignment]
        words = [w for w, _ in texts(run, "geometry", self.texts)]
        rng = run.ctx.once("geometry substitutions", every="run")
        altered = [altered_at_random(w, substitutes, math.ceil(self.share * len(w)), rng) for w in words]
        states, real = self._states(run, encode(words))
        moved, moved_real = self._states(run, encode(altered))
        changed = torch.tensor([a != b for a, b in zip(words, altered, strict=True)])
        shares = displacement_share(states, real, moved, moved_real)[changed]
        return {
            "mean_cosine": float(mean_cosine(states, real).mean()),
            "first_share": float(first_share(states, real).mean()),
            "displacement_share": float(shares.mean()),
        }

    @torch.no_grad()
    def _states(self, run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
        names = dict(run.ctx.bare.named_modules())
        hit = [name for name in names if fnmatch.fnmatchcase(name, self.where)]
        if len(hit) != 1:
            known = nearest(self.where, names)
            raise PlanError(f"TokenGeometry: where={self.where!r} matches {len(hit)} modules, not one: {known}")
        held: list[Tensor] = []

        def keep(module: object, args: object, output: object) -> None:
            first = output if isinstance(output, Tensor) else output[0]  # type: ignore[index]
            held.append(first.cpu())

        handle = names[hit[0]].register_forward_hook(keep)
        try:
            run.predict(batch)
        finally:
            handle.remove()
        return held[0], batch["attention_mask"] != 0


def altered_at_random(words: Words, substitutes: Substitutes, number: int, rng: torch.Generator) -> Words:
    """``words`` with up to ``number`` of them, drawn from those that have substitutes, put by their first one."""
    places = [i for i, word in enumerate(words) if substitutes(word)]
    chosen = {places[i] for i in torch.randperm(len(places), generator=rng)[:number].tolist()}
    return tuple(substitutes(word)[0] if i in chosen else word for i, word in enumerate(words))
