"""Short runs of a method's own plan, and what came of them, for the contract tests."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from perturbed.core.plan import Plan, Stage
from perturbed.core.registry import Method, cards, load
from perturbed.core.run import Engine
from perturbed.core.store import Store

STEPS = 5


@dataclass(frozen=True)
class Case:
    """One intervention of one method, with the micro-plan of its study."""

    slug: str
    name: str
    intervention: Any

    @property
    def label(self) -> str:
        return f"{self.slug}-{self.name}"

    def plan(self, steps: int = STEPS) -> Plan:
        return micro(load(self.slug).study.at("smoke").plan(), steps)

    def with_fields(self, setting: str) -> Any:
        return dataclasses.replace(self.intervention, **getattr(self.intervention, setting))


def methods() -> list[Method]:
    return [load(slug) for slug in cards()]


def cases() -> list[Case]:
    """Every distinct intervention class of every method, as its first arm uses it."""
    found: dict[tuple[str, str], Case] = {}
    for method in methods():
        for arm in (*method.study.arms.values(), *method.study.full_arms.values()):
            for intervention in arm:
                name = type(intervention).__name__
                found.setdefault((method.card.slug, name), Case(method.card.slug, name, intervention))
    return list(found.values())


def cut(stage: Stage, steps: int) -> Stage:
    length = min(stage.steps, steps)
    return dataclasses.replace(stage, steps=length, snapshots=tuple(s for s in stage.snapshots if s <= length))


def micro(plan: Plan, steps: int = STEPS) -> Plan:
    """The plan with every stage cut to a few steps and nothing measured."""
    return plan.replace(stages=tuple(cut(s, steps) for s in plan.stages), measures=())


@dataclass(frozen=True)
class Outcome:
    losses: list[tuple[int, float]]
    weights: dict[str, torch.Tensor]
    prediction: torch.Tensor

    def same(self, other: Outcome) -> bool:
        """Bit for bit, in every recorded loss and in the predictions."""
        return self.losses == other.losses and torch.equal(self.prediction, other.prediction)

    def distance(self, other: Outcome) -> float:
        return float((self.prediction - other.prediction).double().norm())


def outcome(plan: Plan, seed: int = 3, store: Store | None = None, checkpoint_s: float = 60.0) -> Outcome:
    """Train, and predict on the batch that follows."""
    engine = Engine(plan, seed, store or Store(None), checkpoint_s=checkpoint_s)
    result = engine.run()
    assert result.diverged is None, result.diverged
    last = plan.stages[-1]
    with engine.finished(last.name) as run, torch.no_grad():
        trained = next(s for s in reversed(plan.stages) if s.steps)
        run.ctx.stage, run.ctx.steps = trained.name, trained.steps
        prediction = run.predict(next(trained.data(run.ctx)))
    return Outcome(result.curves["loss"], dict(engine.snapshot(last.name)["model"]), prediction)
