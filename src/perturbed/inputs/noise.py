"""Random noise on inputs: a distribution, a scale, and how often it is drawn anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from perturbed.core.context import Ctx
from perturbed.core.plan import Batch, Plan, Site
from perturbed.core.streams import Every
from perturbed.errors import PlanError, nearest


def uniform(like: Tensor, rng: Generator) -> Tensor:
    """Independent draws from U[-1, 1], shaped like ``like``."""
    return torch.rand(like.shape, generator=rng, dtype=like.dtype).mul_(2).sub_(1).to(like.device)


def normal(like: Tensor, rng: Generator) -> Tensor:
    """Independent standard normal draws, shaped like ``like``."""
    return torch.randn(like.shape, generator=rng, dtype=like.dtype).to(like.device)


DISTRIBUTIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {"uniform": uniform, "normal": normal}


def noisy(x: Tensor, scale: float, rng: Generator, *, distribution: str, bounds: tuple[float, float]) -> Tensor:
    """``x`` plus noise, clipped to the legal range.

    Args:
        x: inputs of any shape, within ``bounds``.
        scale: factor on a draw of unit size: the radius of ``uniform``, the standard deviation of ``normal``.
        rng: CPU generator.
        distribution: a name of ``DISTRIBUTIONS``.
        bounds: lowest and highest legal value.
    """
    return (x + scale * DISTRIBUTIONS[distribution](x, rng)).clamp(*bounds)


def continuous_input(batch: Batch, ctx: Ctx) -> tuple[str, Tensor, tuple[float, float]]:
    """Name, values and legal range of the batch's input, for what moves it a little; the plan states both facts.

    Raises:
        PlanError: the values are whole numbers, such as token ids, of which nothing is near.
    """
    name, bounds = ctx.facts.input, ctx.facts.input_range
    assert name is not None
    assert bounds is not None
    if not batch[name].is_floating_point():
        raise PlanError(
            f"the input {name!r} is {str(batch[name].dtype).removeprefix('torch.')}, but what moves it within a range "
            "wants floating-point numbers: convert it in the data, or change features or embeddings instead"
        )
    return name, batch[name], bounds


@dataclass(frozen=True)
class InputNoise:
    """Add random noise to the inputs while training, within their legal range.

    Args:
        scale: the radius of ``uniform`` noise, the standard deviation of ``normal`` noise; 0 is off.
        distribution: ``uniform`` or ``normal``.
        redraw: new noise each ``step``, or the same at each step of a ``stage`` or of the ``run``.
        stage: glob of the stages to act in.
    """

    scale: float = 0.1
    distribution: Literal["uniform", "normal"] = "uniform"
    redraw: Every = "step"
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("inputs",)
    REQUIRES: ClassVar = {"input": ..., "input_range": ...}
    OFF: ClassVar = {"scale": 0.0}
    TINY: ClassVar = {"scale": 1e-4}
    STRONG: ClassVar = {"scale": 1.0}

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise PlanError(f"InputNoise: scale={self.scale} must not be negative")
        if self.distribution not in DISTRIBUTIONS:
            known = nearest(self.distribution, DISTRIBUTIONS)
            raise PlanError(f"InputNoise: no distribution {self.distribution!r}: {known}")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with noise on the batches of its stages."""
        return plan.add_inputs(self.stage, self.perturb)

    def perturb(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch with noise on its input entry."""
        name, values, bounds = continuous_input(batch, ctx)
        rng = ctx.rng(f"input noise {self.stage}", every=self.redraw)
        return {**batch, name: noisy(values, self.scale, rng, distribution=self.distribution, bounds=bounds)}
