"""Noise and dropout on input embeddings: what they draw, for which tokens, on real models, in training alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import own_models
import pytest
import torch
from torch import Tensor, nn
from vision_toys import ctx_of, move

from perturbed.core.context import FeatureHooks, ScopedLoss
from perturbed.core.plan import Facts, Feature, Plan, apply
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError
from perturbed.features.embeddings import (
    EmbeddingDropout,
    EmbeddingNoise,
    dropped_embeddings,
    input_embedding,
    noisy_embeddings,
    text_lengths,
)

WIDTH = 8
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 2, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(rows: int = 2, tokens: int = 5, width: int = WIDTH) -> Tensor:
    return torch.randn(rows, tokens, width, generator=rng(1))


# --- which tokens are a text -----------------------------------------------------------------------------------------


def test_lengths_are_those_of_segments_of_the_real_tokens_or_of_the_row() -> None:
    x = states()
    assert text_lengths({"segment_ids": SEGMENTS}, x).tolist() == [[3, 3, 3, 2, 2], [1, 1, 3, 3, 3]]
    assert text_lengths({"attention_mask": MASK}, x).tolist() == [[3, 3, 3, 0, 0], [0, 4, 4, 4, 4]]
    assert text_lengths({"attention_mask": MASK.bool()}, x).tolist() == [[3, 3, 3, 0, 0], [0, 4, 4, 4, 4]]
    whole = {"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool), "input_ids": MASK}
    assert text_lengths(whole, x).tolist() == [[5] * 5] * 2


def test_the_last_tokens_that_a_loss_leaves_out_do_not_count() -> None:
    assert text_lengths({"segment_ids": SEGMENTS}, states(tokens=4)).tolist() == [[3, 3, 3, 1], [1, 1, 2, 2]]
    assert text_lengths({"attention_mask": MASK}, states(tokens=4)).tolist() == [[3, 3, 3, 0], [0, 3, 3, 3]]


@pytest.mark.parametrize("shape", [(3, 5), (2, 6)])
def test_embeddings_of_other_rows_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=r"attention_mask is \[2, 5\].*once"):
        text_lengths({"attention_mask": MASK}, states(*shape))


# --- noise -----------------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """NEFTune one number at a time, from the same uniform draws."""
    draws, out = torch.rand(x.shape, generator=rng()), x.clone()
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for d in range(x.shape[2]):
                if lengths[b, t]:
                    u = 2 * draws[b, t, d].item() - 1
                    out[b, t, d] += u * alpha / math.sqrt(lengths[b, t].item() * x.shape[2])
    return out


@pytest.mark.parametrize("batch", [{"segment_ids": SEGMENTS}, {"attention_mask": MASK}, {}])
def test_noise_is_the_papers_formula_number_by_number(batch: dict[str, Tensor]) -> None:
    x = states()
    lengths = text_lengths(batch, x)
    found = noisy_embeddings(x, lengths, 5.0, rng())
    torch.testing.assert_close(found, by_hand(x, lengths, 5.0))
    if batch:  # the padded length in place of the real one would be another noise
        assert not torch.allclose(found, by_hand(x, torch.full_like(lengths, 5), 5.0), atol=1e-3)


def test_padding_gets_none_and_the_gradient_passes_unchanged() -> None:
    x = states().requires_grad_()
    found = noisy_embeddings(x, text_lengths({"attention_mask": MASK}, x), 5.0, rng())
    assert torch.equal(found[MASK == 0], x[MASK == 0])
    assert not torch.isclose(found[MASK == 1], x[MASK == 1]).all(-1).any()
    found.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(("tokens", "width"), [(4, 512), (64, 32), (256, 8)])
def test_the_noise_of_a_text_is_as_long_whatever_its_tokens_and_width(tokens: int, width: int) -> None:
    x = torch.zeros(50, tokens, width)
    found = noisy_embeddings(x, text_lengths({}, x), 5.0, rng())
    assert found.abs().max() <= 5 / math.sqrt(tokens * width)
    assert found.square().sum((1, 2)).mean().item() == pytest.approx(25 / 3, rel=0.02)  # E[u^2] = 1/3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_leaves_every_bit(dtype: torch.dtype) -> None:
    x = states().to(dtype)
    assert torch.equal(noisy_embeddings(x, text_lengths({}, x), 0.0, rng()), x)
    assert torch.equal(dropped_embeddings(x, 0.0, rng()), x)
    assert noisy_embeddings(x, text_lengths({}, x), 5.0, rng()).dtype == dtype
    assert dropped_embeddings(x, 0.5, rng()).dtype == dtype


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_takes_numbers_not_tokens_and_keeps_the_mean() -> None:
    x = torch.ones(40, 50, 16)
    found = dropped_embeddings(x, 0.25, rng())
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (found == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert found.mean().item() == pytest.approx(1.0, abs=0.01)
    tokens = (found == 0).double().mean(-1)  # of whole tokens this would be 0 or 1
    assert tokens.std().item() == pytest.approx(math.sqrt(0.25 * 0.75 / 16), rel=0.05)


def test_dropout_has_the_law_of_torchs_own() -> None:
    x = states(64, 32, 32)
    torchs = nn.functional.dropout(x, 0.3, training=True)
    ours = dropped_embeddings(x, 0.3, rng())
    for found in (torchs, ours):
        kept = found != 0
        torch.testing.assert_close(found[kept], (x / 0.7)[kept])
        assert kept.double().mean().item() == pytest.approx(0.7, abs=0.01)


# --- on models -------------------------------------------------------------------------------------------------------


def ids() -> Tensor:
    return torch.randint(1, own_models.WORDS, (3, 5), generator=rng(2))


@pytest.mark.parametrize("make", [own_models.llama, own_models.bert])
def test_a_model_reads_what_a_feature_makes_of_its_embeddings_and_nothing_stays(make: Any) -> None:
    model = make().eval()
    plain, table = model(input_ids=ids()).logits, input_embedding(model)
    noise = states(3, 5, 16)
    ctx = ctx_of(facts=Facts(modality="language", target="next-token"))
    with FeatureHooks(model, (Feature(input_embedding, lambda h, _: h + noise),), ctx):
        inside = model(input_ids=ids()).logits
    torch.testing.assert_close(inside, model(inputs_embeds=table(ids()) + noise).logits)
    assert not torch.allclose(inside, plain, atol=1e-3)
    assert not table._forward_hooks
    assert torch.equal(model(input_ids=ids()).logits, plain)


def test_a_model_that_names_no_embedding_is_refused() -> None:
    for model in (nn.Linear(2, 2), own_models.scaled()):
        with pytest.raises(PlanError, match=r"names no input embedding.*get_input_embeddings"):
            input_embedding(model)


def plan_of(make: Any, **more: Any) -> Plan:
    data = own_models.texts(labels=make is own_models.bert)
    return Plan.from_model(make(**more), data=data, held_out=data, steps=3, batch=4)


def trained(plan: Plan, *arms: Any) -> tuple[str, dict[str, Any]]:
    found = Engine(apply(plan, arms), 0, Store(None)).run()
    return found.weights, found.scores


ARMS = (EmbeddingNoise(alpha=5.0), EmbeddingDropout(rate=0.1))


@pytest.mark.parametrize("arm", ARMS, ids=["noise", "dropout"])
@pytest.mark.parametrize("make", [own_models.llama, own_models.bert])
def test_trains_ones_own_model_otherwise_and_off_is_the_control_to_the_bit(make: Any, arm: Any) -> None:
    plan = plan_of(make)
    control, treated = trained(plan), trained(plan, arm)
    assert trained(plan, dataclasses.replace(arm, **arm.OFF)) == control
    assert treated[0] != control[0]
    assert trained(plan, arm) == treated


@pytest.mark.parametrize("arm", ARMS, ids=["noise", "dropout"])
def test_the_models_own_dropout_draws_what_it_drew(arm: Any) -> None:
    plan = plan_of(own_models.bert, hidden_dropout_prob=0.2)
    assert trained(plan) != trained(plan_of(own_models.bert))
    assert trained(plan, dataclasses.replace(arm, **arm.OFF)) == trained(plan)


@pytest.mark.parametrize("arm", [EmbeddingNoise(alpha=500.0), EmbeddingDropout(rate=0.9)], ids=["noise", "dropout"])
def test_predictions_are_made_without_it(arm: Any) -> None:
    engine = Engine(apply(plan_of(own_models.llama), [arm]), 0, Store(None))
    engine.run()
    model = engine.model_at("finetune").eval()
    with engine.finished("finetune") as run, torch.no_grad():
        found = run.predict({"input_ids": ids(), "attention_mask": torch.ones_like(ids())})
        assert torch.equal(found, model(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits)


class Echo(nn.Module):
    """A table of embeddings and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 100)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        return found


@pytest.mark.parametrize("arm", ARMS, ids=["noise", "dropout"])
def test_draws_anew_at_each_step_and_alike_in_each_look_at_one_step(arm: Any) -> None:
    model, tokens = Echo(), torch.arange(4)[None]
    ctx = ctx_of(facts=Facts(modality="language", target="next-token"))
    stage, loss = apply(plan_of(own_models.llama), [arm]).stages[0], ScopedLoss(lambda m, b, _: m(b["input_ids"]))
    with FeatureHooks(model, stage.features, ctx):
        first, again = (loss(model, {"input_ids": tokens}, ctx) for _ in range(2))
        later = loss(model, {"input_ids": tokens}, move(ctx, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, model(tokens))


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(PlanError, match="alpha=-1"):
        EmbeddingNoise(alpha=-1)
    for rate in (-0.1, 1.0):
        with pytest.raises(PlanError, match="rate="):
            EmbeddingDropout(rate=rate)
