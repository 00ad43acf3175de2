"""What was measured of a paper, whole, for its page: recomputed from the raw scores, with figures.

Which records these are, and what lists show of them, is settled in `perturbed.feed.verdicts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perturbed.evidence import figures, ledger
from perturbed.evidence.ledger import LedgerError, Record
from perturbed.evidence.verdict import unspecific
from perturbed.feed.verdicts import Found, Stamp, find, judged, reason, remembered
from perturbed.home import home


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A verdict as it is shown: ``word``, the class ``css``, ``sign``, ``meaning`` in one line, ``trivial``."""

    word: str
    css: str
    sign: str
    meaning: str
    trivial: bool


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number that the verdict rests on, with what stands beside it."""

    label: str
    value: str
    beside: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm's contrast, as text; ``role`` is ``primary``, ``sham`` or empty."""

    name: str
    role: str
    reference: str
    effect: str
    interval: str
    p: str
    p_holm: str
    detectable: str
    seeds: str
    verdict: Shown


@dataclass(frozen=True, kw_only=True)
class Question:
    """A further question of the study: a contrast of arms on some metric, as text."""

    name: str
    asks: str
    weighs: str
    claimed: str
    effect: str
    interval: str
    p_holm: str
    verdict: Shown


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate: ``css`` is ``pass``, ``fail`` or ``none``."""

    name: str
    css: str
    word: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """Whether the effects of two arms add up."""

    name: str
    effect: str
    interval: str
    p: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number as text, with what stands beside it."""

    value: str
    beside: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a `Table`: one cell for each arm."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of quantities with the arms as columns."""

    arms: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Past:
    """Another record of the study: of an earlier day, of another scale, or the user's own."""

    started: str
    scale: str
    seeds: int
    effect: str
    interval: str
    verdict: Shown
    hash: str
    own: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The newest registered record of a study, recomputed from its raw scores; text is ready to be escaped.

    Attributes:
        hash: Of the record (SHA-256).
        verdict: The primary contrast's.
        specific: The effect is another than the sham's; None without a sham or an interval.
        unspecific: The sham takes something away from an effect that was found.
        sentences: The verdict in words, what it rests on first.
        advice: What to do next, where the verdict leaves something to do.
        advice_command: The command for it.
        effect: Of the primary contrast, positive as claimed; None unless every seed has two finite scores.
        interval: Its 95 % interval.
        p: Of the sign-flip test.
        detectable: What the study would have found with 80 % probability.
        epsilon: Smallest effect of interest.
        unit: Of these five, ``ln units`` for a log transform.
        direction: ``higher``, ``lower`` or ``equal``: what is claimed of the metric.
        tiles: The same numbers as text.
        ours: Means of reference and primary arm in words.
        where: Scale and plan in words.
        registered: Whether claim, metric, ε and seeds were fixed beforehand, in words.
        arms: Every arm's contrast, the primary first.
        sham: The contrast of primary and sham in one sentence.
        other_terms: Standardised effect, rate of wins, gain of pairing.
        cost: What each arm cost.
        scores: Raw scores by seed.
        secondary: Means of the other metrics.
        claim_text: What the paper says happens.
        claim_paper: The paper's own figure and setting.
        command: What reproduces it.
        started: When, ISO.
        origin: Machine, versions, hashes as (name, value).
        own: The record is the user's own.
        history: The other records of the registered study, newest first.
        notes: What could not be read besides.
        figures: Name to SVG file text, drawn when asked for and kept.
        figure_titles: Name to title of each figure.
    """

    slug: str
    title: str
    hash: str
    verdict: Shown
    specific: bool | None
    unspecific: bool
    sentences: tuple[str, ...]
    advice: str | None
    advice_command: str | None
    metric: str
    effect: float | None
    interval: tuple[float, float] | None
    p: float | None
    detectable: float | None
    epsilon: float | None
    unit: str
    direction: str
    tiles: tuple[Tile, ...]
    seeds: tuple[int, ...]
    scale: str
    plan: str | None
    ours: str
    where: str
    registered: str
    arms: tuple[Arm, ...]
    sham: str | None
    other_terms: str | None
    questions: tuple[Question, ...]
    interactions: tuple[Interaction, ...]
    gates: tuple[Gate, ...]
    cost: Table | None
    scores: Table
    secondary: Table | None
    claim_text: str | None
    claim_paper: str | None
    command: str
    started: str | None
    versions: Mapping[str, str]
    origin: tuple[tuple[str, str], ...]
    own: bool
    history: tuple[Past, ...]
    notes: tuple[str, ...]
    figures: Mapping[str, str]
    figure_titles: Mapping[str, str]
    problem: None = None

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON, the figures by their names."""
        fields = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | {"figures": [*self.figures]}
        plain: dict[str, Any] = json.loads(json.dumps(fields, default=lambda value: dataclasses.asdict(value)))
        return plain


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """There is a ledger of the paper, but it cannot be believed; ``problem`` says why, where, and what to do."""

    slug: str
    problem: str
    hash: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The slug and the reason."""
        return {"slug": self.slug, "problem": self.problem}


_pages: dict[str, tuple[Stamp, Evidence | Unreadable | None]] = {}


def evidence(slug: str) -> Evidence | Unreadable | None:
    """All that the paper's page shows of what was measured, or None where nothing was."""
    return remembered(_pages, slug, _compile)


def _compile(slug: str) -> Evidence | Unreadable | None:
    try:
        found = find(slug)
        return None if found is None else _page(slug, found)
    except Exception as error:  # as for lists
        return Unreadable(slug=slug, problem=reason(error))


# --- the whole of it ---------------------------------------------------------------------------------------------


def _page(slug: str, found: Found) -> Evidence:
    from perturbed.evidence import report

    record = {**found.newest, **ledger.recompute(found.newest)}
    told = report.page_values(record)
    primary = record["arms"][record["primary"]]
    advice = told["advice"] or {"text": None, "command": None}
    titles = _figure_titles(record)
    history, notes = _history(found)
    return Evidence(
        slug=slug,
        title=told["name"],
        hash=record["hash"],
        verdict=_shown(told["verdict"]),
        specific=record["specific"],
        unspecific=unspecific(record),
        sentences=tuple(told["story"]),
        advice=advice["text"],
        advice_command=advice["command"],
        metric=record["metric"],
        effect=primary.get("effect"),
        interval=(primary["interval"][0], primary["interval"][1]) if primary.get("interval") else None,
        p=primary.get("p"),
        detectable=primary.get("detectable"),
        epsilon=record["epsilon"],
        unit=report.effect_unit(record).strip(),
        direction=record["direction"],
        tiles=tuple(Tile(**tile) for tile in told["tiles"]),
        seeds=tuple(record["seeds"]),
        scale=record["scale"],
        plan=record.get("plan"),
        ours=told["ours"]["means"],
        where=told["ours"]["where"],
        registered=told["registered"]["text"],
        arms=tuple(Arm(**{**arm, "verdict": _shown(arm["verdict"])}) for arm in told["arms"]),
        sham=told["sham"],
        other_terms=told["other_terms"],
        questions=tuple(Question(**{**one, "verdict": _shown(one["verdict"])}) for one in told["contrasts"]),
        interactions=tuple(
            Interaction(**{name: one[name] for name in ("name", "effect", "interval", "p", "meaning")})
            for one in told["interactions"]
        ),
        gates=tuple(Gate(**gate) for gate in told["gates"]),
        cost=_table(told["cost"]),
        scores=_whole_table(told["scores"]),
        secondary=_table(told["secondary"]),
        claim_text=told["claim"]["text"],
        claim_paper=told["claim"]["paper"],
        command=f"perturbed run {slug} --scale {record['scale']}",
        started=record.get("started"),
        versions={name: str(version) for name, version in (record.get("versions") or {}).items()},
        origin=tuple(told["origin"]),
        own=found.own,
        history=history,
        notes=notes,
        figures=Figures(found.path, record["hash"], tuple(titles)),
        figure_titles=titles,
    )


def _shown(verdict: Mapping[str, Any]) -> Shown:
    return Shown(**{name: verdict[name] for name in ("word", "css", "sign", "meaning", "trivial")})


def _table(told: Mapping[str, Any] | None) -> Table | None:
    return None if told is None else _whole_table(told)


def _whole_table(told: Mapping[str, Any]) -> Table:
    def cell(content: Mapping[str, str] | str) -> Cell:
        return Cell(value=content) if isinstance(content, str) else Cell(**content)

    return Table(
        arms=tuple(told["arms"]),
        rows=tuple(Row(name=row["name"], cells=tuple(map(cell, row["cells"]))) for row in told["rows"]),
    )


def _history(found: Found) -> tuple[tuple[Past, ...], tuple[str, ...]]:
    rows, notes = [], [*found.notes]
    for record, own in reversed(found.others):
        try:
            rows.append(_past(record, own))
        except Exception as error:  # what is wrong with an old record is no reason to hide the new one
            notes.append(f"The record {record['hash'][:12]} was left out: {reason(error)}")
    return tuple(rows), tuple(notes)


def _past(record: Record, own: bool) -> Past:
    from perturbed.evidence import report

    told = report.past_values(judged(record))
    return Past(
        **{name: told[name] for name in ("started", "scale", "seeds", "effect", "interval", "hash")},
        verdict=_shown(told["verdict"]),
        own=own,
    )


# --- figures -----------------------------------------------------------------------------------------------------

# Matplotlib's settings belong to the process, so two threads must not draw at a time.
_drawing = threading.Lock()


class Figures(Mapping[str, str]):
    """The figures of a record as SVG files of their own (with palette and size), drawn when they are asked for.

    A figure once drawn is kept in the user's cache under the hash of its record; where that cannot be written it is
    drawn again.
    """

    def __init__(self, path: Path, record: str, names: Sequence[str]):
        self._path, self._record, self._names = path, record, tuple(names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> str:
        if name not in self._names:
            raise KeyError(name)
        place = home() / "cache" / "feed-figures" / f"{self._record}-{name}-{_drawn_by()}.svg"
        try:
            return place.read_text(encoding="utf-8")
        except OSError:
            pass
        with _drawing:
            svg = figures.standalone(_draw(self._load(), name))
            with contextlib.suppress(OSError):
                _keep(place, svg)
        return svg

    def _load(self) -> Record:
        for record in ledger.read(self._path):
            if record["hash"] == self._record:
                return judged(record)
        raise LedgerError(f"{self._path}: the record {self._record[:12]} is there no more; load the page again")


def _figure_titles(record: Record) -> dict[str, str]:
    curves, interactions = record.get("curves") or {}, record.get("interaction") or {}
    drawable = [
        name
        for name, result in interactions.items()
        if result.get("effect") is not None and figures.interaction_parts(record, name) is not None
    ]
    return {
        "scores": "Scores of every seed",
        "differences": "Paired differences",
        **{f"curve-{i}": f"Learning curves: {metric}" for i, metric in enumerate(curves)},
        **{f"interaction-{i}": f"Interaction: {name}" for i, name in enumerate(drawable)},
    }


def _draw(record: Record, name: str) -> str:
    from perturbed.evidence import report

    if name == "scores":
        return figures.paired_scores(record)
    if name == "differences":
        return figures.paired_differences(record)
    about = _figure_titles(record)[name].partition(": ")[2]
    return report.curve(record, about) if name.startswith("curve") else figures.interaction_plot(record, about)


@functools.cache
def _drawn_by() -> str:
    """The drawing code's state, so that a newer version does not show an older one's figure."""
    return hashlib.sha256(Path(figures.__file__).read_bytes()).hexdigest()[:8]


def _keep(place: Path, svg: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        draft.write_text(svg, encoding="utf-8")
        draft.replace(place)
    finally:
        draft.unlink(missing_ok=True)
