"""Sheet 48 on the contract: two sizes of language model in one plan; prediction adds one's tuning to the other."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from awkward import Drawn, Sgd, caught, ran, repeats_and_resumes, treated
from torch import nn
from torch.nn.functional import cross_entropy

from perturbed.core.plan import Facts, Plan, Stage
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
    return model(batch["input_ids"])


def train(name, stride, **fields):
    return Stage(name=name, steps=4, data=Drawn(Counting(stride)), loss=next_token_loss, optim=Sgd(0.5), **fields)


PLAN = Plan(
    build=Build(8),
    stages=(train("small", 1), train("tuned", 2), train("large", 1, build=Build(16))),
    predict=predict,
    measures=(),
    facts=Facts(modality="language", target="next-token", input="input_ids"),
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
        large, tuned, base = (self.inner(m, batch, ctx) for m in (model, ctx.past[self.tuned], ctx.past[self.base]))
        rising, order = large.softmax(-1).sort(-1)  # what is above 1 - top_p stays: all of it at top_p = 1
        kept = torch.zeros_like(large, dtype=torch.bool).scatter(-1, order, rising.cumsum(-1) > 1 - self.top_p)
        return (large + self.scale * (tuned - base)).masked_fill(~kept, -torch.inf)  # masked after combining


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


def logits(run):
    return run.predict(Counting(1)(run.ctx))


@dataclass(frozen=True)
class PastLogits:
    ref: str

    def __call__(self, run):
        return run.past[self.ref](Counting(1)(run.ctx)["input_ids"])


def sizes(run):
    return [sum(p.numel() for p in m.parameters()) for m in (run.model, run.past["tuned"], run.past["small"])]


def test_scale_0_is_the_large_base_bit_for_bit_and_scale_1_is_not():
    control, off, on = (caught(p, logits)[0] for p in (PLAN, *(treated(PLAN, EmulatedTuning(scale=s)) for s in (0, 1))))
    assert torch.equal(off, control)
    assert not torch.equal(on, control)
    large, tuned, small = caught(PLAN, sizes)[0]
    assert large > tuned == small


def test_with_both_of_one_size_it_is_the_tuned_model():
    emulated = caught(treated(ALIKE, EmulatedTuning()), logits)[0]
    tuned, base = (caught(ALIKE, PastLogits(ref))[0] for ref in ("tuned", "small"))
    torch.testing.assert_close(emulated.softmax(-1), tuned.softmax(-1), rtol=0, atol=1e-6)
    assert (tuned.softmax(-1) - base.softmax(-1)).abs().max() > 1e-3


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_the_nucleus_is_that_of_the_large_base(top_p):
    base = caught(PLAN, logits)[0].softmax(-1)
    mixed = caught(treated(PLAN, EmulatedTuning(scale=0.0, top_p=top_p)), logits)[0]
    for p, kept in zip(base.flatten(0, 1), mixed.isfinite().flatten(0, 1), strict=True):
        best_first = p.sort(descending=True).values
        smallest = next(k for k in range(1, VOCABULARY + 1) if best_first[:k].sum() >= top_p)
        assert kept.sum() == smallest
        assert p[kept].min() >= p[~kept].max()


def test_only_prediction_changes_and_the_arms_share_every_stage(tmp_path):
    plan = treated(PLAN, EmulatedTuning())
    assert ran(plan).run().weights == ran(PLAN).run().weights
    assert [ran(plan).key(s.name) for s in plan.stages] == [ran(PLAN).key(s.name) for s in PLAN.stages]
    repeats_and_resumes(plan, tmp_path, "large", at=2)
    with pytest.raises(PlanError, match="did you mean 'tuned'"):
        treated(PLAN, EmulatedTuning(tuned="tunde"))
