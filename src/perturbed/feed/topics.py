"""A search as a standing topic: every paper that answers, the newest first.

`search` ranks, and leaves the tail of a broad query out; a feed or a digest must miss nothing and has no ranks. All
words count here, none is left out where no paper has them all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection

from perturbed.feed.search import Query, condition, fts, parse


def matching(connection: sqlite3.Connection, text: str, ids: Collection[int]) -> set[int]:
    """Those of some papers that answer a query; none answers an empty one."""
    asked, values = _condition(parse(text))
    rows = connection.execute(
        f"SELECT id FROM paper WHERE id IN (SELECT value FROM json_each(?)) AND {asked}",
        (json.dumps(list(ids)), *values),
    )
    return {row[0] for row in rows.fetchall()}


def newest(connection: sqlite3.Connection, text: str, limit: int, offset: int) -> tuple[list[int], int]:
    """The papers that answer a query, the newest day first, and how many there are in all."""
    asked, values = _condition(parse(text))
    total = int(connection.execute(f"SELECT count(*) FROM paper WHERE {asked}", values).fetchone()[0])
    rows = connection.execute(
        f"SELECT id FROM paper WHERE {asked} ORDER BY day DESC, id DESC LIMIT ? OFFSET ?",
        (*values, limit, offset),
    )
    return [row[0] for row in rows.fetchall()], total


def unclear(text: str) -> str | None:
    """Why a query makes no topic, or None: what of it was not understood, or that it asks for nothing."""
    query = parse(text)
    if query.notes:
        return " ".join(query.notes)
    return None if query.terms or query.excluded or query.filtered else "There is neither a word nor a filter in it."


def _condition(query: Query) -> tuple[str, list[str | int]]:
    """A query as an SQL condition on ``paper``; an empty one lets none through."""
    asked, values = condition(query)
    if query.terms:
        asked += " AND id IN (SELECT rowid FROM words WHERE words MATCH ?)"
        values.append(fts(query.terms))
    return (asked if values or query.filtered else "false"), values
