"""Sheet 48 on the contract: two sizes of language model in one plan; prediction adds one's tuning to the other."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from awkward import Drawn, Sgd, caught, end, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from perturbed.core.plan import Facts, Measure, Plan, Stage
from perturbed.errors import PlanError

VOCABULARY = 12


class TinyLM(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, width), nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids))[0])


@dataclass(frozen=True)
class Build:
    width: int

    def __call__(self, ctx):
        return TinyLM(self.width)


@dataclass(frozen=True)
class Counting:
    """Sequences that go up by ``stride``: pre-training counts by 1, tuning by 2."""

    stride: int

    def __call__(self, ctx):
        first = torch.randint(VOCABULARY, (4, 1), generator=ctx.rng("data"))
        return {"input_ids": (first + self.stride * torch.arange(8)) % VOCABULARY}


def next_token_loss(model, batch, ctx):
    ids = batch["input_ids"]
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def predict(model, batch, ctx):
    return log_softmax(model(batch["input_ids"]), -1)


def train(name, stride, **fields):
    return Stage(name=name, steps=4, data=Drawn(Counting(stride)), loss=next_token_loss, optim=Sgd(0.5), **fields)


PLAN = Plan(
    build=Build(8),
    stages=(train("small", 1), train("tuned", 2), train("large", 1, build=Build(16))),
    predict=predict,
    measures=(),
    facts=Facts(modality="language", target="next-token", output="log-probabilities", input="input_ids"),
)
ALIKE = PLAN.edit("large", lambda s: dataclasses.replace(s, build=None, start="small", steps=0))  # N = M


@dataclass(frozen=True)
class Emulated:
    inner: Any
    tuned: str
    base: str
    scale: float
    top_p: float

    def __call__(self, model, batch, ctx):
        large = self.inner(model, batch, ctx)
        tuned, base = (self.inner(ctx.past[ref], batch, ctx) for ref in (self.tuned, self.base))
        p, order = large.exp().sort(-1)  # rising: what is above 1 - top_p stays, all of it at top_p = 1
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, p.cumsum(-1) > 1 - self.top_p)
        mixed = large + self.scale * (tuned - base)
        return (mixed - mixed.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True) * self.on).masked_fill(~kept, -torch.inf)


@dataclass(frozen=True)
class EmulatedTuning:
    tuned: str = "tuned"
    base: str = "small"
    scale: float = 1.0
    top_p: float = 1.0
    SITES: ClassVar = ("inference",)

    def __call__(self, plan):
        for name in (self.tuned, self.base):
            plan.stage(name)  # a misspelt stage is told before anything is trained
        return plan.replace(predict=Emulated(plan.predict, self.tuned, self.base, self.scale, self.top_p))
