"""Figures of one study as SVG text, in colours that follow the reader's light or dark mode.

Every function takes a record (the JSON object that ``run --json`` prints) and returns one ``<svg>`` element with
``role="img"``, a ``<title>`` and a ``<desc>`` made from the numbers it draws. Colours are CSS variables: a page sets
them once with :func:`palette_css`; :func:`standalone` makes a file of its own. The same record gives the same text.

Panels are drawn about as wide as a phone: their text stays legible there, and wider pages set them side by side.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"  # a dash stands for what is undefined

# Okabe and Ito's colour-blind safe hues, shifted so that each keeps a contrast of 4.5 with its paper.
PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1c2024", "#e9ebee"),
    "muted": ("#5d666f", "#a2abb4"),
    "rule": ("#dfe3e7", "#30363c"),
    "band": ("#eceff2", "#262b31"),
    "arm1": ("#0066a6", "#5cb6f2"),
    "arm2": ("#b84a00", "#f2985f"),
    "arm3": ("#00755a", "#45cba0"),
    "arm4": ("#9a4a88", "#e294cf"),
    "arm5": ("#756400", "#d8c353"),
    "arm6": ("#24798c", "#72d2e2"),
    "arm7": ("#7a4a2b", "#cda583"),
}
_SENTINELS = {name: f"#0a0b{i:02x}" for i, name in enumerate(PALETTE)}
_VARIABLES = {sentinel: f"var(--pt-{name})" for name, sentinel in _SENTINELS.items()}

_WIDTH, _MARGIN = 345, 8  # of a panel, in SVG units; one unit is a CSS pixel on a phone
_ROW = 60  # height of one arm's row in the paired panels
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (9, 2)),
    (0, (3, 3)),
    (0, (2, 1)),
)


@dataclass(frozen=True)
class _Look:
    """Colour, marker and line style of one arm: shape and dashes say what colour says."""

    color: str
    marker: str
    dashes: Any
    hollow: bool = False

    @property
    def face(self) -> str:
        return _SENTINELS["paper"] if self.hollow else self.color

    @property
    def edge(self) -> str:
        return self.color if self.hollow else _SENTINELS["paper"]


# --- numbers as text ---------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits and a real minus sign; an en dash where it is undefined."""
    if value is None or not math.isfinite(value):
        return DASH
    rounded = float(f"{value:.{digits}g}")
    text = f"{rounded:,.0f}" if 1000 <= abs(rounded) < 1e7 else f"{rounded:.{digits}g}"
    return text.replace("-", MINUS)


def places(interval: Sequence[float] | None) -> int | None:
    """Decimals at which half the width of ``interval`` has two significant digits, or None if it has no width."""
    if interval is None or not interval[1] > interval[0]:
        return None
    return max(0, 1 - math.floor(math.log10((interval[1] - interval[0]) / 2)))


def signed(value: float | None, decimals: int | None = None) -> str:
    """``value`` with its sign, at ``decimals`` (see :func:`places`) or at four significant digits."""
    if value is None or not math.isfinite(value):
        return DASH
    text = number(abs(value)) if decimals is None or decimals > 6 else f"{abs(value):.{decimals}f}"
    return (MINUS if value < 0 and re.search("[1-9]", text) else "+") + text


def span(interval: Sequence[float]) -> str:
    """Both ends of ``interval`` as text: ``+0.31 to +0.53``."""
    decimals = places(interval)
    return f"{signed(interval[0], decimals)} to {signed(interval[1], decimals)}"


# --- what a record says about its arms ---------------------------------------------------------------------------


def arm_order(record: Record) -> list[str]:
    """The arms beside ``control``: the primary, the sham, then the others as the record has them."""
    arms = list(record["arms"])
    first = [arm for arm in (record["primary"], record.get("sham")) if arm in arms]
    return first + [arm for arm in arms if arm not in first]


def differences(record: Record, arm: str, reference: str | None = None) -> dict[int, float | None]:
    """Paired differences of ``arm`` by seed: s·(T - C), or s·ln(T/C) for a log transform; positive is as claimed.

    Args:
        record: the record of the study.
        arm: the treatment T.
        reference: the arm C; by default the one that the record compares ``arm`` with.

    Returns:
        The difference of every seed of the record, None where either score is missing (or, for a log, not positive).
    """
    if reference is None:
        reference = str(record["arms"][arm]["reference"])
    sign = -1.0 if record["direction"] == "lower" else 1.0
    pairs = {seed: (_value(record, arm, seed), _value(record, reference, seed)) for seed in record["seeds"]}
    return {seed: None if t is None or c is None else sign * (t - c) for seed, (t, c) in pairs.items()}


def _value(record: Record, arm: str, seed: int) -> float | None:
    """The score of a seed on the scale of the comparison (its logarithm for a log transform), None if undefined."""
    score = record["scores"].get(arm, {}).get(str(seed))
    if score is None or not math.isfinite(score):
        return None
    if record["transform"] != "log":
        return float(score)
    return math.log(score) if score > 0 else None


def _looks(record: Record) -> dict[str, _Look]:
    looks = {"control": _Look(_SENTINELS["muted"], "o", "-", hollow=True)}
    for i, arm in enumerate(arm_order(record)):
        turn = i // 7  # a second arm of one colour gets another marker and line
        looks[arm] = _Look(_SENTINELS[f"arm{i % 7 + 1}"], _MARKERS[(i + turn) % 7], _DASHES[(i + 2 * turn) % 7])
    return looks


def _reference_look(record: Record, reference: str) -> _Look:
    """A reference is always hollow and grey, also where another arm serves as one."""
    marker = _looks(record).get(reference, _Look("", "o", "-")).marker
    return _Look(_SENTINELS["muted"], marker, "-", hollow=True)


def _metric(record: Record) -> str:
    return str(record["metric"]) + (f" ({record['unit']})" if record.get("unit") else "")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(values: Mapping[int, float | None]) -> list[float]:
    return [value for value in values.values() if value is not None]


# --- the paired panels -------------------------------------------------------------------------------------------


def paired_scores(record: Record) -> str:
    """Every seed's score in each arm and in its reference, joined by a line; one row for each arm.

    Scores under a log transform are drawn on a log axis, so that parallel lines mean equal effects. A seed without a
    finite score is a cross at the right edge with its number. The metric's floor and ceiling are dotted lines.
    """
    arms = arm_order(record)
    values = {a: {s: _value(record, a, s) for s in record["seeds"]} for a in record["scores"]}
    drawn = [v for by_seed in values.values() for v in _finite(by_seed)]
    missing = any(v is None for a in arms for v in values.get(a, {}).values())
    with _panel(_WIDTH, len(arms) * _ROW + 46) as (figure, rect):
        axes = figure.add_axes(rect(_MARGIN + 4, 4, _MARGIN + 4, 42))
        low, high = _limits(drawn, 0.06)
        axes.set_xlim(low, high + (0.22 * (high - low) if missing else 0))
        _bound_lines(axes, record)
        for row, arm in enumerate(arms):
            _pair_row(axes, record, arm, row, values)
        _rows(axes, len(arms))
        _score_ticks(axes, record)
        axes.set_xlabel(_metric(record) + (", log scale" if record["transform"] == "log" else ""))
        return _svg(figure, "scores", "Scores of every seed", _scores_text(record, arms))


def _pair_row(axes: Axes, record: Record, arm: str, row: int, values: Mapping[str, Mapping[int, float | None]]) -> None:
    reference = record["arms"][arm]["reference"]
    look, base = _looks(record)[arm], _reference_look(record, reference)
    upper, lower = row + 0.48, row + 0.80
    for seed in record["seeds"]:
        c, t = values[reference].get(seed), values[arm].get(seed)
        if c is not None and t is not None:
            axes.plot([c, t], [upper, lower], color=look.color, lw=1, alpha=0.55, zorder=2)
    _dots(axes, _finite(values[reference]), upper, base)
    _dots(axes, _finite(values[arm]), lower, look)
    for name, height in ((reference, upper), (arm, lower)):
        _missing_mark(axes, [s for s, v in values[name].items() if v is None], height)
    _named(axes, arm, look, 0.0, row + 0.16, "left")
    _named(axes, reference, base, 1.0, row + 0.16, "right")


def _dots(axes: Axes, xs: Sequence[float], height: float, look: _Look) -> None:
    axes.plot(
        xs,
        [height] * len(xs),
        ls="none",
        marker=look.marker,
        ms=6 if look.hollow else 7,
        mfc=look.face,
        mec=look.edge,
        mew=1.3 if look.hollow else 0.8,
        zorder=3,
    )


def _missing_mark(axes: Axes, seeds: Sequence[int], height: float) -> None:
    if not seeds:
        return
    who = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
    axes.text(
        1, height, f"✕ {who}", transform=axes.get_yaxis_transform(), ha="right", va="center", weight="bold", size=9.5
    )


def _named(axes: Axes, name: str, look: _Look, x: float, height: float, side: str) -> None:
    """A name with its marker, at the left or the right end of a row."""
    inward = 1 if side == "left" else -1
    where = axes.get_yaxis_transform()
    axes.plot([x + inward * 0.012], [height], transform=where, ls="none", marker=look.marker, ms=5.5, mfc=look.face,
              mec=look.color, mew=1.3)  # fmt: skip
    axes.text(
        x + inward * 0.035, height, label(name), transform=where, ha=side, va="center_baseline", color=look.color,
        weight="normal" if look.hollow else "bold",
    )  # fmt: skip


def _bound_lines(axes: Axes, record: Record) -> None:
    low, high = axes.get_xlim()
    for bound in record.get("bounds") or ():
        at = _on_scale(record, bound)
        if at is not None and low <= at <= high:
            axes.axvline(at, color=_SENTINELS["muted"], lw=1, ls=(0, (1, 2)), zorder=1)


def _on_scale(record: Record, value: float | None) -> float | None:
    if value is None or record["transform"] != "log":
        return value
    return math.log(value) if value > 0 else None


def _score_ticks(axes: Axes, record: Record) -> None:
    """Ticks at round scores, on an axis that may be that of their logarithms."""
    low, high = axes.get_xlim()
    if record["transform"] != "log":
        axes.set_xticks(*_ticks(low, high))
        return
    if high - low < math.log(20):
        ticks, words = _ticks(math.exp(low), math.exp(high))
    else:
        ticks = [10.0**k for k in range(math.ceil(low / math.log(10)), math.floor(high / math.log(10)) + 1)]
        words = [number(t) for t in ticks]
    axes.set_xticks([math.log(t) for t in ticks], words)


def _ticks(low: float, high: float, sign: bool = False) -> tuple[list[float], list[str]]:
    """Up to six round values from ``low`` to ``high`` and their text, all with the decimals that the step needs."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ticks = [float(t) for t in found if low <= t <= high]
    decimals = next((k for k in range(7) if all(abs(round(t, k) - t) < 1e-9 for t in ticks)), None)
    if decimals is None or (ticks and max(map(abs, ticks)) >= 1e7):
        return ticks, [signed(t) if sign and t else number(t) for t in ticks]
    words = [f"{abs(t):,.{decimals}f}" for t in ticks]
    marks = [MINUS if t < -1e-9 else "+" if sign and t > 1e-9 else "" for t in ticks]
    return ticks, [mark + word for mark, word in zip(marks, words, strict=True)]


def _scores_text(record: Record, arms: Sequence[str]) -> str:
    lines = [f"{_metric(record)} of {len(record['seeds'])} seeds; lines join the two scores of one seed."]
    for arm in dict.fromkeys(["control", *(record["arms"][a]["reference"] for a in arms), *arms]):
        known = {s: v for s, v in record["scores"].get(arm, {}).items() if v is not None}
        lost = [s for s, v in record["scores"].get(arm, {}).items() if v is None]
        text = f"{arm}: " + (
            f"mean {number(_mean(list(known.values())))}, from {number(min(known.values()))} to "
            f"{number(max(known.values()))}"
            if known
            else "no finite score"
        )
        lines.append(text + (f"; no finite score for seed {', '.join(lost)}" if lost else "") + ".")
    return " ".join(lines)


def paired_differences(record: Record) -> str:
    """Every seed's difference from the reference, with mean and 95 % interval, against zero and the band of ±ε."""
    arms = arm_order(record)
    found = {arm: _finite(differences(record, arm)) for arm in arms}
    ends = [x for arm in arms for x in record["arms"][arm].get("interval") or ()]
    epsilon = record.get("epsilon")
    with _panel(_WIDTH, len(arms) * _ROW + 46) as (figure, rect):
        axes = figure.add_axes(rect(_MARGIN + 4, 4, _MARGIN + 4, 42))
        shown = [x for xs in found.values() for x in xs] + ends
        extent = max((abs(x) for x in shown), default=0.0)
        # A band far wider than the data would press the dots into one: then it fills the panel instead.
        band = [epsilon, -epsilon] if epsilon and epsilon < 4 * extent else []
        axes.set_xlim(*_limits([0.0, *shown, *band], 0.08))
        if epsilon:
            low, high = axes.get_xlim()
            axes.axvspan(max(-epsilon, low), min(epsilon, high), color=_SENTINELS["band"], lw=0, zorder=0)
        axes.axvline(0, color=_SENTINELS["ink"], lw=1, solid_capstyle="butt", zorder=1)
        for row, arm in enumerate(arms):
            _difference_row(axes, record, arm, row, found[arm])
        _rows(axes, len(arms))
        axes.set_xticks(*_ticks(*axes.get_xlim(), sign=True))
        axes.set_xlabel(f"difference{_difference_unit(record)}; positive is as claimed")
        return _svg(figure, "differences", "Paired differences", _differences_text(record, arms))


def _difference_unit(record: Record) -> str:
    if record["transform"] == "log":
        return " in ln of the score"
    return f" ({record['unit']})" if record.get("unit") else ""


def _difference_row(axes: Axes, record: Record, arm: str, row: int, found: Sequence[float]) -> None:
    look, result = _looks(record)[arm], record["arms"][arm]
    axes.plot(found, [row + 0.50] * len(found), ls="none", marker=look.marker, ms=5.5, mfc="none", mec=look.color,
              mew=1.2, zorder=3)  # fmt: skip
    effect, interval = result.get("effect"), result.get("interval")
    if interval is not None:
        axes.plot(interval, [row + 0.80] * 2, color=look.color, lw=2.5, marker="|", ms=11, mew=1.6, zorder=3)
    if effect is not None:
        axes.plot([effect], [row + 0.80], ls="none", marker="D", ms=7, mfc=look.color, mec=_SENTINELS["paper"],
                  mew=1.2, zorder=4)  # fmt: skip
    where = axes.get_yaxis_transform()
    axes.text(0, row + 0.16, f"{label(arm, 22)} {MINUS} {label(result['reference'], 16)}", transform=where, ha="left",
              va="center_baseline", color=look.color, weight="bold")  # fmt: skip
    axes.text(1, row + 0.16, _row_result(result), transform=where, ha="right", va="center_baseline")


def _row_result(result: Mapping[str, Any]) -> str:
    effect, interval = result.get("effect"), result.get("interval")
    if effect is None:
        return f"{result['finite']} of {result['n']} finite" if "finite" in result else "no effect"
    return signed(effect, places(interval))


def _differences_text(record: Record, arms: Sequence[str]) -> str:
    unit = _difference_unit(record)
    lines = [f"Differences by seed{unit}; positive is as claimed."]
    for arm in arms:
        result = record["arms"][arm]
        effect, interval = result.get("effect"), result.get("interval")
        text = f"{arm} minus {result['reference']}: "
        if effect is None:
            text += _row_result(result)
        else:
            text += f"mean {signed(effect, places(interval))}"
        lines.append(text + (f", 95 % interval {span(interval)}." if interval is not None else "."))
    if record.get("epsilon"):
        lines.append(f"The smallest effect of interest is ±{number(record['epsilon'])}.")
    return " ".join(lines)


def _rows(axes: Axes, count: int) -> None:
    """One row for each arm from the top, parted by hairlines, with a light grid along the value axis."""
    axes.set_ylim(count, 0)
    axes.set_yticks([])
    for row in range(count):
        # No grid, zero line or band behind the names.
        axes.axhspan(row, row + 0.31, color=_SENTINELS["paper"], lw=0, zorder=1.5)
        if row:
            axes.axhline(row, color=_SENTINELS["rule"], lw=1, zorder=1.6)
    axes.grid(axis="x", color=_SENTINELS["rule"], lw=0.8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _limits(values: Sequence[float], pad: float) -> tuple[float, float]:
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = (high - low) * pad or abs(high) * 0.05 or 1.0
    return low - room, high + room


# --- learning curves and interactions ----------------------------------------------------------------------------


def learning_curves(record: Record, metric: str, *, points: int = 60) -> str:
    """One metric over training: the mean over seeds of each arm (bold), and every seed (thin).

    The mean is drawn at the steps that all seeds of the arm share with a finite value. A range above a factor of 50
    is drawn on a log axis.

    Args:
        record: the record; ``record["curves"][metric]`` is ``{arm: {seed: [[step, value], ...]}}``.
        metric: the curve to draw.
        points: at most as many points are drawn of each seed's line.

    Raises:
        KeyError: if the record has no such curve.
    """
    arms = [a for a in ("control", *arm_order(record)) if a in record["curves"][metric]]
    arms += [a for a in record["curves"][metric] if a not in arms]
    looks = _looks(record)
    columns, rows = _legend_shape(arms)
    top = 26 + 17 * rows
    with _panel(_WIDTH, top + 190) as (figure, rect):
        axes = figure.add_axes(rect(46, top, _MARGIN + 4, 38))
        figure.text(_MARGIN / _WIDTH, 1 - 5 / (top + 190), label(metric, 44), va="top", weight="bold", size=12)
        every: list[float] = []
        last: list[str] = []
        for arm in arms:
            look = looks.get(arm, looks["control"])
            seeds = [_points(line) for line in record["curves"][metric][arm].values()]
            every += [y for line in seeds for y in line.values()]
            for line in seeds:
                xs, ys = _thin(line, points)
                axes.plot(xs, ys, color=look.color, lw=0.8, alpha=0.3, zorder=2)
            mean = _mean_line(seeds)
            xs, ys = _thin(mean, 2 * points)
            axes.plot(xs, ys, color=look.color, lw=2, ls=look.dashes, marker=look.marker, markevery=[-1] if xs else [],
                      ms=6, mfc=look.face, mec=look.color, label=label(arm, 28), zorder=3)  # fmt: skip
            if mean:
                last.append(f"{arm} ends at {number(ys[-1])} at step {xs[-1]:g}")
        _curve_axes(axes, every)
        axes.set_xlabel("step")
        _legend(axes, columns, 1 - 20 / (top + 190))
        text = f"{metric} by training step, mean over seeds of each arm. " + "; ".join(last) + "."
        key = f"curve{list(record['curves']).index(metric)}"
        return _svg(figure, key, f"Learning curves: {metric}", text)


def _curve_axes(axes: Axes, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    if values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    else:
        axes.set_yticks(*_ticks(*axes.get_ylim()))
    axes.set_xticks(*_ticks(*axes.get_xlim()))
    _open_axes(axes)


def _open_axes(axes: Axes) -> None:
    """A light grid for the values and a line below: no box around."""
    axes.grid(axis="y", color=_SENTINELS["rule"], lw=0.8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _points(line: Sequence[Sequence[float | None]]) -> dict[float, float]:
    return {float(x): float(y) for x, y in line if x is not None and y is not None and math.isfinite(y)}


def _mean_line(seeds: Sequence[Mapping[float, float]]) -> dict[float, float]:
    shared = [x for x in (seeds[0] if seeds else ()) if all(x in line for line in seeds)]
    return {x: _mean([line[x] for line in seeds]) for x in shared}


def _thin(line: Mapping[float, float], points: int) -> tuple[list[float], list[float]]:
    """At most ``points`` points of ``line``, evenly chosen, always with the first and the last."""
    xs = sorted(line)
    if len(xs) > points:
        xs = [xs[round(i * (len(xs) - 1) / (points - 1))] for i in range(points)]
    return xs, [line[x] for x in xs]


def _legend_shape(names: Sequence[str]) -> tuple[int, int]:
    width = 46 + 6.6 * max(min(len(name), 28) for name in names)
    columns = max(1, min(len(names), int((_WIDTH - 2 * _MARGIN) / width)))
    return columns, math.ceil(len(names) / columns)


def _legend(axes: Axes, columns: int, top: float = 1.0) -> None:
    legend = axes.figure.legend(
        *axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0, top), ncols=columns, frameon=False,
        borderpad=0.2, handlelength=2.6, columnspacing=1.2, labelspacing=0.35, handletextpad=0.5, borderaxespad=0.3,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_color(_SENTINELS["ink"])


def interaction_parts(record: Record, name: str) -> tuple[str, str] | None:
    """The two arms that ``name`` (``a+b``) combines, or None if it is not the combination of two measured arms."""
    cuts = [(name[:i], name[i + 1 :]) for i, letter in enumerate(name) if letter == "+"]
    return next((cut for cut in cuts if all(part in record["scores"] for part in (*cut, name, "control"))), None)


def interaction_plot(record: Record, name: str) -> str:
    """Do the effects of two methods add up? Mean scores with and without each, beside what the sum would give.

    Drawn over the seeds that are finite in all four arms, on a log axis for a log transform (where "add up" means
    that the ratios multiply).

    Raises:
        ValueError: if ``name`` is not the combination of two arms of the record.
    """
    parts = interaction_parts(record, name)
    if parts is None:
        raise ValueError(f"{name!r} does not combine two arms of this record; it has {', '.join(record['scores'])}")
    a, b = parts
    cells = _complete_cells(record, ("control", a, b, name))
    means = [_mean([cell[i] for cell in cells]) if cells else math.nan for i in range(4)]
    additive = means[1] + means[2] - means[0]
    names = (f"without {a}", f"with {a}", "if effects added up")
    columns, rows = _legend_shape(names)
    top = 10 + 17 * rows
    with _panel(_WIDTH, top + 180) as (figure, rect):
        axes = figure.add_axes(rect(52, top, 30, 38))
        for cell in cells:
            axes.plot([0, 1], [cell[0], cell[2]], color=_SENTINELS["muted"], lw=0.8, alpha=0.3)
            axes.plot([0, 1], [cell[1], cell[3]], color=_SENTINELS["arm1"], lw=0.8, alpha=0.3)
        lines = (
            ([means[0], means[2]], _Look(_SENTINELS["muted"], "o", "-", hollow=True)),
            ([means[1], means[3]], _Look(_SENTINELS["arm1"], "s", "-")),
            ([means[1], additive], _Look(_SENTINELS["arm2"], "D", (0, (3, 2)), hollow=True)),
        )
        for (ys, look), text in zip(lines, names, strict=True):
            axes.plot([0, 1], ys, color=look.color, lw=2, ls=look.dashes, marker=look.marker, ms=7, mfc=look.face,
                      mec=look.color, label=label(text, 28))  # fmt: skip
        axes.set_xlim(-0.08, 1.08)
        axes.set_xticks([0, 1], [f"without {label(b, 18)}", f"with {label(b, 18)}"])
        _value_axis(axes, record)
        _legend(axes, columns)
        key = "interaction" + str(list(record["interaction"]).index(name))
        return _svg(figure, key, f"Interaction of {a} and {b}", _interaction_text(record, (a, b, name), means))


def _complete_cells(record: Record, arms: Sequence[str]) -> list[list[float]]:
    cells = [[_value(record, arm, seed) for arm in arms] for seed in record["seeds"]]
    return [[v for v in cell if v is not None] for cell in cells if None not in cell]


def _value_axis(axes: Axes, record: Record) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_yticks(*_ticks(*axes.get_ylim()))
    if record["transform"] == "log":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(math.exp(y), 3)))
    axes.set_ylabel(_metric(record) + (", log scale" if record["transform"] == "log" else ""))
    _open_axes(axes)


def _interaction_text(record: Record, names: tuple[str, str, str], means: Sequence[float]) -> str:
    a, b, both = names
    back = math.exp if record["transform"] == "log" else float
    found = ", ".join(f"{arm} {number(back(mean))}" for arm, mean in zip(("control", a, b, both), means, strict=True))
    result = record["interaction"][both]
    text = f"Mean {_metric(record)}: {found}. Interaction {signed(result['effect'], places(result['interval']))}"
    return text + (f", 95 % interval {span(result['interval'])}." if result["interval"] else ".")


# --- the small interval of index and README ----------------------------------------------------------------------


def sparkline(record: Record, arm: str | None = None) -> str:
    """The effect of ``arm`` (the primary by default) with its 95 % interval against zero and ±ε, 160 by 26 units.

    The scale is the row's own: what can be compared between rows is where the interval lies, not how long it is.
    """
    arm = record["primary"] if arm is None else arm
    result = record["arms"][arm]
    effect, interval, epsilon = result.get("effect"), result.get("interval"), record.get("epsilon")
    title = f"{arm} minus {result['reference']}: {_row_result(result)}" + (
        f", 95 % interval {span(interval)}" if interval is not None else ""
    )
    desc = "Zero is the thin line" + (f"; the band is ±{number(epsilon)}." if epsilon else ".")
    shapes = [] if effect is None else _spark_shapes(effect, interval or (effect, effect), epsilon or 0.0)
    if effect is None:
        shapes = [f'<text x="80" y="17" text-anchor="middle" font-size="11">{html.escape(_row_result(result))}</text>']
    return (
        '<svg class="pt-spark" role="img" viewBox="0 0 160 26" xmlns="http://www.w3.org/2000/svg" '
        f'style="fill: var(--pt-ink)"><title>{html.escape(title)}</title><desc>{html.escape(desc)}</desc>'
        + "".join(shapes)
        + "</svg>"
    )


def _spark_shapes(effect: float, interval: Sequence[float], epsilon: float) -> list[str]:
    reach = max(abs(effect), abs(interval[0]), abs(interval[1]))
    # Beyond three times the interval the band would hide where in it the effect lies: it then fills the row.
    reach = 1.1 * max(reach, min(epsilon, 3 * reach)) or 1.0

    def at(x: float) -> float:
        return round(80 + 76 * max(-1.0, min(1.0, x / reach)), 2)

    band = ""
    if epsilon:
        left, right = (0.0, 160.0) if epsilon >= reach else (at(-epsilon), at(epsilon))
        band = f'<rect x="{left}" y="2" width="{round(right - left, 2)}" height="22" style="fill: var(--pt-rule)"/>'
    zero = '<path d="M80 0V26" style="stroke: var(--pt-muted); stroke-width: 1"/>'
    line = f'<path d="M{at(interval[0])} 13H{at(interval[1])}" style="stroke: var(--pt-arm1); stroke-width: 3"/>'
    dot = (
        f'<circle cx="{at(effect)}" cy="13" r="4.5" '
        'style="fill: var(--pt-arm1); stroke: var(--pt-paper); stroke-width: 1.2"/>'
    )
    return [band, zero, line, dot]


# --- SVG ---------------------------------------------------------------------------------------------------------


def palette_css() -> str:
    """The CSS variables that the figures are drawn in, for light and for dark mode (print is always light)."""
    light = " ".join(f"--pt-{name}: {colors[0]};" for name, colors in PALETTE.items())
    dark = " ".join(f"--pt-{name}: {colors[1]};" for name, colors in PALETTE.items())
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def standalone(svg: str) -> str:
    """A figure as a file of its own (for an ``<img>`` or a README): with its size, its paper and both palettes."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    if box is None:
        raise ValueError("not a figure of this module: it has no viewBox")
    look = palette_css() + "svg { background: var(--pt-paper); font-family: system-ui, sans-serif; }"
    head, rest = svg.split(">", 1)
    return f'{head} width="{box[1]}" height="{box[2]}"><style>{look}</style>{rest}'


def label(name: str, longest: int = 24) -> str:
    """``name`` on one line without control characters, cut to ``longest`` characters."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    return flat if len(flat) <= longest else flat[: longest - 1] + "…"


def _style() -> dict[str, Any]:
    ink, muted, rule = (_SENTINELS[name] for name in ("ink", "muted", "rule"))
    return {
        "svg.fonttype": "none", "svg.hashsalt": "perturbed", "text.parse_math": False, "axes.unicode_minus": True,
        "font.size": 11, "axes.labelsize": 11, "xtick.labelsize": 10.5, "ytick.labelsize": 10.5, "legend.fontsize": 11,
        "text.color": ink, "axes.labelcolor": muted, "axes.edgecolor": muted, "axes.linewidth": 1,
        "xtick.color": muted, "ytick.color": muted, "grid.color": rule, "axes.facecolor": "none",
        "figure.facecolor": "none", "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0, "axes.axisbelow": True, "lines.solid_capstyle": "round", "axes.labelpad": 5,
        "path.simplify": True,
    }  # fmt: skip


Rect = Callable[[float, float, float, float], tuple[float, float, float, float]]


@contextmanager
def _panel(width: float, height: float) -> Iterator[tuple[Figure, Rect]]:
    """A figure of that size in SVG units, and ``rect(left, top, right, bottom)``: margins as an axes position."""
    import matplotlib.style
    from matplotlib.figure import Figure

    def rect(left: float, top: float, right: float, bottom: float) -> tuple[float, float, float, float]:
        return left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height

    with matplotlib.style.context(["default", _style()]), warnings.catch_warnings():
        # Text is laid out with matplotlib's font but drawn with the reader's, which may well have the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield Figure(figsize=(width / 72, height / 72), dpi=72), rect


def _svg(figure: Figure, key: str, title: str, desc: str) -> str:
    """Render ``figure`` and make it fit to stand in a page; must be called within :func:`_panel`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]
    root = ET.fromstring(buffer.getvalue())
    for child in root.findall("{*}defs"):  # a style sheet that would reach the whole page
        root.remove(child)
    used = {value[1:] for node in root.iter() for name, value in node.items() if name.endswith("}href")}
    for node in root.iter():
        _rewrite(node, key, used)
    root.attrib = {
        "class": "pt-figure", "role": "img", "viewBox": root.attrib["viewBox"], "aria-labelledby": f"{key}-t {key}-d",
        "xmlns": "http://www.w3.org/2000/svg", "style": "stroke-linejoin: round",
    }  # fmt: skip
    for i, (tag, text) in enumerate((("title", title), ("desc", desc))):
        node = ET.Element(tag, {"id": f"{key}-{tag[0]}"})
        node.text = label(text, 2000)
        root.insert(i, node)
    return re.sub(r">\s+<", "><", ET.tostring(root, encoding="unicode"))


def _rewrite(node: ET.Element, key: str, used: set[str]) -> None:
    """CSS variables for sentinel colours, the page's font, ids of the figure's own, two decimals, no name spaces."""
    node.tag = node.tag.split("}")[-1]
    old = dict(node.attrib)
    node.attrib.clear()
    for name, value in old.items():
        if name == "id":
            if value in used:
                node.set("id", f"{key}-{value}")
        elif name.endswith("}href"):
            node.set("href", f"#{key}-{value[1:]}")
        elif name == "clip-path":
            continue
        elif name == "style":
            kept = [part for part in value.split("; ") if not part.startswith("font-family")]
            node.set("style", re.sub(r"#0a0b\w\w", lambda m: _VARIABLES[m[0]], "; ".join(kept)))
        elif name == "transform" and value.startswith("rotate(-0 "):
            continue
        else:
            node.set(name, re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value.replace("\n", "")))
