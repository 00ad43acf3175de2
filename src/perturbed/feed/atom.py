"""Atom feeds (RFC 4287, paged as RFC 5005 says) of papers and of findings.

An entry's identifier is made of the key that the paper came with, or of the hash of the record, and never changes.
Its ``updated`` moves when its words or its verdict do, not when somebody's upvotes are counted anew.
"""

from __future__ import annotations

import math
import re
import sqlite3
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from urllib.parse import quote, urlencode

from markupsafe import Markup

from perturbed.feed import store, verdicts
from perturbed.feed.papers import paper_path
from perturbed.feed.store import Entry
from perturbed.feed.web.pages import outside

ATOM = "http://www.w3.org/2005/Atom"
PAGE = 50  # entries
_TAG = "tag:perturbed.invalid,2026:"
_BEGINNING = datetime(2026, 1, 1, tzinfo=UTC).timestamp()  # of a feed that has no entries yet
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in any XML, however escaped

ET.register_namespace("", ATOM)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One entry of a feed.

    Args:
        id: For good.
        title: Plain text.
        link: Path of the page that it is about.
        updated: Seconds since 1970.
        published: Seconds since 1970.
        authors: Names.
        categories: Scheme and term.
        html: The content; what is not ours in it is escaped.
    """

    id: str
    title: str
    link: str
    updated: float
    published: float
    authors: tuple[str, ...]
    categories: tuple[tuple[str, str], ...]
    html: Markup


@dataclass(frozen=True, kw_only=True)
class Source:
    """A feed, and one page of it.

    Args:
        name: That tells it from our other feeds, for good.
        title: Plain text.
        subtitle: Plain text.
        path: Of the feed.
        asked: Query of its address.
        page_path: Path, with query, of the page that shows the same.
        items: Of this page.
        page: Which page this is, from 1.
        total: Entries of all pages.
    """

    name: str
    title: str
    subtitle: str
    path: str
    asked: tuple[tuple[str, str], ...] = ()
    page_path: str
    items: Sequence[Item]
    page: int
    total: int

    @property
    def pages(self) -> int:
        """How many pages there are, at least one."""
        return max(1, math.ceil(self.total / PAGE))

    @property
    def updated(self) -> float:
        """When anything on this page last changed, seconds since 1970."""
        return max((item.updated for item in self.items), default=_BEGINNING)

    def address(self, base: str, page: int) -> str:
        """Where a page of the feed is."""
        asked = [*self.asked, *([("page", str(page))] if page > 1 else [])]
        return f"{base}{self.path}" + (f"?{urlencode(asked)}" if asked else "")


def document(source: Source, base: str) -> bytes:
    """A feed as XML.

    Args:
        source: What it holds.
        base: What its links begin with: the server's own address, never what a request says.
    """
    feed = ET.Element(f"{{{ATOM}}}feed", {"{http://www.w3.org/XML/1998/namespace}lang": "en"})
    _text(feed, "id", _TAG + source.name)
    _text(feed, "title", source.title)
    _text(feed, "subtitle", source.subtitle)
    _text(feed, "updated", _instant(source.updated))
    _person(feed, "perturbed")
    _link(feed, "self", source.address(base, source.page), "application/atom+xml")
    _link(feed, "alternate", base + source.page_path, "text/html")
    numbers = {"first": 1, "previous": source.page - 1, "next": source.page + 1, "last": source.pages}
    for relation, number in numbers.items():
        if 1 <= number <= source.pages:
            _link(feed, relation, source.address(base, number), "application/atom+xml")
    for item in source.items:
        _entry(feed, item, base)
    ET.indent(feed)
    body: bytes = ET.tostring(feed, encoding="utf-8", xml_declaration=True)
    return body


def papers(connection: sqlite3.Connection, found: Sequence[Entry], base: str) -> list[Item]:
    """Papers as entries."""
    kept = _kept(connection, [entry.id for entry in found])
    return [_paper(entry, *kept[entry.id], base) for entry in found if entry.id in kept]  # an import unites papers


def findings(connection: sqlite3.Connection, limit: int, offset: int, base: str) -> list[Item]:
    """Verdicts as entries, the last that came first; one that a later record overtook says so."""
    rows = connection.execute(
        "SELECT finding.*, (SELECT max(later.seen) FROM finding AS later WHERE later.paper = finding.paper "
        "AND later.id > finding.id) AS overtaken FROM finding ORDER BY id DESC LIMIT ? OFFSET ?",
        (limit, offset),
    ).fetchall()
    about = {entry.id: entry for entry in store.entries(connection, {row["paper"] for row in rows})}
    return [_finding(row, about[row["paper"]], base) for row in rows if row["paper"] in about]


def count_findings(connection: sqlite3.Connection) -> int:
    """How many verdicts there are."""
    return int(connection.execute("SELECT count(*) FROM finding").fetchone()[0])


# --- entries -----------------------------------------------------------------------------------------------------


def _kept(connection: sqlite3.Connection, ids: list[int]) -> dict[int, tuple[str, float]]:
    """The first key of each paper, and when its words or verdict last changed."""
    marks = ",".join("?" * len(ids))
    rows = connection.execute(f"SELECT id, first_key, revised FROM paper WHERE id IN ({marks})", ids)
    return {row["id"]: (row["first_key"], row["revised"]) for row in rows}


def _paper(entry: Entry, first_key: str, revised: float, base: str) -> Item:
    parts = [Markup("<p>{}</p>").format(part) for part in (entry.text or "").split("\n\n") if part.strip()]
    if entry.verdict and entry.slug:
        parts.append(_told(entry.verdict, _sentence(entry.slug)))
    parts.append(_links(entry, base))
    return Item(
        id=f"{_TAG}paper/{quote(first_key, safe='/')}",
        title=entry.title,
        link=paper_path(entry.key),
        updated=revised,
        published=_midnight(entry.day) if entry.day else entry.first_seen,
        authors=_authors(entry),
        categories=_categories(entry.sites, entry.verdict),
        html=Markup("\n").join(parts),
    )


def _finding(row: sqlite3.Row, entry: Entry, base: str) -> Item:
    overtaken = row["overtaken"] is not None
    if overtaken:
        sentence = "A newer record of the same study has taken its place; the page shows both."
    else:
        sentence = _sentence(entry.slug) if entry.slug else ""
    return Item(
        id=f"{_TAG}finding/{row['record']}",
        title=f"{row['verdict']}: {entry.title}",
        link=paper_path(entry.key),
        updated=row["overtaken"] or row["seen"],
        published=row["at"],
        authors=("perturbed",),
        categories=_categories(entry.sites, row["verdict"]),
        html=Markup("\n").join([_told(row["verdict"], sentence), _links(entry, base)]),
    )


def _told(verdict: str, sentence: str) -> Markup:
    return Markup("<p><strong>Measured here: {}.</strong> {}</p>").format(verdict, sentence)


def _sentence(slug: str) -> str:
    found = verdicts.summary_of(slug)
    return found.sentence if found is not None else ""


def _links(entry: Entry, base: str) -> Markup:
    ways = [(base + paper_path(entry.key), "The paper’s page here")]
    if entry.arxiv:
        ways.append((f"https://arxiv.org/abs/{entry.arxiv}", "arXiv"))
    others = (("Code", entry.code_url), ("Project", entry.project_url))
    ways += [(url, name) for name, told in others if (url := outside(told))]
    return Markup("<p>{}</p>").format(
        Markup(" · ").join(Markup('<a href="{}">{}</a>').format(url, name) for url, name in ways)
    )


def _authors(entry: Entry) -> tuple[str, ...]:
    if entry.people:
        return entry.people
    if entry.organisation:
        return (entry.organisation,)
    if entry.author_count:
        return (f"{entry.author_count} author{'s' if entry.author_count > 1 else ''}",)
    return ("authors unknown",)


def _categories(sites: Iterable[str], verdict: str | None) -> tuple[tuple[str, str], ...]:
    return (*(("site", site) for site in sites), *((("verdict", verdict),) if verdict else ()))


# --- XML ---------------------------------------------------------------------------------------------------------


def _entry(feed: ET.Element, item: Item, base: str) -> None:
    entry = ET.SubElement(feed, f"{{{ATOM}}}entry")
    _text(entry, "id", item.id)
    _text(entry, "title", item.title)
    _text(entry, "updated", _instant(item.updated))
    _text(entry, "published", _instant(item.published))
    for name in item.authors:
        _person(entry, name)
    _link(entry, "alternate", base + item.link, "text/html")
    for scheme, term in item.categories:
        ET.SubElement(entry, f"{{{ATOM}}}category", {"term": term, "scheme": _TAG + scheme})
    _text(entry, "content", str(item.html)).set("type", "html")


def _text(parent: ET.Element, name: str, text: str) -> ET.Element:
    made = ET.SubElement(parent, f"{{{ATOM}}}{name}")
    made.text = _ILLEGAL.sub("", text)
    return made


def _person(parent: ET.Element, name: str) -> None:
    _text(ET.SubElement(parent, f"{{{ATOM}}}author"), "name", name)


def _link(parent: ET.Element, relation: str, address: str, kind: str) -> None:
    ET.SubElement(parent, f"{{{ATOM}}}link", {"rel": relation, "href": address, "type": kind})


def _instant(seconds: float) -> str:
    """RFC 3339 in UTC, with milliseconds: two changes within a second are two."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _midnight(day: date) -> float:
    return datetime.combine(day, time(), UTC).timestamp()
