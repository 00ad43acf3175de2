"""Learning rates for fine-tuning, and leaving the pre-training out.

Every schedule here is a factor on the stage's own learning rate and multiplies the schedule that the stage has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch.nn import Module

from perturbed.core.context import Ctx
from perturbed.core.optimiser import Optim, Schedule
from perturbed.core.plan import OptimFn, Plan, Site
from perturbed.errors import PlanError, nearest


def slow_start_fast_decay(
    u: float,
    *,
    start: float = 0.01,
    u_peak: float = 0.4,
    power: float = 1.0,
    rise: Literal["linear", "cosine"] = "linear",
    decay: float = 6.0,
) -> float:
    """The learning rate at ``u`` of a stage, as a multiple of its peak (2012.13628, as a family).

    With w = u / u_peak, or (1 - cos(pi u / u_peak)) / 2 for the cosine rise::

        start + (1 - start) * w ** power                       while u < u_peak
        exp(-decay * (u - u_peak) / (1 - u_peak))              from then on

    Args:
        u: part of the stage that is done, in [0, 1).
        start: rate at the beginning, as a multiple of the peak.
        u_peak: where the peak is, in [0, 1).
        power: exponent of the rise; above 1 it is slower at first.
        rise: ``linear`` or ``cosine``.
        decay: e-foldings from the peak to the end.
    """
    if u < u_peak:
        w: float = u / u_peak if rise == "linear" else (1 - math.cos(math.pi * u / u_peak)) / 2
        return start + (1 - start) * math.pow(w, power)
    return math.exp(-decay * (u - u_peak) / (1 - u_peak))


def step_decay(u: float, milestones: tuple[float, ...], factor: float) -> float:
    """``factor`` to the power of how many ``milestones`` (parts of the stage) ``u`` has reached."""
    return math.pow(factor, sum(u >= m for m in milestones))


@dataclass(frozen=True)
class Scheduled:
    """Optim slot: that of ``inner`` with its schedule multiplied by ``factor``."""

    inner: OptimFn
    factor: Schedule

    def __call__(self, model: Module, ctx: Ctx) -> Optim:
        """The optimiser of one stage."""
        optim = self.inner(model, ctx)
        optim.schedule = _Product(optim.schedule, self.factor)
        return optim


@dataclass(frozen=True)
class _Product:
    one: Schedule
    two: Schedule

    def __call__(self, step: int, steps: int) -> float:
        return self.one(step, steps) * self.two(step, steps)


def _scheduled(plan: Plan, stage: str, factor: Callable[[int, int], float]) -> Plan:
    return plan.edit(stage, lambda s: dataclasses.replace(s, optim=Scheduled(s.optim, factor)))


@dataclass(frozen=True)
class SlowStartFastDecay:
    """Begin with a low rate, rise to a peak, fall fast: for fine-tuning whose first gradients would wreck the features.

    Args:
        peak: highest rate, as a multiple of the stage's own.
        start: rate at the first step, as a multiple of the peak.
        u_peak: part of the stage at which the peak is reached.
        power: exponent of the rise.
        rise: ``linear`` or ``cosine``.
        decay: e-foldings from the peak to the end of the stage; 0 stays at the peak.
        stage: glob of the stages to act in.
    """

    peak: float = 1.0
    start: float = 0.01
    u_peak: float = 0.4
    power: float = 1.0
    rise: Literal["linear", "cosine"] = "linear"
    decay: float = 6.0
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("optim",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"peak": 1.0, "start": 1.0, "decay": 0.0}
    TINY: ClassVar = {"peak": 1.0, "start": 0.999, "decay": 0.001}
    STRONG: ClassVar = {"peak": 2.0, "start": 0.01, "decay": 6.0}

    def __post_init__(self) -> None:
        _check_positive(self, "peak", self.peak)
        _check_positive(self, "power", self.power)
        if not 0 <= self.u_peak < 1 or self.start < 0:
            raise PlanError(f"{self!r}: u_peak must be in [0, 1) and start not negative")
        if self.rise not in ("linear", "cosine"):
            raise PlanError(f"SlowStartFastDecay: no rise {self.rise!r}: {nearest(self.rise, ('linear', 'cosine'))}")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the rates of its stages so multiplied."""
        return _scheduled(plan, self.stage, self.factor)

    def factor(self, step: int, steps: int) -> float:
        """The multiple of the stage's rate at ``step`` of ``steps``."""
        return self.peak * slow_start_fast_decay(
            step / steps, start=self.start, u_peak=self.u_peak, power=self.power, rise=self.rise, decay=self.decay
        )


@dataclass(frozen=True)
class StepDecay:
    """Cut the rate at given parts of the stage; without milestones it is constant.

    Args:
        peak: rate at the first step, as a multiple of the stage's own.
        milestones: parts of the stage, in [0, 1], at which the rate is cut.
        gamma: factor of each cut.
        stage: glob of the stages to act in.
    """

    peak: float = 1.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    stage: str = "*"

    SITES: ClassVar[tuple[Site, ...]] = ("optim",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = {"peak": 1.0, "gamma": 1.0}
    TINY: ClassVar = {"peak": 1.0001}
    STRONG: ClassVar = {"peak": 2.0}

    def __post_init__(self) -> None:
        _check_positive(self, "peak", self.peak)
        if self.gamma < 0 or not all(0 <= m <= 1 for m in self.milestones):
            raise PlanError(f"{self!r}: gamma must not be negative and milestones must be in [0, 1]")

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the rates of its stages so multiplied."""
        return _scheduled(plan, self.stage, self.factor)

    def factor(self, step: int, steps: int) -> float:
        """The multiple of the stage's rate at ``step`` of ``steps``."""
        return self.peak * step_decay(step / steps, self.milestones, self.gamma)


def _check_positive(of: object, field: str, value: float) -> None:
    if value <= 0:
        raise PlanError(f"{type(of).__name__}: {field}={value} must be above 0")


@dataclass(frozen=True)
class FromScratch:
    """Train one stage from the initial weights and drop all others: what fine-tuning is compared with.

    Args:
        times: the stage's new length, as a multiple of its old one.
        stage: name of the stage that is kept.
    """

    times: float = 1.0
    stage: str = "finetune"

    SITES: ClassVar[tuple[Site, ...]] = ("optim",)
    REQUIRES: ClassVar[dict[str, object]] = {}
    OFF: ClassVar = None  # at times=1 it is the identity of a plan of one stage only
    STRONG: ClassVar = {"times": 2.0}

    def __post_init__(self) -> None:
        _check_positive(self, "times", self.times)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with this one stage, begun from its initial weights."""
        kept = plan.stage(self.stage)
        return plan.replace(stages=(dataclasses.replace(kept, start=None, steps=round(self.times * kept.steps)),))
