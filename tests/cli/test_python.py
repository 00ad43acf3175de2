"""What is wrong in a call from Python is said before anything runs, as on the command line."""

from __future__ import annotations

import numpy as np
import pytest
from own_plans import SMALL, plan

import perturbed as pt
from perturbed.inputs.noise import InputNoise

SLUG = "adversarial-fine-tuning"
NOISE = {"noise": [InputNoise(0.3)]}


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("perturbed.api.run_study", lambda *_: pytest.fail("something was run"))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"epsilon": 0.0}, "epsilon.*must be positive"),
        ({"epsilon": float("nan")}, "epsilon.*must be positive"),
        ({"direction": "up"}, "direction must be higher, lower or equal"),
        ({"direction": "equal"}, "needs an epsilon"),
        ({"seeds": "8"}, "seeds='8'"),
        ({"seeds": 2.5}, "seed 2.5 is a float"),
        ({"seeds": [0, 1.5]}, "seed 1.5 is a float"),
        ({"workers": 0}, "workers=0"),
        ({"on": "gpu"}, "on='gpu'.*local, ray"),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_what_cannot_be_judged_or_run_is_refused(how, words):
    with pytest.raises(pt.PerturbedError, match=words):
        pt.compare(plan, NOISE, **how)


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({}, "at least one arm"),
        ([InputNoise(0.3)], "at least one arm"),
        ({"noise": InputNoise(0.3)}, "'noise' is a InputNoise: give a list"),
        ({"noise": [InputNoise]}, "class InputNoise: make one"),
        ({"noise": [None]}, "holds None"),
        ({"noise": "noise"}, "is a str"),
        ({"a": [InputNoise(0.3)], "a+b": [InputNoise(0.1)]}, r"'a\+b'.*combinations"),
    ],
)
@pytest.mark.usefixtures("nothing_runs")
def test_arms_that_are_none_are_named(arms, words):
    with pytest.raises(pt.PerturbedError, match=words):
        pt.compare(plan, arms, factorial=True)


@pytest.mark.parametrize("no_plan", [None, 3, SMALL.__class__, [plan], lambda: None])
@pytest.mark.usefixtures("nothing_runs")
def test_what_gives_no_plan_is_refused(no_plan):
    with pytest.raises(pt.PerturbedError, match=r"give a Plan \(pt.Plan.from_model"):
        pt.compare(no_plan, NOISE)
    if no_plan is not None:
        with pytest.raises(pt.PerturbedError, match="give a Plan"):
            pt.run(SLUG, plan=no_plan)


@pytest.mark.usefixtures("nothing_runs")
def test_lists_of_text_are_lists():
    with pytest.raises(pt.PerturbedError, match="arms='slow_fast'"):
        pt.run(SLUG, arms="slow_fast")
    with pytest.raises(pt.PerturbedError, match=r"settings=.*list"):
        pt.run(SLUG, settings={"plan.width": 3})


def test_plans_seeds_and_arms_of_every_kind():
    wanted = pt.compare(plan, NOISE, seeds=2, workers=1)["scores"]
    for same in (SMALL, lambda: plan):
        assert pt.compare(same, NOISE, seeds=np.arange(2), workers=1)["scores"] == wanted
    once = {"noise": (one for one in NOISE["noise"])}
    assert pt.compare(plan, once, seeds=np.int64(2), workers=1)["scores"] == wanted


def test_a_recipe_serves_a_study_and_a_plan_without_a_name_has_no_command():
    record = pt.run(SLUG, plan=SMALL, seeds=1, arms=["slow_fast"], workers=1)
    assert set(record["scores"]) == {"control", "scratch", "slow_fast"}
    assert record["plan"] == repr(SMALL)
    assert record["command"] == ""


def test_a_metric_that_no_measure_gives_ends_the_first_run():
    runs: list[int] = []

    def other(run: pt.Run) -> dict[str, float]:
        runs.append(run.ctx.seed)
        return {"other": 1.0}

    own = plan.replace(measures=(pt.Measure("score", other),))
    with pytest.raises(pt.PerturbedError, match=r"no measure gives the metric 'score'.*there is other"):
        pt.compare(own, NOISE, seeds=4, workers=1)
    assert runs == [0]


def test_a_plan_that_measures_nothing_says_how_to_measure():
    with pytest.raises(pt.PerturbedError, match="held_out="):
        pt.compare(plan.replace(measures=()), NOISE)
