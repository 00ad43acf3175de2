"""What every method says of itself, and that its committed evidence is that of the study as it stands."""

from __future__ import annotations

import pytest
from probe import methods

from perturbed.core.registry import Method
from perturbed.evidence.ledger import latest, recompute
from perturbed.evidence.runner import _gate_jobs

METHODS = methods()
each = pytest.mark.parametrize("method", METHODS, ids=[m.card.slug for m in METHODS])


@each
def test_card_is_complete(method: Method) -> None:
    card = method.card
    assert set(card.claim) == {"text", "paper"}
    assert card.kind in ("intervention", "measure", "study")
    assert 60 <= len(card.summary) <= 600
    assert card.sites
    assert card.year >= 1990


@each
def test_study_says_beforehand_what_would_count(method: Method) -> None:
    study = method.study
    assert study.epsilon is not None
    assert study.epsilon > 0
    assert study.why_epsilon
    assert study.sanity is not None
    assert study.paper is not None
    assert study.paper.gpu_hours() > 0
    assert study.seeds >= 8
    assert "smoke" in study.scales
    assert set(study.at("full").arms) >= set(study.at("laptop").arms)
    assert _gate_jobs(study.at("smoke"))


@each
def test_committed_evidence_is_of_this_study(method: Method) -> None:
    record = latest(method.card.slug)
    assert record is not None, f"no ledger: perturbed run {method.card.slug} --register"
    recompute(record)
    study = method.study
    told = ("metric", "direction", "epsilon", "primary", "reference", "sham", "transform", "unit")
    assert {k: record[k] for k in told} == {k: getattr(study, k) for k in told}
    assert record["registered"] is True
    assert len(record["seeds"]) >= 8
    assert set(record["scores"]) == {"control", *study.arms}
    assert record["plan"] == repr(study.at("laptop").plan)
    assert record["claim"] == method.card.claim
