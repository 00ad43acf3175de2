"""Masked thought: what its study compares, what the arms share, and that it hides what it says where it says."""

import dataclasses
import time

import pytest
import torch

from perturbed.core.registry import card
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.worked_solutions import MASK, tokenizer
from perturbed.methods.masked_thought import STUDY


def test_arms_are_those_of_the_issue():
    assert tuple(STUDY.at("laptop").plans()) == ("control", "masked", "sham")
    full = STUDY.at("full").arms
    rates = {name: arm[0].rate for name, arm in full.items()}
    assert rates == {"masked": 0.2, "sham": 0.2, "rate_10": 0.1, "rate_40": 0.4, "random": 0.2, "everywhere": 0.2}
    assert full["random"][0].by == "random"
    assert (full["sham"][0].hide, full["everywhere"][0].hide) == ("question", "everywhere")
    assert (STUDY.primary, STUDY.reference, STUDY.sham, STUDY.metric) == ("masked", "control", "sham", "accuracy")
    assert STUDY.direction == "higher"


def test_arms_differ_in_nothing_else_and_share_the_pre_training():
    plans = STUDY.at("full").plans()
    control, store = plans["control"], Store(None)
    pretrained = Engine(control, 0, store).key("pretrain")
    for arm, plan in plans.items():
        assert Engine(plan, 0, store).key("pretrain") == pretrained
        stage, own = plan.stage("finetune"), control.stage("finetune")
        if arm != "control":
            assert dataclasses.replace(stage, inputs=own.inputs, weights=own.weights) == own


def batches(arm, steps=6):
    """The batches that a stage's loss sees, at the last steps of the warm-up and after."""
    plan = STUDY.at("smoke").plans()[arm]
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
    for arm, plan in STUDY.at("smoke").plans().items():
        began = time.process_time()
        scores = Engine(plan, 0, Store(None)).run().scores
        assert time.process_time() - began < 8  # about 1 s; the machine may be busy
        assert set(scores) == {
            *("accuracy", "flawless", "solution_loss"), *("accuracy_longer", "flawless_longer", "solution_loss_longer"),
            *("dependency_question", "dependency_question_far", "dependency_solution", "dependency_solution_far"),
        }, arm  # fmt: skip
        assert all(v is not None and v >= 0 for v in scores.values())


def test_card_names_the_sites_that_are_changed():
    told = card("masked-thought")
    assert told.arxiv == "2403.02178"
    assert told.sites == list(STUDY.arms["masked"][0].SITES)
