"""Sheet 22 on the contract: offline then online actor-critic without resets, in a world that lives in ``ctx.state``."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from awkward import Drawn, end, moved, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.nn.functional import mse_loss, relu

from perturbed.core.optimiser import Optim
from perturbed.core.plan import Facts, Measure, Plan, Stage, one_step

LIMIT, GAMMA, HALF, RING = 6, 0.9, 8, 64
MOVED: dict[str, set[str]] = {}

# ---- a point on a line segment of the plane: go right, then back, for ever ------------------------------------------


def new_world():
    return {"pos": torch.zeros(2), "forward": True, "age": 0, "switches": 0}


def observe(world):
    return torch.cat([world["pos"], torch.tensor([1.0 if world["forward"] else -1.0])])


def act(world, action):
    """The next world, the reward and whether the return ends (success); the limit only switches the instruction."""
    pos = (world["pos"] + 0.3 * action).clamp(-1, 1)
    success = bool(pos[0] > 0.6) if world["forward"] else bool(pos[0] < -0.6)
    switch = success or world["age"] + 1 == LIMIT
    forward = world["forward"] != switch
    moved_on = {"pos": pos, "forward": forward, "age": 0 if switch else world["age"] + 1}
    return {**moved_on, "switches": world["switches"] + switch}, float(success), success


def transition(world, action):
    """One row of data (the next observation keeps the old instruction) and the next world."""
    after, reward, success = act(world, action)
    seen = torch.cat([after["pos"], observe(world)[2:]])
    return after, {
        "obs": observe(world), "action": action, "reward": torch.tensor(reward), "next": seen,
        "alive": torch.tensor(1.0 - success), "returns": torch.tensor(0.0),
    }  # fmt: skip


def logged(ctx, steps=40):
    """What a scripted, noisy hand did, with its return-to-go."""
    g, world, rows = ctx.streams.once("logged", every="run"), new_world(), []
    for _ in range(steps):
        toward = torch.tensor([1.0 if world["forward"] else -1.0, 0.0])
        world, row = transition(world, (toward + 0.5 * torch.randn(2, generator=g)).clamp(-1, 1))
        rows.append(row)
    follow = 0.0
    for row in reversed(rows):
        follow = row["reward"] + GAMMA * row["alive"] * follow
        row["returns"] = follow
    return {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}


def offline_rows(ctx):
    data = logged(ctx)
    rows = torch.randint(len(data["obs"]), (HALF,), generator=ctx.rng("offline rows"))
    return {k: v[rows] for k, v in data.items()}


def online_rows(ctx):
    """Act once in the world, remember it, and mix remembered with logged rows half and half."""
    state, agent = ctx.state, ctx.model
    world = state.get("world") or new_world()
    with torch.no_grad():
        action = agent.sample(observe(world)[None], ctx.rng("explore"))[0][0]
    state["world"], row = transition(world, action)
    ring = state.setdefault("replay", {k: torch.zeros(RING, *v.shape) for k, v in row.items()})
    seen = state["seen"] = state.get("seen", 0) + 1
    for k, v in row.items():
        ring[k][(seen - 1) % RING] = v
    rows = torch.randint(min(seen, RING), (HALF,), generator=ctx.rng("replay rows"))
    return {k: torch.cat([v, ring[k][rows]]) for k, v in offline_rows(ctx).items()}


# ---- the agent -----------------------------------------------------------------------------------------------------


class Agent(nn.Module):
    """Encoder, Gaussian-tanh actor, twin critics, and a slow copy for the targets."""

    def __init__(self):
        super().__init__()
        self.encoder, self.actor = nn.Linear(3, 16), nn.Linear(16, 4)
        self.critics = nn.ModuleList(nn.Sequential(nn.Linear(18, 16), nn.ReLU(), nn.Linear(16, 1)) for _ in range(2))
        self.target = copy.deepcopy(nn.ModuleList([self.encoder, *self.critics])).requires_grad_(False)

    def q(self, obs, action, slow=False):
        encoder, *critics = self.target if slow else (self.encoder, *self.critics)
        joint = torch.cat([relu(encoder(obs)), action], -1)
        return torch.stack([critic(joint)[..., 0] for critic in critics])

    def sample(self, obs, generator):
        mean, log_std = self.actor(relu(self.encoder(obs))).chunk(2, -1)
        z = torch.randn(mean.shape, generator=generator)
        action = torch.tanh(mean + log_std.clamp(-3, 1).exp() * z)
        density = -z.square() / 2 - log_std.clamp(-3, 1) - math.log(2 * math.pi) / 2 - (1 - action**2 + 1e-6).log()
        return action, density.sum(-1)

    def slow(self, tau):
        live = nn.ModuleList([self.encoder, *self.critics])
        for old, new in zip(self.target.parameters(), live.parameters(), strict=True):
            old.lerp_(new, tau)


def build(ctx):
    return Agent()


def td_loss(model, batch, ctx):
    with torch.no_grad():
        action, _ = model.sample(batch["next"], ctx.rng("backup"))
        best = model.q(batch["next"], action, slow=True).min(0).values
        goal = batch["reward"] + GAMMA * batch["alive"] * best
    return mse_loss(model.q(batch["obs"], batch["action"]), goal.expand(2, -1))


@dataclass(frozen=True)
class ActorCritic:
    """The critics (and encoder) on the stage's loss, then the actor, then the slow copy: one Adam, two steps."""

    alpha: float = 0.1
    tau: float = 0.05

    def __call__(self, model, batch, loss, optim, ctx):
        value = self.critic_step(model, batch, loss, optim, ctx)
        self.actor_step(model, batch, optim, ctx)
        with torch.no_grad():
            model.slow(self.tau)
        return value

    def critic_step(self, model, batch, loss, optim, ctx):
        return one_step(model, batch, loss, optim, ctx)

    def actor_step(self, model, batch, optim, ctx):
        action, density = model.sample(batch["obs"], ctx.rng("actor"))
        value = (self.alpha * density - model.q(batch["obs"], action).min(0).values).mean()
        actor = list(model.actor.parameters())  # alone: neither the encoder nor the critics follow the actor
        for p, g in zip(actor, torch.autograd.grad(value, actor), strict=True):
            p.grad = g
        optim.step()
        optim.zero_grad()


def adam(model, ctx):
    """Moments go on from the stage before; a parameter without a gradient is left alone."""
    optim = Optim(torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-2, foreach=False))
    if ctx.optim is not None:
        optim.load_state_dict(ctx.optim)
    return optim


def predict(model, batch, ctx):
    return model.sample(batch["obs"], ctx.rng("act"))[0]


def success(run):
    """Share of switches that were successes in a world of the measure's own."""
    world, won = new_world(), 0.0
    with torch.no_grad():
        for _ in range(12):
            world, reward, _ = act(world, run.predict({"obs": observe(world)[None]})[0])
            won += reward
    return {"success": won / max(1, world["switches"])}


PLAN = Plan(
    build=build,
    stages=(
        Stage(name="offline", steps=5, data=Drawn(offline_rows), loss=td_loss, optim=adam, update=ActorCritic()),
        Stage(name="online", steps=9, data=Drawn(online_rows), loss=td_loss, optim=adam, update=ActorCritic()),
    ),
    predict=predict,
    measures=(Measure("success", success, when="stage"), Measure("curve", success, when=3)),
    facts=Facts(modality="control", target="action", output="action"),
)

# ---- the intervention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conservative:
    """+ w · (logsumexp of Q over sampled actions - Q of the data); policy samples no lower than G if calibrated."""

    inner: Any
    w: float
    calibrated: bool

    def __call__(self, model, batch, ctx):
        g, obs, n = ctx.rng("calql/samples"), batch["obs"], 3
        value = self.inner(model, batch, ctx)
        uniform = torch.rand(n, len(obs), 2, generator=g) * 2 - 1
        many = obs.expand(n, -1, -1)
        drawn = [(model.q(many, uniform) - 2 * math.log(0.5))]
        for start in (obs, batch["next"]):
            with torch.no_grad():
                action, density = model.sample(start.expand(n, -1, -1), g)
            q = model.q(many, action)
            drawn.append((torch.maximum(q, batch["returns"]) if self.calibrated else q) - density)
        gap = torch.logsumexp(torch.cat(drawn, 1), 1) - model.q(obs, batch["action"])
        return value + self.w * gap.mean()


@dataclass(frozen=True)
class CalQL:
    w: float = 1.0
    calibrated: bool = True
    stage: str = "*"
    SITES: ClassVar = ("objectives",)

    def __call__(self, plan):
        return plan.edit(
            self.stage, lambda s: dataclasses.replace(s, loss=Conservative(s.loss, self.w, self.calibrated))
        )


def bottomless(batch, ctx):
    return {**batch, "returns": torch.full_like(batch["returns"], -math.inf)}


def test_weight_0_is_the_run_without_the_term_bit_for_bit():
    control, off, on = ran(PLAN), ran(treated(PLAN, CalQL(0.0))), ran(treated(PLAN, CalQL()))
    assert same(end(off), end(control))
    assert not same(end(on)["model"], end(control)["model"])


def test_without_a_floor_calibration_is_plain_cql():
    cql, cal = treated(PLAN, CalQL(calibrated=False)), treated(PLAN, CalQL())
    assert same(end(ran(cal.add_inputs("*", bottomless))), end(ran(cql)))
    assert not same(end(ran(cal))["model"], end(ran(cql))["model"])


def test_killed_online_it_goes_on_in_the_same_world(tmp_path):
    engine = repeats_and_resumes(treated(PLAN, CalQL()), tmp_path, "online", at=5)
    state = engine.snapshot("online")["state"]
    assert state["seen"] == 9
    assert state["world"]["switches"] >= 1
    assert set(state["replay"]["obs"][:9, 2].tolist()) == {1.0, -1.0}  # both instructions were followed
    assert engine.snapshot("offline")["state"] == {}


@dataclass(frozen=True)
class Watched(ActorCritic):
    """Notes whose weights each half of the step moves."""

    def critic_step(self, model, *rest):
        before = copy.deepcopy(model.state_dict())
        value = super().critic_step(model, *rest)
        MOVED["critic"] = MOVED.get("critic", set()) | moved(before, model.state_dict())
        return value

    def actor_step(self, model, *rest):
        before = copy.deepcopy(model.state_dict())
        super().actor_step(model, *rest)
        MOVED["actor"] = MOVED.get("actor", set()) | moved(before, model.state_dict())


@pytest.mark.parametrize("arm", [(), (CalQL(),)])
def test_the_encoder_learns_from_the_critics_alone(arm):
    MOVED.clear()
    ran(treated(PLAN, *arm).edit("*", lambda s: dataclasses.replace(s, update=Watched())))
    assert {"critic": {"encoder", "critics"}, "actor": {"actor"}} == MOVED
