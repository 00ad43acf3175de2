"""Sheet 63 on the contract: a real BERT that never computes on padding, and sequences dealt evenly to workers."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from awkward import Drawn, Sgd, caught, end, ran, repeats_and_resumes, treated
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from perturbed.core.plan import Facts, Plan, Stage

VOCABULARY, LONGEST, ROWS, PAD, MASK = 24, 12, 8, 0, 1


def build(ctx):
    from transformers import AttentionInterface, BertConfig, BertForMaskedLM

    AttentionInterface.register("by_sequence", by_sequence)
    return BertForMaskedLM(BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=LONGEST, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    ))  # fmt: skip


@dataclass(frozen=True)
class Sentences:
    shortest: int = 2

    def __call__(self, ctx):
        g = ctx.rng("data")
        length = torch.randint(self.shortest, LONGEST + 1, (ROWS, 1), generator=g)
        real = torch.arange(LONGEST) < length
        ids = torch.where(real, torch.randint(2, VOCABULARY, (ROWS, LONGEST), generator=g), PAD)
        hidden = real & (torch.rand(ids.shape, generator=g) < 0.3)
        hidden[:, 0] = True
        labels = torch.where(hidden, ids, -100)
        return {"input_ids": ids.masked_fill(hidden, MASK), "attention_mask": real.long(), "labels": labels}


def masked_loss(model, batch, ctx):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def predict(model, batch, ctx):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


PLAN = Plan(
    build=build,
    stages=(Stage(name="pretrain", steps=1, data=Drawn(Sentences()), loss=masked_loss, optim=Sgd(1.0)),),
    predict=predict,
    measures=(),
    facts=Facts(modality="language", target="masked", classes=VOCABULARY, input="input_ids"),
)

# ---- unpadded ------------------------------------------------------------------------------------------------------


def by_sequence(module, query, key, value, attention_mask, lengths, **kwargs):
    """Attention of each sequence of a packed row to itself alone."""
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([scaled_dot_product_attention(*part) for part in parts], 2).transpose(1, 2), None


class Packed(nn.Module):
    """The model on one row of all real tokens; its outputs go back to their places among the padding."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        row, place = attention_mask.nonzero(as_tuple=True)
        lengths = [n for n in attention_mask.sum(1).tolist() if n]
        config, usual = self.model.config, self.model.config._attn_implementation
        config._attn_implementation = "by_sequence"
        try:
            output = self.model(input_ids=input_ids[row, place][None], position_ids=place[None], lengths=lengths)
        finally:
            config._attn_implementation = usual
        padded = output.logits.new_zeros(*input_ids.shape, output.logits.shape[-1])
        output.logits = padded.index_put((row, place), output.logits[0])
        return output


@dataclass(frozen=True)
class PackedUpdate:
    inner: Any

    def __call__(self, model, batch, loss, optim, ctx):
        return self.inner(Packed(model), batch, loss, optim, ctx)


@dataclass(frozen=True)
class PackedPredict:
    inner: Any

    def __call__(self, model, batch, ctx):
        return self.inner(Packed(model), batch, ctx)


@dataclass(frozen=True)
class Unpad:
    stage: str = "*"
    SITES: ClassVar = ("optim", "inference")
    REQUIRES: ClassVar = {"modality": "language"}

    def __call__(self, plan):
        plan = plan.edit(self.stage, lambda s: dataclasses.replace(s, update=PackedUpdate(s.update)))
        return plan.replace(predict=PackedPredict(plan.predict))


# ---- workers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workers:
    """Simulated workers, each on its part of the batch; parts count by masked tokens (or, wrongly, all alike)."""

    world: int = 4
    globally: bool = True
    SITES: ClassVar = ("optim",)

    def __call__(self, plan):
        return plan.edit("*", lambda s: dataclasses.replace(s, update=Sharded(self.world, self.globally)))


@dataclass(frozen=True)
class Sharded:
    world: int
    globally: bool

    def __call__(self, model, batch, loss, optim, ctx):
        total, tokens = torch.zeros(()), []
        for part in zip(*(v.chunk(self.world) for v in batch.values()), strict=True):
            shard = dict(zip(batch, part, strict=True))
            share = (shard["labels"] >= 0).sum() / (batch["labels"] >= 0).sum() if self.globally else 1 / self.world
            value = loss(model, shard, ctx) * share
            ctx.backward(value)
            total += value.detach()
            tokens.append(int(shard["attention_mask"].sum()))
        optim.step()
        optim.zero_grad()
        ctx.state["straggler"] = ctx.state.get("straggler", 0.0) + max(tokens) * self.world / sum(tokens)
        return total


@dataclass(frozen=True)
class Dealt:
    """The batch in the order of workers: sorted by length and dealt like cards."""

    world: int

    def __call__(self, batch, ctx):
        by_length = batch["attention_mask"].sum(1).argsort(descending=True, stable=True)
        return {k: v[by_length.view(-1, self.world).T.flatten()] for k, v in batch.items()}


@dataclass(frozen=True)
class Deal:
    world: int = 4
    SITES: ClassVar = ("inputs",)

    def __call__(self, plan):
        return plan.add_inputs("*", Dealt(self.world))


def gradient(plan):
    """One step of SGD at rate 1 moves the weights by the gradient."""
    return end(ran(plan))


def assert_close(arm, control, atol=1e-5):
    assert arm["curves"]["loss"][0][1] == pytest.approx(control["curves"]["loss"][0][1], abs=atol)
    for name, after in control["model"].items():
        torch.testing.assert_close(arm["model"][name], after, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def farthest(arm, control):
    return max((arm["model"][k] - v).abs().max().item() for k, v in control["model"].items())


@pytest.mark.parametrize("shortest", [2, LONGEST])
def test_packed_is_padded(shortest):
    plan = PLAN.edit("*", lambda s: dataclasses.replace(s, data=Drawn(Sentences(shortest))))
    assert_close(gradient(treated(plan, Unpad())), gradient(plan))


def test_packed_predicts_as_padded_with_less_work():
    packed = treated(PLAN, Unpad())
    real = Sentences()
    one, two = (caught(p, lambda run: (b := real(run.ctx), run.predict(b)))[0] for p in (packed, PLAN))
    seen = two[0]["attention_mask"].bool()
    torch.testing.assert_close(one[1][seen], two[1][seen], rtol=0, atol=1e-5)
    assert not one[1][~seen].any()
    assert ran(packed).run().cost.flops < ran(PLAN).run().cost.flops
    assert ran(packed).run().cost.tokens == ran(PLAN).run().cost.tokens  # real tokens, padded or not


def borderless(module, query, key, value, attention_mask, lengths, bordered=by_sequence, **kwargs):
    return bordered(module, query, key, value, attention_mask, [sum(lengths)])


def test_tokens_that_see_other_sequences_would_be_told(monkeypatch):
    """The bound of 1e-5 is no empty one: without the borders the gradient is far away."""

    right = gradient(PLAN)
    assert farthest(gradient(treated(PLAN, Unpad())), right) < 1e-5
    monkeypatch.setattr(sys.modules[__name__], "by_sequence", borderless)
    assert farthest(gradient(treated(PLAN, Unpad())), right) > 1e-4


@dataclass(frozen=True)
class Emptied:
    """The first sequence is nothing but padding."""

    inner: Any

    def __call__(self, ctx):
        batch = self.inner(ctx)
        for name, value in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
            batch[name][0] = value
        return batch


def without_first(batch, ctx):
    return {k: v[1:] for k, v in batch.items()}


def test_an_empty_row_changes_nothing():
    plan = PLAN.edit("*", lambda s: dataclasses.replace(s, data=Drawn(Emptied(s.data.draw))))
    shorter = plan.add_inputs("*", without_first)
    assert_close(gradient(treated(plan, Unpad())), gradient(treated(shorter, Unpad())))


def test_dealing_permutes_the_global_batch_and_keeps_its_gradient():
    alone, dealt = gradient(PLAN), gradient(treated(PLAN, Unpad(), Deal(), Workers()))
    batch = Sentences()(_Drawing())
    again = Dealt(4)(batch, None)
    assert sorted(map(tuple, again["input_ids"].tolist())) == sorted(map(tuple, batch["input_ids"].tolist()))
    assert not torch.equal(again["input_ids"], batch["input_ids"])
    assert_close(dealt, alone)
    means = gradient(treated(PLAN, Deal(), Workers(globally=False)))
    assert farthest(means, alone) > 1e-4


class _Drawing:
    def rng(self, name):
        return torch.Generator().manual_seed(0)


def test_dealt_workers_wait_less_and_all_of_it_resumes(tmp_path):
    longer = PLAN.edit("*", lambda s: dataclasses.replace(s, steps=4, optim=Sgd(0.1)))
    as_it_comes, dealt = treated(longer, Workers()), treated(longer, Deal(), Workers())
    waits = [end(ran(p))["state"]["straggler"] / 4 for p in (as_it_comes, dealt)]
    assert 1 <= waits[1] < waits[0]
    repeats_and_resumes(treated(longer, Deal(), Workers()), tmp_path, "pretrain", at=2)
