"""Optim slots: which optimiser a stage uses, with what settings and schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.optimiser import Optim, Schedule, constant


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with momentum.

    Args:
        lr: learning rate, before the schedule.
        momentum: share of the last update that is kept; 0 for none.
        weight_decay: of every parameter, added to its gradient.
        clip: largest global gradient norm, or None.
        schedule: factor on ``lr`` at (step, steps).
    """

    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float | None = None
    schedule: Schedule = constant

    def __call__(self, model: Module, ctx: Ctx) -> Optim:
        """The optimiser of one stage, its momentum at zero."""
        # foreach and loop round alike but fused does not: one of them is pinned, so that a run resumes bit for bit
        optimizer = torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay, foreach=True
        )
        return Optim(optimizer, self.schedule, self.clip)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), of matrices only: no norm's gain, no bias.

    Args:
        lr: learning rate, before the schedule.
        betas: decay of the first and second moment.
        weight_decay: share of the rate by which a weight shrinks in a step.
        clip: largest global gradient norm, or None.
        schedule: factor on ``lr`` at (step, steps).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float | None = 1.0
    schedule: Schedule = constant

    def __call__(self, model: Module, ctx: Ctx) -> Optim:
        """The optimiser of one stage, its moments at zero."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        # fused rounds unlike foreach and the loop: one of them is pinned, so that a run resumes bit for bit
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr, betas=self.betas, fused=True)
        return Optim(optimizer, self.schedule, self.clip)
