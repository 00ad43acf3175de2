"""PAG: what its arms differ in, what they share, and that the sheet's measures and limits are there."""

from dataclasses import replace

import pytest

from perturbed.core.plan import apply
from perturbed.core.registry import card, load
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.features.attention import matching
from perturbed.inference.guidance import ClassifierFree, Guided, Unlabelled
from perturbed.objectives.diffusion import predict_noise
from perturbed.plans.digits_diffusion import dit

STUDY = load("pag").study


def keys(plan):
    engine = Engine(plan, 0, Store(None))
    return engine.key("pretrain"), engine.all_keys()["/result"]


def test_arms_differ_in_the_prediction_and_share_the_training_of_their_network():
    plans = STUDY.at("full").plans()
    control, dits = plans["control"], {name: plans[name] for name in ("dit", "dit_guided")}
    unets = {name: plan for name, plan in plans.items() if name not in dits}
    assert control.predict == dits["dit"].predict == Unlabelled(predict_noise)
    assert {name for name, plan in plans.items() if not isinstance(plan.predict, Guided)} == {
        "control", "labelled", "dit",
    }  # fmt: skip
    for plan in unets.values():
        assert (plan.build, plan.stages, plan.measures) == (control.build, control.stages, control.measures)
    assert len({keys(plan)[0] for plan in unets.values()}) == 1
    assert len({keys(plan)[0] for plan in dits.values()}) == 1
    found = [keys(plan) for plan in plans.values()]
    assert not any(key.startswith("unkeyed") for pair in found for key in pair)
    assert len({stage for stage, _ in found}) == 2
    assert len({result for _, result in found}) == len(plans)


def test_arms_are_those_of_the_sheet():
    everything = STUDY.at("full").arms
    arms = {name: arm[0] for name, arm in everything.items() if len(arm) == 1 and name != "labelled"}
    assert tuple(STUDY.at("laptop").arms) == ("guided", "sham")
    assert sorted(a.scale for n, a in arms.items() if n.startswith(("scale", "guided"))) == [0.5, 1, 2, 3, 5]
    assert {a.kind for a in arms.values()} == {"identity", "mask", "noise", "blur"}
    assert len({a.where for a in arms.values()}) == 4
    guided = arms["guided"]
    assert [n for n, a in arms.items() if a.follow == "neighbour"] == ["sham"]
    assert {n: a.kind for n, a in arms.items() if a.kind != "identity"} == {n: n for n in ("mask", "noise", "blur")}
    nothing = arms["nothing"]
    assert (nothing.scale, nothing.strength) == (guided.scale, 0), "guided, by maps that nothing was done to"
    assert {n for n, a in arms.items() if a.strength != 1} == {"nothing", "mask"}
    assert (arms["sham"].scale, arms["sham"].where, arms["sham"].kind) == (guided.scale, guided.where, guided.kind)


@pytest.mark.parametrize("name", ["labelled_guided", "free_guided", "dit_guided"])
def test_the_guidance_of_another_kind_of_sampling_is_all_that_it_differs_in_from_its_reference(name):
    study = STUDY.at("full")
    *rest, guidance = study.arms[name]
    assert tuple(rest) == study.arms[study.references[name]]
    primary = study.arms["guided"][0]
    assert replace(guidance, where=primary.where) == primary
    assert (guidance.where == primary.where) == (name != "dit_guided")
    assert study.arms["free"] == (*study.arms["labelled"], ClassifierFree(2.0))


def test_the_dit_s_spoiled_layers_are_the_attention_of_its_middle_blocks():
    model = dit(4)
    *_, guidance = STUDY.full_arms["dit_guided"]
    blocks = model.transformer_blocks
    assert len(blocks) == 4
    assert matching(model, guidance.where) == [blocks[1].attn1, blocks[2].attn1]


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
    control = smoke["control"]
    assert results["nothing"].scores == control.scores
    distances = [r.scores["frechet"] for r in (*results.values(), smoke["guided"], control)]
    assert len(set(distances)) == len(distances) - 1, "every other arm draws something else"
    other = {n for n, r in results.items() if r.weights != control.weights}
    assert other == {"dit", "dit_guided"}
    assert results["dit"].weights == results["dit_guided"].weights
    assert results["dit"].cost.grad_passes == control.cost.grad_passes


def test_card():
    assert card("pag").arxiv == "2403.17377"
    assert STUDY.metric == "precision"
    assert STUDY.direction == "higher"
