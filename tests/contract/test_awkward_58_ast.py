"""Sheet 58 on the contract: a stage whose model is images and a step size, matched to stored expert trajectories."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from awkward import Drawn, Sgd, end, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from perturbed.core.optimiser import Optim
from perturbed.core.plan import Facts, Measure, Plan, Stage

CLASSES, AHEAD, EPOCHS = 3, 2, 4
EXPERTS = ("expert-0", "expert-1")
TRAJECTORY = tuple(range(EPOCHS + 1))


def build_net(ctx):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    )


def real(generator, n):
    """Bars whose row is their class, with noise."""
    labels = torch.arange(n) % CLASSES
    pixels = 0.3 * torch.randn(n, 1, 6, 6, generator=generator)
    pixels[torch.arange(n), 0, 2 * labels] += 1.0
    return {"pixels": pixels, "labels": labels}


def real_batch(ctx):
    return real(ctx.rng("real"), 12)


def classify(model, batch, ctx):
    return cross_entropy(model(batch["pixels"]), batch["labels"])


class Synthetic(nn.Module):
    """What is learned: images of fixed labels and the step size of whoever trains on them."""

    def __init__(self, images, labels, step_size):
        super().__init__()
        self.images, self.step_size = nn.Parameter(images), nn.Parameter(torch.tensor(step_size))
        self.register_buffer("labels", labels)


def build_synthetic(ctx):
    first = real(ctx.rng("synthetic/init"), CLASSES)
    return Synthetic(first["pixels"], first["labels"], 0.05)


def draw_start(ctx):
    """Which expert, and the epoch at which the student begins."""
    g = ctx.rng("distil/start")
    return {
        "expert": torch.randint(len(EXPERTS), (1,), generator=g),
        "start": torch.randint(EPOCHS - AHEAD + 1, (1,), generator=g),
    }


def flat(model):
    return parameters_to_vector(model.parameters()).detach()


def trajectory(batch, ctx):
    """The expert's weights at the start and at each epoch to be met, as flat vectors in the batch."""
    expert, start = EXPERTS[batch["expert"]], int(batch["start"])
    points = [flat(ctx.past[f"{expert}@{start + i}"])[None] for i in range(AHEAD + 1)]
    return {**batch, "theta": points[0], "targets": torch.stack(points[1:], 1)}


def named(template, vector):
    """A flat vector as the parameters of ``template``, differentiably."""
    parts = vector.split([p.numel() for p in template.parameters()])
    return {n: part.view_as(p) for (n, p), part in zip(template.named_parameters(), parts, strict=True)}


@dataclass(frozen=True)
class Match:
    """Distance of the student after N unrolled momentum steps to the expert, in units of the expert's own way."""

    steps: int = 4
    momentum: float = 0.9
    balance: bool = False
    middle: float = 0.0

    def __call__(self, model, batch, ctx):
        theta, targets = batch["theta"][0], batch["targets"][0]
        template, begun, velocity = ctx.past[f"{EXPERTS[0]}@0"], theta, torch.zeros_like(theta)
        theta, value = theta.clone().requires_grad_(), torch.zeros(())
        for step in range(1, self.steps + 1):
            logits = functional_call(template, named(template, theta), model.images)
            inner = self.scale(int(batch["start"])) * cross_entropy(logits, model.labels)
            (grad,) = torch.autograd.grad(inner, theta, create_graph=True)
            velocity = self.momentum * velocity + grad
            theta = theta - model.step_size * velocity
            if self.middle and step < self.steps and step % (self.steps // len(targets)) == 0:
                value = value + self.middle * ratio(theta, begun, targets[step // (self.steps // len(targets)) - 1])
        return value + ratio(theta, begun, targets[-1])

    def scale(self, start):
        """The balance factor of the inner loss at a start epoch."""
        if not self.balance:
            return 1.0
        half = (EPOCHS - AHEAD + 1) / 2
        return math.log(start - half + 8, 5) if start >= half else 1 / math.log(half - start + 8, 5)


def ratio(theta, begun, target):
    return (theta - target).square().sum() / (begun - target).square().sum()


def two_rates(model, ctx):
    groups = [{"params": [model.images], "lr": 0.1}, {"params": [model.step_size], "lr": 1e-5}]
    return Optim(torch.optim.SGD(groups, lr=1.0, momentum=0.5))


def predict(model, batch, ctx):
    """The logits of a fresh net trained on the images: what a synthetic set predicts."""
    net = build_net(ctx)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(net.parameters(), lr=model.step_size.item(), momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            cross_entropy(net(model.images.detach()), model.labels).backward()
            optimizer.step()
    return net(batch["pixels"]).detach()


def accuracy(run):
    """Mean over fresh nets on test images of its own."""
    batch = real(run.ctx.rng("test", every="run"), 30)
    right = [(run.predict(batch).argmax(1) == batch["labels"]).float().mean().item() for _ in range(3)]
    return {"accuracy": sum(right) / len(right)}


def expert(name, **fields):
    made = Stage(
        name=name, steps=EPOCHS, data=Drawn(real_batch), loss=classify, optim=Sgd(0.05, 0.9), build=build_net,
        snapshots=TRAJECTORY,
    )  # fmt: skip
    return dataclasses.replace(made, **fields)


DISTIL = Stage(
    name="distil", steps=6, data=Drawn(draw_start), inputs=trajectory, loss=Match(), optim=two_rates,
    build=build_synthetic, reads=tuple(f"{e}@{k}" for e in EXPERTS for k in TRAJECTORY),
)  # fmt: skip
PLAN = Plan(
    build=build_net, stages=(*map(expert, EXPERTS), DISTIL), predict=predict,
    measures=(Measure("accuracy", accuracy),), facts=Facts(modality="vision", target="class", classes=CLASSES),
)  # fmt: skip


@dataclass(frozen=True)
class PerturbStart:
    """Convolution kernels of the start moved by alpha · (d / |d|) · w, for the loss and for its denominator."""

    alpha: float

    def __call__(self, batch, ctx):
        template, g = ctx.past[f"{EXPERTS[0]}@0"], ctx.rng("ast/start")
        parts = named(template, batch["theta"][0])
        for name, w in parts.items():
            if w.dim() == 4:
                d = torch.randn(w.shape, generator=g)
                parts[name] = w + self.alpha * (d / d.norm()) * w
        return {**batch, "theta": torch.cat([w.flatten() for w in parts.values()])[None]}


@dataclass(frozen=True)
class SteadyStudent:
    """AST's student: perturbed start, balanced inner loss, matches on the way."""

    alpha: float = 1.0
    balance: bool = True
    middle: float = 1.0
    stage: str = "distil"
    SITES: ClassVar = ("inputs", "objectives")

    def __call__(self, plan):
        plan = plan.add_inputs(self.stage, PerturbStart(self.alpha))
        change = {"balance": self.balance, "middle": self.middle}
        return plan.edit(self.stage, lambda s: dataclasses.replace(s, loss=dataclasses.replace(s.loss, **change)))


OFF = {"alpha": 0.0, "balance": False, "middle": 0.0}


def test_all_off_is_trajectory_matching_bit_for_bit():
    control = end(ran(PLAN))
    assert same(end(ran(treated(PLAN, SteadyStudent(**OFF)))), control)


@pytest.mark.parametrize("on", ["alpha", "balance", "middle"])
def test_each_switch_changes_the_images(on):
    arm = SteadyStudent(**{**OFF, on: getattr(SteadyStudent(), on)})
    assert not same(end(ran(treated(PLAN, arm)))["model"]["images"], end(ran(PLAN))["model"]["images"])


def test_images_and_step_size_learn_and_experts_differ_and_stay():
    engine = ran(PLAN)
    trained = engine.snapshot("distil")["model"]
    fresh = ran(PLAN.edit("distil", lambda s: dataclasses.replace(s, steps=0))).snapshot("distil")["model"]
    assert not torch.equal(trained["images"], fresh["images"])
    assert trained["step_size"] != fresh["step_size"]
    one, two = (engine.snapshot(f"{e}@0")["model"]["0.weight"] for e in EXPERTS)
    assert not torch.equal(one, two)
    assert not torch.equal(one, engine.snapshot("expert-0@1")["model"]["0.weight"])


def build_still(ctx):
    first = real(ctx.rng("synthetic/init"), CLASSES)
    return Synthetic(first["pixels"], first["labels"], 0.0)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_student_that_stands_still_loses_exactly_1_a_target(alpha):
    plan = treated(PLAN, SteadyStudent(alpha=alpha))
    plan = plan.edit("distil", lambda s: dataclasses.replace(s, build=build_still, steps=1))
    assert ran(plan).run().curves["loss"][-1][1] == AHEAD


def whole_set(ctx):
    return real(ctx.streams.once("whole set", every="run"), 12)


def build_whole_set(ctx):
    data = whole_set(ctx)
    return Synthetic(data["pixels"], data["labels"], 0.05)


def start_at_0(ctx):
    return {"expert": torch.zeros(1, dtype=torch.long), "start": torch.zeros(1, dtype=torch.long)}


def loss_on_the_real_set(**fields):
    """The first matching loss where the images are the experts' own data, their step size and number of steps."""
    plain = {"data": Drawn(whole_set), "optim": Sgd(0.05)}
    match = {
        "build": build_whole_set, "data": Drawn(start_at_0), "steps": 1,
        "loss": Match(**{"steps": AHEAD, "momentum": 0.0, "middle": 1.0, **fields}),
    }  # fmt: skip
    plan = PLAN.edit("expert-*", lambda s: dataclasses.replace(s, **plain))
    return ran(plan.edit("distil", lambda s: dataclasses.replace(s, **match))).run().curves["loss"][-1][1]


def test_on_the_experts_own_data_nothing_is_left_to_match():
    assert loss_on_the_real_set() < 1e-9
    assert loss_on_the_real_set(momentum=0.9) > 1e-3
    assert loss_on_the_real_set(steps=2 * AHEAD) > 1e-3


def test_the_gradient_to_the_images_is_of_second_order():
    """Against central differences of the loss in one pixel, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        template = build_net(None).double()
    theta = flat(template)
    targets = torch.stack([theta + 0.1 * torch.sin(torch.arange(len(theta)) * (k + 1.0)) for k in range(AHEAD)])
    batch = {"theta": theta[None], "targets": targets[None], "start": torch.zeros(1, dtype=torch.long)}
    ctx = type("Ctx", (), {"past": {"expert-0@0": template}})
    first = real(torch.Generator().manual_seed(0), CLASSES)

    def value(shift):
        images = first["pixels"].double().clone()
        images[0, 0, 2, 3] += shift
        model = Synthetic(images, first["labels"], 0.05).double()
        return model, Match()(model, batch, ctx)

    model, loss = value(0.0)
    loss.backward()
    slope = (value(1e-5)[1] - value(-1e-5)[1]).item() / 2e-5
    assert model.images.grad[0, 0, 2, 3].item() == pytest.approx(slope, rel=1e-5)
    assert abs(slope) > 1e-6


def test_it_repeats_and_resumes_and_fresh_nets_are_trained_on_the_images(tmp_path):
    engine = repeats_and_resumes(treated(PLAN, SteadyStudent()), tmp_path, "distil", at=3)
    assert 0 < engine.run().scores["accuracy"] <= 1
