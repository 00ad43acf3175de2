"""What everybody may read: papers by day, week and month, what is trending, search, the map, and one paper whole."""

from __future__ import annotations

import sqlite3
from calendar import Calendar
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from typing import Annotated, Any
from urllib.parse import quote_plus, urlencode

from fastapi import APIRouter, HTTPException, Query
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from perturbed.evidence.report import KINDS
from perturbed.feed import catalogue, evidence, export, ranking, search, store, verdicts
from perturbed.feed.papers import SITES, clean, paper_path
from perturbed.feed.store import Entry
from perturbed.feed.web.pages import CUT, clipped, page, unchanged
from perturbed.feed.web.security import FIGURE_POLICY, SEARCHES, is_owner, limit
from perturbed.feed.web.state import Feed, feed_of

router = APIRouter()

PER_PAGE = 15
OPENING = 420  # bytes of a text in a list
FOLDED = (1900, 900, 400, 160)  # and of what is folded below it: the first with which the page is small enough
LARGEST = 60_000  # bytes of a page
ASKED, REPEATED = 500, 300  # bytes of a search that count, and of one that stands in links to some twenty filters
TRENDING = 100  # papers
ROOMS = {
    "data": "What is learned from: corpora, mixtures, order, repetition, what is planted or left out.",
    "inputs": "What is done to an example on its way in: masks, noise, adversarial changes.",
    "features": "What happens to hidden states and attention inside the model.",
    "weights": "What form the parameters have: low rank, sparse, masked, merged, how they begin.",
    "objectives": "What is asked of the model: the loss, and what it is told to predict.",
    "optim": "How one step is taken: optimisers, schedules, flatness, regularisers.",
    "inference": "How answers are drawn from a finished model: guidance, ensembles, purification.",
    "measures": "How it is judged: certified bounds, attacks, memorisation, forgetting.",
}
VOTER = "owner"  # there is one
_SOURCES = {"arxiv": "arXiv", "oai": "arXiv", "rss": "arXiv", "hub": "the hub", "page": "the saved page"}
Number = Annotated[int, Query(alias="page", ge=1, le=100_000)]


@dataclass(frozen=True)
class Card:
    """A paper in a list, with what was measured of it.

    Args:
        entry: The paper.
        short: What was measured.
        snippet: In a search, where its words stand.
        folded: Bytes of the text below the fold.
    """

    entry: Entry
    short: verdicts.Short | None
    snippet: Sequence[tuple[str, bool]] = ()
    folded: int = FOLDED[0]

    @property
    def opening(self) -> str:
        """The beginning of our summary, else of the abstract."""
        return clipped(self.entry.text or "", OPENING)

    @property
    def rest(self) -> str:
        """Of the abstract what the opening does not hold already."""
        abstract = self.entry.abstract or ""
        if self.entry.summary:
            return clipped(abstract, self.folded)
        return clipped(abstract[len(self.opening.removesuffix(CUT)) :].lstrip(), self.folded)


@dataclass(frozen=True)
class Span:
    """Some days that are one page: what they are called, and where the next such pages are."""

    name: str
    kind: str
    first: date
    last: date
    address: str


@dataclass(frozen=True)
class Paging:
    """Where in a long list a page stands."""

    number: int
    total: int
    address: str
    asked: tuple[tuple[str, str], ...] = ()

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return max(1, -(-self.total // PER_PAGE))

    @property
    def offset(self) -> int:
        """How many papers come before."""
        return (self.number - 1) * PER_PAGE

    @property
    def shown(self) -> list[int | None]:
        """The pages to link to: the first, the last and those about this one, None for a gap between."""
        near = {1, self.pages, *range(max(1, self.number - 2), min(self.pages, self.number + 2) + 1)}
        told: list[int | None] = []
        for number in sorted(near):
            if told and number - (told[-1] or 0) > 1:
                told.append(None)
            told.append(number)
        return told

    def at(self, number: int) -> str:
        """The address of another page of the list."""
        asked = [*self.asked, *([("page", str(number))] if number > 1 else [])]
        return self.address + (f"?{urlencode(asked)}" if asked else "")


def cards(entries: Sequence[Entry]) -> list[Card]:
    """The papers with their evidence in short."""
    return [Card(entry, verdicts.summary_of(entry.slug) if entry.slug else None) for entry in entries]


def listing(request: Request, template: str, *, cards: Sequence[Card], **values: Any) -> Response:
    """A page with a list of papers, with less of each folded away where it would be too large."""
    for folded in FOLDED:
        answer = page(request, template, cards=[replace(card, folded=folded) for card in cards], **values)
        if len(answer.body) <= LARGEST:
            break
    return answer


def measured(feed: Feed, most: int) -> list[Card]:
    """The papers with evidence, the newest finding first."""
    rows = feed.database.read().execute(
        "SELECT paper FROM finding GROUP BY paper ORDER BY max(at) DESC, paper LIMIT ?", (most,)
    )
    return [card for card in cards(store.entries(feed.database.read(), [row[0] for row in rows])) if card.short]


# --- by day ------------------------------------------------------------------------------------------------------


@router.get("/")
def home(request: Request, number: Number = 1) -> Response:
    """The newest day; on a machine where nothing was imported yet, the catalogue."""
    feed = feed_of(request)
    connection = feed.database.read()
    imported = connection.execute("SELECT 1 FROM paper WHERE source <> 'catalogue' LIMIT 1").fetchone()
    newest = store.newest_day(connection)
    if imported and newest:
        return _days(request, _one_day(newest), number, address="/", measured=measured(feed, 6) if number == 1 else [])
    total = connection.execute("SELECT count(*) FROM paper").fetchone()[0]
    paging = Paging(_existing(number, total), total, "/")
    rows = connection.execute(
        "SELECT id FROM paper ORDER BY coalesce(day, year || '-00') DESC, title_key LIMIT ? OFFSET ?",
        (PER_PAGE, paging.offset),
    )
    return listing(
        request,
        "home.html",
        cards=cards(store.entries(connection, [row[0] for row in rows])),
        measured=measured(feed, 12) if number == 1 else [],
        paging=paging,
        newest=newest,
        sites=connection.execute("SELECT site, count(*) FROM acts_on GROUP BY 1 ORDER BY 2 DESC").fetchall(),
        years=connection.execute(
            "SELECT year, count(*) FROM paper WHERE year > 0 GROUP BY 1 ORDER BY 1 DESC"
        ).fetchall(),
        verdicts=connection.execute(
            "SELECT verdict, count(*) FROM paper WHERE verdict IS NOT NULL GROUP BY 1 ORDER BY 2 DESC, 1"
        ).fetchall(),
    )


@router.get("/day/{name}")
def by_day(request: Request, name: str, number: Number = 1) -> Response:
    """The papers of one day."""
    return _days(request, _read(name, lambda: _one_day(date.fromisoformat(name))), number)


@router.get("/week/{name}")
def by_week(request: Request, name: str, number: Number = 1) -> Response:
    """The papers of one week, Monday to Sunday."""
    year, _, week = name.partition("-W")
    return _days(request, _read(name, lambda: _week(date.fromisocalendar(int(year), int(week), 1))), number)


@router.get("/month/{name}")
def by_month(request: Request, name: str, number: Number = 1) -> Response:
    """The papers of one month."""
    return _days(request, _read(name, lambda: _month(date.fromisoformat(f"{name}-01"))), number)


_SPANS: dict[str, Callable[[date], Span]] = {}


def _one_day(day: date) -> Span:
    return Span(f"{day:%A}, {day.day} {day:%B %Y}", "day", day, day, f"/day/{day.isoformat()}")


def _week(day: date) -> Span:
    monday = day - timedelta(days=day.weekday())
    year, week, _ = monday.isocalendar()
    sunday = monday + timedelta(days=6)
    return Span(f"Week {week} of {year}", "week", monday, sunday, f"/week/{year}-W{week:02}")


def _month(day: date) -> Span:
    first = day.replace(day=1)
    last = (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
    return Span(f"{day:%B %Y}", "month", first, last, f"/month/{day:%Y-%m}")


_SPANS.update(day=_one_day, week=_week, month=_month)


def _read(name: str, made: Callable[[], Span]) -> Span:
    try:
        span = made()
    except (ValueError, OverflowError) as e:
        raise HTTPException(404) from e
    if not 1900 < span.first.year < 2200 or not span.address.endswith(f"/{name}"):
        raise HTTPException(404)
    return span


def _days(request: Request, span: Span, number: int, *, address: str | None = None, **values: Any) -> Response:
    connection = feed_of(request).database.read()
    total = store.count_between(connection, span.first, span.last)
    paging = Paging(_existing(number, total), total, address or span.address)
    before, after = store.neighbours(connection, span.first, span.last)
    within = store.newest_day(connection, span.first, span.last) or span.last  # a day of it that is not empty
    of = _SPANS[span.kind]
    found = store.between(connection, span.first, span.last, PER_PAGE, paging.offset)
    return listing(
        request,
        "days.html",
        span=span,
        spans=[make(within) for make in _SPANS.values()],
        before=of(before) if before else None,
        after=of(after) if after else None,
        cards=cards(found),
        paging=paging,
        calendar=_calendar(connection, span.last),
        **{"measured": [], **values},
    )


def _calendar(connection: sqlite3.Connection, day: date) -> dict[str, Any]:
    """The month of a day as weeks of (day, how many papers)."""
    month = _month(day)
    days = (month.first.isoformat(), month.last.isoformat())
    query = "SELECT day, count(*) FROM paper WHERE day BETWEEN ? AND ? GROUP BY day"
    counts = {name: number for name, number in connection.execute(query, days)}
    weeks = Calendar().monthdatescalendar(day.year, day.month)
    return {"first": month.first, "weeks": [[(d, counts.get(d.isoformat(), 0)) for d in week] for week in weeks]}


def _existing(number: int, total: int) -> int:
    if number > 1 and (number - 1) * PER_PAGE >= total:
        raise HTTPException(404)
    return number


# --- trending, search, map ---------------------------------------------------------------------------------------


@router.get("/trending")
def trending(request: Request, number: Number = 1) -> Response:
    """What is read and measured most just now, by a formula that stands on the page."""
    feed = feed_of(request)
    found = ranking.trending(feed.database.read(), feed.clock(), TRENDING)
    paging = Paging(_existing(number, len(found)), len(found), "/trending")
    shown = cards(found[paging.offset : paging.offset + PER_PAGE])
    return listing(request, "trending.html", cards=shown, paging=paging, formula=ranking.FORMULA)


@router.get("/search")
def find(
    request: Request,
    q: str = "",
    number: Number = 1,
) -> Response:
    """Papers by words and by meaning."""
    limit(request, "search", SEARCHES, 60)
    feed = feed_of(request)
    connection = feed.database.read()
    whole = clean(q)
    asked = whole.encode()[:ASKED].decode(errors="ignore")
    offset = (number - 1) * PER_PAGE
    found = search.search(connection, asked, limit=PER_PAGE, offset=offset, meaning=feed.meaning)
    notes = [found.note, "Only the beginning of what was asked counts." if asked != whole else None]
    shown = cards([hit.entry for hit in found.hits])
    return listing(
        request,
        "search.html",
        asked=asked,
        found=found,
        note=" ".join(filter(None, notes)),
        cards=[replace(card, snippet=hit.snippet) for card, hit in zip(shown, found.hits, strict=True)],
        paging=Paging(_existing(number, found.reach), found.reach, "/search", (("q", asked),)),
        filters=_filters(feed, asked) if len(quote_plus(asked)) <= REPEATED else [],
    )


def _filters(feed: Feed, asked: str) -> list[dict[str, Any]]:
    """Links that add a filter to what is asked, or take it away again."""
    connection = feed.database.read()
    years = [str(row[0]) for row in connection.execute(_LAST_YEARS)]
    verdicts = [
        row[0] for row in connection.execute("SELECT DISTINCT verdict FROM paper WHERE verdict IS NOT NULL ORDER BY 1")
    ]
    groups = {"site": SITES, "verdict": ["any", *verdicts, "none"], "year": years}
    return [
        {"name": name, "links": [_filter(asked, name, value) for value in values]} for name, values in groups.items()
    ]


# One look into the index for each year; DISTINCT would read all of it.
_LAST_YEARS = """
WITH RECURSIVE told (year) AS (
    SELECT max(year) FROM paper
    UNION ALL SELECT (SELECT max(year) FROM paper WHERE paper.year < told.year) FROM told WHERE told.year IS NOT NULL
)
SELECT year FROM told WHERE year IS NOT NULL LIMIT 6
"""


def _filter(asked: str, name: str, value: str) -> dict[str, Any]:
    words = asked.split()
    on = f"{name}:{value}" in words
    kept = [word for word in words if not word.startswith(f"{name}:")]
    told = " ".join(kept if on else [*kept, f"{name}:{value}"])
    return {"value": value, "on": on, "address": f"/search?{urlencode({'q': told})}"}


@router.get("/map")
def rooms(request: Request) -> Response:
    """The eight sites in a row, with the papers that act there."""
    connection = feed_of(request).database.read()
    found = [(site, ROOMS[site], cards(_by_evidence(store.on_site(connection, site)))) for site in SITES]
    return page(request, "map.html", rooms=found)


def _by_evidence(entries: Sequence[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: (entry.verdict is None, not entry.has_method, entry.title.casefold()))


# --- one paper ---------------------------------------------------------------------------------------------------


@router.get("/papers/{key:path}/figures/{name}.svg")
def figure(request: Request, key: str, name: str) -> Response:
    """A figure of the paper's evidence."""
    entry = found_paper(request, key)
    shown = evidence.evidence(entry.slug) if entry.slug else None
    if shown is None or name not in shown.figures:
        raise HTTPException(404)
    return unchanged(request, shown.figures[name], "image/svg+xml", {"Content-Security-Policy": FIGURE_POLICY})


@router.get("/papers/{key:path}/cite.bib")
def cite(request: Request, key: str) -> Response:
    """The paper for a bibliography."""
    entry = found_paper(request, key)
    told = export.bibtex_of(feed_of(request).database.read(), entry.id)
    return Response(told, media_type="application/x-bibtex; charset=utf-8")


@router.get("/papers/{key:path}")
def paper(request: Request, key: str) -> Response:
    """One paper: what it says, what came out here, how to run it."""
    feed = feed_of(request)
    connection = feed.database.read()
    entry = found_paper(request, key)
    if entry.key != key:
        return RedirectResponse(paper_path(entry.key), 302)
    fields = feed.runs.fields(entry.slug) if entry.slug and entry.has_method else []
    voted = connection.execute("SELECT 1 FROM vote WHERE paper = ? AND voter = ?", (entry.id, VOTER)).fetchone()
    return page(
        request,
        "paper.html",
        entry=entry,
        item=catalogue.item(entry.slug) if entry.slug else None,
        shown=evidence.evidence(entry.slug) if entry.slug else None,
        short=verdicts.summary_of(entry.slug) if entry.slug else None,
        fields=fields,
        isolation=feed.runs.isolation() if entry.has_method and is_owner(request) else None,
        runs=[run for run in feed.runs.recent(20) if run.slug == entry.slug][:5] if entry.slug else [],
        comments=store.comments_of(connection, entry.id),
        author=VOTER,
        source_name=_SOURCES.get(entry.source, "its source"),
        voted=voted is not None,
        similar=cards(search.similar(connection, entry.id, 6, feed.meaning)),
    )


def found_paper(request: Request, key: str) -> Entry:
    """The paper of a key.

    Raises:
        HTTPException: 404, where there is none.
    """
    entry = store.find(feed_of(request).database.read(), key)
    if entry is None:
        raise HTTPException(404)
    return entry


@router.get("/about")
def about(request: Request) -> Response:
    """What this is, and what it keeps."""
    return page(request, "about.html", formula=ranking.FORMULA, verdicts=list(KINDS))
