"""A/A: real training runs that differ in nothing but their draws must come out without a finding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import perturbed as pt
from perturbed.core.plan import Plan
from perturbed.core.run import Engine
from perturbed.core.store import Store
from perturbed.evidence.verdict import judge
from perturbed.plans.digits import Digits

FINDINGS = ("supported", "contradicted")
PLAN = Digits(width=4, pretrain_steps=60, finetune_steps=5, held_out=300)()


@dataclass(frozen=True)
class OtherName:
    """Renames a stage: its random streams, and nothing else, become others."""

    SITES: ClassVar = ("data",)

    def __call__(self, plan: Plan) -> Plan:
        return plan.edit("pretrain", lambda s: dataclasses.replace(s, name="pretrain-again"))


@pytest.mark.slow
def test_a_study_of_renamed_streams_finds_nothing():
    record = pt.compare(PLAN, {"again": [OtherName()]}, seeds=8, epsilon=0.2, workers=1)
    entry = record["arms"]["again"]
    assert entry["effect"] != 0
    assert entry["verdict"] in ("null", "inconclusive")


@pytest.mark.slow
def test_real_runs_paired_at_random_are_called_a_finding_as_often_as_nominal():
    scores = np.array([Engine(PLAN, seed, Store(None)).run().scores["accuracy"] for seed in range(40)])
    rng = np.random.default_rng(0)
    # studies drawn from the same 40 runs overlap: the reference is the same procedure on 40 independent normal scores
    nominal = [found(rng.standard_normal(40), rng) for _ in range(40)]
    assert np.mean(nominal) == pytest.approx(0.05, abs=0.02)
    assert found(scores, rng) <= max(nominal)
    assert found(scores, rng, effect=2 * scores.std()) > max(nominal), "an effect of two deviations is found more often"


def found(scores, rng, effect=0.0, trials=200):
    """Share of studies of 8 pairs, drawn from ``scores``, that come out as a finding."""
    hits = 0
    for _ in range(trials):
        t, c = rng.permutation(scores)[:16].reshape(2, 8)
        hits += judge(list(t + effect), list(c), direction="higher", epsilon=1e-6).verdict in FINDINGS
    return hits / trials
