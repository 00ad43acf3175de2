"""Sharpness-aware minimisation: descend by the gradient found a little way up the hill."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.optimiser import Optim
from perturbed.core.plan import Batch, LossFn, Plan, Site, Stage, UpdateFn
from perturbed.errors import PlanError, nearest
from perturbed.inputs.adversarial import attacked

Direction = Literal["gradient", "random"]


def ascent(directions: Iterable[Tensor], rho: float) -> list[Tensor]:
    """``rho * d / ||d||`` with the norm over all tensors together (Foret et al. 2021, eq. 2 with p = 2).

    Returns:
        One displacement a tensor, of norm ``rho`` in all; zeros where the directions are zero.
    """
    directions = list(directions)
    norm = math.sqrt(sum(float(d.double().square().sum()) for d in directions))
    return [d * (rho / norm if norm else 0.0) for d in directions]


@dataclass
class Displaced:
    """An optimiser that puts the weights back before it steps, so that only the gradient is that of elsewhere."""

    inner: Optim
    weights: list[Tensor]
    before: list[Tensor]

    def step(self) -> None:
        """Restore the weights and take the inner optimiser's update."""
        with torch.no_grad():
            for weight, kept in zip(self.weights, self.before, strict=True):
                weight.copy_(kept)
        self.inner.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.inner.zero_grad()


@dataclass(frozen=True)
class SharpnessAware:
    """Take each step by the gradient at ``w + rho * g / ||g||``, where g is the gradient at w (Foret et al. 2021).

    Costs one more gradient pass a step. The loss sees the same dropout in both. Under data parallelism g is averaged
    over processes first; the paper's m-sharpness, where each process ascends by its own gradient, is not offered.

    Args:
        rho: length of the ascent, in the units of the weights.
        direction: ``gradient``, or ``random`` (normal, new each step, of the same length) as a sham.
        stage: glob of the stages to act in.
    """

    rho: float = 0.05
    direction: Direction = "gradient"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("optim",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"rho": 0.0}
    TINY: ClassVar = {"rho": 1e-5}
    STRONG: ClassVar = {"rho": 0.5}

    def __post_init__(self) -> None:
        if self.rho < 0:
            raise PlanError(f"SharpnessAware: rho={self.rho} must not be negative")
        if self.direction not in ("gradient", "random"):
            options = ("gradient", "random")
            raise PlanError(f"SharpnessAware: no direction {self.direction!r}: {nearest(self.direction, options)}")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the updates of its stages so taken."""
        return plan.edit(self.stage, self._aware)

    def _aware(self, stage: Stage) -> Stage:
        return dataclasses.replace(stage, update=DisplacedUpdate(stage.update, self.rho, self.direction, stage.name))


@dataclass(frozen=True)
class DisplacedUpdate:
    """Update slot: ``inner``, with its gradients taken where ``SharpnessAware`` says."""

    inner: UpdateFn
    rho: float
    direction: Direction
    stage: str

    def __call__(self, model: Module, batch: Batch, loss: LossFn, optim: Optim, ctx: Ctx) -> Tensor:
        """One update; returns the loss at the displaced weights."""
        if self.direction == "gradient":
            weights, directions = _gradients(model, batch, loss, optim, ctx)
        else:
            weights = [w for w in optim.parameters if w.requires_grad]
            rng = ctx.rng(f"random ascent {self.stage}")
            directions = [_normal(w, rng) for w in weights]
        before = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for weight, displacement in zip(weights, ascent(directions, self.rho), strict=True):
                weight += displacement
        return self.inner(model, batch, loss, Displaced(optim, weights, before), ctx)  # type: ignore[arg-type]


def _gradients(model: Module, batch: Batch, loss: LossFn, optim: Optim, ctx: Ctx) -> tuple[list[Tensor], list[Tensor]]:
    """The weights that the loss moves and its gradients there; buffers (running statistics) stay as they are."""
    with attacked(model, mode="train"):
        for micro, share in ctx.micro_batches(batch):
            ctx.backward(loss(model, micro, ctx) * share)
    weights: list[Tensor] = [w for w in optim.parameters if w.grad is not None]
    gradients = [w.grad for w in weights if w.grad is not None]
    optim.zero_grad()
    return weights, gradients


def _normal(like: Tensor, rng: Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng, dtype=like.dtype).to(like.device)
