"""Search by words, by meaning, and by both at once; nothing that is typed can make it raise.

By words, SQLite's full-text index ranks with BM25, where a word in the title weighs most. To rank a match costs about
a microsecond, so a query that a large part of the papers answers is not ranked whole: first come its matches within
titles, then the newest others. By meaning, the vectors nearest to that of the query. Both orders are fused as usual, by
the sum of 1/(60 + rank) (Cormack, Clarke and Büttcher, "Reciprocal rank fusion", SIGIR 2009).
"""

from __future__ import annotations

import json
import re
import sqlite3
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, get_args

from perturbed.evidence.verdict import Verdict
from perturbed.feed.meaning import Meaning
from perturbed.feed.papers import SITES
from perturbed.feed.schema import TOKENIZER
from perturbed.feed.store import Entry, entries

VERDICTS = get_args(Verdict)

LONGEST, MOST_TERMS = 1000, 24  # of a query: letters, and words that count
RANKED = 5_000  # matches up to which all are ranked, and counted
SHORTEST_PREFIX = 3  # letters; shorter ones would stand for a large part of all words
DEEPEST = 1_000  # results that can be paged through
NEAREST = 100  # papers taken by meaning
FLOOR, SHARE = 0.2, 0.5  # cosine, and part of the best one, below which a paper is not about the query: MiniLM puts
# texts that have nothing to do with each other at 0 to 0.15, and a query's best papers at 0.3 to 0.6
FEW = 5_000  # papers passing the filters up to which only those are compared by meaning
FUSION = 60
_WEIGHTS = "bm25(8.0, 4.0, 1.0, 2.0, 3.0, 0.5, 0.0)"  # title, summary, abstract, people, tags, year, verdict
_BEGIN, _END = "\x02", "\x03"  # around a match in a snippet; the store lets no control character in
_PIECES = 32  # words of a snippet
_WORDS_WEIGHED, _RAREST = 80, 8  # words of a paper whose rarity is looked up, and those that stand for it
_COMMON = 500  # papers from which on a word says little

# Words that hold a sentence together: most papers have them, so they are not looked for beside others.
_LITTLE = re.compile(
    "a|an|and|are|as|at|be|been|by|can|could|do|does|for|from|had|has|have|how|if|in|into|is|it|its|of|on|or|our|should|so|"
    "such|than|that|the|their|them|then|there|these|they|this|to|was|we|were|what|when|where|whether|which|while|who|"
    "whose|why|will|with|would|you",
    re.IGNORECASE,
)

_TOKEN = re.compile(
    r"""(?P<not>-)?(?:
        "(?P<phrase>[^"]*)"
      | (?P<field>site|verdict|year):(?P<value>[^\s"]*)
      | (?P<word>[^\s"]+)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_YEARS = re.compile(r"(\d{4})(?:(?:-|\.\.)(\d{4}))?")


@dataclass(frozen=True)
class Term:
    """One word, phrase or beginning of a word to look for."""

    text: str
    kind: Literal["word", "phrase", "prefix"]

    @property
    def match(self) -> str:
        """As FTS5 reads it: a quoted string, in which nothing has a meaning."""
        quoted = self.text.replace('"', '""')
        return f'"{quoted}"*' if self.kind == "prefix" else f'"{quoted}"'


@dataclass(frozen=True)
class Query:
    """What was asked for.

    Attributes:
        terms: All must occur.
        excluded: None may occur.
        sites: The paper acts on all of them.
        verdicts: It has one of them; ``none`` and ``any`` are among what can be said.
        years: It is of one of these spans, both ends included.
        notes: What of the text could not be understood, in sentences.
    """

    terms: tuple[Term, ...] = ()
    excluded: tuple[Term, ...] = ()
    sites: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    years: tuple[tuple[int, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        """Its words without the signs, to be understood by meaning."""
        return " ".join(term.text for term in self.terms)

    @property
    def filtered(self) -> bool:
        """Whether it limits more than the words."""
        return bool(self.sites or self.verdicts or self.years)


@dataclass(frozen=True)
class Hit:
    """A paper found; ``snippet`` is its text in pieces, of which those with True are matches (escape each)."""

    entry: Entry
    snippet: list[tuple[str, bool]]


@dataclass(frozen=True)
class Found:
    """What a search gave.

    Attributes:
        hits: Of this page.
        total: How many papers answer; where ``more`` is true, at least so many.
        note: What the reader should know, in sentences, or None.
        more: The count was given up at ``total``.
        reach: How many of them can be paged through.
    """

    hits: list[Hit]
    total: int
    note: str | None = None
    more: bool = False
    reach: int = 0

    @property
    def count(self) -> str:
        """The total as people read it: ``12`` or ``5,000+``."""
        return f"{self.total:,}{'+' if self.more else ''}"


def parse(text: str) -> Query:
    """Read a query: words, ``"phrases"``, ``begin*``, ``-word``, ``site:data``, ``verdict:null``, ``year:2020-2023``.

    Whatever is none of these is taken as words.
    """
    notes = []
    text = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text[: LONGEST + 1])
    if len(text) > LONGEST:
        notes.append(f"Only the first {LONGEST:,} letters of the query count.")
    terms: list[Term] = []
    excluded: list[Term] = []
    named: dict[str, list[str]] = {"site": [], "verdict": []}
    years: list[tuple[int, int]] = []
    for found in _TOKEN.finditer(text[:LONGEST]):
        if found["field"] and not found["not"]:
            field, value = found["field"].lower(), found["value"].lower()
            if field == "year":
                if span := _YEARS.fullmatch(value):
                    first, last = int(span[1]), int(span[2] or span[1])
                    years.append((min(first, last), max(first, last)))
                else:
                    notes.append(f"“year:{value}” is not understood: write year:2023 or year:2020-2023.")
            elif value in (known := SITES if field == "site" else ("any", "none", *VERDICTS)):
                named[field].append(value)
            else:
                notes.append(f"There is no {field} “{value}”; there is {', '.join(known)}.")
        elif term := _term(found):
            (excluded if found["not"] else terms).append(term)
    terms = list(dict.fromkeys(terms))
    if len(terms) > MOST_TERMS:
        notes.append(f"Only the first {MOST_TERMS} words of the query count.")
    return Query(
        tuple(terms[:MOST_TERMS]),
        tuple(dict.fromkeys(excluded[:MOST_TERMS])),
        tuple(dict.fromkeys(named["site"])),
        tuple(dict.fromkeys(named["verdict"])),
        tuple(dict.fromkeys(years)),
        tuple(dict.fromkeys(notes)),
    )


def search(
    connection: sqlite3.Connection, text: str, *, limit: int = 20, offset: int = 0, meaning: Meaning | None = None
) -> Found:
    """The papers that answer a query, best first.

    Without words, the newest papers that pass the filters; without anything, none.

    Args:
        connection: Of the feed's database.
        text: As typed; see `parse`.
        limit: Papers of one page.
        offset: Papers of the pages before.
        meaning: The vectors, where the search is by meaning too.
    """
    query = parse(text)
    notes = list(query.notes)
    if not query.terms:
        ids, total, more = _listed(connection, query)
    else:
        ids, found, more = _by_words(connection, _weighty(query), notes)
        near = _by_meaning(connection, query, meaning, notes) if meaning is not None else []
        total = RANKED if more else len(found.union(near))
        ids = fuse(ids, near)
    reach = min(len(ids), DEEPEST)
    page = entries(connection, ids[:DEEPEST][max(offset, 0) : max(offset, 0) + max(limit, 0)])
    snippets = _snippets(_weighty(query), page)
    hits = [Hit(entry, snippets.get(entry.id) or _opening(entry)) for entry in page]
    return Found(hits, total, " ".join(notes) or None, more, reach)


def similar(
    connection: sqlite3.Connection, paper_id: int, limit: int = 10, meaning: Meaning | None = None
) -> list[Entry]:
    """The papers most like one: by its vector, or where it has none by its own rarest words."""
    near = [] if meaning is None else meaning.like(connection, paper_id, limit)
    return entries(connection, (near or _alike(connection, paper_id, limit))[:limit])


def fuse(*orders: Sequence[int]) -> list[int]:
    """One order out of several: by the sum of 1/(60 + rank), ranks from 1; of equals the one named first."""
    score: dict[int, float] = {}
    for order in orders:
        for rank, paper in enumerate(order, 1):
            score[paper] = score.get(paper, 0.0) + 1 / (FUSION + rank)
    return sorted(score, key=score.__getitem__, reverse=True)


def _term(found: re.Match[str]) -> Term | None:
    """A term of the query, or None where it has neither letter nor digit: FTS5 has no token to look for there."""
    text = found["phrase"] or found["word"] or f"{found['field'] or ''} {found['value'] or ''}"
    if not any(unicodedata.category(c)[0] in "LN" for c in text):
        return None
    if found["phrase"]:
        return Term(" ".join(text.split()), "phrase")
    if text.endswith("*") and len(beginning := text.rstrip("*")) >= SHORTEST_PREFIX:
        return Term(beginning, "prefix")
    return Term(text.strip("*"), "word")


def _weighty(query: Query) -> Query:
    """The query without its little words, unless it has no others."""
    terms = tuple(t for t in query.terms if t.kind != "word" or not _LITTLE.fullmatch(t.text))
    return replace(query, terms=terms) if terms else query


def fts(terms: Iterable[Term], join: str = " ", columns: str = "- verdict") -> str:
    """Terms as an FTS5 expression: all of them, or with ``join`` as `` OR `` any."""
    return f"({columns} : ({join.join(term.match for term in terms)}))"


def _match(query: Query, terms: Iterable[Term], join: str = " ", columns: str = "- verdict") -> str:
    """The FTS5 expression of terms, with what the query limits besides; a site is only roughly so (see `_on_sites`)."""
    parts = [fts(terms, join, columns)]
    parts += [f'(tags : "{site}")' for site in query.sites]
    if query.years:
        years = sorted({year for first, last in query.years for year in range(first, last + 1)})
        parts.append("(year : ({}))".format(" OR ".join(f'"{year}"' for year in years)))
    if query.verdicts and "none" not in query.verdicts:
        parts.append(_verdict_match(query.verdicts))
    expression = " AND ".join(parts)
    if "none" in query.verdicts and "any" not in query.verdicts:
        expression = f"({expression}) NOT {_verdict_match(set(VERDICTS) - set(query.verdicts))}"
    if query.excluded:
        expression = f"({expression}) NOT {fts(query.excluded, ' OR ')}"
    return expression


def _verdict_match(verdicts: Iterable[str]) -> str:
    named = VERDICTS if "any" in verdicts else verdicts
    return "(verdict : ({}))".format(" OR ".join(f'"{verdict}"' for verdict in named))


def _by_words(connection: sqlite3.Connection, query: Query, notes: list[str]) -> tuple[list[int], set[int], bool]:
    """The papers with all the words, best first (with some of them, where none has all); all; and whether yet more."""
    query = _within(connection, query)
    match = _match(query, query.terms)
    found = _matching(connection, match)
    if not found and len(query.terms) > 1:
        if rare := _rarest(connection, query):
            match = _match(query, rare, " OR ")
            found = _matching(connection, match)
        if found:
            notes.append("No paper has all these words; these have some of them, or mean something like them.")
    if len(found) <= RANKED:
        return _on_sites(connection, query, _ranked(connection, match)), {*_on_sites(connection, query, found)}, False
    in_title = _match(query, query.terms, columns="{title}")
    ids = _ranked(connection, in_title, since=min(_matching(connection, in_title), default=0))
    if len(ids) < DEEPEST:
        known = set(ids)
        ids += [paper for paper in _ranked(connection, match, since=min(found)) if paper not in known]
    return _on_sites(connection, query, ids), set(found), True


def _matching(connection: sqlite3.Connection, match: str) -> list[int]:
    """The newest matches, one more than will be ranked."""
    rows = connection.execute(
        "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?", (match, RANKED + 1)
    )
    return [row[0] for row in rows.fetchall()]


def _ranked(connection: sqlite3.Connection, match: str, since: int = 0, limit: int = DEEPEST) -> list[int]:
    """The best matches among the rows from ``since`` on."""
    rows = connection.execute(
        f"SELECT rowid FROM words WHERE words MATCH ? AND rank MATCH '{_WEIGHTS}' AND rowid >= ? ORDER BY rank LIMIT ?",
        (match, since, limit),
    )
    return [row[0] for row in rows.fetchall()]


def _rarest(connection: sqlite3.Connection, query: Query) -> list[Term]:
    """The rarest terms that occur, as many as have together few enough matches to be ranked."""
    count = {term: len(_matching(connection, _match(query, [term]))) for term in query.terms}
    chosen: list[Term] = []
    left = RANKED
    for term in sorted((term for term in query.terms if count[term]), key=count.__getitem__):
        left -= count[term]
        if left < 0 and chosen:
            break
        chosen.append(term)
    return chosen


def _within(connection: sqlite3.Connection, query: Query) -> Query:
    """The query with its years cut to those that papers have, so that ``year:0-9999`` is no long list."""
    if not query.years:
        return query
    least, most = connection.execute("SELECT min(year), max(year) FROM paper").fetchone()
    spans = [(max(first, least or 0), min(last, most or 0)) for first, last in query.years]
    return replace(query, years=tuple(span for span in spans if span[0] <= span[1]) or ((0, 0),))


def _on_sites(connection: sqlite3.Connection, query: Query, ids: list[int]) -> list[int]:
    """Those that act on the query's sites: a tag may have the same word."""
    for site in query.sites:
        there = {paper for (paper,) in connection.execute("SELECT paper FROM acts_on WHERE site = ?", (site,))}
        ids = [paper for paper in ids if paper in there]
    return ids


def condition(query: Query) -> tuple[str, list[str | int]]:
    """What a query says besides its terms as an SQL condition on ``paper``, with its values."""
    limits, values = _limits(query)
    if query.excluded:
        limits += " AND id NOT IN (SELECT rowid FROM words WHERE words MATCH ?)"
        values.append(fts(query.excluded, " OR "))
    return limits, values


def _limits(query: Query) -> tuple[str, list[str | int]]:
    """The query's filters as an SQL condition on ``paper``."""
    parts = ["id IN (SELECT paper FROM acts_on WHERE site = ?)"] * len(query.sites)
    values: list[str | int] = list(query.sites)
    if query.verdicts:
        named = [verdict for verdict in query.verdicts if verdict not in ("any", "none")]
        some = "id IN (SELECT id FROM paper INDEXED BY paper_verdict WHERE verdict {})"  # else all days are walked
        either = [some.format(f"IN ({', '.join('?' * len(named))})")] if named else []
        either += [some.format("IS NOT NULL")] * ("any" in query.verdicts)
        either += ["verdict IS NULL"] * ("none" in query.verdicts)
        parts.append(f"({' OR '.join(either)})")
        values += named
    if query.years:
        parts.append(f"({' OR '.join(['year BETWEEN ? AND ?'] * len(query.years))})")
        values += [year for span in query.years for year in span]
    return " AND ".join(parts) or "true", values


def _listed(connection: sqlite3.Connection, query: Query) -> tuple[list[int], int, bool]:
    """The newest papers that pass the filters."""
    if not query.filtered and not query.excluded:
        return [], 0, False
    limits, values = condition(query)
    order = "year DESC, day DESC" if query.years else "day DESC"
    rows = connection.execute(
        f"SELECT id FROM paper WHERE {limits} ORDER BY {order}, source_upvotes DESC, id LIMIT ?",
        (*values, RANKED + 1),
    )
    ids = [row[0] for row in rows.fetchall()]
    return ids, min(len(ids), RANKED), len(ids) > RANKED


def _by_meaning(connection: sqlite3.Connection, query: Query, meaning: Meaning, notes: list[str]) -> list[int]:
    """The papers nearest in meaning to the words, within the filters, with each phrase and without what is excluded."""
    vector = meaning.of_query(query.plain)
    if vector is None:
        if meaning.note:
            notes.append(meaning.note)
        return []
    among: list[int] | None = None
    k = NEAREST
    if query.filtered:
        limits, values = _limits(query)
        rows = connection.execute(f"SELECT id FROM paper WHERE {limits} LIMIT ?", (*values, FEW + 1)).fetchall()
        among, k = ([row[0] for row in rows], k) if len(rows) <= FEW else (None, 10 * NEAREST)
    ranked = meaning.nearest(connection, vector, k, among)
    near = [paper for paper, cosine in ranked if cosine >= max(FLOOR, SHARE * ranked[0][1])]
    ids = json.dumps(near)
    if query.filtered and among is None:
        rows = connection.execute(
            f"SELECT id FROM paper WHERE {limits} AND id IN (SELECT value FROM json_each(?))", (*values, ids)
        ).fetchall()
        near = _only(near, rows)
    inside = "SELECT rowid FROM words WHERE words MATCH ? AND rowid IN (SELECT value FROM json_each(?))"
    if phrases := [term.match for term in query.terms if term.kind == "phrase"]:
        near = _only(near, connection.execute(inside, (" ".join(phrases), ids)).fetchall())
    if query.excluded:
        out = {row[0] for row in connection.execute(inside, (fts(query.excluded, " OR "), ids))}
        near = [paper for paper in near if paper not in out]
    return near[:NEAREST]


def _only(ids: list[int], rows: list[sqlite3.Row]) -> list[int]:
    there = {row[0] for row in rows}
    return [paper for paper in ids if paper in there]


def _alike(connection: sqlite3.Connection, paper_id: int, limit: int) -> list[int]:
    """The papers that share the rarest words of one."""
    row = connection.execute("SELECT title, summary, abstract FROM paper WHERE id = ?", (paper_id,)).fetchone()
    if row is None:
        return []
    text = f"{row['title']} {row['summary'] or ''} {row['abstract'] or ''}".casefold()
    words = list(dict.fromkeys(re.findall(r"[^\W\d_]{4,}", text)))[:_WORDS_WEIGHED]
    count = {
        term: connection.execute(
            "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)", (term.match, _COMMON)
        ).fetchone()[0]
        for term in (Term(word, "word") for word in words)
    }
    rare = sorted((term for term in count if 1 < count[term] < _COMMON), key=count.__getitem__)[:_RAREST]
    if not rare:  # in a small collection every word may be common
        rare = sorted((term for term in count if count[term] > 1), key=count.__getitem__)[:_RAREST]
    if not rare:
        return []
    match = fts(rare, " OR ", "{title summary abstract}")
    return [paper for paper in _ranked(connection, match, limit=limit + 1) if paper != paper_id]


def _snippets(query: Query, page: list[Entry]) -> dict[int, list[tuple[str, bool]]]:
    """Where the words stand in our summary, else in the abstract, for those papers of a page where they do.

    The page is indexed by itself: to ask the index of all papers, row by row, would go through a common word's papers
    twenty times.
    """
    if not query.terms or not page:
        return {}
    with closing(sqlite3.connect(":memory:")) as small:
        small.execute(f"CREATE VIRTUAL TABLE page USING fts5 (summary, abstract, tokenize = '{TOKENIZER}')")
        small.executemany(
            "INSERT INTO page (rowid, summary, abstract) VALUES (?, ?, ?)",
            [(entry.id, entry.summary, entry.abstract) for entry in page],
        )
        cut = ", ".join(f"snippet(page, {column}, ?2, ?3, '…', {_PIECES})" for column in (0, 1))
        rows = small.execute(
            f"SELECT rowid, {cut} FROM page WHERE page MATCH ?1",
            (" OR ".join(term.match for term in query.terms), _BEGIN, _END),
        ).fetchall()
    marked = ((row[0], next((text for text in row[1:] if text and _BEGIN in text), None)) for row in rows)
    return {paper: _snipped(text) for paper, text in marked if text}


def _snipped(text: str) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    for part in re.split(f"({_BEGIN}[^{_END}]*{_END})", text):
        if part:
            pieces.append((part.strip(_BEGIN + _END), part.startswith(_BEGIN)))
    return pieces


def _opening(entry: Entry) -> list[tuple[str, bool]]:
    words = (entry.text or "").split(maxsplit=_PIECES)
    return [(" ".join(words[:_PIECES]) + ("…" if len(words) > _PIECES else ""), False)] if words else []
