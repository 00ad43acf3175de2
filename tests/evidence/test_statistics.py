"""Statistics against closed forms, brute force and SciPy's independent implementations."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from perturbed.evidence import statistics as st


def normal(n, seed, shift=0.3):
    return np.random.default_rng(seed).standard_normal(n) + shift


# --- differences


def test_positive_always_means_as_claimed():
    t, c = [2.0, 3.0], [1.0, 5.0]
    assert st.paired_differences(t, c).tolist() == [1, -2]
    assert st.paired_differences(t, c, direction="lower").tolist() == [-1, 2]
    assert st.paired_differences(t, c, direction="equal").tolist() == [1, -2]


def test_a_log_difference_is_relative_and_ignores_the_unit():
    t, c = np.array([1.1, 2.0]), np.array([1.0, 4.0])
    d = st.paired_differences(t, c, direction="lower", transform="log")
    np.testing.assert_allclose(d, [-math.log(1.1), math.log(2)])
    np.testing.assert_allclose(st.paired_differences(1000 * t, 1000 * c, direction="lower", transform="log"), d)


def test_a_log_of_scores_that_are_not_positive_names_arm_and_seed():
    with pytest.raises(ValueError, match=r"the reference has others at seed 7 \(0\), 9 \(-1\).*transform='raw'"):
        st.paired_differences([1.0, 1.0, 1.0], [0.0, 2.0, -1.0], transform="log", seeds=[7, 8, 9])


def test_scores_that_cannot_be_paired_or_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="2 treatment scores cannot be paired with 3"):
        st.paired_differences([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"positions \[1\] are not"):
        st.paired_differences([1.0, math.nan], [1.0, 2.0])


# --- t statistics


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_t_interval_and_p_are_those_of_scipy(n):
    d = normal(n, n)
    reference = stats.ttest_1samp(d, 0)
    np.testing.assert_allclose(st.t_interval(d), reference.confidence_interval(0.95), rtol=1e-12)
    np.testing.assert_allclose(st.t_interval(d, 0.8), reference.confidence_interval(0.8), rtol=1e-12)
    assert st.paired_t_p(d) == pytest.approx(reference.pvalue, rel=1e-10)
    assert st.mean(d) == pytest.approx(d.mean())
    assert st.sd(d) == pytest.approx(d.std(ddof=1))


def test_the_t_test_uses_the_pairing():
    treatment, control = np.arange(8.0) + 0.1 + 0.01 * normal(8, 1), np.arange(8.0)
    paired = st.paired_t_p(st.paired_differences(treatment, control))
    assert paired < 1e-5 < 0.5 < stats.ttest_ind(treatment, control).pvalue


def test_t_p_without_spread():
    assert st.paired_t_p([0.0, 0.0, 0.0]) == 1
    assert st.paired_t_p([0.5, 0.5, 0.5]) == 0


# --- sign flips


def enumerated(d):
    """Share of all sign assignments whose absolute sum reaches the observed one, in exact integer arithmetic."""
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))
    ]
    return sum(total >= abs(sum(d)) for total in sums) / len(sums)


@pytest.mark.parametrize("n", range(1, 11))
def test_sign_flip_p_is_the_enumeration_with_ties_and_zeros(n):
    for seed in range(20):
        whole = np.random.default_rng([n, seed]).integers(-3, 6, n).tolist()
        assert st.sign_flip_p(whole) == enumerated(whole)


def test_sign_flip_p_is_the_permutation_test_of_scipy():
    d = normal(11, 4)
    reference = stats.permutation_test(
        (d,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=9999, vectorized=True
    )
    assert st.sign_flip_p(d) == pytest.approx(reference.pvalue, abs=1e-12)


def test_sign_flip_p_of_twenty_seeds_counts_every_assignment():
    d = normal(20, 5)
    sums = st.signed_sums(d)
    assert sums.size == 2**20
    assert st.sign_flip_p(d) == (np.abs(sums) >= abs(d.sum()) - 1e-9).mean()


def test_signed_sums_are_all_of_them():
    d = [0.5, 2.0, -7.0]
    brute = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=3)]
    assert sorted(st.signed_sums(d)) == sorted(brute)


def test_sums_that_differ_by_rounding_alone_are_ties():
    d = [0.1, 0.2, -0.3]
    assert sum(d) != 0  # 5.6e-17: a comparison without tolerance would call this the most extreme assignment but one
    assert st.sign_flip_p(d) == 1
    d = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for order in itertools.islice(itertools.permutations(d), 0, 720, 60):
        assert st.sign_flip_p(order) == 2 / 64
    assert st.sign_flip_p([0.3, 0.1, 0.2, 0.0]) == enumerated([3, 1, 2, 0]) == 4 / 16


@pytest.mark.parametrize(("n", "smallest"), [(3, 0.25), (5, 0.0625), (6, 0.03125), (8, 0.0078125), (10, 0.001953125)])
def test_the_smallest_p_is_two_in_two_to_the_n(n, smallest):
    assert st.sign_flip_p(normal(n, 0, shift=50)) == smallest == 2 / 2**n


def test_sign_flip_p_depends_on_no_sign_scale_or_order():
    d = normal(9, 8)
    p = st.sign_flip_p(d)
    assert 2 / 2**9 < p < 1
    assert st.sign_flip_p(-d) == st.sign_flip_p(1e-6 * d) == st.sign_flip_p(d[::-1]) == p
    assert st.sign_flip_p([0.0] * 7) == 1


def test_beyond_twenty_seeds_the_flips_are_seeded_and_right():
    d = normal(23, 2, shift=0.35)
    exact = (np.abs(st.signed_sums(d)) >= abs(d.sum()) - 1e-9).mean()
    p = st.sign_flip_p(d)
    assert 0.01 < exact < 0.5
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / st.FLIPS)
    assert st.sign_flip_p(d) == p != st.sign_flip_p(d, seed=1)
    assert p * 100_000 == pytest.approx(round(p * 100_000))  # (1 + count) / (1 + 99,999)
    assert st.sign_flip_p(normal(70, 1, shift=9)) == 1 / 100_000
    with pytest.raises(ValueError, match="at least 99999"):
        st.sign_flip_p(d, flips=999)


# --- equivalence


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.8])
def test_tost_is_the_larger_of_two_one_sided_tests(shift):
    d, epsilon = normal(8, 3, shift), 0.5
    above = stats.ttest_1samp(d, -epsilon, alternative="greater").pvalue
    below = stats.ttest_1samp(d, epsilon, alternative="less").pvalue
    assert st.tost_p(d, epsilon) == pytest.approx(max(above, below), rel=1e-10)


def test_tost_at_05_is_the_90_percent_interval_within_epsilon():
    d = normal(10, 6, shift=0.1)
    widest = max(abs(end) for end in st.t_interval(d, 0.90))
    assert st.tost_p(d, widest) == pytest.approx(0.05, rel=1e-9)
    assert st.tost_p(d, widest * 1.01) < 0.05 < st.tost_p(d, widest * 0.99)


def test_absence_of_significance_is_not_equivalence():
    d = [-5.0, 6.0, -4.0, 5.0, 3.0, -4.0]
    assert st.paired_t_p(d) > 0.5
    assert st.tost_p(d, 0.5) > 0.05


def test_tost_without_spread_and_with_a_bad_epsilon():
    assert st.tost_p([0.1] * 6, 0.2) == 0
    assert st.tost_p([0.5] * 6, 0.5) == 1
    for epsilon in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon, the smallest effect of interest, must be positive"):
            st.tost_p([1.0, 2.0], epsilon)


# --- many arms


def test_holm_by_hand_and_by_its_definition():
    np.testing.assert_allclose(st.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    p = np.random.default_rng(0).random(9) ** 3
    order = sorted(range(9), key=lambda i: p[i])
    for rank, i in enumerate(order):
        expected = min(1, max((9 - j) * p[order[j]] for j in range(rank + 1)))
        assert st.holm(p)[i] == pytest.approx(expected)
    assert (st.holm(p) <= np.minimum(1, 9 * p)).all()  # never worse than Bonferroni
    assert st.holm([]).size == 0


def test_false_discovery_is_that_of_scipy():
    p = np.random.default_rng(1).random(30) ** 3
    np.testing.assert_allclose(st.false_discovery(p), stats.false_discovery_control(p))
    assert not np.allclose(st.false_discovery(p), st.holm(p))


@pytest.mark.parametrize("adjust", [st.holm, st.false_discovery])
def test_p_values_outside_their_range_are_refused(adjust):
    for bad in ([0.5, 1.2], [-0.1], [math.nan]):
        with pytest.raises(ValueError, match="p-values in"):
            adjust(bad)


# --- effect sizes


def test_effect_sizes_by_hand():
    d = [1.0, 2.0, 3.0]
    assert st.cohen_dz(d) == 2
    assert st.hedges_g(d) == pytest.approx(2 * (1 - 3 / 7))
    with pytest.raises(ValueError, match="all the same"):
        st.cohen_dz([1.0, 1.0])


def test_hedges_factor_is_close_to_the_exact_one():
    n = 10
    exact = math.gamma((n - 1) / 2) / (math.sqrt((n - 1) / 2) * math.gamma((n - 2) / 2))
    d = normal(n, 1)
    assert st.hedges_g(d) / st.cohen_dz(d) == pytest.approx(exact, rel=2e-3)


def test_wins_count_ties_half_and_leave_them_out_of_the_interval():
    share, interval = st.wins([1.0, 2.0, 0.0, -1.0, 3.0, 0.0])
    assert share == (3 + 1) / 6
    np.testing.assert_allclose(interval, stats.binomtest(3, 4).proportion_ci(0.95, method="wilson"))
    for won in range(6):
        d = [1.0] * won + [-1.0] * (5 - won)
        expected = stats.binomtest(won, 5).proportion_ci(0.95, method="wilson")
        np.testing.assert_allclose(st.wins(d)[1], expected, atol=1e-15)
    assert st.wins([0.0, 0.0]) == (0.5, None)


def test_pairing_gain_is_one_for_a_shift_and_zero_for_strangers():
    c = normal(8, 0)
    assert st.pairing_gain(c + 3, c) == pytest.approx(1)
    assert st.pairing_gain(-c, c) == pytest.approx(-1)  # pairing opposites doubles the variance
    t, c = np.array([1.0, -1.0, 1.0, -1.0]), np.array([1.0, 1.0, -1.0, -1.0])  # uncorrelated
    assert st.pairing_gain(t, c) == pytest.approx(0)
    with pytest.raises(ValueError, match="neither arm varies"):
        st.pairing_gain([1.0, 1.0], [2.0, 2.0])


def test_bca_is_that_of_scipy_and_leans_where_the_data_lean():
    d = np.random.default_rng(3).exponential(size=40)
    reference = stats.bootstrap((d,), np.mean, method="BCa", n_resamples=9999, rng=np.random.default_rng(1))
    low, high = st.bca_interval(d)
    np.testing.assert_allclose((low, high), reference.confidence_interval, atol=0.02 * d.std())
    assert high - d.mean() > 1.1 * (d.mean() - low)  # the t and the percentile intervals lean less
    assert st.bca_interval(d) == (low, high)


def test_bca_is_for_display_from_twenty_seeds_on():
    with pytest.raises(ValueError, match=r"below 20 seeds; there are 19: show the t interval"):
        st.bca_interval(normal(19, 0))
    with pytest.raises(ValueError, match="nothing to resample"):
        st.bca_interval([1.0] * 20)


# --- power


def test_the_closed_form_of_the_sign_flip_threshold_is_the_test_itself():
    # The simulation rests on it: for noise z, p <= alpha from minus the K-th smallest subset mean on.
    for seed in range(10):
        z = normal(8, seed, shift=0)
        subsets = itertools.chain.from_iterable(itertools.combinations(z, size) for size in range(1, 9))
        threshold = -sorted(sum(subset) / len(subset) for subset in subsets)[math.floor(0.05 * 2**8 / 2) - 1]
        assert st.sign_flip_p(z + threshold + 1e-6) <= 0.05 < st.sign_flip_p(z + threshold - 1e-6)


@pytest.mark.parametrize("n", [6, 7, 8, 11])
def test_the_table_of_detectable_effects_regenerates(n):
    again = [st.simulate_detectable(n, draws=5000, seed=seed) for seed in range(1, 7)]
    error = np.std(again, ddof=1) * math.sqrt(1 / 6 + 5000 / 20_000)  # of these six, and of the table's 20,000 draws
    assert abs(np.mean(again) - st.DETECTABLE[n]) < 4 * error + 0.0005
    assert error < 0.02


def test_the_table_falls_and_stays_above_what_the_interval_alone_would_need():
    values = [st.DETECTABLE[n] for n in range(6, 21)]
    assert sorted(values, reverse=True) == values
    for n, value in st.DETECTABLE.items():
        alone = st._noncentral_t_effect(n)
        # Independent check of the noncentral solution; SciPy's lower tail is NaN in places, its upper one is not.
        assert stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, alone * math.sqrt(n)) == pytest.approx(0.8, abs=1e-6)
        assert alone < value < alone * (1.26 if n == 6 else 1.07)
    np.testing.assert_allclose(
        [st._noncentral_t_effect(n) for n in (6, 8, 12, 20)], [1.43, 1.16, 0.89, 0.66], atol=0.005
    )


def test_detectable_effect_scales_with_the_spread_and_goes_on_beyond_the_table():
    assert st.detectable_effect(5, 1.0) is None
    assert st.detectable_effect(8, 0.5) == 0.5 * st.DETECTABLE[8]
    beyond = st.detectable_effect(21, 1.0)
    assert beyond is not None
    assert 0.96 < beyond / st.DETECTABLE[20] < 1
    assert st.detectable_effect(10_000, 1.0) == pytest.approx((1.959964 + 0.841621) / 100, rel=1e-3)
    with pytest.raises(ValueError, match=r"5 seeds have no sign-flip p-value as small as 0\.05"):
        st.simulate_detectable(5)


@pytest.mark.parametrize("n", [3, 8, 30])
def test_the_equivalence_margin_shows_equivalence_four_times_in_five(n):
    d = np.random.default_rng(n).standard_normal((40_000, n))
    margin = st.equivalence_margin(n, 1.0)
    widest = np.abs(d.mean(1)) + stats.t.ppf(0.95, n - 1) * d.std(1, ddof=1) / math.sqrt(n)
    assert (widest <= margin).mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 40_000))
    assert st.equivalence_margin(n, 3.0) == pytest.approx(3 * margin)


def test_power_solves_for_any_of_the_three():
    by_effect = st.power(sd=2.0, seeds=8)
    assert by_effect.effect == 2 * st.DETECTABLE[8]
    assert st.power(effect=by_effect.effect, seeds=8).sd == pytest.approx(2)
    assert st.power(sd=2.0, effect=by_effect.effect).seeds == 8
    assert st.power(sd=2.0, effect=by_effect.effect * 0.999).seeds == 9
    assert st.power(sd=1.0, effect=50.0).seeds == 6
    for effect in (0.3, 0.01):
        n = st.power(sd=1.0, effect=effect).seeds
        assert st.detectable_effect(n, 1.0) <= effect < st.detectable_effect(n - 1, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sd": 1.0}, "exactly two of sd, effect and seeds; 1 were given"),
        ({"sd": 1.0, "effect": 1.0, "seeds": 8}, "3 were given"),
        ({"sd": -1.0, "effect": 1.0}, "sd must be a positive number"),
        ({"sd": 1.0, "effect": 0.0}, "effect must be a positive number"),
        ({"sd": 1.0, "seeds": 5}, "fewer than 6 seeds are a screening"),
        ({"sd": 1.0, "effect": 1e-9}, "millions of seeds"),
    ],
)
def test_power_refuses_what_it_cannot_plan(given, message):
    with pytest.raises(ValueError, match=message):
        st.power(**given)
