"""The whole verdict path on simulated studies: it errs as rarely, and finds as often, as it says.

Each study is raw scores of two arms that share what a seed brings; `judge` sees nothing else. Bounds are four
Monte-Carlo standard errors, so that a test fails by chance once in ten thousand times (and, being seeded, never).
"""

import math

import numpy as np
import pytest
from scipy import stats

from perturbed.evidence.statistics import DETECTABLE, equivalence_margin
from perturbed.evidence.verdict import judge

DRAWS = 6000
SEEDS = (6, 8, 12)


def studies(n, effect, draws=DRAWS, **settings):
    """Judge simulated studies with paired differences of standard deviation 1 about ``effect``."""
    rng = np.random.default_rng([n, round(1000 * abs(effect))])
    control = 10 + 3 * rng.standard_normal((draws, n))  # what pairing removes
    treatment = control + effect + rng.standard_normal((draws, n))
    settings = {"direction": "higher"} | settings
    pairs = zip(treatment.tolist(), control.tolist(), strict=True)
    return [judge(t, c, **settings) for t, c in pairs]


def share(found, *verdicts):
    return sum(study.verdict in verdicts for study in found) / len(found)


def margin(rate, draws=DRAWS):
    """Four standard errors of a share."""
    return 4 * math.sqrt(rate * (1 - rate) / draws)


@pytest.mark.parametrize("n", SEEDS)
def test_without_an_effect_findings_are_rarer_than_alpha_and_the_interval_covers_zero(n):
    found = studies(n, 0.0)
    assert share(found, "supported") < 0.025 + margin(0.025)
    assert share(found, "contradicted") < 0.025 + margin(0.025)
    covered = np.mean([study.interval[0] <= 0 <= study.interval[1] for study in found])
    assert covered == pytest.approx(0.95, abs=margin(0.95))
    # The test is not just silent: the joint rule's own rate, by counting among the sign flips, is near its level.
    assert share(found, "supported", "contradicted") > {6: 0.010, 8: 0.028, 12: 0.038}[n]
    p = np.array([study.p for study in found])
    for level in (2 / 2**n, 0.05, 0.2, 0.5):
        reachable = math.floor(level * 2**n / 2) * 2 / 2**n  # an exact p takes every attainable level exactly
        assert (p <= level + 1e-12).mean() == pytest.approx(reachable, abs=margin(reachable))


@pytest.mark.parametrize("n", SEEDS)
def test_the_detectable_effect_is_supported_four_times_in_five(n):
    found = studies(n, DETECTABLE[n])
    assert share(found, "supported") == pytest.approx(0.8, abs=margin(0.8))
    assert share(found, "contradicted") == 0
    covered = np.mean([study.interval[0] <= DETECTABLE[n] <= study.interval[1] for study in found])
    assert covered == pytest.approx(0.95, abs=margin(0.95))
    assert np.mean([study.effect for study in found]) == pytest.approx(DETECTABLE[n], abs=4 / math.sqrt(n * DRAWS))


def test_the_formula_of_the_t_test_alone_would_promise_too_much_at_six_seeds():
    alone = 1.4345  # effect that the t interval supports with 80 % power at n = 6
    assert stats.nct.sf(stats.t.ppf(0.975, 5), 5, alone * math.sqrt(6)) == pytest.approx(0.8, abs=1e-3)
    assert share(studies(6, alone), "supported") < 0.8 - 3 * margin(0.8)


@pytest.mark.parametrize("direction", ["higher", "lower"])
@pytest.mark.parametrize("n", SEEDS)
def test_at_the_edge_of_epsilon_a_null_is_said_falsely_at_most_one_time_in_twenty(n, direction):
    epsilon = 1.5
    found = studies(n, epsilon, direction=direction, epsilon=epsilon)
    assert share(found, "null") < 0.05 + margin(0.05)
    # Equivalence itself, before a finding in either direction takes precedence, has exactly that rate.
    equivalent = np.mean([study.p_equivalence <= 0.05 for study in found])
    assert equivalent == pytest.approx(0.05, abs=margin(0.05))
    assert np.mean([study.trivial for study in found]) < 0.025 + margin(0.025)


@pytest.mark.parametrize("n", SEEDS)
def test_equality_is_claimed_falsely_at_most_one_time_in_twenty_and_shown_as_often_as_planned(n):
    epsilon = equivalence_margin(n, 1.0)
    edge = studies(n, epsilon, direction="equal", epsilon=epsilon)
    assert share(edge, "supported") == pytest.approx(0.05, abs=margin(0.05))
    assert share(edge, "contradicted") < 0.025 + margin(0.025)
    true = studies(n, 0.0, direction="equal", epsilon=epsilon)
    assert share(true, "supported") == pytest.approx(0.8, abs=margin(0.8))
    assert share(true, "contradicted") < 0.001


def test_a_null_needs_precision_and_a_wide_study_stays_inconclusive():
    precise = studies(12, 0.0, epsilon=equivalence_margin(12, 1.0))
    assert share(precise, "null") > 0.8 - 0.05 - margin(0.8)
    wide = studies(6, 0.0, epsilon=0.3)
    assert share(wide, "null") < 0.05
    assert share(wide, "inconclusive") > 0.9


def test_twenty_seeds_keep_their_level_and_power():
    draws = 1500
    assert share(studies(20, 0.0, draws), "supported", "contradicted") < 0.05 + margin(0.05, draws)
    assert share(studies(20, DETECTABLE[20], draws), "supported") == pytest.approx(0.8, abs=margin(0.8, draws))


def test_ignoring_the_pairing_would_lose_the_power():
    """A rule that compared unpaired means, judged here by SciPy, finds next to nothing where ours finds 80 %."""
    rng = np.random.default_rng(0)
    control = 10 + 3 * rng.standard_normal((DRAWS, 8))
    treatment = 10 + 3 * rng.standard_normal((DRAWS, 8)) + DETECTABLE[8] + rng.standard_normal((DRAWS, 8))
    found = [judge(t, c, direction="higher").verdict for t, c in zip(treatment.tolist(), control.tolist(), strict=True)]
    assert found.count("supported") / DRAWS < 0.2
