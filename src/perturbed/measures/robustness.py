"""Accuracy under attack, with and without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from perturbed.core.run import Run
from perturbed.errors import PlanError
from perturbed.inputs.adversarial import Norm, pgd, square_search
from perturbed.measures.vision import correct, examples

Logits = Callable[[Tensor], Tensor]


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest wrong logit minus the right one [B]: above 0 exactly where the prediction is wrong (ties aside)."""
    right = labels.unsqueeze(-1)
    return (logits.scatter(-1, right, -torch.inf).amax(-1) - logits.gather(-1, right).squeeze(-1)).float()


def withstands_pgd(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    alpha: float,
    steps: int,
    restarts: int,
    rng: Generator,
    norm: Norm = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Whether each example is classified rightly as it is and after every restart of PGD on the cross-entropy.

    Args:
        logits: the classifier, of inputs [B, ...] in [B, K].
        x: inputs [B, ...] within ``bounds``.
        labels: classes [B].
        eps: radius of the ball.
        alpha: length of a step.
        steps: gradient steps of each restart.
        restarts: random starts; the worst counts.
        rng: CPU generator.
        norm: ``linf`` or ``l2``.
        bounds: lowest and highest legal value.
    """

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(logits(z), labels, reduction="sum")

    def keep(z: Tensor) -> Tensor:
        return margin(logits(z), labels)

    found = pgd(
        loss, x, eps=eps, alpha=alpha, steps=steps, rng=rng, norm=norm, bounds=bounds, restarts=restarts, keep=keep
    )
    with torch.no_grad():
        return correct(logits(x), labels) & correct(logits(found), labels)


@torch.no_grad()
def withstands_search(
    logits: Logits,
    x: Tensor,
    labels: Tensor,
    *,
    eps: float,
    queries: int,
    rng: Generator,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Whether each image [B, C, H, W] is classified rightly as it is and after a gradient-free search (l-infinity)."""

    def score(z: Tensor) -> Tensor:
        return margin(logits(z), labels)

    found = square_search(score, x, eps=eps, queries=queries, rng=rng, bounds=bounds)
    return correct(logits(x), labels) & correct(logits(found), labels)


@dataclass(frozen=True)
class Robustness:
    """Measure: accuracy under PGD and under gradient-free search, on the predictor as a whole.

    Gives ``accuracy_pgd`` (worst of the restarts), and with ``queries`` also ``accuracy_search`` and ``masked``, the
    share of examples that withstand PGD and fall to the search: well above 0, gradients are masked and PGD misleads.
    Each starting point is drawn once a seed, so that arms meet the same ones.

    Args:
        eps: radius of the l-infinity ball, in units of the input.
        alpha: length of a step of PGD.
        steps: steps of PGD.
        restarts: restarts of PGD.
        queries: evaluations that the search has; 0 leaves it out.
        fact: the plan's fact that gives the examples; a plan without it is not asked, unless it is ``held_out``.
        suffix: put after each name.
    """

    eps: float = 0.1
    alpha: float = 0.025
    steps: int = 20
    restarts: int = 3
    queries: int = 100
    fact: str = "held_out"
    suffix: str = ""

    def __call__(self, run: Run) -> dict[str, float]:
        """The shares, each in [0, 1]."""
        name, bounds = run.ctx.facts.input, run.ctx.facts.input_range
        if name is None or bounds is None:
            raise PlanError("Robustness wants the facts input and input_range: set them in the plan's facts")
        if self.fact != "held_out" and run.ctx.facts.get(self.fact) is None:
            return {}
        by_pgd, by_search = [], []
        for batch in examples(run, self.fact):
            labels, x = batch["labels"], batch[name]
            rest: dict[str, Any] = {k: v for k, v in batch.items() if k != name}

            def logits(z: Tensor, rest: dict[str, Any] = rest) -> Tensor:
                return run.predict({**rest, name: z})

            by_pgd.append(
                withstands_pgd(
                    logits, x, labels, eps=self.eps, alpha=self.alpha, steps=self.steps, restarts=self.restarts,
                    rng=run.ctx.rng("pgd start", every="run"), bounds=bounds,
                )
            )  # fmt: skip
            if self.queries:
                rng = run.ctx.rng("square search", every="run")
                by_search.append(
                    withstands_search(logits, x, labels, eps=self.eps, queries=self.queries, rng=rng, bounds=bounds)
                )
        pgd_holds = torch.cat(by_pgd)
        scores = {"accuracy_pgd": pgd_holds.float().mean().item()}
        if by_search:
            search_holds = torch.cat(by_search)
            scores["accuracy_search"] = search_holds.float().mean().item()
            scores["masked"] = (pgd_holds & ~search_holds).float().mean().item()
        return {f"{key}{self.suffix}": value for key, value in scores.items()}
