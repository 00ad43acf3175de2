"""arXiv over OAI-PMH (``https://oaipmh.arxiv.org/oai``), with metadata in the forms ``arXiv`` and ``arXivRaw``.

``arXivRaw`` lists every version with its time, so the day of the first one is known. The ``created`` of ``arXiv`` has
been seen to be that of the latest version: it is believed only as far as it agrees with the identifier.
"""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, date
from email.utils import parsedate_to_datetime
from xml.etree.ElementTree import Element

from perturbed.feed.importers import markup
from perturbed.feed.importers.reading import FormatError, Read, day_of, each, identifier_in, title_in
from perturbed.feed.papers import Paper

_OAI = "{http://www.openarchives.org/OAI/2.0/}"
_PLAIN = "{http://arxiv.org/OAI/arXiv/}"
_RAW = "{http://arxiv.org/OAI/arXivRaw/}"


class ExpiredToken(FormatError):
    """The resumption token is no longer known: the list is to be asked for anew."""


def read(data: str | bytes) -> Read:
    """The papers of an answer to ``ListRecords`` or ``GetRecord``; ``more`` is the resumption token.

    Deleted records count as skipped. An answer of ``noRecordsMatch`` has no papers and is no error.

    Raises:
        ExpiredToken: The server does not know the token any more.
        FormatError: It is not OAI-PMH or not whole, or the server refused.
    """
    top = markup.parse(data, f"{_OAI}OAI-PMH", "record")
    for error in top.findall(f"{_OAI}error"):
        code = error.get("code")
        if code == "noRecordsMatch":
            return Read(())
        kind = ExpiredToken if code == "badResumptionToken" else FormatError
        raise kind(f"arXiv refused the harvest: {code}: {markup.text(error) or 'no reason given'}")
    token = markup.text(top.find(f"*/{_OAI}resumptionToken"))
    return replace(each(top.findall(f"*/{_OAI}record"), _paper, markup.text), more=token)


def _paper(record: Element) -> Paper | None:
    header = record.find(f"{_OAI}header")
    if header is not None and header.get("status") == "deleted":
        return None
    for space in (_RAW, _PLAIN):
        for name in ("arXivRaw", "arXiv"):
            told = record.find(f"{_OAI}metadata/{space}{name}")
            if told is not None:
                return _told(told, space)
    raise ValueError("no metadata of arXiv or arXivRaw")


def _told(told: Element, space: str) -> Paper:
    title = title_in(markup.text(told.find(f"{space}title")))
    arxiv = identifier_in(told.findtext(f"{space}id"))
    if space == _RAW:
        people = _names(markup.text(told.find(f"{space}authors")) or "")
        published, updated = _versions(told)
    else:
        people = tuple(n for a in told.findall(f"{space}authors/{space}author") if (n := _person(a)))
        published, updated = _days(told, arxiv)
    return Paper(
        title=title,
        source="oai",
        arxiv=arxiv,
        abstract=markup.text(told.find(f"{space}abstract")),
        authors=people,
        published=published,
        updated=updated,
        categories=tuple((markup.text(told.find(f"{space}categories")) or "").split()),
        doi=markup.text(told.find(f"{space}doi")),
    )


def _person(author: Element) -> str | None:
    parts = (markup.text(author.find(f"{_PLAIN}{name}")) for name in ("forenames", "keyname", "suffix"))
    return " ".join(part for part in parts if part) or None


def _names(line: str) -> tuple[str, ...]:
    """The names in a line of authors; affiliations stand in brackets, which may be nested."""
    for _ in range(4):
        line = re.sub(r"\([^()]*\)", " ", line)
    parts = (part.strip(" ,") for part in re.split(r",|\band\b(?=\s)", line))
    names: list[str] = []
    for part in (" ".join(p.split()) for p in parts if p):
        if names and re.fullmatch(r"(?:jr|sr)\.?|i{2,3}|iv", part, re.I):
            names[-1] += f" {part}"
        elif part:
            names.append(part)
    return tuple(names)


def _versions(told: Element) -> tuple[date | None, date | None]:
    """Days of the first and of the last version."""
    days = {v.get("version"): _mail_day(v.findtext(f"{_RAW}date")) for v in told.findall(f"{_RAW}version")}
    numbered = {int(name[1:]): day for name, day in days.items() if name and re.fullmatch(r"v\d{1,4}", name)}
    return numbered.get(1), numbered[max(numbered)] if numbered else None


def _days(told: Element, arxiv: str) -> tuple[date | None, date | None]:
    created, updated = (day_of(markup.text(told.find(f"{_PLAIN}{name}"))) for name in ("created", "updated"))
    digits = re.match(r"(?:[a-z.-]+/)?(\d\d)(\d\d)", arxiv, re.I)
    if created is not None and digits is not None:
        years, month = int(digits[1]), int(digits[2])
        year = years + (1900 if years > 90 else 2000)
        if (created.year, created.month) > (year, month):
            return None, updated or created  # later than the identifier: not the first version
    return created, updated or created


def _mail_day(text: str | None) -> date | None:
    try:
        return parsedate_to_datetime(text or "").astimezone(UTC).date()
    except (ValueError, IndexError, OverflowError):
        return None
