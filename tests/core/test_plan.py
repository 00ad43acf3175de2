"""Plans, stages and how interventions rewrite them."""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import toy

from perturbed.core.plan import Facts, Feature, Measure, Stage, apply, changed_sites
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.errors import PlanError

STAGE = Stage(name="extra", steps=1, data=toy.Points(), loss=toy.loss, optim=toy.adam)


def other(*args):
    raise AssertionError("never run")


@dataclass(frozen=True)
class Replace:
    """Replaces one slot, of the plan or of a stage, and declares ``SITES``."""

    SITES: tuple
    of_plan: bool
    slot: str
    value: object = other

    def __call__(self, plan):
        change = {self.slot: self.value}
        return plan.replace(**change) if self.of_plan else plan.edit("tune", lambda s: dataclasses.replace(s, **change))


FACTS = Facts(modality="vision", target="class")
CHANGES = [
    (True, "build", other, "weights"), (True, "facts", FACTS, "weights"), (True, "predict", other, "inference"),
    (True, "features", (Feature("*", other),), "features"), (True, "measures", (), "measures"),
    (False, "data", other, "data"), (False, "inputs", other, "inputs"), (False, "weights", other, "weights"),
    (False, "features", (Feature("*", other),), "features"), (False, "build", other, "weights"),
    (False, "facts", FACTS, "weights"), (False, "loss", other, "objectives"), (False, "optim", other, "optim"),
    (False, "update", other, "optim"),
]  # fmt: skip


@pytest.mark.parametrize(("of_plan", "slot", "value", "site"), CHANGES)
def test_a_change_outside_the_declared_sites_is_refused(of_plan, slot, value, site):
    plan = toy.plan()
    assert apply(plan, [Replace((site,), of_plan, slot, value)]) != plan
    declared = ("data", "optim") if site not in ("data", "optim") else ("measures",)
    with pytest.raises(PlanError, match=f"Replace changes {site} but declares only {', '.join(declared)}"):
        apply(plan, [Replace(declared, of_plan, slot, value)])


def test_slots_are_compared_by_identity_and_an_equal_copy_in_a_tuple_counts():
    plan = toy.plan().add_feature("tune", Feature("norm", toy.feature_noise))
    assert changed_sites(plan, plan.edit("*", dataclasses.replace)) == set()
    again = plan.edit("tune", lambda s: dataclasses.replace(s, features=tuple(copy.copy(f) for f in s.features)))
    assert changed_sites(plan, again) == {"features"}


def test_what_an_inserted_stage_holds_counts_as_declared():
    @dataclass(frozen=True)
    class Insert:
        SITES: ClassVar = ("data",)

        def __call__(self, plan):
            return plan.insert(STAGE, after="pretrain")

    assert [s.name for s in apply(toy.plan(), [Insert()]).stages] == ["pretrain", "extra", "tune"]


def test_the_last_intervention_is_the_outermost():
    plan = toy.one_stage()
    double, add = toy.Scale(2.0), toy.Shift(1.0)
    batch = {"x": torch.ones(1, 6)}
    values = {
        name: apply(plan, order).stage("train").inputs(batch, None)["x"][0, 0].item()
        for name, order in (("scale then shift", [double, add]), ("shift then scale", [add, double]))
    }
    assert values == {"scale then shift": 3.0, "shift then scale": 4.0}


def test_the_callers_plan_stays_as_it_is_and_the_log_tells_what_was_applied():
    plan = toy.plan()
    before = copy.copy(plan), plan.stages
    changed = apply(plan, [toy.Scale(2.0), toy.Shift(1.0, stage="tune")])
    assert (plan, plan.stages) == before
    assert plan.applied == ()
    assert changed.applied == (repr(toy.Scale(2.0)), repr(toy.Shift(1.0, stage="tune")))
    assert changed.stage("pretrain").inputs == toy.ScaleInputs(2.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages = ()


def test_a_missing_fact_is_named_with_the_remedy():
    plan = toy.plan(facts=Facts(modality="vision", target="class"), name="bare")
    with pytest.raises(PlanError) as error:
        apply(plan, [toy.Scale()])
    for part in ("Scale requires the fact input (any)", "'bare' has None", "perturbed plans", "set input in its facts"):
        assert part in str(error.value)


def test_a_fact_of_another_value_is_refused_and_any_of_several_is_taken():
    @dataclass(frozen=True)
    class Wants:
        REQUIRES: dict
        SITES: ClassVar = ()

        def __call__(self, plan):
            return plan

    apply(toy.plan(), [Wants({"modality": ("vision", "speech"), "classes": 2})])
    with pytest.raises(PlanError, match=re.escape("modality ('language' or 'speech'); plan 'toy' has 'vision'")):
        apply(toy.plan(), [Wants({"modality": ("language", "speech")})])
    facts = dataclasses.replace(toy.FACTS, more={"sigma": 3})
    apply(toy.plan(facts=facts), [Wants({"sigma": 3})])
    with pytest.raises(PlanError, match="requires the fact sigma"):
        apply(toy.plan(), [Wants({"sigma": 3})])


def test_what_is_no_plan_is_refused():
    @dataclass(frozen=True)
    class Nothing:
        SITES: ClassVar = ()

        def __call__(self, plan):
            return None

    with pytest.raises(PlanError, match="returned NoneType, not a Plan"):
        apply(toy.plan(), [Nothing()])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.stage("pretrian"), "no stage 'pretrian': did you mean 'pretrain'?"),
        (lambda p: p.add_inputs("tuen", other), "no stage 'tuen': did you mean 'tune'?"),
        (lambda p: p.edit("zzz*", other), "no stage 'zzz*': there is pretrain, tune"),
        (lambda p: p.insert(STAGE, before="x"), "no stage 'x'"),
        (lambda p: p.insert(STAGE), "exactly one of before= and after="),
        (lambda p: p.insert(STAGE, before="tune", after="tune"), "exactly one of before= and after="),
        (lambda p: p.replace(stages=()), "has no stage"),
        (lambda p: p.replace(stages=(*p.stages, p.stages[0])), "two stages called 'pretrain'"),
        (
            lambda p: p.insert(dataclasses.replace(STAGE, start="tune"), before="tune"),
            "'tune', which is no earlier stage",
        ),
        (lambda p: p.insert(dataclasses.replace(STAGE, reads=("pretain",)), after="tune"), "did you mean 'pretrain'?"),
        (
            lambda p: p.insert(dataclasses.replace(STAGE, start="pretrain@2"), after="tune"),
            "add that step to snapshots",
        ),
        (
            lambda p: p.insert(dataclasses.replace(STAGE, start="pretrain@x"), after="tune"),
            "add that step to snapshots",
        ),
        (lambda p: dataclasses.replace(STAGE, name="a b"), "without spaces"),
        (lambda p: dataclasses.replace(STAGE, name="a@3"), "without spaces and any of @"),
        (lambda p: dataclasses.replace(STAGE, steps=-1), "steps=-1 must be a whole number that is not"),
        (lambda p: dataclasses.replace(STAGE, steps=4.5), "steps=4.5 must be a whole number"),
        (lambda p: dataclasses.replace(STAGE, steps="4"), "steps='4' must be a whole number"),
        (lambda p: dataclasses.replace(STAGE, snapshots=(2,)), "snapshot at step 2 is outside 0…1"),
        (lambda p: Measure("m", other, when=0), "when=0 must be at least 1"),
    ],
)
def test_bad_plans_say_what_is_wrong(ask, message):
    with pytest.raises(PlanError) as error:
        ask(toy.plan())
    assert message in str(error.value)


def test_a_glob_reaches_every_stage_it_matches_and_no_other():
    plan = toy.plan().insert(dataclasses.replace(STAGE, name="tune-2"), after="tune")
    changed = plan.add_inputs("tune*", toy.ScaleInputs(2.0))
    hit = [s.name for s in changed.stages if s.inputs == toy.ScaleInputs(2.0)]
    assert hit == ["tune", "tune-2"]


def test_a_feature_glob_that_matches_no_module_raises_before_training():
    plan = toy.one_stage(features=(Feature("nrom", toy.feature_noise),))
    with pytest.raises(PlanError, match="'nrom' matches no module: did you mean 'norm'"):
        Engine(plan, 0, Store(None)).run()
    plan = toy.one_stage().replace(features=(Feature("layers.*", toy.feature_noise),))
    with pytest.raises(PlanError, match=re.escape("'layers.*' matches no module")):
        Engine(plan, 0, Store(None)).run()


def test_a_measure_takes_the_place_of_one_of_the_same_name():
    first, second = Measure("a", toy.accuracy), Measure("b", toy.accuracy)
    plan = toy.plan(measures=(first, second)).add_measures(Measure("a", toy.noisy), Measure("c", toy.noisy))
    assert [(m.name, m.fn) for m in plan.measures] == [("b", toy.accuracy), ("a", toy.noisy), ("c", toy.noisy)]


def test_where_a_stage_begins():
    own = dataclasses.replace(STAGE, name="own", build=toy.build)
    student = dataclasses.replace(STAGE, name="student", start="pretrain")
    plan = toy.plan().insert(own, after="tune").insert(student, after="own")
    assert [plan.previous(s) for s in plan.stages] == ["init", "pretrain", "init", "pretrain"]
