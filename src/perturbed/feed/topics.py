"""A search as a standing topic: every paper that answers, the newest first.

`search` ranks, and leaves the tail of a broad query out; a feed or a digest must miss nothing and has no ranks. All
words count here, none is left out where no paper has them all.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable

from perturbed.feed.search import Query, Term, parse

_COLUMNS = "{title summary abstract people tags}"
_INDEX = "id IN (SELECT rowid FROM words WHERE words MATCH ?)"


def matching(connection: sqlite3.Connection, text: str, ids: Collection[int]) -> set[int]:
    """Those of some papers that answer a query; none answers an empty one."""
    condition, values = _condition(parse(text))
    rows = connection.execute(
        f"SELECT id FROM paper WHERE id IN (SELECT value FROM json_each(?)) AND {condition}",
        (json.dumps(list(ids)), *values),
    )
    return {row[0] for row in rows.fetchall()}


def newest(connection: sqlite3.Connection, text: str, limit: int, offset: int) -> tuple[list[int], int]:
    """The papers that answer a query, the newest day first, and how many there are in all."""
    condition, values = _condition(parse(text))
    total = int(connection.execute(f"SELECT count(*) FROM paper WHERE {condition}", values).fetchone()[0])
    rows = connection.execute(
        f"SELECT id FROM paper WHERE {condition} ORDER BY day DESC, id DESC LIMIT ? OFFSET ?",
        (*values, limit, offset),
    )
    return [row[0] for row in rows.fetchall()], total


def _condition(query: Query) -> tuple[str, list[str | int]]:
    """A query as an SQL condition on ``paper``."""
    parts: list[str] = []
    values: list[str | int] = []
    if query.terms:
        parts.append(_INDEX)
        values.append(_match(query.terms, " AND "))
    if query.excluded:
        parts.append(f"NOT {_INDEX}")
        values.append(_match(query.excluded, " OR "))
    for site in query.sites:
        parts.append("id IN (SELECT paper FROM acts_on WHERE site = ?)")
        values.append(site)
    if query.verdicts:
        parts.append("(coalesce(verdict, 'none') IN (SELECT value FROM json_each(?)) OR verdict IS NOT NULL AND ?)")
        values += [json.dumps(query.verdicts), "any" in query.verdicts]
    if query.years:
        parts.append(f"({' OR '.join(['year BETWEEN ? AND ?'] * len(query.years))})")
        values += [year for span in query.years for year in span]
    return " AND ".join(parts) or "false", values


def _match(terms: Iterable[Term], join: str) -> str:
    return f"{_COLUMNS} : ({join.join(term.match for term in terms)})"
