"""The report of a study as one self-contained HTML page, and the index of all studies.

A page needs no script and asks the network for nothing: style and figures are inside, and its content policy forbids
the rest. It says the verdict first, in words, with what it rests on; a negative result is set exactly as a positive
one. Whatever a record lacks (scores judged from a file have no cost, gates or curves) is left out.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, TextIO

from perturbed.evidence import figures, statistics
from perturbed.evidence.figures import DASH, MINUS, Record, number, places, signed, span
from perturbed.evidence.verdict import sham_on_either_side, unspecific

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
STYLE = _HERE / "style.css"
_FEWEST_SEEDS = 6  # below, a study is a screening
_ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7}")


@dataclass(frozen=True)
class Kind:
    """How one verdict is shown: a sign, what it means in one line, and the group of the index that it stands in."""

    sign: str
    meaning: str
    group: str


_ANSWERED, _OPEN, _UNUSABLE = "Answered", "Still open", "No verdict possible"
_GROUPS = {
    _ANSWERED: "The study had the precision to say yes, no, or that there is no effect worth having.",
    _OPEN: "More seeds, as a new record, would settle these.",
    _UNUSABLE: "A run diverged or a gate failed: mend and run again.",
}
KINDS = {
    "supported": Kind("✓", "The claim held at this scale.", _ANSWERED),
    "contradicted": Kind("⇄", "The opposite of the claim held at this scale.", _ANSWERED),
    "null": Kind("=", "No effect worth having at this scale.", _ANSWERED),
    "deterministic": Kind("≡", "The same difference in every seed.", _ANSWERED),
    "inconclusive": Kind("?", "Neither an effect nor its absence was shown at this scale.", _OPEN),
    "screening": Kind("…", "A first look with few seeds; no verdict.", _OPEN),
    "diverged": Kind("∞", "A run ended without a finite score, so there is no verdict.", _UNUSABLE),
    "invalid": Kind("!", "A gate failed: these numbers cannot be relied upon.", _UNUSABLE),
}

_TIME = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
_FLOPS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1.0, "FLOP"))
_COUNT = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
_COSTS = {
    "wall_s": ("Wall time", _TIME),
    "cpu_s": ("CPU time", _TIME),
    "flops": ("Compute", _FLOPS),
    "tokens": ("Tokens", _COUNT),
    "examples": ("Examples", _COUNT),
    "grad_passes": ("Gradient passes", _COUNT),
    "peak_bytes": ("Peak memory", _BYTES),
    "params_trained": ("Parameters trained", _COUNT),
    "params_stored": ("Parameters stored", _COUNT),
    "measuring_cpu_s": ("Measuring, CPU time", _TIME),
}


# --- public ------------------------------------------------------------------------------------------------------


def study_html(record: Record, *, history: Sequence[Record] = ()) -> str:
    """The page of one study.

    Args:
        record: the study as ``run --json`` prints it, or a line of the ledger.
        history: earlier records of the same study, oldest first; they are listed with their verdicts.

    Returns:
        A complete HTML document. The same arguments give the same text.

    Raises:
        KeyError: if the record lacks a field that every record has.
    """
    return _environment().get_template("study.html").render(_study(record, history))


def write_study(record: Record, out: Path, *, history: Sequence[Record] = ()) -> Path:
    """Write the page of one study into the folder ``out`` (made if missing) and return its path.

    The file appears whole or not at all; its name is that of :func:`page_name`.

    Raises:
        OSError: if ``out`` cannot be made or written to; before the page is drawn.
    """
    with _replacing(Path(out) / page_name(record)) as file:
        file.write(study_html(record, history=history))
    return Path(out) / page_name(record)


def write_index(records: Sequence[Record], out: Path) -> Path:
    """Write ``index.html``, the table of all studies, into the folder ``out`` and return its path.

    Of several records with one page (see :func:`page_name`) the one started last is shown. Each row links to its page,
    which :func:`write_study` writes. The false discovery rate (Benjamini-Hochberg over the primary p-values of
    studies that passed their gates) is a column and changes no verdict.

    Raises:
        OSError: if ``out`` cannot be made or written to; before the page is drawn.
    """
    with _replacing(Path(out) / "index.html") as file:
        file.write(_environment().get_template("index.html").render(_index(records)))
    return Path(out) / "index.html"


def page_name(record: Record) -> str:
    """The file name of a record's page, stable and safe: one for each study and scale (laptop needs no mention).

    What a user changed has a page of its own, so that it never stands in for the registered study.
    """
    name = record.get("slug")
    if name:
        name += f"-{record['scale']}" if record.get("scale") not in (None, "laptop") else ""
        name += "" if record.get("registered") else "-changed"
    else:
        plan, sizes, _ = (record.get("plan") or "scores").partition("(")
        name = f"{plan}-{record['primary']}-vs-{record['reference']}-{record['metric']}"
        if sizes:  # all fields of a plan would make too long a name
            told = f"{record['plan']} {', '.join(record['arms'])}"
            name += "-" + hashlib.sha256(told.encode()).hexdigest()[:6]
    return (re.sub(r"[^A-Za-z0-9]+", "-", str(name)).strip("-")[:120] or "study") + ".html"


# --- one study ---------------------------------------------------------------------------------------------------


def page_values(record: Record, history: Sequence[Record] = ()) -> dict[str, Any]:
    """All that the page of a study says in words and numbers: everything but the figures, as its template reads it.

    Args:
        record: the study as ``run --json`` prints it, or a line of the ledger.
        history: earlier records of the same study, oldest first.

    Returns:
        ``verdict`` (`shown_verdict`), ``story`` (its sentences), ``advice``, ``tiles``, ``registered``, ``ours``,
        ``arms``, ``sham``, ``other_terms``, ``contrasts``, ``interactions``, ``secondary``, ``cost``, ``gates``,
        ``scores``, ``origin`` and ``history``: text, ready to be escaped.

    Raises:
        KeyError: if the record lacks a field that every record has.
    """
    return {
        "record": {**dict.fromkeys(("slug", "scale", "plan", "command", "epsilon")), **record},
        "claim": {"text": None, "paper": None, **(record.get("claim") or {})},
        "name": _name(record),
        "verdict": shown_verdict(record),
        "story": _story(record),
        "advice": _advice(record),
        "tiles": _tiles(record),
        "registered": _registered(record),
        "arxiv": _arxiv(record),
        "ours": _ours(record),
        "arms": [_arm(record, arm) for arm in figures.arm_order(record)],
        "sham": _sham(record),
        "other_terms": _other_terms(record),
        "contrasts": [_contrast(name, asked) for name, asked in (record.get("contrasts") or {}).items()],
        "interactions": [_interaction(record, name) for name in record.get("interaction") or {}],
        "secondary": _secondary(record),
        "cost": _cost(record),
        "gates": [_gate(name, gate) for name, gate in (record.get("gates") or {}).items()],
        "scores": _scores(record["scores"], record["seeds"]),
        "origin": _origin(record),
        "history": [past_values(old) for old in reversed(history)],
    }


def main_sentence(record: Record) -> str:
    """The primary contrast in one sentence: the effect in words of the metric, or why there is none."""
    return _lost(record) if _primary(record).get("effect") is None else _finding(record)


def _study(record: Record, history: Sequence[Record]) -> dict[str, Any]:
    words = page_values(record, history)
    for interaction in words["interactions"]:
        name = interaction["name"]
        interaction["figure"] = figures.interaction_plot(record, name) if interaction["drawn"] else None
    return {
        **_base(),
        **words,
        "spark": None if _primary(record).get("effect") is None else figures.sparkline(record),
        "scores_figure": figures.paired_scores(record),
        "differences_figure": figures.paired_differences(record),
        "curves": [curve(record, metric) for metric in record.get("curves") or {}],
    }


def curve(record: Record, metric: str) -> str:
    """One learning curve, with fewer points a line the more lines the page holds, so that it stays small."""
    lines = sum(len(seeds) for arms in record["curves"].values() for seeds in arms.values())
    return figures.learning_curves(record, metric, points=max(8, min(60, 7000 // max(lines, 1))))


def _name(record: Record) -> str:
    return str(record.get("title") or record.get("slug") or f"{record['primary']} against {record['reference']}")


def kind_of(verdict: str) -> tuple[Kind, str]:
    """How a verdict is shown, and its class in the style; one of a later version as it is written."""
    if verdict in KINDS:
        return KINDS[verdict], verdict
    return Kind("·", f"Verdict: {verdict}.", _OPEN), "unknown"


def shown_verdict(record: Record, verdict: str | None = None, trivial: bool | None = None) -> dict[str, Any]:
    """What a template needs to show a verdict; an unknown one (of a later version) is shown as it is written.

    Args:
        record: the record; its own verdict is shown unless another is given.
        verdict: of one of its arms.
        trivial: of that arm.

    Returns:
        ``word``, ``css`` (a class), ``sign``, ``meaning`` (one line), ``group`` (answered, open or unusable) and
        ``trivial`` (only where that takes something away from the word).
    """
    word = record["verdict"] if verdict is None else verdict
    trivial = bool(record.get("trivial")) if trivial is None else trivial
    kind, css = kind_of(word)
    small = trivial and word not in ("null", "deterministic") and record["direction"] != "equal"
    return {"word": word, "css": css, "sign": kind.sign, "meaning": kind.meaning, "group": kind.group, "trivial": small}


def _primary(record: Record) -> Mapping[str, Any]:
    result: Mapping[str, Any] = record["arms"][record["primary"]]
    return result


def _story(record: Record) -> list[str]:
    """The verdict in sentences: what was found, how surely, and what qualifies it."""
    result, word = _primary(record), record["verdict"]
    told = []
    if word == "invalid":
        failed = [f"{n} ({g.get('detail') or 'no detail'})" for n, g in record["gates"].items() if g["pass"] is False]
        told.append("Failed: " + "; ".join(failed) + "." if failed else "The record does not say which gate failed.")
    told.append(main_sentence(record))
    return told if result.get("effect") is None else told + _qualifications(record)


def _lost(record: Record) -> str:
    result = _primary(record)
    arms = (record["primary"], result["reference"])
    lost = {a: [s for s in record["seeds"] if record["scores"][a].get(str(s)) is None] for a in arms}
    who = "; ".join(f"{a}: seed {', '.join(map(str, seeds))}" for a, seeds in lost.items() if seeds)
    found = f"{result['finite']} of {result['n']} pairs have two finite scores" if "finite" in result else "no effect"
    return found + (f" (missing in {who})" if who else "") + ". No pair is dropped, so no effect is given."


def _finding(record: Record) -> str:
    """The primary effect in words of the metric itself: higher or lower, not positive or negative."""
    result = _primary(record)
    sign = -1.0 if record["direction"] == "lower" else 1.0
    effect = sign * result["effect"]
    ends = sorted(sign * x for x in result["interval"]) if result.get("interval") else None
    decimals = places(ends)
    text = (
        f"Over {result['n']} paired seeds, {_words(record['metric'])} was on average "
        f"{_difference(record, effect, decimals)} with {_words(record['primary'])} than with "
        f"{_words(result['reference'])}"
    )
    if ends is None or decimals is None:
        return text + "."
    return f"{text} (95 % interval: {_range(record, ends, decimals)})."


def _words(name: str) -> str:
    """A name of the record as it stands in a sentence; tables and figures keep it as it is."""
    return name.replace("_", " ")


def _difference(record: Record, x: float, decimals: int | None) -> str:
    """``x`` in words: ``0.42 bits higher``, or for a log transform the ratio as ``4.1 % lower``."""
    side = "higher" if x > 0 else "lower"
    return f"{_amount(record, x, decimals)} {side}" if x else "no different"


def _amount(record: Record, x: float, decimals: int | None) -> str:
    if record["transform"] == "log":
        ratio = math.exp(x)
        return f"{number(ratio, 3)} times" if not 0.5 <= ratio <= 2 else f"{number(100 * abs(ratio - 1), 3)} %"
    unit = record.get("unit")
    return signed(abs(x), decimals)[1:] + (f" {unit}" if unit else "")


def _range(record: Record, ends: Sequence[float], decimals: int) -> str:
    low, high = ends
    if low < 0 < high:
        return f"{_difference(record, low, decimals)} to {_difference(record, high, decimals)}"
    near, far = sorted(ends, key=abs)
    amount, other = _amount(record, near, decimals), _difference(record, far, decimals)
    unit = amount.partition(" ")[2]
    shared = unit and other.partition(" ")[2].rpartition(" ")[0] == unit
    return f"{amount.partition(' ')[0] if shared else amount} to {other}"


def _qualifications(record: Record) -> list[str]:
    word, epsilon = record["verdict"], record.get("epsilon")
    margin = f"±{number(epsilon)}{effect_unit(record)}" if epsilon else ""
    told = []
    if word == "null":
        told.append(
            f"Two one-sided tests place it within {margin}, the smallest effect of interest. That is a finding, "
            "not a failed search for one."
        )
    if word == "supported" and record["direction"] == "equal":
        told.append(f"Two one-sided tests place it within {margin}: equal, as claimed.")
    if word == "contradicted" and record["direction"] == "equal":
        told.append(f"The whole interval lies outside {margin}: not equal, as had been claimed.")
    if shown_verdict(record)["trivial"]:
        told.append(f"But the whole interval lies within {margin}: too small to matter, so summaries count it as null.")
    if word == "inconclusive":
        told.append("The interval is too wide to tell an effect of interest from none.")
    if word == "deterministic":
        told.append("The seeds do not differ, so there is no chance to test against: this difference is the result.")
    if unspecific(record):
        told.append(
            f"The sham, {record['sham']}, did as much or more, as far as this study can tell: the effect cannot be put "
            "down to what the method is about."
        )
    return told


def _advice(record: Record) -> dict[str, str | None] | None:
    """What to do next, where the verdict leaves something to do: a sentence, and perhaps a command."""
    text = {
        "screening": f"A verdict needs at least {_FEWEST_SEEDS} seeds (8 by default).",
        "diverged": "Look at the learning curves of the missing seeds, then lower the learning rate or mend the loss, "
        "and run again as a new record; leaving those seeds out would flatter whichever arm broke down.",
        "invalid": "Mend what the gate names and run again. Until then read nothing below as an effect.",
        "inconclusive": "More seeds, as a new record, never added to this one.",
    }.get(record["verdict"])
    if text is None:
        return None
    detectable, spread, seeds = _primary(record).get("detectable"), _spread(record), len(record["seeds"])
    if record["verdict"] != "inconclusive" or not detectable or not spread:
        return {"text": text, "command": None}
    text = f"With {seeds} seeds, effects below {number(detectable, 2)}{effect_unit(record)} are likely missed. {text} "
    if record.get("epsilon"):
        plan = f"--effect {record['epsilon']:.3g}"
        text += "How many would find the smallest effect of interest:"
    else:
        plan = f"--seeds {2 * seeds}"
        text += "What twice as many would find:"
    return {"text": text, "command": f"perturbed power --sd {spread:.3g} {plan}"}


def _spread(record: Record) -> float | None:
    """The standard deviation of the primary differences, if there are two."""
    found = [d for d in figures.differences(record, record["primary"]).values() if d is not None]
    return stdev(found) if len(found) > 1 else None


def effect_unit(record: Record) -> str:
    """The unit of effects and of ε, to stand behind a number."""
    if record["transform"] == "log":
        return " ln units"
    return f" {record['unit']}" if record.get("unit") else ""


def _tiles(record: Record) -> list[dict[str, str]]:
    """The four numbers that a verdict rests on: effect, seeds, detectable effect, smallest effect of interest."""
    result, unit = _primary(record), effect_unit(record)
    effect, interval, detectable = result.get("effect"), result.get("interval"), result.get("detectable")
    tiles = []
    if effect is not None:
        beside = [f"95 % interval {span(interval)}"] if interval else []
        beside += [_ratio(record, effect, interval)] if record["transform"] == "log" else []
        tiles.append(_tile("Effect, positive as claimed", signed(effect, places(interval)) + unit, "; ".join(beside)))
    p = f"sign-flip test, p = {_p(result['p'])}" if result.get("p") is not None else "no test"
    tiles.append(_tile("Paired seeds", str(result.get("n", len(record["seeds"]))), p))
    if detectable is not None:
        tiles.append(
            _tile(
                "Smallest detectable effect", number(detectable, 2) + unit, "found with 80 % probability by this study"
            )
        )
    if record.get("epsilon"):
        why = record.get("why_epsilon") or "fixed beforehand"
        tiles.append(_tile("Smallest effect of interest, ε", f"±{number(record['epsilon'])}{unit}", why))
    return tiles


def _tile(label: str, value: str, beside: str) -> dict[str, str]:
    return {"label": label, "value": value, "beside": beside}


def _ratio(record: Record, effect: float, interval: Sequence[float] | None) -> str:
    sign = -1.0 if record["direction"] == "lower" else 1.0
    text = f"{record['primary']} / {_primary(record)['reference']} = {number(math.exp(sign * effect))}"
    if interval is None:
        return text
    low, high = sorted(math.exp(sign * x) for x in interval)
    return f"{text} ({number(low)} to {number(high)})"


def _registered(record: Record) -> dict[str, str]:
    if record.get("registered"):
        return {
            "css": "yes",
            "word": "registered",
            "text": "Claim, metric, ε and seeds were fixed beforehand.",
        }
    if record.get("slug"):
        text = "Fields or seeds differ from the registered study: its claim is not what was tested."
        return {"css": "no", "word": "changed by the user", "text": text}
    return {"css": "no", "word": "not registered", "text": "Nothing shows that claim and metric were fixed beforehand."}


def _arxiv(record: Record) -> str | None:
    name = str(record.get("arxiv") or "")
    return name if _ARXIV.fullmatch(name) else None


def _ours(record: Record) -> dict[str, str]:
    result = _primary(record)
    unit = f" {record['unit']}" if record.get("unit") else ""
    # in log units the interval says nothing about how finely the scores are known
    decimals = None if record.get("transform") == "log" else places(result["interval"])
    means = []
    for arm in (result["reference"], record["primary"]):
        mean = _mean(record["scores"].get(arm, {}))
        plain = DASH if mean is None else number(mean) if decimals is None or decimals > 6 else f"{mean:.{decimals}f}"
        means.append(f"{arm} " + ("without a mean" if mean is None else plain))
    where = " · ".join(str(x) for x in (record.get("scale") and f"{record['scale']} scale", record.get("plan")) if x)
    return {
        "means": f"{record['metric']}: {' → '.join(means)}{unit}",
        "where": where,
        "seeds": f"{len(record['seeds'])} seeds",
    }


def _mean(by_seed: Mapping[str, float | None]) -> float | None:
    """The mean of an arm, undefined if one of its scores is."""
    values = [value for value in by_seed.values() if value is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(by_seed) else None


def _arm(record: Record, arm: str) -> dict[str, Any]:
    result = record["arms"][arm]
    interval = result.get("interval")
    role = "primary" if arm == record["primary"] else "sham" if arm == record.get("sham") else ""
    finite = f"{result['finite']} of {result['n']}" if "finite" in result else str(len(record["seeds"]))
    return {
        "name": arm,
        "role": role,
        "reference": result["reference"],
        "effect": signed(result.get("effect"), places(interval)),
        "interval": span(interval) if interval else DASH,
        "p": _p(result.get("p")),
        "p_holm": _p(result.get("p_holm")),
        "detectable": number(result.get("detectable"), 2),
        "seeds": finite,
        "verdict": shown_verdict(record, result["verdict"], bool(result.get("trivial"))),
    }


def _contrast(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    interval = asked["interval"]
    weights = sorted(asked["weights"].items(), key=lambda one: one[1] < 0)  # a ledger keeps them by name
    terms = [f"{MINUS if w < 0 else '+'} {'' if abs(w) == 1 else f'{abs(w):g} '}{arm}" for arm, w in weights]
    formula = " ".join(terms).removeprefix("+ ")
    epsilon = asked["epsilon"]
    return {
        "name": name,
        "asks": asked["asks"],
        "weighs": f"{asked['metric']} of {formula}" + (f", in{effect_unit(asked)}" if effect_unit(asked) else ""),
        "claimed": asked["direction"] + (f", ε ±{number(epsilon)}" if epsilon else ""),
        "effect": signed(asked["effect"], places(interval)),
        "interval": span(interval) if interval else DASH,
        "p_holm": _p(asked["p_holm"]),
        "verdict": shown_verdict(asked, asked["verdict"], bool(asked["trivial"])),
    }


def _p(p: float | None) -> str:
    if p is None:
        return DASH
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def _sham(record: Record) -> str | None:
    """The contrast of primary and sham in one sentence, where the study has a sham."""
    sham = record.get("sham")
    if sham is None or sham not in record["scores"]:
        return None
    found = [d for d in figures.differences(record, record["primary"], sham).values() if d is not None]
    if len(found) < len(record["seeds"]):
        return f"{record['primary']} {MINUS} {sham}: not every seed has both scores."
    mean = signed(math.fsum(found) / len(found), places(_primary(record).get("interval")))
    text = f"{record['primary']} {MINUS} {sham} = {mean}{effect_unit(record)} on average. "
    if record.get("specific") is None:
        return text + "Whether that is more than chance was not judged."
    either_side = sham_on_either_side(record)
    where = "zero" if either_side else "zero on the side of the effect"
    apart = "different from" if either_side else "more than"
    if record["specific"]:
        return text + f"Its 95 % interval excludes {where}: the effect is {apart} the sham's."
    return text + f"Its 95 % interval does not exclude {where}: the effect is not shown to be {apart} the sham's."


def _other_terms(record: Record) -> str | None:
    """The primary contrast standardised, as a rate of wins, and what pairing was worth; no verdict rests on these."""
    arm, against = record["primary"], _primary(record)["reference"]
    found = [d for d in figures.differences(record, arm).values() if d is not None]
    if len(found) < max(2, len(record["seeds"])) or not stdev(found):
        return None
    share, rate = statistics.wins(found)
    told = [
        f"the effect is {signed(statistics.cohen_dz(found), 2)} standard deviations of the paired differences "
        f"(Hedges’ g {signed(statistics.hedges_g(found), 2)})",
        f"{arm} does better on {number(100 * share, 3)} % of the seeds"
        + (f" (95 % interval {100 * rate[0]:.0f} to {100 * rate[1]:.0f} %)" if rate else ""),
    ]
    t, c = ([record["scores"][a][str(s)] for s in record["seeds"]] for a in (arm, against))
    if record["transform"] == "raw":
        told.append(f"pairing by seed took away {number(100 * statistics.pairing_gain(t, c), 2)} % of the variance")
    if len(found) >= 20:
        told.append(f"the BCa bootstrap interval is {span(statistics.bca_interval(found))}")
    return "; ".join(told) + "."


def _interaction(record: Record, name: str) -> dict[str, Any]:
    result = record["interaction"][name]
    effect, interval = result.get("effect"), result.get("interval")
    drawn = effect is not None and figures.interaction_parts(record, name) is not None
    if effect is not None and interval is None:
        meaning = "too few seeds, or the same in every one, so there is nothing to test against"
    elif interval is None:
        meaning = "not every seed has a finite score in all of its arms"
    elif interval[0] > 0:
        meaning = "together they do more, in the claimed direction, than the sum of what each does alone"
    elif interval[1] < 0:
        meaning = "together they do less, in the claimed direction, than the sum of what each does alone"
    else:
        meaning = "nothing shows that together they do more or less than the sum of what each does alone"
    return {
        "name": name,
        "effect": signed(effect, places(interval)) + (effect_unit(record) if effect is not None else ""),
        "interval": span(interval) if interval else DASH,
        "p": _p(result.get("p")),
        "meaning": meaning,
        "drawn": drawn,
    }


def _secondary(record: Record) -> dict[str, Any] | None:
    """Means of the secondary metrics, arms as columns; described, not tested."""
    metrics = record.get("secondary") or {}
    if not metrics:
        return None
    arms = _columns(record, {arm for by_arm in metrics.values() for arm in by_arm})
    rows = []
    for metric, by_arm in metrics.items():
        cells = [_cell(by_arm.get(arm, {})) for arm in arms]
        rows.append({"name": metric, "cells": cells})
    return {"arms": arms, "rows": rows}


def _columns(record: Record, present: set[str]) -> list[str]:
    known = [arm for arm in ("control", *figures.arm_order(record)) if arm in present]
    return known + sorted(present - set(known))


def _cell(by_seed: Mapping[str, float | None]) -> dict[str, str]:
    values = [value for value in by_seed.values() if value is not None]
    mean = _mean(by_seed)
    if mean is None:
        return {"value": DASH, "beside": f"{len(values)} of {len(by_seed)} finite" if by_seed else ""}
    low, high = number(min(values)), number(max(values))
    return {"value": number(mean), "beside": f"{low} to {high}" if low != high else ""}


def _cost(record: Record) -> dict[str, Any] | None:
    """What each arm cost: quantities as rows, arms as columns, each with its ratio to the arm's reference."""
    cost = record.get("cost") or {}
    if not cost:
        return None
    arms = _columns(record, set(cost))
    rows = []
    for key, (label, units) in _COSTS.items():
        if any(cost[arm].get(key) for arm in arms):
            cells = [
                {"value": _scaled(cost[arm].get(key), units), "beside": _cost_ratio(record, arm, key)} for arm in arms
            ]
            rows.append({"name": label, "cells": cells})
    return {"arms": arms, "rows": rows}


def _cost_ratio(record: Record, arm: str, key: str) -> str:
    reference = record["arms"].get(arm, {}).get("reference")
    mine, theirs = (record["cost"].get(a, {}).get(key) for a in (arm, reference))
    return f"\N{MULTIPLICATION SIGN} {mine / theirs:.2f}" if mine is not None and theirs else ""


def _scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """``value`` with three digits in the largest unit that it fills (the smallest, if it fills none)."""
    if value is None:
        return DASH
    size, unit = next((u for u in units if value >= u[0]), units[-1])
    if value == 0:
        return "0"
    return f"{number(value / size, 3)} {unit}".rstrip()


def _gate(name: str, gate: Mapping[str, Any]) -> dict[str, str]:
    passed = gate.get("pass")
    css, word = ("none", "not applicable") if passed is None else ("pass", "passed") if passed else ("fail", "failed")
    return {"name": name.replace("_", " "), "css": css, "word": word, "detail": str(gate.get("detail") or "")}


def _scores(by_arm: Mapping[str, Mapping[str, float | None]], seeds: Sequence[int]) -> dict[str, Any]:
    """Raw scores with the digits that tell them apart from any other number: the shortest that read back the same."""
    rows = [
        {"name": f"seed {seed}", "cells": [_raw(by_seed.get(str(seed))) for by_seed in by_arm.values()]}
        for seed in seeds
    ]
    return {"arms": list(by_arm), "rows": rows}


def _raw(value: float | None) -> str:
    return "not finite" if value is None else repr(value)


def _origin(record: Record) -> list[tuple[str, str]]:
    """Everything that says where the numbers come from, as rows of a list."""
    machine = record.get("machine") or {}
    versions = record.get("versions") or {}
    rows = [
        ("Started", record.get("started")),
        ("Machine", ", ".join(f"{k} {v}" for k, v in machine.items())),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("Significance level", f"{record['alpha']:g}" if record.get("alpha") else None),
        ("Content hash (SHA-256)", record.get("hash")),
        ("Source hash", record.get("source_sha")),
        ("Verdict rules", f"version {record['verdict_version']}" if record.get("verdict_version") else None),
    ]
    return [(name, str(value)) for name, value in rows if value]


def past_values(record: Record) -> dict[str, Any]:
    """A record as one row among others: date, scale, seeds, effect, interval, verdict, beginning of the hash."""
    result = _primary(record)
    interval = result.get("interval")
    return {
        "started": str(record.get("started") or DASH),
        "scale": str(record.get("scale") or DASH),
        "seeds": len(record["seeds"]),
        "effect": signed(result.get("effect"), places(interval)),
        "interval": span(interval) if interval else DASH,
        "verdict": shown_verdict(record),
        "hash": str(record.get("hash") or DASH)[:12],
    }


# --- the index ---------------------------------------------------------------------------------------------------


def _index(records: Sequence[Record]) -> dict[str, Any]:
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda r: str(r.get("started") or "")):
        newest[page_name(record)] = record
    rates = _false_discovery(newest)
    pages = sorted(newest, key=lambda page: (_name(newest[page]).casefold(), page))
    rows = [_row(page, newest[page], rates.get(page)) for page in pages]
    counts: dict[str, int] = {}
    for row in rows:
        counted = "null" if row["verdict"]["trivial"] else row["verdict"]["word"]
        counts[counted] = counts.get(counted, 0) + 1
    groups = [
        {"name": name, "text": text, "rows": [row for row in rows if row["verdict"]["group"] == name]}
        for name, text in _GROUPS.items()
    ]
    order = sorted(counts, key=lambda word: (list(KINDS).index(word) if word in KINDS else len(KINDS), word))
    return {
        **_base(),
        "groups": [group for group in groups if group["rows"]],
        "counts": [(word, word if word in KINDS else "unknown", counts[word]) for word in order],
        "total": len(rows),
    }


def _false_discovery(newest: Mapping[str, Record]) -> dict[str, float]:
    from perturbed.evidence.statistics import false_discovery

    valid = {page: record for page, record in newest.items() if record["verdict"] != "invalid"}
    tested = {page: p for page, record in valid.items() if (p := _primary(record).get("p")) is not None}
    return dict(zip(tested, map(float, false_discovery(list(tested.values()))), strict=True)) if tested else {}


def _row(page: str, record: Record, rate: float | None) -> dict[str, Any]:
    result = _primary(record)
    effect, interval = result.get("effect"), result.get("interval")
    spent = [cost.get("cpu_s") for cost in (record.get("cost") or {}).values()]
    total = sum(x for x in spent if x is not None) * len(record["seeds"])
    return {
        "page": page,
        "name": _name(record),
        "about": " · ".join(str(x) for x in (record.get("slug"), record.get("scale"), record["metric"]) if x),
        "registered": _registered(record),
        "verdict": shown_verdict(record),
        "unspecific": unspecific(record),
        "spark": figures.sparkline(record),
        "effect": "" if effect is None else signed(effect, places(interval)) + effect_unit(record),
        "interval": span(interval) if interval else "",
        "seeds": str(len(record["seeds"])),
        "p": _p(result.get("p")),
        "rate": _p(rate),
        "cost": _scaled(total, _TIME) if total else DASH,
    }


# --- files and templates -----------------------------------------------------------------------------------------


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _base() -> dict[str, Any]:
    return {"style": figures.palette_css() + STYLE.read_text(encoding="utf-8")}


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file to write that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
