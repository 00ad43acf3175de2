"""arXiv's API: Atom, as ``https://export.arxiv.org/api/query`` answers."""

from __future__ import annotations

from dataclasses import replace
from xml.etree.ElementTree import Element

from perturbed.feed.importers import markup
from perturbed.feed.importers.reading import FormatError, Read, day_of, each, identifier_in, title_in
from perturbed.feed.papers import Paper

_ATOM = "{http://www.w3.org/2005/Atom}"
_ARXIV = "{http://arxiv.org/schemas/atom}"
_SEARCH = "{http://a9.com/-/spec/opensearch/1.1/}"


def read(data: str | bytes) -> Read:
    """The papers of an answer; ``more`` is the ``start`` of the next page.

    An answer without an entry although ``startIndex`` is below ``totalResults`` has its own start as ``more``: arXiv
    does that when it is busy, and the same is to be asked again.

    Raises:
        FormatError: It is not Atom or not whole, or arXiv answered with its entry for an error.
    """
    feed = markup.parse(data, f"{_ATOM}feed", "entry")
    entries = feed.findall(f"{_ATOM}entry")
    total, start = _number(feed, "totalResults"), _number(feed, "startIndex")
    following = (start or 0) + len(entries)
    more = str(following) if total is not None and following < total else None
    return replace(each(entries, _paper, markup.text), more=more)


def _refuse_error(entry: Element) -> None:
    where = entry.findtext(f"{_ATOM}id") or ""
    if "/api/errors" in where:
        raise FormatError(f"arXiv refused the question: {markup.text(entry.find(f'{_ATOM}summary')) or where}")


def _paper(entry: Element) -> Paper:
    _refuse_error(entry)
    title = title_in(markup.text(entry.find(f"{_ATOM}title")))
    arxiv = identifier_in(entry.findtext(f"{_ATOM}id"))
    people = tuple(name for a in entry.findall(f"{_ATOM}author") if (name := markup.text(a.find(f"{_ATOM}name"))))
    return Paper(
        title=title,
        source="arxiv",
        arxiv=arxiv,
        abstract=markup.text(entry.find(f"{_ATOM}summary")),
        authors=people,
        published=day_of(entry.findtext(f"{_ATOM}published")),
        updated=day_of(entry.findtext(f"{_ATOM}updated")),
        categories=_categories(entry),
        doi=markup.text(entry.find(f"{_ARXIV}doi")),
    )


def _categories(entry: Element) -> tuple[str, ...]:
    primary = entry.find(f"{_ARXIV}primary_category")
    first = [] if primary is None else [primary.get("term")]
    terms = [*first, *(c.get("term") for c in entry.findall(f"{_ATOM}category"))]
    return tuple(dict.fromkeys(term for term in terms if term))


def _number(feed: Element, name: str) -> int | None:
    text = (feed.findtext(f"{_SEARCH}{name}") or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
