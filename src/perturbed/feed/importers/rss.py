"""arXiv's daily announcements: RSS, as ``https://rss.arxiv.org/rss/cs.LG+cs.CL`` answers."""

from __future__ import annotations

import re
from datetime import date
from email.utils import parsedate_to_datetime
from xml.etree.ElementTree import Element

from perturbed.feed.importers import markup
from perturbed.feed.importers.reading import Read, each, identifier_in, title_in
from perturbed.feed.papers import Paper

_ARXIV = "{http://arxiv.org/schemas/atom}"
_DUBLIN = "{http://purl.org/dc/elements/1.1/}"
_NEW = ("new", "cross")


def read(data: str | bytes) -> Read:
    """The papers of a day's announcements.

    A new paper is listed on the day of its announcement; a replacement was listed before, and only its day of update
    is told. The day of publication is not in this format. An empty channel (no announcements at weekends) is no error.

    Raises:
        FormatError: It is not RSS, or not whole.
    """
    top = markup.parse(data, "rss", "item")
    return each(top.findall("channel/item"), _paper, markup.text)


def _paper(item: Element) -> Paper:
    title = title_in(markup.text(item.find("title")))
    arxiv = identifier_in(f"{item.findtext('guid') or ''} {item.findtext('link') or ''}")
    told = markup.text(item.find("description")) or ""
    kind = markup.text(item.find(f"{_ARXIV}announce_type")) or _group(r"Announce Type:\s*(\S+)", told) or "new"
    creators = markup.text(item.find(f"{_DUBLIN}creator")) or ""
    day = _day(item.findtext("pubDate"))
    return Paper(
        title=title,
        source="rss",
        arxiv=arxiv,
        abstract=_group(r"Abstract:\s*(.+)", told),
        authors=tuple(name for part in creators.split(",") if (name := part.strip())),
        updated=None if kind in _NEW else day,
        listed=day if kind in _NEW else None,
        categories=tuple(dict.fromkeys(c for e in item.findall("category") if (c := markup.text(e)))),
        doi=markup.text(item.find(f"{_ARXIV}DOI")),
    )


def _group(pattern: str, told: str) -> str | None:
    found = re.search(pattern, told, re.S)
    return found[1] if found else None


def _day(text: str | None) -> date | None:
    """The day as the announcement names it: arXiv's own, whatever the zone."""
    try:
        return parsedate_to_datetime(text or "").date()
    except (ValueError, IndexError, OverflowError):
        return None
