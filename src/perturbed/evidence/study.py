"""What a study says before it runs: control plan, arms, the one contrast that decides, and what would count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from perturbed.core.plan import Intervention, Measure, Plan, apply
from perturbed.errors import PlanError, nearest

Direction = Literal["higher", "lower", "equal"]
Recipe = Callable[[], Plan]
Arms = Mapping[str, tuple[Intervention, ...]]


@dataclass(frozen=True)
class AtLeast:
    """A sanity gate: the control's mean of ``metric`` over seeds is at least ``value``."""

    metric: str
    value: float
    relation: ClassVar[str] = "at least"

    def __call__(self, mean: float) -> bool:
        """Whether ``mean`` passes."""
        return mean >= self.value


@dataclass(frozen=True)
class AtMost:
    """A sanity gate: the control's mean of ``metric`` over seeds is at most ``value``."""

    metric: str
    value: float
    relation: ClassVar[str] = "at most"

    def __call__(self, mean: float) -> bool:
        """Whether ``mean`` passes."""
        return mean <= self.value


@dataclass(frozen=True, kw_only=True)
class PaperScale:
    """The paper's own setting, which ``--scale paper --dry-run`` prices.

    Args:
        model: hub name or description of the model.
        data: hub name of the data set.
        params: parameters of the model.
        tokens: training tokens (or examples, for other modalities) of one run.
        passes: forward-and-backward passes per token, where a step needs several (attacks).
        precision: of the arithmetic.
        runs: training runs that the paper's comparison needs (arms times seeds).
    """

    model: str
    data: str
    params: float
    tokens: float
    passes: float = 1.0
    precision: str = "bf16"
    runs: int = 2

    def flops(self) -> float:
        """Operations of all runs: 6 per parameter, token and pass (Kaplan et al. 2020, section 2.1)."""
        return 6.0 * self.params * self.tokens * self.passes * self.runs

    def gpu_hours(self, peak: float = 989e12, utilisation: float = 0.4) -> float:
        """Hours on one GPU of ``peak`` operations a second (default: H100, dense bf16) at a usual utilisation."""
        return self.flops() / (peak * utilisation) / 3600


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A further question of a study: a weighted sum of arms' scores of one seed, judged against zero.

    A difference on another metric is ``{"masked": 1, "control": -1}``, an interaction ``{"both": 1, "one": -1,
    "other": -1, "control": 1}``. It is a look among others: Holm's correction counts it with the secondary arms.

    Args:
        weights: of the arms; they sum to 0, so that what all arms share cancels.
        asks: what is claimed, in one sentence.
        metric: whose scores are weighed; any that the plan's or the study's measures give.
        direction: of the claim.
        epsilon: smallest effect of interest, in units of the metric (of its logarithm with ``transform="log"``).
        unit: of the metric.
        transform: weigh scores as they are, or their logarithms.
    """

    weights: Mapping[str, float]
    asks: str
    metric: str
    direction: Direction
    epsilon: float | None = None
    unit: str = ""
    transform: Literal["raw", "log"] = "raw"

    def __post_init__(self) -> None:
        if not math.isclose(sum(self.weights.values()), 0, abs_tol=1e-12) or not any(self.weights.values()):
            raise PlanError(f"the weights of a contrast must sum to 0 and not all be 0: {dict(self.weights)}")
        if self.direction == "equal" and self.epsilon is None:
            raise PlanError("a contrast of direction 'equal' needs an epsilon: how large a difference is still equal")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A paper's claim made testable.

    Args:
        plan: the control: a frozen dataclass of sizes and data whose call gives the plan.
        arms: named tuples of interventions; an empty tuple repeats the control.
        primary: the arm that the claim is about; None where arms are compared on equal footing.
        reference: the arm it is compared with.
        sham: the arm that should show nothing if the claim's mechanism is what works.
        metric: the score that decides.
        unit: of the metric.
        direction: of the claim.
        epsilon: smallest effect of interest, in units of the metric (of its logarithm with ``transform="log"``).
        why_epsilon: one sentence.
        sanity: what the control must reach for the comparison to mean anything.
        transform: compare scores as they are, or their logarithms.
        bounds: floor and ceiling of the metric.
        budget: ``equal`` (tokens, examples and gradient passes of primary and reference) or ``reported``.
        scales: fields of ``plan`` by scale.
        full_arms: further arms of the ``full`` scale.
        references: the arm that a secondary arm is compared with, where that is not the control.
        contrasts: further questions, each on a metric of its own; one that weighs an arm of ``full`` is asked there.
        measures: added to the plan of every arm.
        seeds: how many.
        paper: the paper's setting.
    """

    plan: Recipe
    arms: Arms
    primary: str | None
    metric: str
    direction: Direction
    epsilon: float | None = None
    why_epsilon: str = ""
    sanity: AtLeast | AtMost | None = None
    reference: str = "control"
    sham: str | None = None
    unit: str = ""
    transform: Literal["raw", "log"] = "raw"
    bounds: tuple[float | None, float | None] = (None, None)
    budget: Literal["equal", "reported"] = "equal"
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))
    full_arms: Arms = field(default_factory=lambda: MappingProxyType({}))
    references: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    contrasts: Mapping[str, Contrast] = field(default_factory=lambda: MappingProxyType({}))
    measures: tuple[Measure, ...] = ()
    seeds: int = 8
    paper: PaperScale | None = None

    def __post_init__(self) -> None:
        known = ["control", *self.arms]
        for name in (self.primary, self.reference, self.sham):
            if name is not None and name not in known:
                raise PlanError(f"study names the arm {name!r}, which it does not have: {nearest(name, known)}")
        every = [*known, *self.full_arms]
        for name, contrast in self.contrasts.items():
            if name in every:
                raise PlanError(f"contrast {name!r} has the name of an arm: give it one of its own")
            for arm in contrast.weights:
                if arm not in every:
                    raise PlanError(
                        f"contrast {name!r} weighs the arm {arm!r}, which is not there: {nearest(arm, every)}"
                    )
        clash = [a for a in (*self.arms, *self.full_arms) if a == "control" or not a.replace("+", "_").isidentifier()]
        if clash:
            raise PlanError(f"arm name {clash[0]!r} must be an identifier and not 'control'")

    def metrics(self) -> tuple[str, ...]:
        """What every run must be measured by: for the verdict, the sanity gate and the contrasts."""
        asked = [
            self.metric,
            *([self.sanity.metric] if self.sanity else []),
            *(c.metric for c in self.contrasts.values()),
        ]
        return tuple(dict.fromkeys(asked))

    def at(self, scale: str) -> Study:
        """This study at a scale: plan fields set, and at ``full`` with all arms."""
        if scale not in ("smoke", "laptop", "full", "paper"):
            raise PlanError(f"no scale {scale!r}: {nearest(scale, ('smoke', 'laptop', 'full', 'paper'))}")
        fields = dict(self.scales.get(scale, {}))
        plan = dataclasses.replace(self.plan, **fields) if fields else self.plan  # type: ignore[type-var]
        arms = {**self.arms, **self.full_arms} if scale in ("full", "paper") else self.arms
        return dataclasses.replace(self, plan=plan, arms=arms)

    def plans(self) -> dict[str, Plan]:
        """The plan of every arm, the control first.

        Raises:
            PlanError: an intervention does not fit the plan.
        """
        control = self.plan()
        control = control.add_measures(*self.measures)
        return {"control": control, **{name: apply(control, arm) for name, arm in self.arms.items()}}
