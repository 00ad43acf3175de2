"""One paper as a source tells of it, and what makes two tellings the same paper."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from datetime import date
from urllib.parse import quote

SITES = ("data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures")

# What a source is believed over: arXiv knows its papers, the hub copies from arXiv, a saved page lost the format.
SOURCES = ("catalogue", "page", "hub", "rss", "oai", "arxiv")

_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_ARXIV = re.compile(r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v(\d{1,4}))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What a source says of one paper; what it does not say is None or empty.

    Args:
        title: With single spaces.
        source: One of `SOURCES`.
        arxiv: Identifier without version.
        abstract: Plain text with single spaces, paragraphs parted by a blank line.
        authors: Names in order, where the source gives them.
        author_count: How many; where names are given, their number.
        organisation: That the source names in place of, or beside, the authors.
        published: Day of the first version.
        updated: Day of the version that is described.
        listed: Day on which the source listed the paper.
        categories: arXiv categories, the primary first.
        doi: Digital object identifier.
        code_url: Repository, http(s).
        project_url: Page of the project, http(s).
        upvotes: Of the source's readers.
        comments: How many the source's readers wrote.
    """

    title: str
    source: str
    arxiv: str | None = None
    abstract: str | None = None
    authors: tuple[str, ...] = ()
    author_count: int | None = None
    organisation: str | None = None
    published: date | None = None
    updated: date | None = None
    listed: date | None = None
    categories: tuple[str, ...] = ()
    doi: str | None = None
    code_url: str | None = None
    project_url: str | None = None
    upvotes: int | None = None
    comments: int | None = None

    def __post_init__(self) -> None:
        if self.authors:
            object.__setattr__(self, "author_count", len(self.authors))

    @property
    def key(self) -> str:
        """What names the paper in an address: the arXiv identifier, else a hash of the title."""
        return self.arxiv or title_address(self.title)


def clean(text: str) -> str:
    """``text`` on one line, with single spaces and without what `printed` leaves out."""
    return spaced(printed(spaced(text)))


def printed(text: str) -> str:
    """``text``, its lines as they are, without what nobody should write into a title, a name or a comment.

    That is: control characters (search marks its matches with them), halves of surrogate pairs (JSON can spell them, no
    file can hold them), signs that turn the direction of writing of all that follows in a mail, a feed reader or a
    terminal, and what cannot stand in XML.
    """
    return _UNWANTED.sub("", text)


def spaced(text: str) -> str:
    """``text`` with each run of white space as one space, and none at its ends."""
    return " ".join(text.split())


def arxiv_id(text: str) -> tuple[str, int | None] | None:
    """The arXiv identifier in a text (an id, an ``oai:`` name, an address) and its version, or None.

    Both forms are read: ``2403.17377v2`` and ``hep-ex/0307015``.
    """
    found = _ARXIV.search(text)
    return (found[1], int(found[2]) if found[2] else None) if found else None


def title_key(title: str) -> str:
    """What two writings of one title share: letters and digits, without case, accents, spaces and signs.

    A title of signs alone is itself.
    """
    plain = unicodedata.normalize("NFKD", title).casefold()
    return "".join(filter(str.isalnum, plain)) or spaced(plain)


def paper_path(key: str) -> str:
    """The path of a paper's page; the slash of an old arXiv identifier stays."""
    return f"/papers/{quote(key, safe='/')}"


def title_address(title: str) -> str:
    """The name in an address of a paper of which only the title is known."""
    return "t-" + hashlib.sha256(title_key(title).encode()).hexdigest()[:16]
