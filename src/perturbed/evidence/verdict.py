"""From paired scores to a verdict, by rules that are fixed before a study runs.

The verdict speaks about the small study that was run ("at this scale"), not about a paper's benchmark. Importing this
module costs nothing: NumPy and SciPy are loaded when something is computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from perturbed.evidence.statistics import Direction, Transform

VERDICT_VERSION = 1

Verdict = Literal[
    "invalid", "diverged", "screening", "deterministic", "supported", "contradicted", "null", "inconclusive"
]
Scores = Mapping[Any, float | None] | Sequence[float | None]
Bounds = Sequence[float | None]

EQUIVALENCE_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the paired scores of two arms say.

    Attributes:
        effect: Mean signed difference, positive as claimed; None unless every seed has two finite scores.
        interval: Its 95 % paired t interval; None also for one seed and for a deterministic difference.
        p: Two-sided sign-flip p-value; None where there is no interval.
        p_t: Two-sided paired t p-value, for Holm's adjustment over secondary arms; None where there is no interval.
        p_equivalence: Two one-sided tests within ±epsilon; None without an interval or an epsilon.
        detectable: True effect that these seeds would have supported with 80 % power or, for direction ``equal``, the
            smallest epsilon that a true zero would have met; None below 6 seeds and where differences do not vary.
        verdict: One of `Verdict`.
        trivial: The 95 % interval lies within ±epsilon (direction ``higher`` or ``lower``; never for a verdict that
            says nothing about the effect). Summaries count trivial as null.
        finite: Seeds with a finite score in both arms.
        n: Seeds.
    """

    effect: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_t: float | None
    p_equivalence: float | None
    detectable: float | None
    verdict: Verdict
    trivial: bool
    finite: int
    n: int


def judge(
    treatment: Scores,
    reference: Scores,
    *,
    direction: Direction,
    epsilon: float | None = None,
    alpha: float = 0.05,
    transform: Transform = "raw",
    bounds: Bounds = (None, None),
    gates_pass: bool = True,
) -> Judgement:
    """Judge a treatment against its reference on paired seeds.

    The verdict is the first that holds: ``invalid`` (a gate failed), ``diverged`` (a score is missing or not finite;
    no pair is dropped), ``screening`` (fewer than 6 seeds), ``deterministic`` (the differences do not vary beyond
    rounding, and no arm sits at the metric's floor or ceiling); then for ``higher`` and ``lower``: ``supported``
    (interval above 0 and p <= alpha), ``contradicted`` (interval below 0 and p <= alpha), ``null`` (equivalent within
    ±epsilon at .05), ``inconclusive``; for ``equal``: ``supported`` (equivalent), ``contradicted`` (interval outside
    ±epsilon), ``inconclusive``.

    Args:
        treatment: Score by seed, or scores in the order of seeds; None or a number that is not finite = diverged.
        reference: The same seeds.
        direction: What is claimed of the treatment's score.
        epsilon: Smallest effect of interest, in the effect's unit; without it neither ``null`` nor trivial is said.
        alpha: Level of the sign-flip test. The interval stays at 95 % and equivalence at .05.
        transform: ``log`` judges ``ln(T / C)``.
        bounds: The metric's floor and ceiling, None where there is none.
        gates_pass: False when a gate of the study failed.

    Raises:
        ValueError: Seeds occur in one arm only (they are named) or not at all, a setting is out of range, ``equal``
            comes without epsilon, or ``log`` meets a score that is not positive.
    """
    _check_settings(direction, epsilon, alpha, transform)
    seeds, t, c = _pair(treatment, reference)
    n, finite = len(seeds), sum(_finite(a) and _finite(b) for a, b in zip(t, c, strict=True))
    if finite < n:
        return Judgement(
            effect=None,
            interval=None,
            p=None,
            p_t=None,
            p_equivalence=None,
            detectable=None,
            verdict="diverged" if gates_pass else "invalid",
            trivial=False,
            finite=finite,
            n=n,
        )

    from perturbed.evidence import statistics

    d = statistics.paired_differences(t, c, direction=direction, transform=transform, seeds=seeds)
    effect = statistics.mean(d)
    spread = statistics.sd(d) if n > 1 else 0.0
    deterministic = n >= statistics.FEWEST_SEEDS and _deterministic(spread, t, c, transform, bounds)
    tested = n > 1 and not deterministic
    interval = statistics.t_interval(d) if tested else None
    p = statistics.sign_flip_p(d) if tested else None
    p_equivalence = statistics.tost_p(d, epsilon) if tested and epsilon is not None else None
    detectable = None
    if n >= statistics.FEWEST_SEEDS and tested and spread > 0:
        at_power = statistics.equivalence_margin if direction == "equal" else statistics.detectable_effect
        # The table of the joint rule holds at .05, so at another level nothing can be said.
        detectable = at_power(n, spread) if direction == "equal" or alpha == statistics.ALPHA else None

    verdict: Verdict
    trivial = False
    if not gates_pass:
        verdict = "invalid"
    elif n < statistics.FEWEST_SEEDS:
        verdict = "screening"
    else:
        low, high = interval or (effect, effect)
        trivial = direction != "equal" and epsilon is not None and -epsilon <= low and high <= epsilon
        if interval is None:
            verdict = "deterministic"
        else:
            verdict = _finding(interval, p, p_equivalence, direction, epsilon, alpha)
    return Judgement(
        effect=effect,
        interval=interval,
        p=p,
        p_t=statistics.paired_t_p(d) if tested else None,
        p_equivalence=p_equivalence,
        detectable=detectable,
        verdict=verdict,
        trivial=trivial,
        finite=finite,
        n=n,
    )


def judge_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Recompute from a record's raw scores all that is derived from them.

    The primary arm is compared with ``reference``, every other arm with what ``references`` names,
    else ``control``. Secondary arms get Holm-adjusted
    paired t p-values, and to be ``supported`` or ``contradicted`` an arm needs ``p_holm <= alpha`` besides: several
    looks do not make a finding. A failed gate makes every arm ``invalid``.

    Each of ``contrasts`` is judged as `judge_contrast` says; they count among the looks that Holm's correction is for.

    ``specific`` belongs to the primary arm: the 95 % interval of treatment - sham excludes 0, on the side of the effect
    (any side for direction ``equal``, and where the reference is not the control that the sham stands beside). None
    without a sham in the scores, or where that interval does not exist.

    Args:
        record: As `perturbed run --json` prints it; ``scores``, ``seeds``, ``primary``, ``reference``, ``sham``,
            ``direction``, ``epsilon``, ``alpha``, ``transform``, ``bounds`` and ``gates`` are read.

    Returns:
        ``arms`` {arm: reference, effect, interval, p, p_holm, detectable, verdict, trivial, specific, finite, n},
        ``verdict``, ``trivial`` and ``specific`` of the record; ``contrasts``, where it asks any, with what they say.

    Raises:
        ValueError: An arm that is named has no scores, or an arm lacks a seed (arm and seeds are named).
    """
    scores = {arm: _of_seeds(record, arm) for arm in record["scores"]}
    primary, sham, alpha = record["primary"], record["sham"], record["alpha"]
    named = {arm: other for arm, other in record.get("references", {}).items() if arm in scores and other in scores}
    references = dict.fromkeys((arm for arm in scores if arm != "control"), "control") | named
    references[primary] = record["reference"]
    for arm in (primary, *references.values()):
        if arm not in scores:
            raise ValueError(f"the record has no scores for arm {arm!r}, only for {', '.join(scores)}")

    def contrast(arm: str, against: str) -> Judgement:
        return judge(
            scores[arm],
            scores[against],
            direction=record["direction"],
            epsilon=record["epsilon"],
            alpha=alpha,
            transform=record["transform"],
            bounds=record["bounds"],
            gates_pass=_gates_pass(record),
        )

    questions = record.get("contrasts") or {}
    judged = {arm: contrast(arm, against) for arm, against in references.items()}
    judged |= {name: judge_contrast(record, question) for name, question in questions.items()}
    adjusted = _holm({look: found.p_t for look, found in judged.items() if look != primary})
    for look, p in adjusted.items():
        judged[look] = _after_holm(judged[look], p, questions.get(look, record), alpha)
    found = judged[primary]
    specific = None
    if sham is not None and sham in scores and sham != primary:
        specific = _specific(found.effect, contrast(primary, sham), sham_on_either_side(record))
    told = {look: _told(found, adjusted.get(look)) for look, found in judged.items()}
    return {
        "arms": {
            arm: {"reference": against, **told[arm], "specific": specific if arm == primary else None}
            for arm, against in references.items()
        },
        **({"contrasts": {name: {**asked, **told[name]} for name, asked in questions.items()}} if questions else {}),
        "verdict": found.verdict,
        "trivial": found.trivial,
        "specific": specific,
    }


def judge_contrast(record: Mapping[str, Any], question: Mapping[str, Any]) -> Judgement:
    """Judge a weighted sum of a record's arms, seed by seed, against zero.

    Args:
        record: ``scores``, ``secondary``, ``metric``, ``seeds``, ``alpha`` and ``gates`` are read.
        question: ``weights`` {arm: weight}, and ``metric``, ``direction``, ``epsilon`` and ``transform`` as of a study.

    Returns:
        What `judge` says of the arms of positive weight against those of negative weight; a seed without a finite
        score in one of them has diverged.

    Raises:
        ValueError: The record has no such arm or metric, or a logarithm meets a score that is not positive.
    """
    metric = question["metric"]
    by_arm = record["scores"] if metric == record["metric"] else record["secondary"].get(metric, {})
    for arm in question["weights"]:
        if arm not in by_arm:
            raise ValueError(f"the record has no {metric!r} of arm {arm!r}, which a contrast weighs")
    positive, negative = (
        {seed: _side(by_arm, question, str(seed), sign) for seed in record["seeds"]} for sign in (1, -1)
    )
    return judge(
        positive,
        negative,
        direction=question["direction"],
        epsilon=question["epsilon"],
        alpha=record["alpha"],
        gates_pass=_gates_pass(record),
    )


def _side(by_arm: Mapping[str, Any], question: Mapping[str, Any], seed: str, sign: int) -> float | None:
    """The arms of positive (or negative) weight of a contrast, added up with its size."""
    total = []
    for arm, weight in question["weights"].items():
        score = by_arm[arm].get(seed)
        if score is None or not math.isfinite(score):
            return None
        if question["transform"] == "log" and score <= 0:
            raise ValueError(f"seed {seed} of arm {arm!r} has the score {score}, which has no logarithm")
        if sign * weight > 0:
            total.append(abs(weight) * (math.log(score) if question["transform"] == "log" else score))
    return math.fsum(total)


def _gates_pass(record: Mapping[str, Any]) -> bool:
    return all(gate["pass"] is not False for gate in record["gates"].values())


def _after_holm(found: Judgement, p: float, asked: Mapping[str, Any], alpha: float) -> Judgement:
    """The judgement with the adjusted p in place of its own, which can take a finding away."""
    if not found.interval or found.verdict not in ("supported", "contradicted"):
        return found
    verdict = _finding(found.interval, p, found.p_equivalence, asked["direction"], asked["epsilon"], alpha)
    return replace(found, verdict=verdict)


def _told(found: Judgement, p_holm: float | None) -> dict[str, Any]:
    return {
        "effect": found.effect,
        "interval": list(found.interval) if found.interval else None,
        "p": found.p,
        "p_holm": p_holm,
        "detectable": found.detectable,
        "verdict": found.verdict,
        "trivial": found.trivial,
        "finite": found.finite,
        "n": found.n,
    }


def sham_on_either_side(record: Mapping[str, Any]) -> bool:
    """Whether treatment - sham may differ from 0 on any side: it stands beside the control, which is not compared."""
    return bool(record["direction"] == "equal" or record["reference"] != "control")


def unspecific(record: Mapping[str, Any]) -> bool:
    """Whether the sham takes something away from an effect that was found; a null has nothing to lose."""
    return record.get("specific") is False and record["verdict"] in ("supported", "contradicted", "deterministic")


def _check_settings(direction: str, epsilon: float | None, alpha: float, transform: str) -> None:
    if direction not in ("higher", "lower", "equal"):
        raise ValueError(f"direction must be higher, lower or equal, not {direction!r}")
    if transform not in ("raw", "log"):
        raise ValueError(f"transform must be raw or log, not {transform!r}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    if epsilon is not None and not (math.isfinite(epsilon) and epsilon > 0):
        raise ValueError(f"epsilon, the smallest effect of interest, must be positive, not {epsilon}")
    if direction == "equal" and epsilon is None:
        raise ValueError("direction 'equal' needs an epsilon: say how large a difference would still count as equal")


def by_seed(scores: Scores) -> dict[Any, float | None]:
    """``{seed: score}`` of a mapping as it is, or of scores in the order of seeds from 0."""
    return dict(scores if isinstance(scores, Mapping) else enumerate(scores))


def _pair(treatment: Scores, reference: Scores) -> tuple[list[Any], list[Any], list[Any]]:
    t, c = by_seed(treatment), by_seed(reference)
    lonely = [
        f"seed{'s' * (len(only) > 1)} {', '.join(map(str, only))} only in the {arm}"
        for arm, only in (("treatment", [s for s in t if s not in c]), ("reference", [s for s in c if s not in t]))
        if only
    ]
    if lonely:
        raise ValueError(
            f"unpaired: {' and '.join(lonely)}; every seed needs a score in both arms "
            "(nan for a run that diverged), so run what is missing or take the seed out of both"
        )
    if not t:
        raise ValueError("there are no seeds to judge")
    return list(t), list(t.values()), [c[seed] for seed in t]


def _finite(score: float | None) -> bool:
    return score is not None and math.isfinite(score)


def _deterministic(spread: float, t: list[float], c: list[float], transform: str, bounds: Bounds) -> bool:
    # A log difference is relative already: 1e-9 of the score is 1e-9 in log units.
    scale = 1.0 if transform == "log" else max(abs(math.fsum(t) / len(t)), abs(math.fsum(c) / len(c)))
    return spread <= 1e-9 * scale and not any(
        bound is not None and all(math.isclose(score, bound, rel_tol=1e-9, abs_tol=1e-12) for score in scores)
        for bound in bounds
        for scores in (t, c)
    )


def _finding(
    interval: tuple[float, float],
    p: float | None,
    p_equivalence: float | None,
    direction: str,
    epsilon: float | None,
    alpha: float,
) -> Verdict:
    low, high = interval
    equivalent = p_equivalence is not None and p_equivalence <= EQUIVALENCE_LEVEL
    if direction == "equal":
        assert epsilon is not None
        if equivalent:
            return "supported"
        return "contradicted" if low > epsilon or high < -epsilon else "inconclusive"
    if p is not None and p <= alpha:
        if low > 0:
            return "supported"
        if high < 0:
            return "contradicted"
    return "null" if equivalent else "inconclusive"


def _of_seeds(record: Mapping[str, Any], arm: str) -> dict[int, float | None]:
    scores, seeds = record["scores"][arm], record["seeds"]
    missing = [str(seed) for seed in seeds if str(seed) not in scores]
    surplus = sorted(scores.keys() - {str(seed) for seed in seeds})
    if missing or surplus:
        raise ValueError(
            f"the scores of arm {arm!r} do not fit the record's seeds: missing {', '.join(missing) or 'none'}, "
            f"not among the seeds {', '.join(surplus) or 'none'}"
        )
    return {seed: scores[str(seed)] for seed in seeds}


def _holm(p: Mapping[str, float | None]) -> dict[str, float]:
    known = {look: value for look, value in p.items() if value is not None}
    if not known:
        return {}
    from perturbed.evidence.statistics import holm

    return {look: float(value) for look, value in zip(known, holm(list(known.values())), strict=True)}


def _specific(effect: float | None, against_sham: Judgement, either_side: bool) -> bool | None:
    if effect is None or against_sham.effect is None or against_sham.n < 2:
        return None
    # Without an interval the difference does not vary: it is the point itself that is or is not zero.
    low, high = against_sham.interval or (against_sham.effect, against_sham.effect)
    if either_side:
        return low > 0 or high < 0
    return low > 0 if effect > 0 else high < 0
