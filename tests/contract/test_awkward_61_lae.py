"""Sheet 61 on the contract: three tasks, a head that grows, an adapter with a slow copy, the larger of two opinions."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from awkward import Drawn, Sgd, caught, end, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, gelu

from perturbed.core.plan import Facts, Plan, Stage

TASKS, EACH, STEPS = 3, 2, 6


class Net(nn.Module):
    """A frozen backbone, an adapter that begins as the identity, and one head a task."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(6, 16).requires_grad_(False)
        self.adapter = nn.Sequential(nn.Linear(16, 3), nn.GELU(), nn.Linear(3, 16))
        nn.init.zeros_(self.adapter[2].weight), nn.init.zeros_(self.adapter[2].bias)
        self.heads = nn.ModuleList()

    def forward(self, x):
        h = gelu(self.backbone(x))
        h = h + self.adapter(h)
        return torch.cat([head(h) for head in self.heads], 1)


def build(ctx):
    return Net()


def grow(model, ctx):
    model.heads.append(nn.Linear(16, EACH))
    return model


@dataclass(frozen=True)
class Task:
    """Noisy points around the centres of the task's classes."""

    number: int

    def __call__(self, ctx):
        g, centres = ctx.rng("data"), torch.randn(TASKS * EACH, 6, generator=ctx.streams.once("centres", every="run"))
        labels = self.number * EACH + torch.randint(EACH, (8,), generator=g)
        return {"x": centres[labels] + 0.3 * torch.randn(8, 6, generator=g), "labels": labels}


def loss(model, batch, ctx):
    return cross_entropy(model(batch["x"]), batch["labels"])


def predict(model, batch, ctx):
    return model(batch["x"]).softmax(-1)


def facts(number):
    seen = (number + 1) * EACH
    return Facts(
        modality="vision", target="class", output="probabilities", input="x", classes=seen,
        more={"task": (seen - EACH, seen)},
    )  # fmt: skip


def task(number):
    """The optimiser is new in each task; the backbone is frozen and old heads are simply offered no gradient."""
    return Stage(
        name=f"task-{number}", steps=STEPS, data=Drawn(Task(number)), loss=loss, optim=Sgd(0.2), weights=grow,
        facts=facts(number), snapshots=(0, STEPS // 2),
    )  # fmt: skip


SEQUENTIAL = Plan(
    build=build, stages=tuple(map(task, range(TASKS))), predict=predict, measures=(), facts=facts(TASKS - 1)
)

# ---- learning, accumulation, ensemble ------------------------------------------------------------------------------


def local_loss(model, batch, ctx):
    """Cross-entropy among the classes of the task in hand."""
    low, high = ctx.facts.get("task")
    return cross_entropy(model(batch["x"])[:, low:high], batch["labels"] - low)


@dataclass(frozen=True)
class LocalLoss:
    stage: str = "*"
    SITES: ClassVar = ("objectives",)

    def __call__(self, plan):
        return plan.edit(self.stage, lambda s: dataclasses.replace(s, loss=local_loss))


def after_the_first(plan, pattern, change):
    for stage in plan.matching(pattern)[1:]:
        plan = plan.edit(stage.name, change)
    return plan


@dataclass(frozen=True)
class HeadFirst:
    inner: Any
    share: float

    def __call__(self, model, batch, loss, optim, ctx):
        model.adapter.requires_grad_(ctx.step >= self.share * ctx.steps)
        value = self.inner(model, batch, loss, optim, ctx)
        model.adapter.requires_grad_(True)
        return value


@dataclass(frozen=True)
class Calibrate:
    """The adapter rests for the first ``share`` of every task but the first."""

    share: float = 0.5
    stage: str = "*"
    SITES: ClassVar = ("optim",)

    def __call__(self, plan):
        return after_the_first(
            plan, self.stage, lambda s: dataclasses.replace(s, update=HeadFirst(s.update, self.share))
        )


@dataclass(frozen=True)
class Accumulating:
    inner: Any
    decay: float

    def __call__(self, model, batch, loss, optim, ctx):
        online = {f"adapter.{name}": p.detach() for name, p in model.adapter.named_parameters()}
        offline = ctx.state.setdefault("lae/offline", {name: p.clone() for name, p in online.items()})
        value = self.inner(model, batch, loss, optim, ctx)
        for name, p in online.items():
            offline[name].lerp_(p, 1 - self.decay)
        return value


class Swapped(nn.Module):
    """A model called with other values of some parameters."""

    def __init__(self, model, values):
        super().__init__()
        self.model, self.values = model, values

    def forward(self, *args):
        return functional_call(self.model, self.values, args)


@dataclass(frozen=True)
class LargerOf:
    inner: Any

    def __call__(self, model, batch, ctx):
        offline = Swapped(model, ctx.state.get("lae/offline", {}))  # none yet in the first task
        return torch.maximum(self.inner(model, batch, ctx), self.inner(offline, batch, ctx))


@dataclass(frozen=True)
class AccumulateAndEnsemble:
    decay: float = 0.9
    stage: str = "*"
    SITES: ClassVar = ("optim", "inference")

    def __call__(self, plan):
        plan = after_the_first(
            plan, self.stage, lambda s: dataclasses.replace(s, update=Accumulating(s.update, self.decay))
        )
        return plan.replace(predict=LargerOf(plan.predict))


CONTROL = treated(SEQUENTIAL, LocalLoss())


def opinions(run):
    x = torch.cat([Task(k)(run.ctx)["x"] for k in range(TASKS)])
    return run.predict({"x": x})


def test_decay_0_is_the_control_exactly_and_another_decay_is_not():
    control, off, on = (
        caught(p, opinions, when="stage")
        for p in (CONTROL, *(treated(CONTROL, AccumulateAndEnsemble(d)) for d in (0.0, 0.9)))
    )
    assert [p.shape[1] for p in control] == [2, 4, 6]
    assert same(off, control)
    assert torch.equal(on[0], control[0])  # one opinion in the first task
    assert all((a >= b).all() and (a > b).any() for a, b in zip(on[1:], control[1:], strict=True))


def test_the_slow_copy_begins_after_task_0_and_is_the_moving_average():
    engine = ran(treated(CONTROL, AccumulateAndEnsemble(0.9)))
    assert same(end(engine)["model"], end(ran(CONTROL))["model"])  # nothing flows back
    assert end(engine, "task-0")["state"] == {}
    plan = treated(CONTROL, AccumulateAndEnsemble(0.9)).edit(
        "task-1", lambda s: dataclasses.replace(s, snapshots=tuple(range(STEPS)))
    )
    engine = ran(plan)
    slow = engine.snapshot("task-0")["model"]["adapter.0.weight"]
    for ref in (*(f"task-1@{k}" for k in range(1, STEPS)), "task-1"):
        slow = 0.9 * slow + 0.1 * engine.snapshot(ref)["model"]["adapter.0.weight"]
    torch.testing.assert_close(end(engine, "task-1")["state"]["lae/offline"]["adapter.0.weight"], slow)


def changed(engine, before, after):
    one, two = (engine.snapshot(ref)["model"] for ref in (before, after))
    return {name for name in one if name in two and not torch.equal(one[name], two[name])}


def test_the_local_loss_leaves_old_heads_and_the_full_one_does_not():
    old = {"heads.0.weight", "heads.0.bias"}
    assert not changed(ran(CONTROL), "task-0", "task-1") & old
    assert changed(ran(SEQUENTIAL), "task-0", "task-1") >= old


def test_the_adapter_rests_in_the_first_half_of_later_tasks():
    engine = ran(treated(CONTROL, Calibrate()))
    head = {"heads.1.weight", "heads.1.bias"}
    assert changed(engine, "task-1@0", "task-1@3") == head
    assert any(name.startswith("adapter") for name in changed(engine, "task-1@3", "task-1"))
    assert any(name.startswith("adapter") for name in changed(engine, "task-0@0", "task-0@3"))
    assert not any(name.startswith("backbone") for name in changed(engine, "task-0@0", "task-2"))
    assert same(end(ran(treated(CONTROL, Calibrate(0.0)))), end(ran(CONTROL)))


def test_all_of_it_repeats_and_resumes(tmp_path):
    repeats_and_resumes(treated(CONTROL, Calibrate(), AccumulateAndEnsemble()), tmp_path, "task-1", at=4)
