"""What every reader of a source gives back, and how text and numbers that others wrote are taken in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime

from perturbed.errors import PerturbedError
from perturbed.feed.papers import Paper, spaced, title_key

_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # the others count as white space
_SHOWN = 120  # characters of a line that a report repeats


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


def clean(text: str) -> str:
    """``text`` with single spaces, without control characters and half surrogates, which no database can keep."""
    return spaced(_CONTROL.sub("", text))


def title_in(text: object) -> str:
    """The title in a text.

    Raises:
        ValueError: It has no letter or digit, by which papers are told apart.
    """
    title = clean(text) if isinstance(text, str) else ""
    if not title_key(title):
        raise ValueError("no title")
    return title


def day_of(moment: str | None) -> date | None:
    """The UTC day of an ISO 8601 moment or day, or None where it is none."""
    try:
        at = datetime.fromisoformat(moment or "")
    except ValueError:
        return None
    return at.astimezone(UTC).date() if at.tzinfo else at.date()


def web_address(text: object) -> str | None:
    """``text`` where it is an http(s) address, else None: nothing else may become a link."""
    if not isinstance(text, str):
        return None
    address = clean(text)
    return address if re.fullmatch(r"https?://[^\s/<>\"'@]+(?:/[^\s<>\"]*)?", address) else None
