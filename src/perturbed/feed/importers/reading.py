"""What every reader of a source gives back, and how text and numbers that others wrote are taken in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar

from perturbed.errors import PerturbedError
from perturbed.feed.papers import Paper, arxiv_id, clean, title_key

E = TypeVar("E")

_SHOWN = 120  # characters of a line that a report repeats
FIRST_DAY = date(1900, 1, 1)
AHEAD = 7  # days by which those of a source may be ahead of ours
_MOST_AUTHORS = 10_000  # the most that a paper has had are half as many
_LONGEST = {  # characters
    "title": 1_000,
    "abstract": 50_000,
    "organisation": 500,
    "doi": 500,
    "code_url": 2_000,
    "project_url": 2_000,
}


class FormatError(PerturbedError):
    """What was read is not, or not wholly, in the format that it should have; nothing of it was taken."""


@dataclass(frozen=True)
class Unread:
    """Something that was not understood, and so was left out.

    Args:
        line: Its place, the first being 1.
        text: How it begins.
        why: What was missing or wrong.
        unit: What ``line`` counts: lines of a text, or entries of JSON and XML.
    """

    line: int
    text: str
    why: str
    unit: str = "line"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", clean(self.text)[:_SHOWN])

    def __str__(self) -> str:
        return f"{self.unit} {self.line}: {self.why}: {self.text}"


@dataclass(frozen=True)
class Read:
    """What one answer or file held.

    Args:
        papers: In the order of the source.
        unread: What was not understood.
        more: What the source calls its next page (an OAI token, the next ``start`` of Atom); None at the end.
        skipped: Entries that were understood and hold no further paper: deletions, second showings.
        notes: Choices that were made where the source leaves two readings.
    """

    papers: tuple[Paper, ...]
    unread: tuple[Unread, ...] = ()
    more: str | None = None
    skipped: int = 0
    notes: tuple[str, ...] = ()


def each(entries: Iterable[E], paper: Callable[[E], Paper | None], text: Callable[[E], str | None]) -> Read:
    """What a source's entries hold, each read by itself: one that is not understood takes no other along.

    Args:
        entries: In the order of the source.
        paper: The paper of an entry, or None where it is to be skipped; raises ValueError where it is not understood.
        text: What a report shows of an entry that was not understood.
    """
    papers: list[Paper] = []
    unread: list[Unread] = []
    skipped = 0
    for place, entry in enumerate(entries, 1):
        try:
            found = paper(entry)
        except ValueError as e:
            unread.append(Unread(place, text(entry) or "", str(e), "entry"))
        else:
            if found is None:
                skipped += 1
            else:
                papers.append(found)
    return Read(tuple(papers), tuple(unread), skipped=skipped)


def bounded(read: Read, now: float) -> Read:
    """What was read without the papers that tell more than any real one, or of days that no paper can be of.

    They go to ``unread``. One day far ahead of ``now`` would be the newest of all for years.
    """
    unreal = {place: why for place, paper in enumerate(read.papers, 1) if (why := _unreal(paper, now))}
    if not unreal:
        return read
    unread = (Unread(place, read.papers[place - 1].title, why, "paper") for place, why in unreal.items())
    papers = (paper for place, paper in enumerate(read.papers, 1) if place not in unreal)
    return replace(read, papers=tuple(papers), unread=(*read.unread, *unread))


def has_been(day: date, now: float, *, ahead: int = 1) -> bool:
    """Whether a day is not older than all papers, and no further ahead than it is in some time zone already."""
    return FIRST_DAY <= day <= datetime.fromtimestamp(now, UTC).date() + timedelta(days=ahead)


def _unreal(paper: Paper, now: float) -> str | None:
    days = ((name, getattr(paper, name)) for name in ("listed", "published", "updated"))
    if odd := next(
        ((name, day) for name, day in days if day is not None and not has_been(day, now, ahead=AHEAD)), None
    ):
        return f"{odd[0]} on {odd[1]}, of which no paper can be"
    if len(paper.authors) > _MOST_AUTHORS:
        return f"{len(paper.authors):,} authors"
    texts = [(name, getattr(paper, name) or "", most) for name, most in _LONGEST.items()]
    texts += [("author", name, 300) for name in paper.authors] + [("category", name, 100) for name in paper.categories]
    return next((f"{name} of {len(text):,} characters" for name, text, most in texts if len(text) > most), None)


def title_in(text: object) -> str:
    """The title in a text.

    Raises:
        ValueError: It has no letter or digit, by which papers are told apart.
    """
    title = clean(text) if isinstance(text, str) else ""
    if not title_key(title):
        raise ValueError("no title")
    return title


def identifier_in(text: str | None) -> str:
    """The arXiv identifier in a text, without its version.

    Raises:
        ValueError: There is none.
    """
    found = arxiv_id(text or "")
    if found is None:
        raise ValueError("no arXiv identifier")
    return found[0]


def day_of(moment: str | None) -> date | None:
    """The UTC day of an ISO 8601 moment or day, or None where it is none."""
    try:
        at = datetime.fromisoformat(moment or "")
        return at.astimezone(UTC).date() if at.tzinfo else at.date()
    except (ValueError, OverflowError):  # of the year 1 or 9999, in another zone
        return None


def web_address(text: object) -> str | None:
    """``text`` where it is an http(s) address, else None: nothing else may become a link."""
    if not isinstance(text, str):
        return None
    address = clean(text)
    return address if re.fullmatch(r"https?://[^\s/<>\"'@]+(?:/[^\s<>\"]*)?", address) else None
