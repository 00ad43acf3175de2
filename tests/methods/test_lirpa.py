"""What the contract tests cannot know of the method: its arms, what they share, and another class of network."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from perturbed.core.plan import apply
from perturbed.core.registry import load
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.subset import SomeExamples
from perturbed.evidence.study import Study
from perturbed.inputs.adversarial import PGDTraining
from perturbed.measures.sharpness import weight_noise
from perturbed.objectives.certified import CertifiedTraining
from perturbed.plans.digits import Digits, Split, mlp

STUDY: Study = load("lirpa").study
ARMS = ("control", "ibp", "fused", "sham")
FEW = ("few", "few_flat", "few_flat_small", "few_noise")


def test_arms_are_those_that_were_asked_for() -> None:
    assert tuple(STUDY.at("laptop").plans()) == ARMS
    assert set(STUDY.at("full").arms) - set(ARMS) == {"separate", "adversarial", *FEW}
    assert (STUDY.primary, STUDY.reference, STUDY.sham) == ("fused", "ibp", "sham")
    assert (STUDY.metric, STUDY.direction, STUDY.budget) == ("accuracy_certified", "higher", "equal")


def test_arms_differ_in_what_is_mixed_in_alone() -> None:
    rules = [arm[0] for arm in STUDY.arms.values()]
    assert [rule.ease for rule in rules] == ["none", "fused", "clean"]  # type: ignore[attr-defined]
    assert len({dataclasses.replace(rule, ease="none") for rule in rules}) == 1  # type: ignore[type-var]


def test_arms_of_the_full_record_are_what_they_are_called() -> None:
    (primary,), full = STUDY.arms["fused"], STUDY.full_arms
    eps = primary.eps  # type: ignore[attr-defined]
    assert full["separate"] == (dataclasses.replace(primary, ease="separate"),)  # type: ignore[type-var]
    assert full["adversarial"] == (PGDTraining(eps=eps, alpha=eps / 4, steps=10, stage="finetune"),)
    flat, small = full["few_flat"][-1], full["few_flat_small"][-1]
    assert small == dataclasses.replace(flat, eps=flat.eps / 10)  # type: ignore[attr-defined, type-var]
    assert [m.fn.eps for m in STUDY.measures[:2]] == [eps, eps], "measured in the ball that is trained on"  # type: ignore[attr-defined]


def test_arms_share_the_clean_pre_training_and_have_one_budget() -> None:
    plans = {k: p.replace(measures=()) for k, p in STUDY.at("smoke").plans().items()}
    engines = {arm: Engine(plan, 0, Store(None)) for arm, plan in plans.items()}
    assert len({engine.key("pretrain") for engine in engines.values()}) == 1
    assert len({engine.key("finetune") for engine in engines.values()}) == len(ARMS)
    assert len({engine.run().cost.grad_passes for engine in engines.values()}) == 1


def test_arms_on_few_labels_see_the_same_tenth_for_as_many_steps() -> None:
    plans = STUDY.at("full").plans()
    for arm in FEW:
        assert [stage.data for stage in plans[arm].stages] == [
            SomeExamples(stage.data, 0.1)  # type: ignore[arg-type]
            for stage in plans["control"].stages
        ]
    assert {tuple(stage.steps for stage in plans[arm].stages) for arm in FEW} == {(105, 1260)}
    assert {arm: STUDY.references[arm] for arm in FEW[1:]} == dict.fromkeys(FEW[1:], "few")


def test_arms_on_few_labels_share_their_pre_training_and_differ_after_it() -> None:
    short = dataclasses.replace(STUDY.plan, **STUDY.scales["smoke"])  # type: ignore[type-var]
    plans = dataclasses.replace(STUDY.at("full"), plan=short, measures=()).plans()
    engines = {arm: Engine(plans[arm].replace(measures=()), 0, Store(None)) for arm in FEW}
    assert len({engine.key("pretrain") for engine in engines.values()}) == 1
    results = {arm: engine.run() for arm, engine in engines.items()}
    assert len({result.weights for result in results.values()}) == len(FEW)
    assert len({result.cost.examples for result in results.values()}) == 1


def test_the_noise_of_the_sham_is_as_long_as_the_balls_reach_together() -> None:
    model = mlp(16)
    flat, noise = (STUDY.full_arms[arm][-1] for arm in ("few_flat", "few_noise"))
    by = weight_noise(model, flat.eps, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    whole = sum(float(d.square().sum()) for layer in by for d in layer) ** 0.5
    assert whole == pytest.approx(noise.rho, rel=1e-5)  # type: ignore[attr-defined]


def test_off_is_the_control_bit_for_bit_and_a_radius_of_zero_is_not() -> None:
    control = STUDY.at("smoke").plans()["control"].replace(measures=())
    weights = Engine(control, 0, Store(None)).run().weights
    off = CertifiedTraining(**{"stage": "finetune", **CertifiedTraining.OFF})
    assert Engine(apply(control, [off]), 0, Store(None)).run().weights == weights
    no_ball = CertifiedTraining(eps=0.0, ramp=0.0, stage="finetune")
    assert Engine(apply(control, [no_ball]), 0, Store(None)).run().weights != weights


def test_smoke_is_short_and_every_arm_has_every_score() -> None:
    began = time.process_time()
    results = {arm: Engine(plan, 0, Store(None)).run() for arm, plan in STUDY.at("smoke").plans().items()}
    assert time.process_time() - began < 15
    names = {"accuracy", "accuracy_certified", "accuracy_interval", "accuracy_pgd", "loss_rise", "loss_proven"}
    for result in results.values():
        assert names <= result.scores.keys()
        assert all(result.scores[name] is not None for name in names)


def test_a_transformer_of_transformers_trains_on_bounds_and_is_measured() -> None:
    plan = Digits(model="vit", width=4, batch=4, pretrain_steps=1, finetune_steps=2, held_out=10)()
    measured = STUDY.measures[0]
    two = {"held_out": Split("digits", 10, "test", at_most=2)}
    plan = plan.replace(facts=dataclasses.replace(plan.facts, more=two), measures=(measured,))
    rule = CertifiedTraining(eps=1e-6, ramp=0.0, ease="separate", stage="finetune")
    control, treated = (Engine(apply(plan, arm), 0, Store(None)).run() for arm in ([], [rule]))
    assert control.weights != treated.weights
    assert treated.scores["accuracy_certified"] is not None
    assert torch.isfinite(torch.tensor(treated.scores["accuracy_certified"]))
