"""What came out of a paper's study, in short: which records decide it, what lists show, and the copy in the database.

The committed evidence goes first; where there is none, the newest record of the registered study among the user's own
stands in, as `perturbed.evidence.ledger.latest` has it. Stored verdicts are taken as they are once a record's hash
holds, and SciPy is never imported. A ledger that cannot be believed is said to be so, with the reason, at its paper,
and touches nothing else.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from perturbed.evidence import figures, ledger
from perturbed.evidence.ledger import LedgerError, Record
from perturbed.evidence.verdict import VERDICT_VERSION
from perturbed.feed.catalogue import catalogue
from perturbed.feed.database import Database, put_setting, setting

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


def summary_of(slug: str) -> Short | None:
    """The evidence of a paper in short, or None where nothing was measured.

    Nothing is recomputed, but for a record that other rules have judged. As long as the ledger's files are the same,
    the answer is the one made before.
    """
    return remembered(_shorts, slug, _summarise)


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
    news = {slug: _judge(slug) for slug in changed}
    count = 0
    with database.write() as connection:
        for slug, (verdict, findings) in news.items():
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
class Found:
    """The records of a study: those of the folder that decides, oldest first, and what else there is."""

    path: Path
    own: bool
    deciding: list[Record]
    others: list[tuple[Record, bool]]
    notes: tuple[str, ...]

    @property
    def newest(self) -> Record:
        """The one that the verdict is of."""
        return self.deciding[-1]


@dataclass(frozen=True)
class _Finding:
    hash: str
    verdict: str
    at: float | None


def _folders() -> tuple[tuple[Path, bool], ...]:
    return (ledger.package_folder(), False), (ledger.user_folder(), True)


def find(slug: str) -> Found | None:
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
    return Found(*chosen, others=rest[-_MOST_HISTORY:], notes=tuple(notes))


def judged(record: Record) -> Record:
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
    found = find(slug)
    for record in found.deciding if found else ():
        # An old record that cannot be judged is no finding; the page leaves it out too, and says why.
        with contextlib.suppress(Exception):
            verdict = str(judged(record)["verdict"])
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


def remembered(known: dict[str, tuple[Stamp, T]], slug: str, make: Callable[[str], T]) -> T | None:
    """What ``make`` says of a study, kept in ``known`` while its ledgers are the same; None where it has none."""
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
        found = find(slug)
        return None if found is None else _short(slug, judged(found.newest), found.own)
    except Exception as error:  # one damaged file must not take a list of a hundred papers down
        return Short(
            slug=slug,
            verdict=UNREADABLE,
            trivial=False,
            sentence=f"The evidence could not be read: {reason(error)}",
            spark=None,
            hash=None,
            own=False,
            problem=reason(error),
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


def reason(error: Exception) -> str:
    """Why a record cannot be shown, in words: its ledger's own, or what failed."""
    return (
        str(error) if isinstance(error, LedgerError) else f"a record cannot be used ({type(error).__name__}: {error})"
    )
