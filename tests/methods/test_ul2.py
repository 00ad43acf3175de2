"""UL2: what its arms differ in, that they spend the same, and that every measure of the sheet is there."""

import math

import pytest

from perturbed.core.registry import card
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.methods.ul2 import STUDY
from perturbed.objectives.denoising import DENOISERS, Denoised
from perturbed.objectives.language import next_token_loss


def test_arms_differ_in_the_loss_and_its_rate_and_nothing_else():
    plans = STUDY.at("full").plans()
    stages = {arm: plan.stages[0] for arm, plan in plans.items()}
    for arm, stage in stages.items():
        if arm != "control":
            assert isinstance(stage.loss, Denoised)
            assert stage.loss.inner is next_token_loss
            assert stage.optim.inner == stages["control"].optim, "the rate apart"
        for slot in ("steps", "data", "inputs", "features", "weights", "update"):
            assert getattr(stage, slot) == getattr(stages["control"], slot)
        assert plans[arm].measures == plans["control"].measures
    mixtures = {arm: s.loss.mixture for arm, s in stages.items() if arm != "control"}
    assert {arm: m.mode for arm, m in mixtures.items() if m.mode != "own"} == {"sham": "random", "no_mode": "none"}
    rates = {arm: STUDY.at("full").arms[arm][1] for arm in mixtures}
    assert rates["sham"] == rates["mixture"]
    assert mixtures["sham"].weights == mixtures["no_mode"].weights == mixtures["mixture"].weights
    assert {arm for arm, m in mixtures.items() if m.share != 1} == {"span_and_lm"}


def test_proportions_are_those_the_docstring_names():
    weights = STUDY.arms["mixture"][0].weights
    of = {mode: sum(w for w, d in zip(weights, DENOISERS, strict=True) if d.mode == mode) for mode in "RSX"}
    assert of == pytest.approx({"R": 0.4, "S": 0.2, "X": 0.4})
    full = STUDY.at("full").arms
    assert len(set(full["uniform"][0].weights)) == 1
    assert (full["span_and_lm"][0].weights, full["span_and_lm"][0].share) == (full["span"][0].weights, 0.5)
    assert [d for d, w in zip(DENOISERS, full["span"][0].weights, strict=True) if w] == [DENOISERS[0]]
    assert [d.mode for d, w in zip(DENOISERS, full["prefix"][0].weights, strict=True) if w] == ["S"]
    assert [d.mode for d, w in zip(DENOISERS, full["extreme"][0].weights, strict=True) if w] == ["X"] * 4


def test_smoke_measures_all_that_the_sheet_asks_for_at_equal_cost():
    plans = STUDY.at("smoke").plans()
    results = {arm: Engine(plans[arm], 1234, Store(None)).run() for arm in ("control", "mixture")}
    control, mixture = (results[arm] for arm in ("control", "mixture"))
    assert mixture.cost.tokens == control.cost.tokens
    assert mixture.cost.params_trained == control.cost.params_trained
    assert mixture.cost.flops == pytest.approx(control.cost.flops, rel=1e-3)
    for scores in (control.scores, mixture.scores):
        assert scores["worst_loss"] == max(scores[f"{kind}_loss"] for kind in "rsx")
        assert 3 < scores["worst_loss"] < math.log(1024) + 1
        assert 0 <= scores["label_accuracy"] <= 1
        assert {"label_loss", "context_gain", "own_mode_loss", "wrong_mode_loss", "no_mode_loss"} <= set(scores)
    losses = [value for _, value in mixture.curves["loss"]]
    assert losses[-1] < losses[0] - 0.3


def test_card():
    assert card("ul2").arxiv == "2205.05131"
    assert STUDY.metric == "worst_loss"
    assert STUDY.direction == "lower"
