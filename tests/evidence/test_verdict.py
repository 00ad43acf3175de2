"""The verdict's order and rules, each by a case, and all of them against an implementation written from scratch."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from perturbed.evidence.statistics import DETECTABLE, equivalence_margin, holm, paired_t_p
from perturbed.evidence.verdict import VERDICT_VERSION, judge, judge_record

CONTROL = [0.50, 0.52, 0.47, 0.51, 0.49, 0.53, 0.48, 0.50]
NOISE = [0.010, -0.012, 0.004, 0.008, -0.006, 0.011, -0.009, 0.002]


def shifted(by, noise=1.0):
    return [c + by + noise * e for c, e in zip(CONTROL, NOISE, strict=True)]


def record(scores, **changes):
    seeds = list(range(len(next(iter(scores.values())))))
    return {
        "primary": "method",
        "reference": "control",
        "sham": None,
        "direction": "higher",
        "epsilon": 0.02,
        "alpha": 0.05,
        "transform": "raw",
        "bounds": [0.0, 1.0],
        "gates": {},
        "seeds": seeds,
        "scores": {arm: {str(i): x for i, x in zip(seeds, of, strict=True)} for arm, of in scores.items()},
    } | changes


# --- the rules, one by one


@pytest.mark.parametrize(
    ("treatment", "settings", "verdict", "trivial"),
    [
        (shifted(0.10), {}, "supported", False),
        (shifted(0.10), {"direction": "lower"}, "contradicted", False),
        (shifted(-0.10), {"direction": "lower"}, "supported", False),
        (shifted(-0.10), {}, "contradicted", False),
        (shifted(0.0), {}, "inconclusive", False),
        (shifted(0.0), {"epsilon": 0.02}, "null", True),
        (shifted(0.0, 9.0), {"epsilon": 0.02}, "inconclusive", False),
        (shifted(0.015), {"epsilon": 0.03}, "supported", True),
        (shifted(-0.015), {"epsilon": 0.03}, "contradicted", True),
        (shifted(0.10), {"epsilon": 0.03}, "supported", False),
        (shifted(0.0), {"direction": "equal", "epsilon": 0.02}, "supported", False),
        (shifted(0.10), {"direction": "equal", "epsilon": 0.02}, "contradicted", False),
        (shifted(-0.10), {"direction": "equal", "epsilon": 0.02}, "contradicted", False),
        (shifted(0.02, 2.0), {"direction": "equal", "epsilon": 0.02}, "inconclusive", False),
        (shifted(0.0, 0.0), {"epsilon": 0.02}, "deterministic", True),
        (shifted(0.1, 0.0), {"epsilon": 0.02}, "deterministic", False),
        (shifted(0.1, 0.0), {"direction": "equal", "epsilon": 0.02}, "deterministic", False),
    ],
)
def test_each_finding(treatment, settings, verdict, trivial):
    found = judge(treatment, CONTROL, **({"direction": "higher"} | settings))
    assert (found.verdict, found.trivial, found.finite, found.n) == (verdict, trivial, 8, 8)


def test_the_numbers_are_those_of_the_textbook():
    found = judge(shifted(0.10), CONTROL, direction="higher", epsilon=0.02)
    d = np.subtract(shifted(0.10), CONTROL)
    assert found.effect == pytest.approx(d.mean())
    np.testing.assert_allclose(found.interval, stats.ttest_1samp(d, 0).confidence_interval(0.95))
    assert found.p == 2 / 2**8
    assert found.p_t == pytest.approx(stats.ttest_1samp(d, 0).pvalue)
    assert found.p_equivalence == pytest.approx(stats.ttest_1samp(d, 0.02, alternative="less").pvalue)
    assert found.detectable == pytest.approx(DETECTABLE[8] * d.std(ddof=1))
    equal = judge(shifted(0.10), CONTROL, direction="equal", epsilon=0.02)
    assert equal.detectable == pytest.approx(equivalence_margin(8, d.std(ddof=1)))


def test_six_seeds_need_every_difference_on_one_side():
    # Interval well above 0 and t p = .02, yet the sign-flip test says .0625: a rule without it would say supported.
    d = [1.0, 1.2, 0.9, 1.1, 1.0, -0.05]
    found = judge(d, [0.0] * 6, direction="higher", bounds=(None, None))
    assert found.interval is not None
    assert found.interval[0] > 0
    assert found.p == 4 / 64 > 0.05 > found.p_t
    assert found.verdict == "inconclusive"
    assert judge([*d[:5], 0.05], [0.0] * 6, direction="higher").verdict == "supported"


def test_a_small_sign_flip_p_is_not_enough_either():
    d = [0.01, 0.02, 0.01, 0.02, 0.01, 5.0]
    found = judge(d, [0.0] * 6, direction="higher")
    assert found.p == 2 / 64
    assert found.interval[0] < 0
    assert found.verdict == "inconclusive"


# --- their order


def test_order_of_the_exceptions():
    diverged = [None, *shifted(0.1)[1:]]
    assert judge(diverged, CONTROL, direction="higher", gates_pass=False).verdict == "invalid"
    assert judge(shifted(0.1), CONTROL, direction="higher", gates_pass=False).verdict == "invalid"
    assert judge(diverged[:4], CONTROL[:4], direction="higher").verdict == "diverged"
    assert judge([1.0] * 5, [0.5] * 5, direction="higher").verdict == "screening"
    assert judge([1.0] * 6, [0.5] * 6, direction="higher").verdict == "deterministic"


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_seed_without_a_finite_score_drops_no_pair(bad):
    treatment, control = shifted(0.1), list(CONTROL)
    treatment[2] = bad
    control[5] = bad
    found = judge(treatment, control, direction="higher", epsilon=0.02)
    assert (found.verdict, found.finite, found.n) == ("diverged", 6, 8)
    assert (found.effect, found.interval, found.p, found.detectable, found.trivial) == (None, None, None, None, False)


def test_a_screening_shows_its_numbers_but_says_nothing():
    found = judge(shifted(0.0)[:5], CONTROL[:5], direction="higher", epsilon=0.5)
    assert found.verdict == "screening"
    assert found.interval is not None
    assert found.detectable is None
    assert not found.trivial
    single = judge([0.7], [0.5], direction="higher")
    assert (single.verdict, single.interval, single.p) == ("screening", None, None)
    assert single.effect == pytest.approx(0.2)


# --- deterministic


def test_deterministic_is_relative_to_the_scores():
    big = [1e6 * c for c in CONTROL]
    for error, verdict in ((1e-5, "deterministic"), (1e-1, "supported")):
        treatment = [c + 1e4 + error * (-1) ** i for i, c in enumerate(big)]
        found = judge(treatment, big, direction="higher")
        assert found.verdict == verdict
        assert (
            (found.interval is None) == (found.p is None) == (found.detectable is None) == (verdict == "deterministic")
        )
        assert found.effect == pytest.approx(1e4)


def test_deterministic_in_log_units_does_not_depend_on_the_unit_of_the_scores():
    for unit in (1e-12, 1.0, 1e12):
        control = [unit * c for c in CONTROL]
        treatment = [2 * c for c in control]
        found = judge(treatment, control, direction="lower", transform="log")
        assert found.verdict == "deterministic"
        assert found.effect == pytest.approx(-math.log(2))


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_at_a_floor_or_ceiling_nothing_is_deterministic(bound):
    stuck = [bound] * 8
    both = judge(stuck, stuck, direction="higher", bounds=(0.0, 1.0))
    assert (both.verdict, both.effect, both.interval, both.p) == ("inconclusive", 0.0, (0.0, 0.0), 1.0)
    assert both.detectable is None  # a saturated metric would otherwise seem able to detect anything
    assert judge(stuck, stuck, direction="higher", bounds=(0.0, 1.0), epsilon=0.1).verdict == "null"
    assert judge(stuck, stuck, direction="equal", bounds=(0.0, 1.0), epsilon=0.1).verdict == "supported"
    if bound:
        assert judge(stuck, [0.9] * 8, direction="higher", bounds=(0.0, 1.0)).verdict == "supported"
        assert judge(stuck, [0.9] * 8, direction="higher", bounds=(0.0, None)).verdict == "deterministic"


def test_one_seed_off_the_ceiling_is_not_saturation():
    found = judge([1.0] * 7 + [1.0 - 1e-12], [0.5] * 8, direction="higher", bounds=(0.0, 1.0))
    assert found.verdict == "supported"
    control = [
        0.25,
        0.5,
        0.75,
        0.5,
        0.25,
        0.0,
        0.5,
        0.25,
    ]  # one score at the floor, one of the treatment at the ceiling
    found = judge([c + 0.25 for c in control], control, direction="higher", bounds=(0.0, 1.0))
    assert found.verdict == "deterministic"


# --- invariants


def test_everything_at_once_against_a_second_implementation():
    """Rules of the design written anew, with SciPy's t tests and enumeration by itertools."""

    def second(d, direction, epsilon):
        n = len(d)
        low, high = stats.ttest_1samp(d, 0).confidence_interval(0.95)
        flips = np.array(list(itertools.product((1, -1), repeat=n))) @ d
        p = (np.abs(flips) >= abs(d.sum()) - 1e-12).mean()
        tost = max(
            stats.ttest_1samp(d, -epsilon, alternative="greater").pvalue,
            stats.ttest_1samp(d, epsilon, alternative="less").pvalue,
        )
        if direction == "equal":
            return (
                "supported" if tost <= 0.05 else "contradicted" if low > epsilon or high < -epsilon else "inconclusive"
            )
        if low > 0 and p <= 0.05:
            return "supported"
        if high < 0 and p <= 0.05:
            return "contradicted"
        return "null" if tost <= 0.05 else "inconclusive"

    rng = np.random.default_rng(0)
    seen = set()
    for case in range(240):
        n, direction = int(rng.integers(6, 10)), ("higher", "lower", "equal")[case % 3]
        control = rng.normal(5, 1, n)
        treatment = control + rng.normal(rng.choice([-2, -1, 0, 0, 1, 2]), rng.choice([0.5, 1, 2]), n)
        expected = second((treatment - control) * (-1 if direction == "lower" else 1), direction, 1.2)
        found = judge(treatment.tolist(), control.tolist(), direction=direction, epsilon=1.2)
        assert found.verdict == expected
        seen.add((direction, expected))
    assert len(seen) == 11  # four verdicts for higher and lower, three for equal: each came up


def test_higher_and_lower_mirror_each_other():
    a, b = judge(shifted(0.1), CONTROL, direction="higher"), judge(CONTROL, shifted(0.1), direction="lower")
    assert a.verdict == b.verdict == "supported"
    assert (a.effect, a.interval, a.p) == (pytest.approx(b.effect), pytest.approx(b.interval), b.p)


def test_mappings_are_paired_by_seed_and_sequences_by_position():
    forward = {i: x for i, x in enumerate(shifted(0.1))}
    backward = dict(reversed(list(enumerate(CONTROL))))
    assert judge(forward, backward, direction="higher") == judge(shifted(0.1), CONTROL, direction="higher")
    assert judge(shifted(0.1), CONTROL[::-1], direction="higher") != judge(shifted(0.1), CONTROL, direction="higher")


# --- errors


def test_unpaired_seeds_are_named():
    with pytest.raises(ValueError, match="seeds 0, 3 only in the treatment and seed 9 only in the reference"):
        judge({0: 1.0, 1: 1.0, 3: 1.0}, {1: 1.0, 9: 1.0}, direction="higher")
    with pytest.raises(ValueError, match="seed 2 only in the treatment"):
        judge([1.0, 1.0, 1.0], [1.0, 1.0], direction="higher")
    with pytest.raises(ValueError, match="no seeds to judge"):
        judge([], [], direction="higher")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"direction": "equal"}, "'equal' needs an epsilon"),
        ({"direction": "up"}, "higher, lower or equal, not 'up'"),
        ({"direction": "lower", "transform": "ln"}, "raw or log"),
        ({"direction": "lower", "alpha": 5}, "alpha must lie between 0 and 1"),
        ({"direction": "lower", "epsilon": -0.1}, "epsilon, the smallest effect of interest, must be positive"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        judge(CONTROL, CONTROL, **settings)


def test_a_log_verdict_of_a_score_at_zero_names_the_seed():
    with pytest.raises(ValueError, match=r"seed 31 \(0\)"):
        judge({30: 1.0, 31: 0.0}, {30: 1.0, 31: 1.0}, direction="lower", transform="log")


# --- records


def test_a_record_is_judged_arm_by_arm():
    scores = {"control": CONTROL, "method": shifted(0.10), "sham": shifted(0.0), "other": shifted(0.09)}
    found = judge_record(record(scores, sham="sham"))
    assert (found["verdict"], found["trivial"], found["specific"]) == ("supported", False, True)
    assert set(found["arms"]) == {"method", "sham", "other"}
    assert found["arms"]["method"]["p_holm"] is None
    assert found["arms"]["method"]["specific"] is True
    assert found["arms"]["sham"] | {"specific": None} == found["arms"]["sham"]
    assert found["arms"]["sham"]["verdict"] == "null"
    p = [paired_t_p(np.subtract(scores[arm], CONTROL)) for arm in ("sham", "other")]
    assert [found["arms"][arm]["p_holm"] for arm in ("sham", "other")] == pytest.approx(holm(p).tolist())
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    single = judge(shifted(0.10), CONTROL, direction="higher", epsilon=0.02, bounds=(0.0, 1.0))
    assert found["arms"]["method"]["interval"] == list(single.interval)
    assert set(found["arms"]["method"]) == {
        "reference", "effect", "interval", "p", "p_holm", "detectable", "verdict", "trivial", "specific", "finite", "n",
    }  # fmt: skip


def test_only_the_primary_arm_is_compared_with_the_reference():
    scores = {"control": CONTROL, "method": shifted(0.10), "scratch": shifted(0.10, -1.0), "other": shifted(0.10)}
    found = judge_record(record(scores, reference="scratch"))
    assert [found["arms"][arm]["reference"] for arm in ("method", "scratch", "other")] == [
        "scratch",
        "control",
        "control",
    ]
    assert abs(found["arms"]["method"]["effect"]) < 0.01
    assert found["arms"]["other"]["effect"] == pytest.approx(0.101)
    assert found["verdict"] == found["arms"]["method"]["verdict"] != "supported"


def test_secondary_arms_pay_for_being_many():
    rng = np.random.default_rng(5)
    weak = (np.array(CONTROL) + rng.normal(0.010, 0.010, 8)).tolist()
    assert judge(weak, CONTROL, direction="higher", epsilon=0.02).verdict == "supported"
    few = judge_record(record({"control": CONTROL, "method": shifted(0.1), "weak": weak}))
    assert few["arms"]["weak"]["verdict"] == "supported"
    crowd = {f"arm{i}": shifted(0.0, 3 + i) for i in range(9)}
    many = judge_record(record({"control": CONTROL, "method": shifted(0.1), "weak": weak, **crowd}))
    assert many["arms"]["weak"]["p"] == few["arms"]["weak"]["p"] <= 0.05 < many["arms"]["weak"]["p_holm"]
    assert many["arms"]["weak"]["verdict"] in ("null", "inconclusive")
    assert many["arms"]["method"] == few["arms"]["method"]  # the primary contrast pays nothing


def test_an_effect_that_the_sham_has_too_is_not_specific():
    def specific(sham, **changes):
        scores = {"control": CONTROL, "method": shifted(0.10), "sham": sham}
        return judge_record(record(scores, sham="sham", **changes))["specific"]

    assert specific(shifted(0.0)) is True
    assert specific(shifted(0.10, -1.0)) is False
    assert specific(shifted(0.10)) is False  # the very same runs: the difference is 0 without any spread
    assert specific(shifted(0.20)) is False  # the sham does more: the method's content is not what helps
    assert specific([None, *shifted(0.0)[1:]]) is None
    assert specific(shifted(0.20), direction="lower") is False  # the claim fails, and the sham harms more
    assert specific(shifted(0.0), direction="lower") is True  # harm that the sham does not do
    assert judge_record(record({"control": CONTROL, "method": shifted(0.1)}, sham="left_out"))["specific"] is None


def test_beside_another_reference_the_sham_only_has_to_differ():
    scores = {"control": CONTROL, "strong": shifted(0.3), "method": shifted(0.2), "sham": shifted(0.0, -1.0)}
    found = judge_record(record(scores, sham="sham", reference="strong"))
    assert found["arms"]["method"]["effect"] < 0
    assert found["specific"] is True
    same = judge_record(record({**scores, "sham": shifted(0.2, -1.0)}, sham="sham", reference="strong"))
    assert same["specific"] is False


def test_a_failed_gate_makes_every_arm_invalid_and_an_undefined_one_none():
    scores = {"control": CONTROL, "method": shifted(0.10), "other": shifted(0.10)}
    undefined = judge_record(record(scores, gates={"off_equals_control": {"pass": None, "detail": "no OFF"}}))
    assert undefined["verdict"] == "supported"
    failed = judge_record(record(scores, gates={"a": {"pass": True, "detail": ""}, "b": {"pass": False, "detail": ""}}))
    assert failed["verdict"] == failed["arms"]["other"]["verdict"] == "invalid"
    assert failed["arms"]["method"]["effect"] == pytest.approx(0.101)


def test_a_diverged_arm_leaves_the_others_alone():
    scores = {"control": CONTROL, "method": shifted(0.10), "other": [*shifted(0.1)[:7], None], "third": shifted(0.1)}
    found = judge_record(record(scores))
    assert found["verdict"] == "supported"
    other = found["arms"]["other"]
    assert (other["verdict"], other["finite"], other["n"], other["p_holm"]) == ("diverged", 7, 8, None)
    # A p-value that does not exist is not one of the family.
    assert found["arms"]["third"]["p_holm"] == pytest.approx(paired_t_p(np.subtract(shifted(0.1), CONTROL)))


def test_records_that_do_not_hang_together_are_refused():
    scores = {"control": CONTROL, "method": shifted(0.10)}
    with pytest.raises(ValueError, match="no scores for arm 'scratch', only for control, method"):
        judge_record(record(scores, reference="scratch"))
    torn = record(scores)
    del torn["scores"]["method"]["3"]
    torn["scores"]["method"]["11"] = 0.5
    with pytest.raises(
        ValueError, match="arm 'method' do not fit the record's seeds: missing 3, not among the seeds 11"
    ):
        judge_record(torn)


def test_importing_the_verdict_loads_nothing_heavy():
    program = (
        "import sys; from perturbed.evidence import verdict; "
        "heavy = {'numpy', 'scipy', 'torch', 'perturbed.core'} & set(sys.modules); assert not heavy, heavy; "
        "verdict.judge([1.0, 2, 3, 4, 5, 7], [1.0] * 6, direction='equal', epsilon=1.0); "
        "heavy = {'scipy.stats', 'torch', 'perturbed.core'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert VERDICT_VERSION == 1
