"""The plan ``pendulum-cloning``: the clone acts like its teacher, on start states that pair the arms."""

import dataclasses
import time

import pytest
import torch

from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.data.demonstrations import swing_up
from perturbed.errors import PlanError
from perturbed.evidence.settings import load_plan
from perturbed.plans.pendulum_cloning import PendulumCloning

SMOKE = PendulumCloning(steps=300, episodes=8, evaluations=5)


def run(plan, seed=1000):
    return Engine(plan, seed, Store(None)).run()


def untrained(plan):
    return plan.replace(stages=(dataclasses.replace(plan.stages[0], steps=0),))


def teacher(model, batch, ctx):
    return swing_up(batch["observations"])


def random_torque(model, batch, ctx):
    return 4 * torch.rand(len(batch["observations"]), 1, generator=ctx.rng("torque")) - 2


@pytest.fixture(scope="module")
def returns():
    """Of the clone, its teacher, a random policy and an untrained network, from the same start states."""
    plan = PendulumCloning()()
    begun = time.process_time()
    clone = run(plan)
    seconds = time.process_time() - begun
    rest = {"teacher": teacher, "random": random_torque}
    others = {name: run(untrained(plan).replace(predict=fn)).scores["return"] for name, fn in rest.items()}
    blank = run(untrained(plan)).scores["return"]
    return {"clone": clone.scores["return"], "untrained": blank, "seconds": seconds, **others}


def test_the_clone_acts_like_its_teacher_and_far_better_than_chance(returns):
    assert returns["teacher"] > -250
    assert returns["random"] < -1000
    assert returns["clone"] > returns["teacher"] - 50
    assert returns["untrained"] < returns["clone"] - 500, "the return must come from training"


def test_it_keeps_to_its_budget(returns):
    assert returns["seconds"] < 10
    begun = time.process_time()
    run(SMOKE())
    assert time.process_time() - begun < 1.5


def watched(plan, seed):
    """The observations that each call of the policy was given."""
    seen = []

    def watching(model, batch, ctx):
        seen.append(batch["observations"].clone())
        return model(batch["observations"])

    run(plan.replace(predict=watching), seed)
    return seen


def start_states(plan, seed):
    return watched(untrained(plan), seed)[0]


def test_start_states_are_drawn_by_the_seed_and_shared_by_its_arms():
    other_arm = dataclasses.replace(SMOKE, width=32, lr=1e-3)
    assert torch.equal(start_states(SMOKE(), 3), start_states(other_arm(), 3))
    assert not torch.equal(start_states(SMOKE(), 3), start_states(SMOKE(), 4))
    assert start_states(SMOKE(), 3).shape == (5, 3)


def test_a_run_measured_on_the_way_meets_the_same_start_states_each_time():
    plan = dataclasses.replace(SMOKE, steps=2, evaluations=2)()
    seen = watched(plan.add_measures(dataclasses.replace(plan.measures[0], when=1)), 3)
    assert len(seen) == 400
    assert torch.equal(seen[0], seen[200])
    assert not torch.equal(seen[1], seen[201]), "the policy has learnt in between"


def test_the_same_seed_gives_the_same_bits():
    one, two = run(SMOKE()), run(SMOKE())
    assert (one.weights, one.scores) == (two.weights, two.scores)
    assert one.weights != run(SMOKE(), seed=1001).weights


def test_its_facts_say_what_interventions_ask_for_and_its_name_finds_it():
    facts = SMOKE().facts
    assert (facts.modality, facts.target, facts.output, facts.input) == ("control", "action", "action", "observations")
    assert load_plan("pendulum-cloning") == PendulumCloning()


@pytest.mark.parametrize("field", ["width", "episodes", "batch", "evaluations", "lr"])
def test_sizes_that_make_no_run_are_named(field):
    with pytest.raises(PlanError, match=f"{field}=0"):
        PendulumCloning(**{field: 0})
