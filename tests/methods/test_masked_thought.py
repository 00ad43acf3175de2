"""Masked thought: what its study compares, what the arms share, and that it hides what it says where it says."""

import dataclasses
import time

import pytest
import torch

from perturbed.core.context import FeatureHooks
from perturbed.core.registry import card
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.worked_solutions import MASK, tokenizer
from perturbed.features.embeddings import EmbeddingDropout, EmbeddingNoise
from perturbed.inputs.masking import MaskedInputs
from perturbed.methods.masked_thought import STUDY

CHANGED = {
    "control": set(), "random": {"inputs", "optim"}, "embedding_noise": {"features"}, "embedding_dropout": {"features"},
}  # fmt: skip


def test_arms_are_those_of_the_issue():
    assert tuple(STUDY.at("laptop").plans()) == ("control", "masked", "sham")
    full = STUDY.at("full").arms
    told = {
        name: (arm[0].rate, arm[0].by, arm[0].hide) for name, arm in full.items() if isinstance(arm[0], MaskedInputs)
    }
    assert told == {
        "masked": (0.2, "mask", "solution"), "sham": (0.2, "mask", "question"),
        "rate_10": (0.1, "mask", "solution"), "rate_40": (0.4, "mask", "solution"),
        "random": (0.2, "random", "solution"), "everywhere": (0.2, "mask", "everywhere"),
    }  # fmt: skip
    others = {name: arm for name, arm in full.items() if name not in told}
    assert others == {
        "embedding_noise": (EmbeddingNoise(alpha=5.0, stage="finetune"),),
        "embedding_dropout": (EmbeddingDropout(rate=0.1, stage="finetune"),),
    }
    assert (STUDY.primary, STUDY.reference, STUDY.sham, STUDY.metric) == ("masked", "control", "sham", "accuracy")
    assert STUDY.direction == "higher"


def test_arms_differ_in_nothing_else_and_share_the_pre_training():
    plans = STUDY.at("full").plans()
    control, store = plans["control"], Store(None)
    pretrained = Engine(control, 0, store).key("pretrain")
    for arm, plan in plans.items():
        assert Engine(plan, 0, store).key("pretrain") == pretrained
        stage, own = plan.stage("finetune"), control.stage("finetune")
        changed = {
            s for s in ("inputs", "features", "weights", "loss", "optim") if getattr(stage, s) != getattr(own, s)
        }
        assert changed == CHANGED.get(arm, {"inputs", "weights", "optim"}), arm
        assert dataclasses.replace(stage, **{s: getattr(own, s) for s in changed}) == own


def small():
    """The plans of all arms at smoke sizes."""
    return dataclasses.replace(STUDY.at("full"), plan=STUDY.at("smoke").plan).plans()


def batches(arm, steps=6):
    """The batches that a stage's loss sees, at the last steps of the warm-up and after."""
    plan = small()[arm]
    stage = plan.stage("finetune")
    ctx = Engine(plan, 0, Store(None))._ctx(stage, stage.steps)
    stream, found = stage.data(ctx), []
    for ctx.step in range(stage.steps - steps, stage.steps):
        ctx.streams.tick("finetune", ctx.step)
        found.append(stage.inputs(next(stream), ctx))
    return found


@pytest.mark.parametrize("arm", ["masked", "sham"])
def test_a_fifth_of_the_solution_or_of_the_question_is_hidden(arm):
    mask = tokenizer().convert_tokens_to_ids(MASK)
    seen = {k: torch.cat([b[k].flatten() for b in batches(arm)]) for k in ("input_ids", "labels", "loss_mask")}
    hidden, solution = seen["input_ids"] == mask, seen["loss_mask"]
    here, there = (solution, ~solution) if arm == "masked" else (~solution, solution)
    assert not hidden[there].any()
    assert hidden[here].double().mean() == pytest.approx(0.2, abs=0.04)
    assert not (seen["labels"] == mask).any()
    assert torch.equal(seen["labels"][~hidden], seen["input_ids"][~hidden])


def test_the_control_sees_what_the_treatment_is_asked_for():
    for masked, plain in zip(batches("masked"), batches("control"), strict=True):
        assert torch.equal(masked["labels"], plain["input_ids"])


def test_smoke_is_short_and_every_arm_has_every_score():
    for arm, plan in small().items():
        began = time.process_time()
        scores = Engine(plan, 0, Store(None)).run().scores
        assert time.process_time() - began < 8  # about 1 s; the machine may be busy
        assert set(scores) == {
            *("accuracy", "flawless", "solution_loss"), *("accuracy_longer", "flawless_longer", "solution_loss_longer"),
            *("dependency_question", "dependency_question_far", "dependency_solution", "dependency_solution_far"),
        }, arm  # fmt: skip
        assert all(v is not None and v >= 0 for v in scores.values())


def gradients(arm):
    """Those of an untrained model on the first batch, by parameter."""
    plan = small()[arm]
    engine, stage = Engine(plan, 0, Store(None)), plan.stage("finetune")
    ctx = engine._ctx(stage, stage.steps)
    ctx.model = model = engine.model_at("init")
    batch = ctx.batch = next(stage.data(ctx))
    with FeatureHooks(model, stage.features, ctx):
        stage.loss(model, batch, ctx).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("arm", ["embedding_noise", "embedding_dropout"])
def test_comparators_change_what_the_model_learns_from_but_not_the_batch(arm):
    for noisy, plain in zip(batches(arm), batches("control"), strict=True):
        assert noisy.keys() == plain.keys()
        assert all(torch.equal(noisy[k], plain[k]) for k in plain)
    assert not all(torch.equal(a, b) for a, b in zip(gradients(arm), gradients("control"), strict=True))


def test_card_names_the_sites_that_are_changed():
    told = card("masked-thought")
    assert told.arxiv == "2403.02178"
    assert told.sites == list(STUDY.arms["masked"][0].SITES)
