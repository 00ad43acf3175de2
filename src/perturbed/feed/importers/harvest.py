"""Imports: a file of any kind that is read here, or what arXiv and the hub have had since the last time.

Where a harvest stands is written in the same transaction as the papers it brought, so that one which is cut off, even
by ``kill -9``, goes on at the next page and has lost and doubled nothing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from perturbed.errors import PerturbedError, nearest
from perturbed.feed import store
from perturbed.feed.database import Database
from perturbed.feed.importers import atom, hub, oai, page, rss
from perturbed.feed.importers.http import Client
from perturbed.feed.importers.reading import FormatError, Read, Unread, bounded, has_been
from perturbed.feed.papers import Paper

BATCH = 500  # papers in a transaction: few enough that others wait a fraction of a second
LARGEST_FILE = 200_000_000  # bytes: it is read whole
HUB_PAGE = 100
HUB_MOST = 50  # pages of one day; no day has had two
OAI_MOST = 10_000  # pages of one harvest: all of arXiv in those of the server's size
ATOM_PAGE = 500
ATOM_MOST = 30_000  # results of one query that arXiv gives out
CATEGORIES = ("cs.LG", "cs.CL", "cs.CV", "stat.ML")
HARVESTS = ("hub", "arxiv", "oai", "rss")
_GROUPS = ("cs", "econ", "eess", "math", "q-bio", "q-fin", "stat")  # the others are sets of physics


_CATEGORY = re.compile(r"[a-z]+(?:-[a-z]+)?(?:\.[A-Za-z]{2}|\.[a-z]+(?:-[a-z]+)*)?")


class ImportFileError(PerturbedError):
    """A file that cannot be imported; the message says what is wrong with it and what to do."""


@dataclass(frozen=True)
class Step:
    """How far an import is: ``done`` papers of ``source`` so far, and what it is at."""

    source: str
    done: int
    what: str


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Report:
    """What an import did.

    Args:
        source: What was read.
        new: Papers not known before.
        merged: Papers of which only other sources had told.
        changed: Papers of which this source told something new.
        same: Papers of which it told nothing new.
        skipped: Entries without a paper, such as deletions, and papers told twice in one file.
        unread: Everything that was not understood.
        notes: Choices that were made where the source leaves two readings.
        failed: Sources of an update that could not be read, and why; what they gave before is kept.
    """

    source: str
    new: int = 0
    merged: int = 0
    changed: int = 0
    same: int = 0
    skipped: int = 0
    unread: tuple[Unread, ...] = ()
    notes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def papers(self) -> int:
        """How many tellings were taken."""
        return self.new + self.merged + self.changed + self.same

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        counts = (f"{getattr(self, name)} {name}" for name in ("new", "merged", "changed", "same", "skipped"))
        head = f"{self.source}: {self.papers} papers ({', '.join(counts)}), {len(self.unread)} not understood"
        return [
            head,
            *(f"  failed: {text}" for text in self.failed),
            *(f"  note: {text}" for text in self.notes),
            *(f"  not understood: {unread}" for unread in self.unread),
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as plain values."""
        names = ("source", "new", "merged", "changed", "same", "skipped")
        return {
            **{name: getattr(self, name) for name in names},
            "unread": [{"line": u.line, "unit": u.unit, "text": u.text, "why": u.why} for u in self.unread],
            "notes": list(self.notes),
            "failed": list(self.failed),
        }


@dataclass
class _Tally:
    """A report as it grows; ``started`` on the clock that no one sets."""

    source: str
    now: float
    started: float = field(default_factory=time.monotonic)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("new", "merged", "changed", "same"), 0))
    skipped: int = 0
    unread: list[Unread] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, read: Read, source: str = "") -> None:
        prefix = f"{source}: " if source else ""
        self.skipped += read.skipped
        self.notes += [prefix + note for note in read.notes]
        self.unread += [replace(u, why=prefix + u.why) for u in read.unread]

    @property
    def done(self) -> int:
        return sum(self.counts.values())

    def report(self) -> Report:
        return Report(
            self.source,
            **self.counts,
            skipped=self.skipped,
            unread=tuple(self.unread),
            notes=tuple(self.notes),
            failed=tuple(self.failed),
        )


def import_file(
    database: Database, path: Path, *, saved_on: date | None, now: float, progress: Progress | None = None
) -> Report:
    """Import a file; its kind is told by what is in it, not by its name.

    Args:
        database: Where the papers go, 500 in a transaction; importing a file again changes nothing.
        path: A saved page in plain text, the hub's JSON, arXiv's Atom, OAI-PMH or RSS.
        saved_on: Day on which a page was saved; days on pages have no year. The other kinds do not need it.
        now: Seconds since 1970.
        progress: Called after each transaction.

    Raises:
        ImportFileError: The file cannot be read, is too large, of no known kind, or is a page without ``saved_on``
            or saved on a day before all papers or still to come.
        FormatError: The file is of a known kind but broken; nothing was taken.
    """
    if saved_on is not None and not has_been(saved_on, now):
        raise ImportFileError(
            f"saved on {saved_on}: that day is still to come, or older than any page; say on which day it was"
        )
    read = bounded(read_file(path, saved_on=saved_on), now)
    tally = _Tally(path.name, now)
    tally.add(read)
    row = _begin(database, tally)
    _store(database, read.papers, tally, progress=progress, what=path.name)
    return _end(database, row, tally)


def read_file(path: Path, *, saved_on: date | None) -> Read:
    """What a file holds, without storing it; errors as those of `import_file`."""
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise ImportFileError(f"{path}: {size:,} bytes, more than {LARGEST_FILE:,}; split it and import the parts")
        data = path.read_bytes()
    except OSError as e:
        raise ImportFileError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        return _read(data, saved_on)
    except (FormatError, ImportFileError) as e:
        raise type(e)(f"{path}: {e}") from e


def _read(data: bytes, saved_on: date | None) -> Read:
    kind = sniff(data)
    if kind != "page":
        return {"hub": hub.read, "atom": atom.read, "oai": oai.read, "rss": rss.read}[kind](data)
    if saved_on is None:
        raise ImportFileError(
            "a saved page leaves its own year out of its days: say on which day it was saved (--saved-on YYYY-MM-DD)"
        )
    return page.read(_decoded(data), saved_on)


def sniff(data: bytes) -> str:
    """What a file holds: ``page``, ``hub``, ``atom``, ``oai`` or ``rss``.

    Raises:
        ImportFileError: It is HTML, another kind of XML, binary, or empty.
    """
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    start = data[:4096].decode("utf-16" if wide else "utf-8", "ignore").lstrip("\ufeff \t\r\n")
    if not start:
        raise ImportFileError("the file is empty")
    if "\0" in start:
        raise ImportFileError("a binary file; import a page saved as plain text, or JSON, Atom, OAI-PMH or RSS")
    if start[0] in "[{":
        return "hub"
    if start[0] != "<":
        return "page"
    if re.match(r"<!doctype\s+html|<html", start, re.I):
        raise ImportFileError("HTML; save the page as plain text (in the browser: save as, text), then import that")
    root = re.search(r"<(?:[\w.-]+:)?([A-Za-z][\w.-]*)", re.sub(r"<!--.*?-->|<\?.*?\?>", "", start, flags=re.S))
    kinds = {"feed": "atom", "OAI-PMH": "oai", "rss": "rss"}
    name = root[1] if root else "nothing"
    if name not in kinds:
        raise ImportFileError(f"XML of another kind (it begins with {name!r}); there is Atom, OAI-PMH and RSS")
    return kinds[name]


def _decoded(data: bytes) -> str:
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        raise FormatError(f"not text in UTF-8: byte {e.start} does not fit; save the page again as UTF-8") from e


def update(
    database: Database,
    *,
    days: int = 3,
    categories: Sequence[str] = CATEGORIES,
    sources: Sequence[str] = ("hub", "arxiv"),
    client: Client,
    now: float,
    progress: Progress | None = None,
) -> Report:
    """Fetch what is new, going on where an earlier call was cut off.

    Args:
        database: Where the papers go, with the state of the harvest in the same transactions.
        days: How many days to look back, today (UTC) included.
        categories: Of arXiv, such as ``cs.LG``.
        sources: Of ``hub`` (its daily papers), ``arxiv`` (the API, by day of submission), ``oai`` (everything that
            changed since the last harvest; the first looks ``days`` back) and ``rss`` (today's announcements).
        client: Fetches.
        now: Seconds since 1970.
        progress: Called after each transaction.

    Returns:
        The report; a source that could not be read is in ``failed``, and the others are read all the same.

    Raises:
        PerturbedError: A source or category that there is not, ``days`` below 1, or no source could be read.
    """
    if unknown := [s for s in sources if s not in HARVESTS]:
        raise PerturbedError(f"source {unknown[0]!r}: {nearest(unknown[0], HARVESTS)}")
    if bad := [c for c in categories if not _CATEGORY.fullmatch(c)]:
        raise PerturbedError(f"category {bad[0]!r}: not one of arXiv, such as cs.LG or hep-ex")
    if days < 1 or not sources or (not categories and set(sources) != {"hub"}):
        raise PerturbedError("nothing to fetch: at least one day, one source and, for arXiv, one category")
    tally = _Tally(f"update from {', '.join(sources)}", now)
    row = _begin(database, tally)
    harvest = _Harvest(database, client, tally, progress)
    today = datetime.fromtimestamp(now, UTC).date()
    span = (today - timedelta(days=days - 1), today)
    for source in sources:
        try:
            if source == "hub":
                harvest.hub(span)
            elif source == "arxiv":
                harvest.atom(span, tuple(categories))
            elif source == "oai":
                for category in categories:
                    harvest.oai(span, category)
            else:
                harvest.rss(tuple(categories))
        except PerturbedError as e:
            tally.failed.append(f"{source}: {e}")
    report = _end(database, row, tally)
    if len(report.failed) == len(sources):
        raise PerturbedError("; ".join(report.failed))
    return report


@dataclass(frozen=True)
class _Harvest:
    database: Database
    client: Client
    tally: _Tally
    progress: Progress | None

    def hub(self, span: tuple[date, date]) -> None:
        """The daily papers of each day, page by page."""
        state = self._state("hub")
        for first, last, place in _spans(span, state):
            day, number = (date.fromisoformat(place[0]), int(place[1])) if place else (first, 0)
            before: tuple[Paper, ...] = ()  # the same page again is the end: some servers do not count pages
            while day <= last:
                if number >= HUB_MOST:
                    raise PerturbedError(f"the hub lists more than {HUB_MOST * HUB_PAGE:,} papers of {day}; try later")
                query = urlencode({"date": day.isoformat(), "p": number, "limit": HUB_PAGE})
                read = self.client.read(f"https://huggingface.co/api/daily_papers?{query}", hub.read)
                full = len(read.papers) + len(read.unread) >= HUB_PAGE and read.papers != before
                following = (day, number + 1) if full else (day + timedelta(days=1), 0)
                place = [following[0].isoformat(), str(following[1])]
                ended = following[0] > last
                self._take("hub", read, day.isoformat(), None if ended else _state(first, last, place))
                before = read.papers
                day, number = following

    def atom(self, span: tuple[date, date], categories: tuple[str, ...]) -> None:
        """What was submitted to any of the categories, oldest first so that a page stays what it was."""
        name = f"arxiv:{'+'.join(categories)}"
        either = " OR ".join(f"cat:{c}" for c in categories)
        for first, last, place in _spans(span, self._state(name)):
            start = int(place[0]) if place else 0
            days = f"submittedDate:[{first:%Y%m%d}0000 TO {last:%Y%m%d}2359]"
            while True:
                if start >= ATOM_MOST:
                    raise PerturbedError(
                        f"more than {ATOM_MOST:,} papers between {first} and {last}, which arXiv does not give out at "
                        "once: ask for fewer days or categories, or take --source oai"
                    )
                query = {"search_query": f"({either}) AND {days}", "start": start, "max_results": ATOM_PAGE}
                query |= {"sortBy": "submittedDate", "sortOrder": "ascending"}
                read = self.client.read(f"https://export.arxiv.org/api/query?{urlencode(query)}", atom.read)
                following = None if read.more is None else _state(first, last, [read.more])
                self._take(name, read, f"{first} to {last}", following)
                if read.more is None:
                    break
                if int(read.more) <= start:
                    raise PerturbedError(f"arXiv answered page {read.more} when asked for {start}; run it again later")
                start = int(read.more)

    def oai(self, span: tuple[date, date], category: str) -> None:
        """Every record of a category that changed since the last harvest began."""
        name = f"oai:{category}"
        state = self._state(name) or {"since": span[0].isoformat()}
        began = state.get("began", span[1].isoformat())  # what changes meanwhile belongs to the next harvest
        token = state.get("token")
        before: set[str] = set()
        begun_anew = False
        while True:
            try:
                read = self.client.read(_records(category, state["since"], token), oai.read)
            except oai.ExpiredToken:
                if token is None or begun_anew:
                    raise
                token, begun_anew = None, True  # a day has passed since: the same list from its start
                before.clear()
                continue
            before.add(token or "")
            if read.more in before or len(before) > OAI_MOST:
                raise PerturbedError("arXiv's resumption tokens lead in a circle; run it again later")
            token = read.more
            following = {"since": state["since"], "began": began, "token": token} if token else {"since": began}
            self._take(name, read, f"{category} since {state['since']}", following)
            if token is None:
                return

    def rss(self, categories: tuple[str, ...]) -> None:
        """Today's announcements, one answer."""
        read = self.client.read(f"https://rss.arxiv.org/rss/{quote('+'.join(categories), safe='+.-')}", rss.read)
        self._take("rss", read, "today's announcements", None)

    def _state(self, name: str) -> dict[str, Any] | None:
        found = self.database.read().execute("SELECT state FROM progress WHERE source = ?", (name,)).fetchone()
        return dict(json.loads(found["state"])) if found is not None else None

    def _take(self, name: str, read: Read, what: str, state: dict[str, Any] | None) -> None:
        """Store a page; with its last papers where the harvest goes on."""
        read = bounded(read, self.tally.now)
        self.tally.add(read, f"{name} {what}")
        _store(self.database, read.papers, self.tally, progress=self.progress, what=what, then=(name, state))


def _records(category: str, since: str, token: str | None) -> str:
    archive, _, subject = category.partition(".")
    group = archive if archive in _GROUPS else "physics"
    path = ":".join([group, archive, *([subject] if subject else [])])
    query = {"verb": "ListRecords"}
    query |= {"resumptionToken": token} if token else {"metadataPrefix": "arXivRaw", "set": path, "from": since}
    return f"https://oaipmh.arxiv.org/oai?{urlencode(query)}"


def _state(first: date, last: date, place: list[str]) -> dict[str, Any]:
    return {"first": first.isoformat(), "last": last.isoformat(), "place": place}


def _spans(span: tuple[date, date], state: dict[str, Any] | None) -> Iterator[tuple[date, date, list[str] | None]]:
    """What to harvest: what was cut off, from its place, then what of ``span`` it does not hold."""
    first, last = span
    if state is not None:
        begun, ended = date.fromisoformat(state["first"]), date.fromisoformat(state["last"])
        yield begun, ended, state["place"]
        if begun <= first and last <= ended:
            return
    yield first, last, None


def _begin(database: Database, tally: _Tally) -> int:
    with database.write() as connection:
        done = connection.execute("INSERT INTO import (source, started) VALUES (?, ?)", (tally.source, tally.now))
    return int(done.lastrowid or 0)


def _end(database: Database, row: int, tally: _Tally) -> Report:
    report = tally.report()
    ended = tally.now + time.monotonic() - tally.started
    with database.write() as connection:
        values = (ended, json.dumps(report.as_json(), ensure_ascii=False), row)
        connection.execute("UPDATE import SET ended = ?, report = ? WHERE id = ?", values)
    return report


def _store(
    database: Database,
    papers: Sequence[Paper],
    tally: _Tally,
    *,
    progress: Progress | None,
    what: str,
    then: tuple[str, dict[str, Any] | None] | None = None,
) -> None:
    """Store papers, `BATCH` in a transaction; ``then`` is the state that the last of them brings about."""
    for start in range(0, max(len(papers), 1), BATCH):
        batch = papers[start : start + BATCH]
        counts = dict.fromkeys(tally.counts, 0)
        with database.write() as connection:
            for paper in batch:
                counts[store.upsert(connection, paper, tally.now).kind] += 1
            if then is not None and start + BATCH >= len(papers):
                name, state = then
                if state is None:
                    connection.execute("DELETE FROM progress WHERE source = ?", (name,))
                else:
                    connection.execute("INSERT OR REPLACE INTO progress VALUES (?, ?)", (name, json.dumps(state)))
        for kind, count in counts.items():  # only once they are there
            tally.counts[kind] += count
        if progress is not None:
            progress(Step(tally.source, tally.done, what))
