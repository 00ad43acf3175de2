"""Sheet 3 on the contract: a side network's residual on predicted noise, and a 1x1 critic trained in alternation."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from awkward import Drawn, Sgd, caught, end, moved, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss, softplus

from perturbed.core.optimiser import Optim
from perturbed.core.plan import Facts, Measure, Plan, Stage

KEPT = torch.cumprod(1 - torch.linspace(0.01, 0.4, 6), 0)  # share of the signal that is left at each timestep


def noised(x, t, noise):
    kept = KEPT[t].view(-1, 1, 1, 1)
    return kept.sqrt() * x + (1 - kept).sqrt() * noise


def with_time(z, t):
    return torch.cat([z, (t / len(KEPT)).view(-1, 1, 1, 1).expand_as(z)], 1)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, z, t):
        return self.body(with_time(z, t))


def draw(ctx):
    g = ctx.rng("data")
    bar = torch.zeros(4, 1, 8, 8)
    bar[torch.arange(4), :, torch.randint(8, (4,), generator=g)] = 1.0
    return {"x": bar, "t": torch.randint(len(KEPT), (4,), generator=g), "noise": torch.randn(bar.shape, generator=g)}


def build(ctx):
    return Denoiser()


def noise_loss(model, batch, ctx):
    return mse_loss(model(noised(batch["x"], batch["t"], batch["noise"]), batch["t"]), batch["noise"])


def predict_noise(model, batch, ctx):
    return model(batch["z"], batch["t"])


def sample(run):
    """DDIM without added noise, from the same start in every arm."""
    z = torch.randn(2, 1, 8, 8, generator=run.ctx.rng("sample", every="run"))
    for t in reversed(range(len(KEPT))):
        eps = run.predict({"z": z, "t": torch.full((2,), t)})
        clean = (z - (1 - KEPT[t]).sqrt() * eps) / KEPT[t].sqrt()
        before = KEPT[t - 1] if t else torch.tensor(1.0)
        z = before.sqrt() * clean + (1 - before).sqrt() * eps
    return z


PLAN = Plan(
    build=build,
    stages=(Stage(name="tune", steps=6, data=Drawn(draw), loss=noise_loss, optim=Sgd(0.05)),),
    predict=predict_noise,
    measures=(),
    facts=Facts(modality="diffusion", target="noise", output="noise", input="x"),
)


class WithSide(nn.Module):
    """The base's noise plus a residual that depends on the noisy input; the residual begins at 0."""

    def __init__(self, base, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.side = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 1))
        nn.init.zeros_(self.side[-1].weight), nn.init.zeros_(self.side[-1].bias)

    def forward(self, z, t):
        return self.base(z, t) + self.scale * self.side(with_time(z, t))


@dataclass(frozen=True)
class AddSide:
    scale: float

    def __call__(self, model, ctx):
        with ctx.streams.scope("apla/side", shared=True):  # its own initialisation, whoever else adds modules
            return WithSide(model, self.scale)


@dataclass(frozen=True)
class SideNetwork:
    """One weights slot: the loss and the prediction both call the model, so both get the residual."""

    scale: float = 1.0
    stage: str = "tune"
    SITES: ClassVar = ("weights",)

    def __call__(self, plan):
        return plan.add_weights(self.stage, AddSide(self.scale))


def build_critic():
    return nn.Sequential(nn.Conv2d(2, 8, 1), nn.SiLU(), nn.Conv2d(8, 1, 1))


def critic_optim(module):
    return Optim(torch.optim.SGD(module.parameters(), lr=0.1))


def critic_of(ctx):
    return ctx.net("apla/critic", build_critic, critic_optim)


class Recording(nn.Module):
    """A model that remembers its last output, for a loss around a loss that keeps its prediction to itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        self.output = self.model(*args)
        return self.output


@dataclass(frozen=True)
class FoolCritic:
    inner: Any
    weight: float

    def __call__(self, model, batch, ctx):
        seen = Recording(model)
        value = self.inner(seen, batch, ctx)
        critic = critic_of(ctx).module
        frozen = {name: p.detach() for name, p in critic.named_parameters()}  # no gradient to the critic here
        return (
            value + self.weight * softplus(-functional_call(critic, frozen, with_time(seen.output, batch["t"]))).mean()
        )


@dataclass(frozen=True)
class ThenTeachCritic:
    inner: Any

    def __call__(self, model, batch, loss, optim, ctx):
        value, critic, t = self.inner(model, batch, loss, optim, ctx), critic_of(ctx), batch["t"]
        assert all(p.grad is None for p in critic.module.parameters())
        with torch.no_grad():
            fake = model(noised(batch["x"], t, batch["noise"]), t)
        real, fake = (critic.module(with_time(e, t)) for e in (batch["noise"], fake))
        critic.step((softplus(-real) + softplus(fake)).mean(), ctx)
        assert all(p.grad is None for p in model.parameters())
        return value


@dataclass(frozen=True)
class Adversarial:
    weight: float = 0.1
    stage: str = "tune"
    SITES: ClassVar = ("objectives", "optim")

    def __call__(self, plan):
        return plan.edit(
            self.stage,
            lambda s: dataclasses.replace(s, loss=FoolCritic(s.loss, self.weight), update=ThenTeachCritic(s.update)),
        )


def critic_gap(run):
    """How much more real the true noise looks than the predicted: the network is there while measuring too."""
    batch = draw(run.ctx)
    z, t, critic = noised(batch["x"], batch["t"], batch["noise"]), batch["t"], critic_of(run.ctx).module
    gap = critic(with_time(batch["noise"], t)) - critic(with_time(run.predict({"z": z, "t": t}), t))
    return {"gap": gap.mean().item()}


def test_side_output_at_scale_0_samples_the_control_bit_for_bit():
    control, off, on = (caught(p, sample)[0] for p in (PLAN, *(treated(PLAN, SideNetwork(s)) for s in (0.0, 1.0))))
    assert torch.equal(off, control)
    assert not torch.equal(on, control)


def test_the_residual_is_in_the_loss_and_is_trained_from_zero():
    engine = ran(treated(PLAN, SideNetwork()))
    assert engine.run().curves["loss"][0] == ran(PLAN).run().curves["loss"][0]  # zero at the first step
    assert engine.run().curves["loss"][2] != ran(PLAN).run().curves["loss"][2]
    assert engine.snapshot("tune")["model"]["side.2.weight"].abs().max() > 0


def test_adversarial_weight_0_trains_the_critic_and_leaves_the_model_bit_for_bit():
    control, off, on = ran(PLAN), ran(treated(PLAN, Adversarial(0.0))), ran(treated(PLAN, Adversarial()))
    assert same(end(off)["model"], end(control)["model"])
    assert not same(end(on)["model"], end(control)["model"])
    one = ran(treated(PLAN, Adversarial(0.0)).edit("tune", lambda s: dataclasses.replace(s, steps=1)))
    first, last = (e.snapshot("tune")["nets"]["apla/critic"]["module"] for e in (one, off))
    assert moved(first, last) == {"0", "2"}


def test_both_repeat_and_resume_and_the_critic_can_be_measured(tmp_path):
    plan = treated(PLAN, SideNetwork(), Adversarial()).add_measures(Measure("gap", critic_gap))
    engine = repeats_and_resumes(plan, tmp_path, "tune", at=3)
    fresh = caught(plan.edit("tune", lambda s: dataclasses.replace(s, steps=1)), critic_gap)[0]
    assert engine.run().scores["gap"] != fresh["gap"]
