"""PAG: what its arms differ in, what they share, and that the sheet's measures and limits are there."""

import pytest

from perturbed.core.plan import apply
from perturbed.core.registry import card, load
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.inference.guidance import Guided
from perturbed.objectives.diffusion import predict_noise

STUDY = load("pag").study


def test_arms_differ_in_the_prediction_and_share_the_training():
    plans = STUDY.at("full").plans()
    control = plans.pop("control")
    assert control.predict is predict_noise
    for plan in plans.values():
        assert isinstance(plan.predict, Guided)
        assert (plan.stages, plan.measures) == (control.stages, control.measures)
    keys = {Engine(plan, 0, Store(None)).key("pretrain") for plan in (control, *plans.values())}
    assert len(keys) == 1
    assert not next(iter(keys)).startswith("unkeyed")
    assert len({Engine(plan, 0, Store(None)).all_keys()["/result"] for plan in plans.values()}) == len(plans)


def test_arms_are_those_of_the_sheet():
    arms = {name: arm[0] for name, arm in STUDY.at("full").arms.items()}
    assert tuple(STUDY.at("laptop").arms) == ("guided", "sham")
    assert sorted(a.scale for n, a in arms.items() if n.startswith(("scale", "guided"))) == [0.5, 1, 2, 3, 5]
    assert {a.kind for a in arms.values()} == {"identity", "mask", "noise", "blur"}
    assert len({a.where for a in arms.values()}) == 4
    guided = arms["guided"]
    assert [n for n, a in arms.items() if a.follow == "neighbour"] == ["sham"]
    assert (arms["sham"].scale, arms["sham"].where, arms["sham"].kind) == (guided.scale, guided.where, guided.kind)


@pytest.fixture(scope="module")
def smoke():
    store = Store(None)
    return {arm: Engine(plan, 1234, store).run() for arm, plan in STUDY.at("smoke").plans().items()}


def test_smoke_measures_all_that_the_sheet_asks_for_at_equal_training_cost(smoke):
    control = smoke["control"]
    assert STUDY.plan.samples >= 1000
    for arm, result in smoke.items():
        assert {"precision", "recall", "coverage", "frechet", "confidence", "spread"} <= set(result.scores)
        assert result.weights == control.weights
        assert result.cost.grad_passes == control.cost.grad_passes
        if arm != "control":
            assert result.scores["frechet"] != control.scores["frechet"]
    assert smoke["guided"].scores["frechet"] != smoke["sham"].scores["frechet"]


def test_every_arm_of_the_full_record_samples_and_spoiling_nothing_is_the_control(smoke):
    plan, store = STUDY.at("smoke").plans()["control"], Store(None)
    results = {n: Engine(apply(plan, arm), 1234, store).run() for n, arm in STUDY.full_arms.items()}
    assert results["nothing"].scores == smoke["control"].scores
    distances = [r.scores["frechet"] for r in (*results.values(), smoke["guided"], smoke["control"])]
    assert len(set(distances)) == len(distances) - 1, "every other arm draws something else"


def test_card():
    assert card("pag").arxiv == "2403.17377"
    assert STUDY.metric == "precision"
    assert STUDY.direction == "higher"
