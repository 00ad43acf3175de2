"""What every method must do, run over all that are found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from probe import Case, cases, outcome

from perturbed.core.keys import describe, digest
from perturbed.core.plan import Plan, apply, changed_sites
from perturbed.core.store import Store
from perturbed.errors import PlanError

CASES = cases()
each = pytest.mark.parametrize("case", CASES, ids=[c.label for c in CASES])
pytestmark = pytest.mark.timeout(60)


def exempt(case: Case, rule: str, tell: Any) -> None:
    reason = getattr(case.intervention, "EXEMPT", {}).get(rule)
    if reason:
        tell(case.label, rule, reason)
        pytest.skip(f"exempt from {rule}: {reason}")


@each
def test_constructs_by_default_and_survives_json(case: Case) -> None:
    kind = type(case.intervention)
    assert kind() == kind(), "two default constructions differ"
    fields = json.loads(json.dumps(dataclasses.asdict(case.intervention)))
    again = kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    assert again == case.intervention
    assert kind.__name__ in repr(case.intervention)


@each
def test_off_is_the_control_bit_for_bit(case: Case, tell: Any) -> None:
    if case.intervention.OFF is None:
        tell(case.label, "off", "the method has no off; its own test checks the limit that its sheet names")
        pytest.skip("no off")
    plan = case.plan()
    assert outcome(apply(plan, [case.with_fields("OFF")])).same(outcome(plan))


@each
def test_strong_is_not_the_identity_and_tiny_moves_less(case: Case, tell: Any) -> None:
    exempt(case, "strong", tell)
    plan = case.plan()
    control = outcome(plan)
    strong = outcome(apply(plan, [case.with_fields("STRONG")]))
    assert not strong.same(control)
    if hasattr(case.intervention, "TINY"):
        short = case.plan(steps=1)
        first = outcome(short)
        tiny = outcome(apply(short, [case.with_fields("TINY")])).distance(first)
        assert tiny < outcome(apply(short, [case.with_fields("STRONG")])).distance(first)


@each
def test_changes_the_sites_it_declares(case: Case) -> None:
    plan = case.plan()
    changed = case.with_fields("STRONG")(plan)
    touched = changed_sites(plan, changed)
    assert touched <= set(case.intervention.SITES)
    reshaped = [(s.name, s.steps, s.start) for s in changed.stages] != [(s.name, s.steps, s.start) for s in plan.stages]
    assert touched == set(case.intervention.SITES) or reshaped


@each
def test_twice_is_the_same_and_nothing_outside_moves(case: Case) -> None:
    plan = case.plan()
    before = digest(describe(plan))
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    treated = apply(plan, [case.with_fields("STRONG")])
    assert outcome(treated).same(outcome(treated))
    assert digest(describe(plan)) == before
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


class Killed(Exception):
    """What stands for a kill in the midst of training."""


@dataclasses.dataclass(frozen=True)
class Killer:
    """A data slot whose stream dies at a step."""

    inner: Any
    at: int

    def __call__(self, ctx: Any) -> Any:
        stream = self.inner(ctx)
        killer = self

        class Dying:
            def __next__(self) -> Any:
                if ctx.step == killer.at:
                    raise Killed
                return next(stream)

            def state_dict(self) -> Any:
                return stream.state_dict()

            def load_state_dict(self, state: Any) -> None:
                stream.load_state_dict(state)

        return Dying()

    def fingerprint(self) -> str:
        return digest(describe(self.inner))  # the key of what it wraps, so that the resumed run finds the checkpoint


@each
def test_resumes_bit_for_bit(case: Case, tmp_path: Any) -> None:
    treated = apply(case.plan(), [case.with_fields("STRONG")])
    last = treated.stages[-1]
    if last.steps < 2:
        pytest.skip("the last stage is not trained")

    def dying(at: int) -> Plan:
        return treated.edit(last.name, lambda s: dataclasses.replace(s, data=Killer(s.data, at)))

    store = Store(tmp_path)
    with pytest.raises(Killed):
        outcome(dying(last.steps - 1), store=store, checkpoint_s=0.0)
    resumed = outcome(dying(-1), store=store)
    whole = outcome(treated)
    assert resumed.same(whole)
    assert all(torch.equal(resumed.weights[k], whole.weights[k]) for k in whole.weights)


@each
def test_composes_with_partners_in_both_orders(case: Case) -> None:
    changed = apply(case.plan(steps=2), [case.with_fields("STRONG")])  # another network may lack a partner's layers
    fitting = (c for c in CASES if c.label != case.label and _fits(changed, c))
    for partner in itertools.islice(fitting, 2):
        for arm in ((case, partner), (partner, case)):
            outcome(apply(case.plan(steps=2), [c.with_fields("STRONG") for c in arm]))


def _fits(plan: Plan, case: Case) -> bool:
    try:
        outcome(apply(plan, [case.with_fields("STRONG")]))  # a glob is matched when the model is there
    except PlanError:
        return False
    return True


@each
def test_a_missing_fact_is_named_with_the_remedy(case: Case) -> None:
    plan = case.plan()
    for fact in getattr(case.intervention, "REQUIRES", {}):
        poorer = plan.replace(facts=dataclasses.replace(plan.facts, **{fact: None}))
        with pytest.raises(PlanError, match=rf"{fact}.*perturbed plans"):
            apply(poorer, [case.intervention])


@each
def test_a_glob_that_matches_nothing_raises(case: Case) -> None:
    names = [f.name for f in dataclasses.fields(case.intervention) if f.name in ("stage", "where")]
    for name in names:
        lost = dataclasses.replace(case.intervention, **{name: "no-such-*"})
        with pytest.raises(PlanError, match="no-such"):
            outcome(apply(case.plan(steps=1), [lost]))
