"""Papers in the database: a telling is merged into what is known, and rows are read as pages need them.

Which telling is believed, field by field: that of the better source (`papers.SOURCES`), and of one source the later.
The rank of the source of each field is kept beside it, so that the order in which the sources tell does not matter.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

from perturbed.feed.papers import SITES, SOURCES, Paper, clean, printed, title_address, title_key

# Told by sources and decided by their rank; ``ranks`` of a row holds one digit for each, "-" where nobody told.
FIELDS = (
    *("title", "abstract", "people", "author_count", "organisation", "published", "updated", "listed"),
    *("doi", "code_url", "project_url"),
)
COUNTS = ("source_upvotes", "source_comments")  # they change with time: the newest telling is right
_UNTOLD = "-" * len(FIELDS)
_RANK = {"-": -1} | {str(i): i for i in range(len(SOURCES))}

_LARGEST = 2**31  # a count above is a source's mistake, and might not fit a column

Kind = Literal["new", "merged", "changed", "same"]


@dataclass(frozen=True)
class Change:
    """What a telling did.

    Attributes:
        paper: The row's id.
        kind: ``new``; ``merged`` if it met a paper of which only other sources had told, or showed that two rows are
            one paper; ``changed`` or ``same`` otherwise.
    """

    paper: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A paper as pages show it; what nobody told is None or empty.

    Attributes:
        id: Of the row.
        key: In addresses: the arXiv identifier, else ``t-`` and a hash of the title.
        arxiv: Identifier without version.
        slug: In the catalogue.
        summary: Our own words.
        abstract: The source's words.
        people: Author names in order.
        author_count: Their number, known also where the names are not.
        listed: Day on which a source listed it.
        day: Under which it is browsed: ``listed``, else ``published``.
        tags: Sites and tags of the catalogue, arXiv categories.
        sites: Where it acts, in the order of `papers.SITES`.
        source: The best believed source that told of it.
        source_upvotes: Of the source's readers, as the newest telling says.
        source_comments: How many the source's readers wrote.
        votes: The owner's own.
        comments: How many are written here.
        verdict: Of the newest registered evidence.
        has_method: Whether it can be run here.
        changed: When what is shown last changed, seconds since 1970.
    """

    id: int
    key: str
    arxiv: str | None
    title: str
    slug: str | None
    summary: str | None
    abstract: str | None
    people: tuple[str, ...]
    author_count: int | None
    organisation: str | None
    published: date | None
    updated: date | None
    listed: date | None
    day: date | None
    year: int | None
    tags: tuple[str, ...]
    sites: tuple[str, ...]
    doi: str | None
    code_url: str | None
    project_url: str | None
    source: str
    source_upvotes: int | None
    source_comments: int | None
    votes: int
    comments: int
    verdict: str | None
    has_method: bool
    first_seen: float
    changed: float

    @property
    def text(self) -> str | None:
        """Our summary, else the source's abstract."""
        return self.summary or self.abstract


@dataclass(frozen=True)
class Comment:
    """A comment written here; ``body`` is plain text, ``at`` in seconds since 1970."""

    id: int
    author: str
    body: str
    at: float


def upsert(connection: sqlite3.Connection, paper: Paper, now: float) -> Change:
    """Merge a telling into what is known; call it inside a transaction.

    Two tellings are of one paper if they have one arXiv identifier or, where at least one has none, one `title_key`.
    Two identifiers with one title are two papers. A telling that shows two rows to be one paper unites them: votes,
    comments, findings, the vector and the place in the catalogue move, and the old key goes on as an alias.

    Args:
        connection: Inside a transaction.
        paper: The telling.
        now: Seconds since 1970.

    Raises:
        ValueError: The title is empty, or the source is none of `papers.SOURCES`.
    """
    title = clean(paper.title)
    if not title:
        raise ValueError("a paper needs a title")
    if paper.source not in SOURCES:
        raise ValueError(f"source {paper.source!r}: there is {', '.join(SOURCES)}")
    known = _titled(connection, title)
    if paper.arxiv is None:
        row = known[0] if known else None  # of several papers with this title the first: nothing tells them apart
        return _insert(connection, paper, title, now) if row is None else _merge(connection, row, paper, title, now)
    found = next(iter(_rows(connection, "SELECT * FROM paper WHERE arxiv = ?", paper.arxiv)), None)
    nameless = next((row for row in known if row["arxiv"] is None), None)
    if found is None:
        return (
            _insert(connection, paper, title, now)
            if nameless is None
            else _merge(connection, nameless, paper, title, now)
        )
    if nameless is None:
        return _merge(connection, found, paper, title, now)
    united = _unite(connection, found, nameless, now)
    return Change(_merge(connection, united, paper, title, now).paper, "merged")


def enrol(
    connection: sqlite3.Connection,
    paper: int,
    *,
    slug: str,
    summary: str,
    year: int | None,
    sites: Collection[str],
    tags: Sequence[str],
    has_method: bool,
    now: float,
) -> bool:
    """Set what belongs to the catalogue and no import touches; whether anything changed.

    ``year`` counts only while the day of publication is unknown; ``tags`` (and the sites) are added to those there.

    Raises:
        ValueError: A site that is none of `papers.SITES`.
    """
    if unknown := set(sites) - set(SITES):
        raise ValueError(f"site {sorted(unknown)[0]!r}: there is {', '.join(SITES)}")
    row = connection.execute("SELECT * FROM paper WHERE id = ?", (paper,)).fetchone()
    there = {site for (site,) in connection.execute("SELECT site FROM acts_on WHERE paper = ?", (paper,))}
    wanted = {
        "slug": slug,
        "summary": summary,
        "year": row["year"] if row["published"] else year,
        "tags": _tags(row["tags"], (*sites, *tags)),
        "has_method": int(has_method),
    }
    moved = _update(connection, row, wanted, now)
    if there != set(sites):
        connection.execute("DELETE FROM acts_on WHERE paper = ?", (paper,))
        connection.executemany("INSERT INTO acts_on VALUES (?, ?)", [(paper, site) for site in sites])
        connection.execute("UPDATE paper SET changed = ? WHERE id = ?", (now, paper))
    return moved or there != set(sites)


def find(connection: sqlite3.Connection, key: str) -> Entry | None:
    """The paper of a key, an earlier key, an arXiv identifier with or without version, or a slug, in any case."""
    key = clean(key)
    bare = re.sub(r"v\d+$", "", key, flags=re.IGNORECASE)
    row = connection.execute(
        "SELECT id FROM paper WHERE key = :key UNION ALL SELECT id FROM paper WHERE slug = :key "
        "UNION ALL SELECT paper FROM alias WHERE key = :key UNION ALL SELECT id FROM paper WHERE arxiv = :bare "
        "UNION ALL SELECT paper FROM alias WHERE key = :bare LIMIT 1",
        {"key": key, "bare": bare},
    ).fetchone()
    return next(iter(entries(connection, [row[0]])), None) if row else None


def entries(connection: sqlite3.Connection, ids: Iterable[int]) -> list[Entry]:
    """The papers of these ids in this order; an id without a paper is left out."""
    wanted = list(ids)
    rows = connection.execute(
        f"{_SELECT} WHERE paper.id IN (SELECT value FROM json_each(?))", (json.dumps(wanted),)
    ).fetchall()
    by_id = {row["id"]: _entry(row) for row in rows}
    return [by_id[i] for i in wanted if i in by_id]


def between(connection: sqlite3.Connection, first: date, last: date, limit: int, offset: int = 0) -> list[Entry]:
    """The papers of these days, newest day first and within a day by the source's upvotes."""
    rows = connection.execute(
        "SELECT id FROM paper WHERE day BETWEEN ? AND ? ORDER BY day DESC, source_upvotes DESC, id LIMIT ? OFFSET ?",
        (first.isoformat(), last.isoformat(), limit, offset),
    )
    return entries(connection, [row[0] for row in rows.fetchall()])


def count_between(connection: sqlite3.Connection, first: date, last: date) -> int:
    """How many papers these days have."""
    days = (first.isoformat(), last.isoformat())
    return int(connection.execute("SELECT count(*) FROM paper WHERE day BETWEEN ? AND ?", days).fetchone()[0])


def neighbours(connection: sqlite3.Connection, first: date, last: date) -> tuple[date | None, date | None]:
    """The nearest days with papers before ``first`` and after ``last``."""
    before = connection.execute("SELECT max(day) FROM paper WHERE day < ?", (first.isoformat(),)).fetchone()[0]
    after = connection.execute("SELECT min(day) FROM paper WHERE day > ?", (last.isoformat(),)).fetchone()[0]
    return _day(before), _day(after)


def newest_day(connection: sqlite3.Connection, first: date = date.min, last: date = date.max) -> date | None:
    """The last of these days that has papers."""
    days = (first.isoformat(), last.isoformat())
    return _day(connection.execute("SELECT max(day) FROM paper WHERE day BETWEEN ? AND ?", days).fetchone()[0])


def on_site(connection: sqlite3.Connection, site: str) -> list[Entry]:
    """The papers that act on a site, by title."""
    rows = connection.execute(
        "SELECT id FROM paper JOIN acts_on ON paper.id = acts_on.paper WHERE site = ? ORDER BY title_key, id", (site,)
    )
    return entries(connection, [row[0] for row in rows.fetchall()])


def vote(connection: sqlite3.Connection, paper: int, voter: str, now: float) -> bool:
    """Count a voter's upvote, once; whether it is new."""
    done = connection.execute("INSERT OR IGNORE INTO vote VALUES (?, ?, ?)", (paper, voter, now))
    return done.rowcount == 1


def unvote(connection: sqlite3.Connection, paper: int, voter: str) -> bool:
    """Take a voter's upvote back; whether there was one."""
    done = connection.execute("DELETE FROM vote WHERE paper = ? AND voter = ?", (paper, voter))
    return done.rowcount == 1


def comment(connection: sqlite3.Connection, paper: int, author: str, body: str, now: float) -> int:
    """Keep a comment as plain text; its id.

    Raises:
        ValueError: It is empty.
    """
    body = printed(body.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if not body:
        raise ValueError("a comment needs words")
    done = connection.execute(
        "INSERT INTO comment (paper, author, body, at) VALUES (?, ?, ?, ?)", (paper, clean(author), body, now)
    )
    return int(done.lastrowid or 0)


def uncomment(connection: sqlite3.Connection, paper: int, author: str, comment: int) -> bool:
    """Delete an author's own comment on a paper; whether there was one."""
    done = connection.execute("DELETE FROM comment WHERE id = ? AND paper = ? AND author = ?", (comment, paper, author))
    return done.rowcount == 1


def comments_of(connection: sqlite3.Connection, paper: int) -> list[Comment]:
    """The comments on a paper, oldest first."""
    rows = connection.execute("SELECT id, author, body, at FROM comment WHERE paper = ? ORDER BY at, id", (paper,))
    return [Comment(*row) for row in rows.fetchall()]


_SELECT = """
SELECT paper.*,
    (SELECT group_concat(site) FROM acts_on WHERE acts_on.paper = paper.id) AS sites,
    (SELECT count(*) FROM vote WHERE vote.paper = paper.id) AS votes,
    (SELECT count(*) FROM comment WHERE comment.paper = paper.id) AS comments
FROM paper
"""
_DAYS = ("published", "updated", "listed", "day")
_AS_THEY_ARE = (
    *("id", "key", "arxiv", "title", "slug", "summary", "abstract", "author_count", "organisation", "year", "doi"),
    *("code_url", "project_url", "source", "source_upvotes", "source_comments", "votes", "comments", "verdict"),
    *("first_seen", "changed"),
)


def _entry(row: sqlite3.Row) -> Entry:
    acts = set((row["sites"] or "").split(","))
    plain: dict[str, Any] = {name: row[name] for name in _AS_THEY_ARE} | {name: _day(row[name]) for name in _DAYS}
    return Entry(
        **plain,
        people=tuple(row["people"].splitlines()),
        tags=tuple(row["tags"].split()),
        sites=tuple(site for site in SITES if site in acts),
        has_method=bool(row["has_method"]),
    )


def _insert(connection: sqlite3.Connection, paper: Paper, title: str, now: float) -> Change:
    told = _told(paper, title)
    rank = str(SOURCES.index(paper.source))
    values: dict[str, Any] = {
        **told,
        "people": told["people"] or "",
        "key": paper.arxiv or title_address(title),
        "arxiv": paper.arxiv,
        "title_key": title_key(title),
        "year": paper.published.year if paper.published else None,
        "tags": _tags("", paper.categories),
        "source": paper.source,
        "sources": paper.source,
        "ranks": "".join("-" if told[name] is None else rank for name in FIELDS),
        "source_upvotes": _count(paper.upvotes),
        "source_comments": _count(paper.comments),
        "first_seen": now,
        "changed": now,
    }
    done = connection.execute(
        f"INSERT INTO paper ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", tuple(values.values())
    )
    return Change(int(done.lastrowid or 0), "new")


def _merge(connection: sqlite3.Connection, row: Mapping[str, Any], paper: Paper, title: str, now: float) -> Change:
    """The telling into its row."""
    rank = SOURCES.index(paper.source)
    ranks = list(row["ranks"] or _UNTOLD)
    wanted: dict[str, Any] = {}
    for i, (name, value) in enumerate(_told(paper, title).items()):
        if value is not None and rank >= _RANK[ranks[i]]:
            wanted[name] = value
            ranks[i] = str(rank)
    for name, number in zip(COUNTS, (_count(paper.upvotes), _count(paper.comments)), strict=True):
        if number is not None:
            wanted[name] = number
    if "published" in wanted:
        wanted["year"] = int(wanted["published"][:4])
    if row["arxiv"] is None and paper.arxiv:
        wanted |= {"arxiv": paper.arxiv, "key": paper.arxiv}
        _alias(connection, row["key"], row["id"])
    wanted["title_key"] = title_key(wanted.get("title", row["title"]))
    for other in (row["title"], title):  # a later telling that has no identifier may come under either
        if title_key(other) != wanted["title_key"]:
            _alias(connection, title_address(other), row["id"])
    wanted["tags"] = _tags(row["tags"], paper.categories)
    wanted["source"] = max(row["source"], paper.source, key=SOURCES.index)
    sources = row["sources"].split()
    if fresh := paper.source not in sources:
        sources = sorted([*sources, paper.source], key=SOURCES.index)
    moved = _update(connection, row, wanted, now, {"ranks": "".join(ranks), "sources": " ".join(sources)})
    return Change(row["id"], "merged" if fresh else "changed" if moved else "same")


def _unite(
    connection: sqlite3.Connection, kept: Mapping[str, Any], gone: Mapping[str, Any], now: float
) -> dict[str, Any]:
    """Two rows that are one paper become the first; the row as it is then."""
    newer = max((kept, gone), key=lambda row: row["changed"])
    older = gone if newer is kept else kept
    wanted: dict[str, Any] = {}
    ranks = ""
    for name, mine, theirs in zip(FIELDS, kept["ranks"] or _UNTOLD, gone["ranks"] or _UNTOLD, strict=True):
        believed = kept if _RANK[mine] >= _RANK[theirs] else gone
        wanted[name] = believed[name]
        ranks += max(mine, theirs, key=_RANK.__getitem__)
    for name in COUNTS:
        wanted[name] = older[name] if newer[name] is None else newer[name]
    catalogued = gone if gone["slug"] and not kept["slug"] else kept
    for name in ("slug", "summary", "verdict", "has_method"):
        wanted[name] = catalogued[name]
    wanted["year"] = int(wanted["published"][:4]) if wanted["published"] else kept["year"] or gone["year"]
    wanted["title_key"] = title_key(wanted["title"])
    wanted["tags"] = _tags(kept["tags"], gone["tags"].split())
    wanted["source"] = max(kept["source"], gone["source"], key=SOURCES.index)
    sources = sorted({*kept["sources"].split(), *gone["sources"].split()}, key=SOURCES.index)
    ids = (kept["id"], gone["id"])
    for table in ("comment", "finding", "alias"):
        connection.execute(f"UPDATE {table} SET paper = ? WHERE paper = ?", ids)
    for table in ("vote", "acts_on", "vector"):  # where both have one, the kept row's stands
        connection.execute(f"UPDATE OR IGNORE {table} SET paper = ? WHERE paper = ?", ids)
    connection.execute("INSERT OR IGNORE INTO sketch (paper, bits) SELECT ?, bits FROM sketch WHERE paper = ?", ids)
    connection.execute("DELETE FROM paper WHERE id = ?", (gone["id"],))
    _alias(connection, gone["key"], kept["id"])
    if wanted["title_key"] != kept["title_key"]:
        _alias(connection, title_address(kept["title"]), kept["id"])
    if kept["slug"] and gone["slug"]:
        _alias(connection, gone["slug"], kept["id"])
    seen = min(kept["first_seen"], gone["first_seen"])
    _update(connection, kept, wanted, now, {"ranks": ranks, "sources": " ".join(sources), "first_seen": seen})
    return dict(connection.execute("SELECT * FROM paper WHERE id = ?", (kept["id"],)).fetchone())


def _update(
    connection: sqlite3.Connection,
    row: Mapping[str, Any],
    wanted: Mapping[str, Any],
    now: float,
    unseen: Mapping[str, Any] | None = None,
) -> bool:
    """Write what differs (naming a column unchanged would index its words anew); whether anything seen changed."""
    differs = {name: value for name, value in wanted.items() if row[name] != value}
    written = differs | {name: value for name, value in (unseen or {}).items() if row[name] != value}
    if differs:
        written["changed"] = now
    if written:
        names = ", ".join(f"{name} = ?" for name in written)
        connection.execute(f"UPDATE paper SET {names} WHERE id = ?", (*written.values(), row["id"]))
    return bool(differs)


def _rows(connection: sqlite3.Connection, query: str, value: str) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(query, (value,)).fetchall()]


def _titled(connection: sqlite3.Connection, title: str) -> list[dict[str, Any]]:
    """The papers told under a title, by its key or by an alias."""
    rows = _rows(connection, "SELECT * FROM paper WHERE title_key = ? ORDER BY id", title_key(title))
    more = _rows(
        connection,
        "SELECT paper.* FROM alias JOIN paper ON paper.id = alias.paper WHERE alias.key = ?",
        title_address(title),
    )
    return rows + [row for row in more if all(row["id"] != other["id"] for other in rows)]


def _alias(connection: sqlite3.Connection, key: str, paper: int) -> None:
    connection.execute("INSERT OR IGNORE INTO alias VALUES (?, ?)", (key, paper))


def _told(paper: Paper, title: str) -> dict[str, Any]:
    """The values of `FIELDS`, None where the source is silent."""
    people = "\n".join(name for author in paper.authors if (name := clean(author)))
    return {
        "title": title,
        "abstract": printed(paper.abstract).strip() or None if paper.abstract else None,
        "people": people or None,
        "author_count": people.count("\n") + 1 if people else _count(paper.author_count),
        "organisation": _or_none(paper.organisation),
        "published": _iso(paper.published),
        "updated": _iso(paper.updated),
        "listed": _iso(paper.listed),
        "doi": _or_none(paper.doi),
        "code_url": _or_none(paper.code_url),
        "project_url": _or_none(paper.project_url),
    }


def _or_none(text: str | None) -> str | None:
    return clean(text) or None if text else None


def _iso(day: date | None) -> str | None:
    return day.isoformat() if day else None


def _day(text: str | None) -> date | None:
    return date.fromisoformat(text) if text else None


def _count(number: int | None) -> int | None:
    return number if number is not None and 0 <= number < _LARGEST else None


def _tags(there: str, more: Iterable[str]) -> str:
    return " ".join(dict.fromkeys([*there.split(), *(word for text in more for word in clean(text).split())]))
