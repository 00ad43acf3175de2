"""Stale evidence is named; what cannot be compared is not called the same."""

import copy

import pytest

from perturbed.core.keys import machine, versions
from perturbed.core.registry import cards
from perturbed.errors import StaleError
from perturbed.evidence import again


def record(**scores):
    arms = {"a": {"effect": 0.5, "interval": [0.4, 0.6]}}
    return {"verdict": "supported", "arms": arms, "smoke": scores, "versions": versions(), "machine": machine()}


def test_a_smoke_score_may_move_by_rounding_only():
    again._compare_smoke("m", {"control": 0.5, "a": None}, {"control": 0.5 * (1 + 9e-5), "a": None})
    for found in ({"control": 0.5 * (1 + 2e-4), "a": None}, {"control": 0.5, "a": 0.1}, {"control": 0.5, "b": None}):
        with pytest.raises(StaleError, match="--register"):
            again._compare_smoke("m", {"control": 0.5, "a": None, "b": 0.0}, found)


def test_scores_of_another_machine_or_version_are_not_compared():
    assert again._comparable(record())
    assert again._comparable(record() | {"machine": {**machine(), "cores": 2}})
    assert not again._comparable(record() | {"versions": {**versions(), "torch": "0.1"}})
    assert not again._comparable(record() | {"machine": {**machine(), "cpu": "another"}})


def test_a_study_run_again_must_give_the_verdict_and_effects_within_the_intervals():
    fresh = copy.deepcopy(record())
    again._compare("m", record(), fresh)
    with pytest.raises(StaleError, match="null"):
        again._compare("m", record(), fresh | {"verdict": "null"})
    for effect in (0.39, None):
        with pytest.raises(StaleError, match="outside"):
            again._compare("m", record(), fresh | {"arms": {"a": {"effect": effect}}})
    asked = {"contrasts": {"why": {"effect": 0.1, "interval": [0.0, 0.2]}}}
    again._compare("m", record() | asked, fresh | asked)
    with pytest.raises(StaleError, match="the effect of why is None"):
        again._compare("m", record() | asked, fresh)


def test_every_method_has_its_turn(monkeypatch):
    asked = []
    monkeypatch.setattr(again, "committed", lambda slug: asked.append(slug) or (_ for _ in ()).throw(StaleError(slug)))
    for day in range(len(cards())):
        monkeypatch.setattr(again, "datetime", _Calendar(day))
        with pytest.raises(StaleError):
            again.rerun("rotate")
    assert sorted(asked) == sorted(cards())


class _Calendar:
    def __init__(self, day):
        self.day, self.date = day, self

    def today(self):
        return self

    def toordinal(self):
        return self.day


def test_a_method_without_evidence_says_how_to_make_it(monkeypatch):
    monkeypatch.setattr(again, "latest", lambda slug, own: None)
    with pytest.raises(StaleError, match="perturbed run hubble --register"):
        again.rerun("hubble")
