"""The papers as JSON and as BibTeX, also out of a damaged file as far as its rows can be read."""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from perturbed.feed.database import DatabaseError
from perturbed.feed.papers import SITES
from perturbed.feed.schema import APPLICATION_ID

_COLUMNS = (
    *("id", "key", "title", "arxiv", "slug", "year", "published", "updated", "listed", "people", "author_count"),
    *("organisation", "doi", "code_url", "project_url", "tags", "source", "source_upvotes", "source_comments"),
    *("verdict", "summary", "abstract"),
)
_SMALLEST_ROW = 48  # bytes; a file of so many pages cannot hold more rows than this lets in
_SPAN = 256  # rows read at once


def as_json(connection: sqlite3.Connection, unread: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The papers, one object each, in the order in which they came.

    ``authors``, ``comments`` and ``upvotes`` are counts as the source gave them, or null; ``author_names`` are the
    names where it gave them; ``votes`` is the owner's own count and ``notes`` are the comments written here.

    Args:
        connection: Of the feed's database, or from `salvage`.
        unread: Gets the number of each row that could not be read; where None, such a row raises.

    Raises:
        sqlite3.DatabaseError: A row cannot be read and ``unread`` is None.
    """
    for row in _rows(connection, unread):
        paper = row["id"]
        yield {
            "title": row["title"],
            "published": row["published"],
            "authors": row["author_count"],
            "comments": row["source_comments"],
            "upvotes": row["source_upvotes"],
            "arxiv": row["arxiv"],
            "key": row["key"],
            "slug": row["slug"],
            "year": row["year"],
            "sites": [site for site in SITES if site in _of(connection, "SELECT site FROM acts_on", paper, unread)],
            "verdict": row["verdict"],
            "author_names": (row["people"] or "").splitlines(),
            "organisation": row["organisation"],
            "listed": row["listed"],
            "updated": row["updated"],
            "summary": row["summary"],
            "abstract": row["abstract"],
            "tags": (row["tags"] or "").split(),
            "doi": row["doi"],
            "code_url": row["code_url"],
            "project_url": row["project_url"],
            "source": row["source"],
            "votes": len(_of(connection, "SELECT voter FROM vote", paper, unread)),
            "notes": _of(connection, "SELECT body FROM comment", paper, unread),
        }


def as_bibtex(connection: sqlite3.Connection, unread: list[int] | None = None) -> Iterator[str]:
    """The papers, one ``@misc`` entry each; ``unread`` as for `as_json`."""
    taken: set[str] = set()
    for row in _rows(connection, unread):
        yield _bibtex(row, taken)


def bibtex_of(connection: sqlite3.Connection, paper: int) -> str:
    """One paper as `as_bibtex` has it."""
    row = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM paper WHERE id = ?", (paper,)).fetchone()
    return _bibtex(dict(row), set())


def salvage(path: Path) -> sqlite3.Connection:
    """A connection to a damaged feed database that only reads, for `as_json` and `as_bibtex` with ``unread``.

    Raises:
        DatabaseError: Not even the list of tables can be read, or the file is another program's.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    except sqlite3.Error as e:
        raise DatabaseError(f"{path}: cannot be opened ({e})") from e
    connection.row_factory = sqlite3.Row
    try:
        ours = connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        connection.execute("SELECT id FROM paper WHERE id < 0").fetchone()
    except sqlite3.DatabaseError as e:
        connection.close()
        raise DatabaseError(
            f"{path}: nothing of it can be read ({e}); move it away and restore a backup, or begin anew by an import"
        ) from e
    if not ours:
        connection.close()
        raise DatabaseError(f"{path}: this SQLite file is another program's")
    return connection


def _bibtex(row: Mapping[str, Any], taken: set[str]) -> str:
    names = (row["people"] or "").splitlines()
    fields = {
        "title": f"{{{_tex(row['title'])}}}",
        "author": " and ".join(f"{{{_tex(name)}}}" if _odd(name) else _tex(name) for name in names),
        "year": str(row["year"] or ""),
        "eprint": row["arxiv"] or "",
        "archiveprefix": "arXiv" if row["arxiv"] else "",
        "doi": _address(row["doi"]),
        "url": f"https://arxiv.org/abs/{row['arxiv']}" if row["arxiv"] else _address(row["project_url"]),
        "abstract": _tex(" ".join((row["abstract"] or "").split())),
    }
    body = "".join(f",\n  {name} = {{{value}}}" for name, value in fields.items() if value)
    return f"@misc{{{_cite(row, taken)}{body}\n}}\n"


def _rows(connection: sqlite3.Connection, unread: list[int] | None) -> Iterator[dict[str, Any]]:
    columns = ", ".join(_COLUMNS)
    if unread is None:
        yield from map(dict, connection.execute(f"SELECT {columns} FROM paper ORDER BY id"))
        return
    last = _last(connection)
    for first in range(1, last + 1, _SPAN):
        yield from _readable(connection, first, min(first + _SPAN - 1, last), unread)


def _readable(connection: sqlite3.Connection, first: int, last: int, unread: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of a span of numbers; where it cannot be read whole, those of its halves."""
    # A span is read one row past its end, so that the last sound row before a damaged page needs a question of its own.
    span, ends = ("BETWEEN ? AND ? ORDER BY id", (first, last)) if first < last else ("= ?", (first,))
    try:
        rows = connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM paper WHERE id {span}", ends).fetchall()
    except sqlite3.DatabaseError:
        if first < last:
            middle = (first + last) // 2
            yield from _readable(connection, first, middle, unread)
            yield from _readable(connection, middle + 1, last, unread)
        else:
            unread.append(first)
            yield from _pieces(connection, first)
        return
    yield from map(dict, rows)


def _pieces(connection: sqlite3.Connection, paper: int) -> Iterator[dict[str, Any]]:
    """What of a row can be read one column at a time: a long abstract lies on pages of its own."""
    row: dict[str, Any] = dict.fromkeys(_COLUMNS)
    for name in _COLUMNS:
        with suppress(sqlite3.Error, TypeError):
            row[name] = connection.execute(f"SELECT {name} FROM paper WHERE id = ?", (paper,)).fetchone()[0]
    if row["title"] and row["key"]:
        yield row | {"id": paper}


def _last(connection: sqlite3.Connection) -> int:
    """The largest row number, or where its page is lost a number that it cannot exceed."""
    with suppress(sqlite3.Error):
        return int(connection.execute("SELECT max(id) FROM paper").fetchone()[0] or 0)
    for index in ("paper_title", "paper_day", "paper_year"):
        with suppress(sqlite3.Error):
            return int(connection.execute(f"SELECT max(id) FROM paper INDEXED BY {index}").fetchone()[0] or 0)
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    return int(pages * connection.execute("PRAGMA page_size").fetchone()[0] // _SMALLEST_ROW)


def _of(connection: sqlite3.Connection, query: str, paper: int, unread: list[int] | None) -> list[str]:
    """What another table holds of a paper; nothing where that is damaged and ``unread`` allows it."""
    try:
        return [row[0] for row in connection.execute(f"{query} WHERE paper = ?", (paper,)).fetchall()]
    except sqlite3.Error:
        if unread is None:
            raise
        return []


_ESCAPES = {
    **{c: f"\\{c}" for c in "&%$#_"},
    **{"{": r"\textbraceleft{}", "}": r"\textbraceright{}", "\\": r"\textbackslash{}"},
    **{"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
}


def _tex(text: str) -> str:
    """Plain text as TeX shows it. Braces are named, since BibTeX counts also those that TeX would take as signs."""
    return "".join(_ESCAPES.get(c, c) for c in text)


def _odd(name: str) -> bool:
    """Whether BibTeX would take a name apart wrongly."""
    return "," in name or " and " in f" {name} " or "{" in name or "}" in name


def _address(text: str | None) -> str:
    """An address or DOI, which BibTeX styles print as it is, without what would end the field."""
    return re.sub(r"[{}\\\s]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), text or "")


def _cite(row: Mapping[str, Any], taken: set[str]) -> str:
    """What the entry is cited by: slug, else family name, year and a word of the title; unlike all others."""
    name = _letters(((row["people"] or "").splitlines() or [""])[0].split(" ")[-1])
    word = next((_letters(word) for word in row["title"].split() if len(_letters(word)) > 3), "paper")
    wanted = row["slug"] or f"{name}{row['year'] or ''}{word}"
    cite, n = wanted, 2
    while cite.casefold() in taken:
        cite, n = f"{wanted}-{n}", n + 1
    taken.add(cite.casefold())
    return cite


def _letters(text: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKD", text).casefold() if c.isascii() and c.isalnum())
