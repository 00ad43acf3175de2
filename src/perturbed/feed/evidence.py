"""What was measured of a paper, from the ledgers: in short for lists, whole for its page, and as findings.

The committed evidence goes first; where there is none, the newest record of the registered study among the user's own
stands in, as `perturbed.evidence.ledger.latest` has it. Lists take stored verdicts as they are once a record's hash
holds, and never import SciPy; a paper's page recomputes everything from the raw scores. A ledger that cannot be
believed is said to be so, with the reason, at its paper, and touches nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from perturbed.evidence import figures, ledger
from perturbed.evidence.ledger import LedgerError, Record
from perturbed.evidence.verdict import VERDICT_VERSION, unspecific
from perturbed.feed.catalogue import catalogue
from perturbed.feed.database import Database, put_setting, setting
from perturbed.home import home

SCALE = "laptop"  # the scale that every study has been registered at; a paper's verdict is that of this scale
UNREADABLE = "unreadable"  # in place of a verdict

_STAMPS = "ledgers"  # the setting that says which state of the ledgers the database has copied
_MOST_HISTORY = 20

Stamp = tuple[tuple[str, int, int], ...]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Short:
    """The evidence of a paper as lists show it.

    Attributes:
        verdict: One of `perturbed.evidence.verdict.Verdict`, or ``unreadable``.
        trivial: The interval lies within ±ε although the verdict names an effect.
        sentence: The finding in one sentence, or why the evidence could not be read.
        spark: Effect and interval as an SVG, or None without an effect.
        hash: Of the record; None if it could not be read.
        own: The record is the user's own, not committed evidence.
        problem: Why the evidence could not be read, or None.
    """

    slug: str
    verdict: str
    trivial: bool
    sentence: str
    spark: str | None
    hash: str | None
    own: bool
    problem: str | None = None


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


def summary_of(slug: str) -> Short | None:
    """The evidence of a paper in short, or None where nothing was measured.

    Nothing is recomputed, but for a record that other rules have judged. As long as the ledger's files are the same,
    the answer is the one made before.
    """
    return _kept(_shorts, slug, _summarise)


def evidence(slug: str) -> Evidence | Unreadable | None:
    """All that the paper's page shows of what was measured, or None where nothing was."""
    return _kept(_pages, slug, _compile)


def sync(database: Database, now: float) -> int:
    """Copy the verdicts of ledgers that have changed into the database, with a finding wherever one changes.

    Papers that the catalogue has not put into the database are left for later. The verdict of a paper whose ledger
    cannot be read is taken away.

    Args:
        database: Of the feed.
        now: Seconds since 1970.

    Returns:
        How many findings are new.
    """
    stamps = {known.slug: [list(part) for part in _stamp(known.slug)] for known in catalogue()}
    copied: dict[str, Any] = json.loads(setting(database.read(), _STAMPS) or "{}")
    changed = [slug for slug in stamps if stamps[slug] != copied.get(slug, [])]
    if not changed:
        return 0
    judged = {slug: _judge(slug) for slug in changed}
    count = 0
    with database.write() as connection:
        for slug, (verdict, findings) in judged.items():
            paper = connection.execute("SELECT id, verdict FROM paper WHERE slug = ?", (slug,)).fetchone()
            if paper is None:
                continue
            for finding in findings:
                done = connection.execute(
                    "INSERT OR IGNORE INTO finding (paper, record, verdict, at, seen) VALUES (?, ?, ?, ?, ?)",
                    (paper["id"], finding.hash, finding.verdict, finding.at or now, now),
                )
                count += done.rowcount
            if paper["verdict"] != verdict:
                connection.execute(
                    "UPDATE paper SET verdict = ?, changed = ? WHERE id = ?", (verdict, now, paper["id"])
                )
            copied[slug] = stamps[slug]
        put_setting(connection, _STAMPS, json.dumps(copied))
    return count


# --- which records -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The records of a study: those of the folder that decides, oldest first, and what else there is."""

    path: Path
    own: bool
    deciding: list[Record]
    others: list[tuple[Record, bool]]
    notes: tuple[str, ...]

    @property
    def newest(self) -> Record:
        return self.deciding[-1]


@dataclass(frozen=True)
class _Finding:
    hash: str
    verdict: str
    at: float | None


def _folders() -> tuple[tuple[Path, bool], ...]:
    return (ledger.package_folder(), False), (ledger.user_folder(), True)


def _find(slug: str) -> _Found | None:
    """The records of a study, or None where there is none of the registered one.

    Raises:
        LedgerError: The folder that decides has a ledger that cannot be believed.
    """
    chosen: tuple[Path, bool, list[Record]] | None = None
    others: list[tuple[Record, bool]] = []
    notes: list[str] = []
    for folder, own in _folders():
        path = ledger.file_of(folder, slug)
        if not path.exists():
            continue
        try:
            records = [record for record in ledger.read(path) if record["registered"] is True]
        except LedgerError as error:
            if chosen is None:
                raise
            notes.append(f"Your own records were left out: {error}")
            continue
        mine = [record for record in records if record["scale"] == SCALE]
        if chosen is None and mine:
            chosen = (path, own, mine)
        others += [(record, own) for record in records if record["scale"] != "smoke"]
    if chosen is None:
        return None
    newest = chosen[2][-1]
    rest = [(record, own) for record, own in others if record["hash"] != newest["hash"]]
    rest.sort(key=lambda pair: str(pair[0].get("started") or ""))
    return _Found(*chosen, others=rest[-_MOST_HISTORY:], notes=tuple(notes))


def _judged(record: Record) -> Record:
    """The record as this version's rules have it, without computing where they are those that it was stored under."""
    return record if record["verdict_version"] == VERDICT_VERSION else {**record, **ledger.recompute(record)}


def _judge(slug: str) -> tuple[str | None, list[_Finding]]:
    """The verdict that lists show, and the records that first said so or otherwise; nothing that cannot be believed.

    A record that says what the one before it said is no finding.
    """
    short = summary_of(slug)
    if short is None or short.problem:
        return None, []
    findings: list[_Finding] = []
    found = _find(slug)
    for record in found.deciding if found else ():
        # An old record that cannot be judged is no finding; the page leaves it out too, and says why.
        with contextlib.suppress(Exception):
            verdict = str(_judged(record)["verdict"])
            if not findings or findings[-1].verdict != verdict:
                findings.append(_Finding(record["hash"], verdict, _seconds(record.get("started"))))
    return short.verdict, findings


def _seconds(started: object) -> float | None:
    try:
        at = datetime.fromisoformat(str(started))
    except ValueError:
        return None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


# --- answers that are kept while the files stay as they are --------------------------------------------------------

_shorts: dict[str, tuple[Stamp, Short | None]] = {}
_pages: dict[str, tuple[Stamp, Evidence | Unreadable | None]] = {}


def _kept(known: dict[str, tuple[Stamp, T]], slug: str, make: Callable[[str], T]) -> T | None:
    stamp = _stamp(slug)
    if not stamp:
        return None
    kept = known.get(slug)
    if kept is None or kept[0] != stamp:
        kept = known[slug] = (stamp, make(slug))
    return kept[1]


def _stamp(slug: str) -> Stamp:
    """Path, size and time of change of the study's ledgers; empty where there is none."""
    parts = []
    for folder, _ in _folders():
        try:
            path = ledger.file_of(folder, slug)
            state = path.stat()
        except (LedgerError, OSError):
            continue
        parts.append((str(path), state.st_size, state.st_mtime_ns))
    return tuple(parts)


def _summarise(slug: str) -> Short | None:
    try:
        found = _find(slug)
        return None if found is None else _short(slug, _judged(found.newest), found.own)
    except Exception as error:  # one damaged file must not take a list of a hundred papers down
        return Short(
            slug=slug,
            verdict=UNREADABLE,
            trivial=False,
            sentence=f"The evidence could not be read: {_reason(error)}",
            spark=None,
            hash=None,
            own=False,
            problem=_reason(error),
        )


def _short(slug: str, record: Record, own: bool) -> Short:
    from perturbed.evidence import report

    shown = report.shown_verdict(record)
    return Short(
        slug=slug,
        verdict=str(shown["word"]),
        trivial=bool(shown["trivial"]),
        sentence=report.main_sentence(record),
        spark=None if record["arms"][record["primary"]].get("effect") is None else figures.sparkline(record),
        hash=record["hash"],
        own=own,
    )


def _compile(slug: str) -> Evidence | Unreadable | None:
    try:
        found = _find(slug)
        return None if found is None else _page(slug, found)
    except Exception as error:  # as for lists
        return Unreadable(slug=slug, problem=_reason(error))


def _reason(error: Exception) -> str:
    return (
        str(error) if isinstance(error, LedgerError) else f"a record cannot be used ({type(error).__name__}: {error})"
    )


# --- the whole of it ---------------------------------------------------------------------------------------------


def _page(slug: str, found: _Found) -> Evidence:
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


def _history(found: _Found) -> tuple[tuple[Past, ...], tuple[str, ...]]:
    rows, notes = [], [*found.notes]
    for record, own in reversed(found.others):
        try:
            rows.append(_past(record, own))
        except Exception as error:  # what is wrong with an old record is no reason to hide the new one
            notes.append(f"The record {record['hash'][:12]} was left out: {_reason(error)}")
    return tuple(rows), tuple(notes)


def _past(record: Record, own: bool) -> Past:
    from perturbed.evidence import report

    told = report.past_values(_judged(record))
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
                return _judged(record)
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
