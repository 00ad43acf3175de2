"""Small plans and interventions for the tests of the core; importable, so that child processes get the same keys."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perturbed.core.context import Ctx
from perturbed.core.optimiser import Optim
from perturbed.core.plan import Batch, Facts, Feature, Measure, Plan, Stage


class PointStream:
    """Points of two classes (sign of the sum of the first three coordinates), drawn anew at each step."""

    def __init__(self, ctx: Ctx, batch: int):
        self.ctx, self.batch = ctx, batch

    def __next__(self) -> Batch:
        x = torch.randn(self.batch, 6, generator=self.ctx.rng("data"))
        return {"x": x, "labels": (x[:, :3].sum(1) > 0).long()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass(frozen=True)
class Points:
    batch: int = 8

    def __call__(self, ctx: Ctx) -> PointStream:
        return PointStream(ctx, self.batch)


class EpochStream:
    """A fixed set seen in a new order each epoch: a stream with a state that a resume must put back."""

    def __init__(self, ctx: Ctx, batch: int, size: int):
        x = torch.randn(size, 6, generator=ctx.streams.once("set", every="run"))
        self.data = {"x": x, "labels": (x[:, :3].sum(1) > 0).long()}
        self.ctx, self.batch, self.size, self.at, self.epoch = ctx, batch, size, 0, 0
        self._shuffle()

    def _shuffle(self) -> None:
        self.order = torch.randperm(self.size, generator=self.ctx.streams.once(f"epoch {self.epoch}"))

    def __next__(self) -> Batch:
        if self.at + self.batch > self.size:
            self.at, self.epoch = 0, self.epoch + 1
            self._shuffle()
        rows = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        return {k: v[rows] for k, v in self.data.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.epoch = state["at"], state["epoch"]
        self._shuffle()


@dataclass(frozen=True)
class Epochs:
    batch: int = 8
    size: int = 40

    def __call__(self, ctx: Ctx) -> EpochStream:
        return EpochStream(ctx, self.batch, self.size)


class Classifier(nn.Module):
    """BatchNorm and dropout, so that every kind of hidden state and draw is there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.first(x)))))


def build(ctx: Ctx) -> nn.Module:
    return Classifier()


def loss(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return cross_entropy(model(batch["x"]), batch["labels"])


def nan_from_step_three(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return loss(model, batch, ctx) * (float("nan") if ctx.step >= 3 else 1.0)


def adam(model: nn.Module, ctx: Ctx) -> Optim:
    return Optim(torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False), decay, clip=1.0)


def decay(step: int, steps: int) -> float:
    return 1 - step / (steps + 1)


def adam_kept(model: nn.Module, ctx: Ctx) -> Optim:
    """Goes on with the moments of the snapshot begun from."""
    optim = adam(model, ctx)
    if ctx.optim is not None:
        optim.load_state_dict(ctx.optim)
    return optim


def predict(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return model(batch["x"])


def accuracy(run: Any) -> dict[str, float]:
    x = torch.randn(64, 6, generator=run.ctx.rng("eval", every="run"))
    right = run.predict({"x": x}).argmax(1) == (x[:, :3].sum(1) > 0).long()
    return {"accuracy": right.float().mean().item()}


def noisy(run: Any) -> dict[str, float]:
    """Draws from torch's default generator and from a stream."""
    return {"noisy": torch.rand(()).item() + torch.rand((), generator=run.ctx.rng("noisy")).item()}


FACTS = Facts(modality="vision", target="class", classes=2, input="x")


def plan(**fields: Any) -> Plan:
    """Two stages, a measure of each kind."""
    stages = (
        Stage(name="pretrain", steps=6, data=Points(), loss=loss, optim=adam),
        Stage(name="tune", steps=4, data=Epochs(), loss=loss, optim=adam),
    )
    measures = (
        Measure("accuracy", accuracy), Measure("each", accuracy, when="stage"), Measure("curve", noisy, when=2),
    )  # fmt: skip
    made = Plan(build=build, stages=stages, predict=predict, measures=measures, facts=FACTS, name="toy")
    return made.replace(**fields)


def one_stage(steps: int = 6, **fields: Any) -> Plan:
    """One stage, whose fields may be given, and one measure at the end."""
    stage = Stage(**{"name": "train", "steps": steps, "data": Points(), "loss": loss, "optim": adam, **fields})
    return plan(stages=(stage,), measures=(Measure("accuracy", accuracy),))


def tiny_llama(ctx: Ctx) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attention_dropout=0.1, use_cache=False, attn_implementation="sdpa",
        tie_word_embeddings=True,
    ))  # fmt: skip


class TokenStream(PointStream):
    def __next__(self) -> Batch:
        return {"input_ids": torch.randint(32, (self.batch, 12), generator=self.ctx.rng("data"))}


@dataclass(frozen=True)
class Tokens:
    batch: int = 4

    def __call__(self, ctx: Ctx) -> TokenStream:
        return TokenStream(ctx, self.batch)


def token_loss(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def token_logits(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return model(input_ids=batch["input_ids"]).logits


def token_score(run: Any) -> dict[str, float]:
    ids = torch.randint(32, (4, 12), generator=run.ctx.rng("eval", every="run"))
    return {"logit": run.predict({"input_ids": ids}).mean().item()}


def llama_plan(steps: int = 4) -> Plan:
    stage = Stage(name="pretrain", steps=steps, data=Tokens(), loss=token_loss, optim=adam)
    facts = Facts(modality="language", target="next-token", classes=32, input="input_ids")
    return Plan(
        build=tiny_llama, stages=(stage,), predict=token_logits, measures=(Measure("logit", token_score),), facts=facts
    )


# ---- interventions -------------------------------------------------------------------------------------------------


def fidget_inputs(batch: Batch, ctx: Ctx) -> Batch:
    torch.rand(7)
    torch.rand(3, generator=ctx.rng("fidget/inputs"))
    return batch


def fidget_feature(h: Tensor, ctx: Ctx) -> Tensor:
    return h + 0 * torch.rand(h.shape, generator=ctx.rng("fidget/feature"))


def fidget_weights(model: nn.Module, ctx: Ctx) -> nn.Module:
    torch.rand(11)
    torch.rand(5, generator=ctx.rng("fidget/weights"))
    return model


@dataclass(frozen=True)
class FidgetLoss:
    inner: Any

    def __call__(self, model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
        torch.rand(2, generator=ctx.rng("fidget/loss"))
        return self.inner(model, batch, ctx)


@dataclass(frozen=True)
class Fidget:
    """Draws in every room and changes nothing: no other draw may move."""

    stage: str = "*"
    where: str = "*norm"
    SITES: ClassVar = ("inputs", "features", "weights", "objectives")

    def __call__(self, plan: Plan) -> Plan:
        plan = plan.add_inputs(self.stage, fidget_inputs).add_weights(self.stage, fidget_weights)
        plan = plan.add_feature(self.stage, Feature(self.where, fidget_feature))
        return plan.edit(self.stage, lambda s: dataclasses.replace(s, loss=FidgetLoss(s.loss)))


@dataclass(frozen=True)
class Scale:
    """inputs · ``factor``, by a named field; ``REQUIRES`` the fact ``input``."""

    factor: float = 2.0
    stage: str = "*"
    SITES: ClassVar = ("inputs",)
    REQUIRES: ClassVar = {"input": ...}

    def __call__(self, plan: Plan) -> Plan:
        return plan.add_inputs(self.stage, ScaleInputs(self.factor))


@dataclass(frozen=True)
class ScaleInputs:
    factor: float

    def __call__(self, batch: Batch, ctx: Ctx) -> Batch:
        return {**batch, "x": batch["x"] * self.factor}


@dataclass(frozen=True)
class Shift:
    """inputs + ``by``."""

    by: float = 1.0
    stage: str = "*"
    SITES: ClassVar = ("inputs",)

    def __call__(self, plan: Plan) -> Plan:
        return plan.add_inputs(self.stage, ShiftInputs(self.by))


@dataclass(frozen=True)
class ShiftInputs:
    by: float

    def __call__(self, batch: Batch, ctx: Ctx) -> Batch:
        return {**batch, "x": batch["x"] + self.by}


# ---- a plan that uses everything a checkpoint must hold --------------------------------------------------------------


def tiny_net() -> nn.Module:
    return nn.Linear(6, 6)


def tiny_net_optim(module: nn.Module) -> Optim:
    return Optim(torch.optim.AdamW(module.parameters(), lr=1e-2, foreach=False))


def push(batch: Batch, ctx: Ctx) -> Batch:
    """An auxiliary network learns to raise the loss; its moves, a running count and an artifact are kept."""
    net = ctx.net("pusher", tiny_net, tiny_net_optim)
    moved = {**batch, "x": batch["x"] + 0.1 * torch.tanh(net.module(batch["x"]))}
    net.step(-ctx.loss(ctx.model, moved, ctx), ctx)
    ctx.model.zero_grad()
    ctx.state["seen"] = ctx.state.get("seen", 0) + len(batch["x"])
    ctx.artifacts["mean"] = 0.9 * ctx.artifacts.get("mean", torch.zeros(6)) + 0.1 * batch["x"].mean(0)
    x = (batch["x"] + 0.1 * torch.tanh(net.module(batch["x"])) + ctx.artifacts["mean"]).detach()
    return {**batch, "x": x + 0.001 * ctx.state["seen"]}


def feature_noise(h: Tensor, ctx: Ctx) -> Tensor:
    return h + 0.1 * torch.randn(h.shape, generator=ctx.rng("feature noise"))


@dataclass
class SlowStream:
    inner: Any
    seconds: float

    def __next__(self) -> Batch:
        time.sleep(self.seconds)
        return next(self.inner)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


@dataclass(frozen=True)
class Slow:
    """A data slot whose every batch takes ``seconds``, so that a test can kill the run at a chosen step."""

    inner: Any
    seconds: float

    def __call__(self, ctx: Ctx) -> SlowStream:
        return SlowStream(self.inner(ctx), self.seconds)

    def fingerprint(self) -> str:
        return repr(self.inner)  # the wait changes no bit


def rich(seconds: float = 0.0, steps: int = 20) -> Plan:
    """Snapshots, state, artifacts, an auxiliary network, a stateful stream and feature noise."""
    first = Stage(
        name="first", steps=steps, data=Slow(Epochs(), seconds), loss=loss, optim=adam, inputs=push,
        features=(Feature("norm", feature_noise),), snapshots=(3, 11),
    )  # fmt: skip
    second = Stage(
        name="second", steps=steps, data=Slow(Points(), seconds), loss=distil, optim=adam_kept, reads=("first@3",),
        inputs=push,
    )  # fmt: skip
    return plan(stages=(first, second), measures=(Measure("accuracy", accuracy), Measure("curve", accuracy, when=5)))


def distil(model: nn.Module, batch: Batch, ctx: Ctx) -> Tensor:
    return loss(model, batch, ctx) + (model(batch["x"]) - ctx.past["first@3"](batch["x"])).square().mean()


class Crash(Exception):
    pass


@dataclass(frozen=True)
class CrashAt:
    """A data slot that raises when the run comes to step ``at`` of its stage, once ``armed`` names it."""

    inner: Any
    name: str
    armed: ClassVar[tuple[str, int] | None] = None

    def __call__(self, ctx: Ctx) -> Any:
        return CrashStream(self.inner(ctx), self.name, ctx)


class CrashStream(SlowStream):
    def __init__(self, inner: Any, name: str, ctx: Ctx):
        super().__init__(inner, 0.0)
        self.name, self.ctx = name, ctx

    def __next__(self) -> Batch:
        if CrashAt.armed == (self.name, self.ctx.step):
            raise Crash
        return next(self.inner)
