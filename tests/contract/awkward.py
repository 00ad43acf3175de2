"""What the tests of the awkward sheets share: run a plan, look inside, kill it and go on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from perturbed.core.context import Ctx
from perturbed.core.keys import describe, digest
from perturbed.core.plan import Batch, Measure, Plan, apply, changed_sites
from perturbed.core.run import Engine, Run
from perturbed.core.store import Store

SAVED = ("model", "optim", "state", "artifacts", "nets", "curves")


def ran(plan: Plan, store: Store | None = None, **fields: Any) -> Engine:
    """The engine of a finished run with seed 0."""
    engine = Engine(plan, 0, store or Store(None), **fields)
    engine.run()
    return engine


def end(engine: Engine, ref: str | None = None) -> dict[str, Any]:
    """Everything a snapshot holds but its cost."""
    tree = engine.snapshot(ref or engine.plan.stages[-1].name)
    return {k: tree[k] for k in SAVED}


def same(a: Any, b: Any) -> bool:
    """Bit equality of two trees."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """First parts of the names of the tensors that differ."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def treated(plan: Plan, *interventions: Any) -> Plan:
    """The plan with interventions applied; each changes the sites that it declares and no other."""
    for intervention in interventions:
        changed = apply(plan, [intervention])
        touched = changed_sites(plan, changed)
        inserted = len(changed.stages) > len(plan.stages)
        assert touched == set(intervention.SITES) or (inserted and touched < set(intervention.SITES))
        plan = changed
    return plan


@dataclass(frozen=True)
class Catch:
    """A measure that hands the test what ``fn`` read off the run."""

    fn: Any
    caught: list[Any] = field(default_factory=list)

    def __call__(self, run: Run) -> dict[str, float]:
        with torch.no_grad():
            self.caught.append(self.fn(run))
        return {"caught": 0.0}

    def fingerprint(self) -> str:
        return "catch"


def caught(plan: Plan, fn: Any, when: Any = "end") -> list[Any]:
    """What ``fn`` read off the run each time that it was measured."""
    catch = Catch(fn)
    ran(plan.replace(measures=(Measure("catch", catch, when=when),)))
    return catch.caught


class Killed(Exception):
    """Stands for a kill in the midst of training."""


@dataclass(frozen=True)
class Mortal:
    """A data slot whose stream dies at a step; it notes the steps that it lived to see."""

    inner: Any
    at: int | None
    steps: list[int] = field(default_factory=list)

    def __call__(self, ctx: Ctx) -> Any:
        return MortalStream(self.inner(ctx), ctx, self)

    def fingerprint(self) -> str:
        return digest(describe(self.inner))


@dataclass
class MortalStream:
    inner: Any
    ctx: Ctx
    life: Mortal

    def __next__(self) -> Batch:
        if self.ctx.step == self.life.at:
            raise Killed
        self.life.steps.append(self.ctx.step)
        return next(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def repeats_and_resumes(plan: Plan, tmp_path: Any, stage: str, at: int) -> Engine:
    """Run twice, and once more killed before step ``at`` of ``stage``: three times the same bits."""
    before = torch.random.get_rng_state()
    whole = ran(plan)
    assert not any(key.startswith("unkeyed") for key in whole.all_keys().values())
    assert same(end(whole), end(ran(plan)))
    assert torch.equal(before, torch.random.get_rng_state())

    def mortal(at: int | None) -> tuple[Plan, Mortal]:
        life = Mortal(plan.stage(stage).data, at)
        return plan.edit(stage, lambda s: dataclasses.replace(s, data=life)), life

    try:
        ran(mortal(at)[0], Store(tmp_path), checkpoint_s=0.0)
    except Killed:
        second, life = mortal(None)
        resumed = ran(second, Store(tmp_path))
        assert life.steps[0] == at, "it began anew in place of going on"
        assert same(end(resumed), end(whole))
        assert all(same(end(resumed, s.name), end(whole, s.name)) for s in plan.stages)
        return whole
    raise AssertionError(f"stage {stage!r} never came to step {at}")


class FromRng:
    """A stream without a state of its own: ``draw(ctx)`` makes a batch from the streams of the step."""

    def __init__(self, draw: Any, ctx: Ctx):
        self.draw, self.ctx = draw, ctx

    def __next__(self) -> Batch:
        return self.draw(self.ctx)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Drawn:
    """The data slot of ``FromRng``."""

    draw: Any

    def __call__(self, ctx: Ctx) -> FromRng:
        return FromRng(self.draw, ctx)


@dataclass(frozen=True)
class Sgd:
    """Plain SGD on every parameter whose name begins with one of ``only``."""

    lr: float = 0.1
    momentum: float = 0.0
    only: tuple[str, ...] = ("",)

    def __call__(self, model: nn.Module, ctx: Ctx) -> Any:
        from perturbed.core.optimiser import Optim

        chosen = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(self.only)]
        return Optim(torch.optim.SGD(chosen, lr=self.lr, momentum=self.momentum))
