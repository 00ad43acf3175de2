"""Statistics of seed-paired differences.

The unit is the training seed: control and treatment of one seed share initialisation, data order and evaluation
items, so everything here works on ``d``, the vector of one signed difference a seed (positive = as claimed).
Nothing here knows about records, verdicts or models. ``scipy.special`` is imported inside the functions that need
it, ``scipy.stats`` (0.7 s) nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Direction = Literal["higher", "lower", "equal"]
Transform = Literal["raw", "log"]
Vector = NDArray[np.float64]

ALPHA = 0.05
POWER = 0.8
LEVEL = 0.95
EXACT_SEEDS = 20
FEWEST_SEEDS = 6
FLIPS = 99_999

# Detectable effect of the joint rule in units of s_d, at 80 % power and alpha = .05: `tabulate()` regenerates it.
DETECTABLE = {
    6: 1.797, 7: 1.356, 8: 1.206, 9: 1.100, 10: 1.016,
    11: 0.949, 12: 0.896, 13: 0.852, 14: 0.814, 15: 0.781,
    16: 0.752, 17: 0.726, 18: 0.703, 19: 0.681, 20: 0.662,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Power:
    """A planned study: with ``seeds`` pairs of standard deviation ``sd``, ``effect`` is supported at ``power``."""

    sd: float
    effect: float
    seeds: int
    power: float = POWER
    alpha: float = ALPHA


def _vector(values: ArrayLike, fewest: int = 1) -> Vector:
    d = np.asarray(values, dtype=np.float64)
    if d.ndim != 1 or d.size < fewest:
        raise ValueError(f"expected a vector of at least {fewest} differences, one a seed; got shape {d.shape}")
    if not np.isfinite(d).all():
        raise ValueError(f"differences must be finite; those at positions {np.flatnonzero(~np.isfinite(d))} are not")
    return d


def paired_differences(
    treatment: ArrayLike,
    reference: ArrayLike,
    *,
    direction: Direction = "higher",
    transform: Transform = "raw",
    seeds: Sequence[int] | None = None,
) -> Vector:
    """Return ``d_i = s (T_i - C_i)``, or ``s ln(T_i / C_i)`` for ``transform="log"``.

    Args:
        treatment: Finite scores T, one a seed.
        reference: Finite scores C of the same seeds in the same order.
        direction: ``lower`` gives s = -1, so that positive always means "as claimed"; else s = +1.
        transform: ``log`` measures relative change: effect, interval and epsilon are then in log units.
        seeds: Names of the seeds for error messages; positions when absent.

    Raises:
        ValueError: The lengths differ, a score is not finite, or ``log`` meets a score that is not positive.
    """
    t, c = _vector(treatment), _vector(reference)
    if t.size != c.size:
        raise ValueError(f"{t.size} treatment scores cannot be paired with {c.size} reference scores")
    sign = -1.0 if direction == "lower" else 1.0
    if transform == "raw":
        return sign * (t - c)
    names = range(t.size) if seeds is None else seeds
    for arm, scores in (("treatment", t), ("reference", c)):
        bad = [f"{seed} ({score:g})" for seed, score in zip(names, scores, strict=True) if score <= 0]
        if bad:
            raise ValueError(
                f"a log effect needs positive scores, but the {arm} has others at seed {', '.join(bad)}: "
                "judge this metric with transform='raw'"
            )
    return sign * (np.log(t) - np.log(c))


def mean(d: ArrayLike) -> float:
    """Return the mean difference, correctly rounded, so that every machine recomputes the same number."""
    values = _vector(d)
    return math.fsum(values) / values.size


def sd(d: ArrayLike) -> float:
    """Return s_d, the sample standard deviation of the differences (n - 1 in the denominator)."""
    values = _vector(d, fewest=2)
    if (values == values[0]).all():
        return 0.0  # the rounding of the mean would leave a spread of 1e-17 or so
    centre = mean(values)
    return math.sqrt(math.fsum((values - centre) ** 2) / (values.size - 1))


def t_interval(d: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Return the Student interval of the mean difference at confidence ``level`` (at least two seeds)."""
    from scipy.special import stdtrit

    values = _vector(d, fewest=2)
    half = float(stdtrit(values.size - 1, (1 + level) / 2)) * sd(values) / math.sqrt(values.size)
    return mean(values) - half, mean(values) + half


def paired_t_p(d: ArrayLike) -> float:
    """Return the two-sided p-value of the paired t test of a zero mean.

    Differences that are all the same have no t statistic: the p-value is 1 where they are zero, else 0.
    """
    from scipy.special import stdtr

    values = _vector(d, fewest=2)
    centre, spread = mean(values), sd(values)
    if spread == 0:
        return 1.0 if centre == 0 else 0.0
    return float(2 * stdtr(values.size - 1, -abs(centre) / (spread / math.sqrt(values.size))))


def signed_sums(values: ArrayLike) -> Vector:
    """Return all ``2^n`` sums of ``±values``, by doubling: each further value is added to and taken from the rest."""
    sums = np.zeros(1)
    for value in np.asarray(values, dtype=np.float64):
        sums = np.concatenate([sums + value, sums - value])
    return sums


def sign_flip_p(d: ArrayLike, *, flips: int = FLIPS, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip (paired permutation) test of a zero mean.

    Up to 20 seeds it is exact: the share of all ``2^n`` sign assignments whose absolute mean is at least the
    observed one. Every full sum is one of the first half plus one of the second, so they are counted by bisection in
    the sorted sums of one half. Beyond 20 seeds it is ``(1 + count) / (1 + flips)`` over seeded random assignments.
    Sums that differ by rounding alone count as ties. The smallest exact value is ``2 / 2^n``.

    Args:
        d: Differences, one a seed.
        flips: Random assignments beyond 20 seeds, at least 99,999.
        seed: Of those assignments; the same p-value comes out on every machine.

    Raises:
        ValueError: ``flips`` is below 99,999.
    """
    values = _vector(d)
    if flips < FLIPS:
        raise ValueError(f"the sign-flip test needs at least {FLIPS} random assignments, not {flips}")
    # Rounding moves a sum by less than n machine epsilons of the sum of magnitudes.
    threshold = abs(math.fsum(values)) - 1e-12 * math.fsum(np.abs(values))
    if threshold <= 0:
        return 1.0
    if values.size <= EXACT_SEEDS:
        half = values.size // 2
        left, right = signed_sums(values[:half]), np.sort(signed_sums(values[half:]))
        # The signed sums are symmetric about zero, so both tails hold equally many.
        upper = left.size * right.size - int(np.searchsorted(right, threshold - left, side="left").sum())
        return 2 * upper / (1 << values.size)
    as_extreme = 0
    bits = np.random.PCG64(seed)  # noqa: TID251 - torch-free; raw bits, whose stream NumPy promises never to change
    words = -(-values.size // 64)
    for start in range(0, flips, 8192):
        rows = min(8192, flips - start)
        raw = bits.random_raw((rows, words)).astype("<u8").view(np.uint8)
        signs = 1.0 - 2.0 * np.unpackbits(raw, axis=1, count=values.size)
        as_extreme += int((np.abs(signs @ values) >= threshold).sum())
    return (1 + as_extreme) / (1 + flips)


def tost_p(d: ArrayLike, epsilon: float) -> float:
    """Return the p-value of equivalence within ``±epsilon`` by two one-sided t tests (Schuirmann, 1987).

    It is the larger p-value of "the mean is above -epsilon" and "the mean is below +epsilon". Differences that are
    all the same give 0 strictly inside ``±epsilon``, else 1.

    Raises:
        ValueError: ``epsilon`` is not positive and finite.
    """
    from scipy.special import stdtr

    values = _vector(d, fewest=2)
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon, the smallest effect of interest, must be positive, not {epsilon}")
    inside, spread = epsilon - abs(mean(values)), sd(values)
    if spread == 0:
        return 0.0 if inside > 0 else 1.0
    return float(stdtr(values.size - 1, -inside / (spread / math.sqrt(values.size))))


def _p_values(p: ArrayLike) -> Vector:
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected a vector of p-values in [0, 1], got {values.tolist()}")
    return values


def holm(p: ArrayLike) -> Vector:
    """Return Holm's step-down adjusted p-values (family-wise error), in the order given."""
    values = _p_values(p)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(raised, 1.0)
    return adjusted


def false_discovery(p: ArrayLike) -> Vector:
    """Return the Benjamini-Hochberg step-up adjusted p-values (false discovery rate), in the order given."""
    values = _p_values(p)
    order = np.argsort(values, kind="stable")[::-1]
    lowered = np.minimum.accumulate(values[order] * values.size / np.arange(values.size, 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = lowered
    return adjusted


def cohen_dz(d: ArrayLike) -> float:
    """Return d_z, the mean difference in units of s_d.

    Raises:
        ValueError: The differences are all the same, so there is no such unit.
    """
    spread = sd(d)
    if spread == 0:
        raise ValueError("the differences are all the same: an effect in units of their spread does not exist")
    return mean(d) / spread


def hedges_g(d: ArrayLike) -> float:
    """Return d_z times Hedges' small-sample factor ``1 - 3 / (4 (n - 1) - 1)``."""
    return cohen_dz(d) * (1 - 3 / (4 * (_vector(d).size - 1) - 1))


def wins(d: ArrayLike) -> tuple[float, tuple[float, float] | None]:
    """Return P(the treatment beats the reference) and its 95 % Wilson score interval.

    The probability counts a tie as half a win; the interval is that of the seeds which are not ties, and is None
    where there are none.
    """
    from scipy.special import ndtri

    values = _vector(d)
    won, decided = int((values > 0).sum()), int((values != 0).sum())
    share = (won + (values.size - decided) / 2) / values.size
    if not decided:
        return share, None
    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2
    rate = won / decided
    centre = (rate + z2 / (2 * decided)) / (1 + z2 / decided)
    half = math.sqrt(z2 * (rate * (1 - rate) + z2 / (4 * decided)) / decided) / (1 + z2 / decided)
    return share, (max(0.0, centre - half), min(1.0, centre + half))


def pairing_gain(treatment: ArrayLike, reference: ArrayLike) -> float:
    """Return ``1 - s_d^2 / (s_T^2 + s_C^2)``: the share of the unpaired variance that pairing by seed removed.

    0 means that pairing gained nothing, below 0 that it hurt.

    Raises:
        ValueError: Neither arm varies.
    """
    t, c = _vector(treatment, fewest=2), _vector(reference, fewest=2)
    unpaired = sd(t) ** 2 + sd(c) ** 2
    if unpaired == 0:
        raise ValueError("neither arm varies over seeds, so there is no variance that pairing could remove")
    return 1 - sd(t - c) ** 2 / unpaired


def bca_interval(d: ArrayLike, *, resamples: int = 9999, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % BCa bootstrap interval of the mean difference (Efron, 1987).

    It is for display beside the t interval; no verdict uses it, and below 20 seeds it covers too little (.91 at 10).

    Raises:
        ValueError: Fewer than 20 seeds, or differences that are all the same.
    """
    from scipy.special import ndtr, ndtri

    values = _vector(d)
    n = values.size
    if n < 20:
        raise ValueError(f"a BCa interval covers too little below 20 seeds; there are {n}: show the t interval")
    if sd(values) == 0:
        raise ValueError("the differences are all the same: there is nothing to resample")
    draw = np.random.default_rng(seed).integers(0, n, (resamples, n))  # noqa: TID251 - torch-free statistics
    means = np.sort(values[draw].mean(axis=1))
    below = (np.searchsorted(means, mean(values), "left") + np.searchsorted(means, mean(values), "right")) / 2
    bias = ndtri(below / resamples)
    jackknife = (values.sum() - values) / (n - 1)
    pull = jackknife.mean() - jackknife
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    z = bias + ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(means, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def simulate_detectable(n: int, *, draws: int = 20_000, seed: int = 0, alpha: float = ALPHA) -> float:
    """Return the effect, in units of the differences' standard deviation, that the joint rule supports at 80 % power.

    The joint rule says `supported` when the 95 % t interval lies above 0 and the exact sign-flip p is at most alpha.
    For noise z the smallest effect that passes both has a closed form: the first passes from ``t s / sqrt(n) - mean``
    on; the second says that, apart from the empty one, fewer than ``K = floor(alpha 2^n / 2)`` subsets of seeds have
    a sum at or below 0, hence passes from minus the K-th smallest subset mean of z on. The wanted effect is the
    80 % quantile over normal z of the larger one; that of the first alone is known exactly (noncentral t) and serves
    as control variate. Time and memory grow with ``2^n``.

    Args:
        n: Seeds; ``2 / 2^n`` must not exceed alpha.
        draws: Simulated studies.
        seed: Of the simulation.
        alpha: Level of the sign-flip test.
    """
    kth = math.floor(alpha * 2**n / 2)
    if kth < 1:
        raise ValueError(f"{n} seeds have no sign-flip p-value as small as {alpha}")
    from scipy.special import stdtrit

    generator = np.random.default_rng([seed, n])  # noqa: TID251 - torch-free statistics
    critical = float(stdtrit(n - 1, (1 + LEVEL) / 2)) / math.sqrt(n)
    by_interval, by_flips = np.empty(draws), np.empty(draws)
    rows = max(1, 2**21 >> n)
    for start in range(0, draws, rows):
        z = generator.standard_normal((min(rows, draws - start), n))
        sums, sizes = np.zeros((len(z), 1)), np.zeros(1)
        for column in z.T:
            sums, sizes = np.concatenate([sums, sums + column[:, None]], axis=1), np.concatenate([sizes, sizes + 1])
        means = sums[:, 1:] / sizes[1:]
        by_flips[start : start + len(z)] = -np.partition(means, kth - 1, axis=1)[:, kth - 1]
        by_interval[start : start + len(z)] = critical * z.std(axis=1, ddof=1) - z.mean(axis=1)
    joint = float(np.quantile(np.maximum(by_interval, by_flips), POWER))
    return joint - float(np.quantile(by_interval, POWER)) + _noncentral_t_effect(n)


def tabulate() -> dict[int, float]:
    """Regenerate the constant ``DETECTABLE`` (about six minutes)."""
    return {n: round(simulate_detectable(n), 3) for n in DETECTABLE}


def _noncentral_t_effect(n: int, alpha: float = ALPHA) -> float:
    """Effect in units of sd whose t interval lies above 0 with 80 % power, from the noncentral t distribution."""
    from scipy.special import nctdtrinc, stdtrit

    return float(nctdtrinc(n - 1, 1 - POWER, stdtrit(n - 1, 1 - alpha / 2))) / math.sqrt(n)


def detectable_effect(n: int, sd: float) -> float | None:
    """Return the smallest true effect that the joint rule (see `simulate_detectable`) supports with 80 % power.

    Tabulated by simulation for 6 to 20 seeds; beyond, where the sign-flip test takes next to nothing away, it is the
    noncentral t solution. None below 6 seeds, where nothing can be supported.

    Args:
        n: Seeds.
        sd: Standard deviation of the differences; the effect is in the same unit.
    """
    if n < FEWEST_SEEDS:
        return None
    return sd * (DETECTABLE[n] if n in DETECTABLE else _noncentral_t_effect(n))


def equivalence_margin(n: int, sd: float) -> float:
    """Return the smallest epsilon for which equivalence is shown with 80 % power when the true difference is zero.

    Equivalence at level .05 means ``|mean| <= epsilon - t s / sqrt(n)``. Mean and s are independent for normal
    differences, so the power is ``E[2 Phi(sqrt(n) epsilon - t s) - 1]`` over the values of s that allow it (in units of
    the true sd), an integral over the quantiles of a chi distribution with n - 1 degrees of freedom.

    Args:
        n: Seeds, at least 2.
        sd: Standard deviation of the differences; the margin is in the same unit.
    """
    return sd * _margin_units(n)


@lru_cache
def _margin_units(n: int) -> float:
    from scipy.optimize import brentq
    from scipy.special import gammainc, gammaincinv, ndtr, stdtrit

    freedom = n - 1
    critical = float(stdtrit(freedom, 1 - ALPHA))
    nodes, weights = np.polynomial.legendre.leggauss(64)

    def shortfall(margin: float) -> float:
        reach = gammainc(freedom / 2, freedom * (margin / critical) ** 2 / 2)
        u = reach * (nodes + 1) / 2
        s = np.sqrt(2 * gammaincinv(freedom / 2, u) / freedom)
        return float((weights * (2 * ndtr(margin - critical * s) - 1)).sum() * reach / 2) - POWER

    return float(brentq(shortfall, 1e-3, 20 * critical)) / math.sqrt(n)


def power(*, sd: float | None = None, effect: float | None = None, seeds: int | None = None) -> Power:
    """Plan a study of the joint rule at alpha .05 and 80 % power: given any two of the three, solve the third.

    Args:
        sd: Standard deviation of the paired differences over seeds (a pilot's s_d).
        effect: True effect in the claimed direction, in the unit of ``sd``.
        seeds: Number of pairs, at least 6.

    Returns:
        The three numbers: the smallest effect, the fewest seeds or the largest spread.

    Raises:
        ValueError: Not exactly two are given, or one is out of range.
    """
    given = {"sd": sd, "effect": effect, "seeds": seeds}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise ValueError(f"give exactly two of sd, effect and seeds; {len(given) - len(missing)} were given")
    for name, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, not {value}")
    if seeds is not None and seeds < FEWEST_SEEDS:
        raise ValueError(f"fewer than {FEWEST_SEEDS} seeds are a screening and support nothing: plan with more")
    if effect is None:
        assert sd is not None
        assert seeds is not None
        return Power(sd=sd, effect=sd * _units(seeds), seeds=seeds)
    if sd is None:
        assert seeds is not None
        return Power(sd=effect / _units(seeds), effect=effect, seeds=seeds)
    return Power(sd=sd, effect=effect, seeds=_fewest_seeds(effect / sd))


def _units(n: int) -> float:
    units = detectable_effect(n, 1.0)
    assert units is not None
    return units


def _fewest_seeds(units: float) -> int:
    """Smallest n whose detectable effect, in units of sd, is at most ``units``."""
    if units < 1e-3:
        raise ValueError(
            f"an effect of {units:.2g} standard deviations would take millions of seeds: reduce the spread between "
            "paired runs, or look for a larger effect"
        )
    high = FEWEST_SEEDS
    while _units(high) > units:
        high *= 2
    low = max(FEWEST_SEEDS - 1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _units(middle) <= units else (middle, high)
    return high
