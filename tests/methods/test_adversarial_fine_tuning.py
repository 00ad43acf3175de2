"""What the contract tests cannot know of the method: its arms, their cost and what they share."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from perturbed.core.plan import Plan, apply
from perturbed.core.registry import load
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.evidence.study import Study
from perturbed.inputs.adversarial import PGDTraining
from perturbed.optim.fine_tuning import SlowStartFastDecay
from perturbed.plans.digits import Digits

STUDY: Study = load("adversarial-fine-tuning").study
ARMS = ("control", "scratch", "slow_fast", "sham")


def small(study: Study = STUDY) -> dict[str, Plan]:
    return {k: p.replace(measures=()) for k, p in study.at("smoke").plans().items()}


def test_arms_are_those_that_were_asked_for() -> None:
    assert tuple(STUDY.at("laptop").plans()) == ARMS
    assert set(STUDY.at("full").arms) - set(ARMS) == {"constant", "step_decay", "scratch_wider", "slow_fast_wider"}
    assert (STUDY.primary, STUDY.reference, STUDY.sham) == ("slow_fast", "scratch", "sham")
    assert (STUDY.metric, STUDY.direction, STUDY.budget) == ("accuracy_pgd", "higher", "reported")


def test_scratch_takes_sixty_epochs_where_fine_tuning_takes_eight_after_twenty() -> None:
    plans, epoch = STUDY.plans(), (1797 - 450) // 64
    assert [(s.name, s.steps) for s in plans["slow_fast"].stages] == [("pretrain", 20 * epoch), ("finetune", 8 * epoch)]
    assert [(s.name, s.steps) for s in plans["scratch"].stages] == [("finetune", 60 * epoch)]
    assert [s.steps for s in plans["control"].stages] == [s.steps for s in plans["sham"].stages]
    rates = plans["scratch"].stage("finetune").optim.factor  # type: ignore[attr-defined]
    assert [rates(u, 100) for u in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])


def test_gradient_passes_are_counted_as_the_docstring_says() -> None:
    plans = small()
    pretrain, fine = (s.steps for s in plans["control"].stages)
    expected = {
        "control": pretrain + fine, "sham": pretrain + fine,
        "slow_fast": pretrain + fine * 11, "scratch": round(7.5 * fine) * 11,
    }  # fmt: skip
    store = Store(None)
    assert {arm: Engine(plans[arm], 0, store).run().cost.grad_passes for arm in ARMS} == expected


def test_arms_share_the_clean_pre_training_and_scratch_its_initial_weights() -> None:
    plans = small()
    engines = {arm: Engine(plan, 0, Store(None)) for arm, plan in plans.items()}
    keys = {arm: engines[arm].key("pretrain") for arm in ("control", "slow_fast", "sham")}
    assert len(set(keys.values())) == 1
    first, second = (engines[arm].model_at("init").state_dict() for arm in ("control", "scratch"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_sham_differs_from_the_treatment_in_the_noise_alone() -> None:
    treated, sham = STUDY.arms["slow_fast"], STUDY.arms["sham"]
    assert treated[1] == sham[1]
    assert sham[0].scale == treated[0].eps  # type: ignore[attr-defined]
    assert sham[0].stage == treated[0].stage  # type: ignore[attr-defined]


def test_all_off_is_the_control_bit_for_bit() -> None:
    plans = small()
    control = plans["control"]
    off = [dataclasses.replace(i, **i.OFF) for i in STUDY.arms["slow_fast"]]  # type: ignore[attr-defined, type-var]
    weights = Engine(apply(control, off), 0, Store(None)).run().weights
    assert weights == Engine(control, 0, Store(None)).run().weights
    half_off = [PGDTraining(eps=0.0, stage="finetune"), SlowStartFastDecay(stage="finetune")]
    assert weights != Engine(apply(control, half_off), 0, Store(None)).run().weights


def test_smoke_is_short_and_every_arm_has_every_score() -> None:
    for arm, plan in STUDY.at("smoke").plans().items():
        began = time.process_time()
        result = Engine(plan, 0, Store(None)).run()
        assert time.process_time() - began < 8  # about 1 s; the machine may be busy
        assert result.diverged is None
        assert set(result.scores) == {
            "accuracy", "accuracy_pgd", "accuracy_search", "masked", "accuracy_pgd_seen", "accuracy_pgd_wider",
        }, arm  # fmt: skip
        assert all(v is not None and 0 <= v <= 1 for v in result.scores.values())
        clean, pgd = result.scores["accuracy"], result.scores["accuracy_pgd"]
        assert clean is not None
        assert pgd is not None
        assert pgd <= clean


@pytest.mark.slow
def test_attacked_training_withstands_attacks_and_noise_does_not() -> None:
    plan = dataclasses.replace(STUDY.plan, pretrain_steps=210, finetune_steps=84)  # type: ignore[type-var]
    plans, store = dataclasses.replace(STUDY, plan=plan).plans(), Store(None)
    held = {arm: Engine(plans[arm], 1000, store).run().scores for arm in ("control", "slow_fast", "sham")}
    robust = {arm: scores["accuracy_pgd"] or 0.0 for arm, scores in held.items()}
    assert robust["slow_fast"] > robust["control"] + 0.1
    assert robust["slow_fast"] > robust["sham"] + 0.1
    assert (held["slow_fast"]["accuracy"] or 0) > 0.9
    assert (held["slow_fast"]["masked"] or 0) < 0.02


def test_the_study_runs_on_the_vit_class_of_transformers():
    plan = Digits(model="vit", width=8, batch=16, pretrain_steps=2, finetune_steps=2, held_out=20)()
    arms = {name: Engine(apply(plan, arm), 0, Store(None)).run() for name, arm in {"control": (), **STUDY.arms}.items()}
    assert len({r.weights for r in arms.values()}) == len(arms)
    assert arms["slow_fast"].cost.grad_passes == 2 + 2 * 11
    assert arms["sham"].cost.grad_passes == 4
