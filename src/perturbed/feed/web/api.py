"""The same papers and findings as JSON, read only, for programs: typed, and described at ``/api/openapi.json``."""

from __future__ import annotations

import json
import re
from datetime import date
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Path as InPath
from pydantic import BaseModel, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response

from perturbed.feed import evidence, search, store
from perturbed.feed.store import Entry
from perturbed.feed.web.browse import found_paper
from perturbed.feed.web.pages import outside, unchanged
from perturbed.feed.web.security import SEARCHES, Refused
from perturbed.feed.web.security import limit as limited
from perturbed.feed.web.state import feed_of

Site = Literal["data", "inputs", "features", "weights", "objectives", "optim", "inference", "measures"]


class Trouble(BaseModel):
    """Why a request was not answered."""

    detail: str


class PaperOut(BaseModel):
    """A paper; what nobody told is null."""

    key: str = Field(description="Names the paper in addresses: its arXiv identifier, else a hash of its title")
    arxiv: str | None = Field(description="Identifier without version")
    slug: str | None = Field(description="Name in the catalogue")
    title: str
    summary: str | None = Field(description="In our own words")
    published: date | None
    listed: date | None = Field(description="Day on which a source listed it")
    year: int | None
    authors: int | None = Field(description="How many")
    author_names: list[str]
    organisation: str | None
    upvotes: int | None = Field(description="The source's")
    comments: int | None = Field(description="The source's count")
    sites: list[Site] = Field(description="Where it acts")
    verdict: str | None = Field(description="Of the newest registered evidence")
    has_method: bool = Field(description="Whether it can be run here")


class WholePaper(PaperOut):
    """A paper with what is too long for a list."""

    abstract: str | None
    updated: date | None
    tags: list[str]
    doi: str | None
    code_url: str | None
    project_url: str | None


class Papers(BaseModel):
    """A part of a list of papers."""

    total: int
    papers: list[PaperOut]


class Piece(BaseModel):
    """A piece of text; ``match`` says whether it was looked for."""

    text: str
    match: bool


class HitOut(BaseModel):
    """A paper that was found, and where."""

    paper: PaperOut
    snippet: list[Piece]


class FoundOut(BaseModel):
    """What a search found."""

    total: int = Field(description="Of the papers found; at the most that are counted where there are more")
    note: str | None = Field(description="What the search could not do, and why")
    hits: list[HitOut]


_TROUBLES: dict[int | str, dict[str, Any]] = {
    304: {"description": "Not changed since the ETag told"},
    429: {"model": Trouble, "description": "Too many requests; Retry-After says how long to wait"},
}
_MISSING: dict[int | str, dict[str, Any]] = {404: {"model": Trouble, "description": "There is none"}}
_UNFIT: dict[int | str, dict[str, Any]] = {422: {"model": Trouble, "description": "A parameter was not understood"}}

router = APIRouter(prefix="/api", tags=["papers"], responses={**_TROUBLES, **_UNFIT})


def _as(form: str, example: str) -> BeforeValidator:
    """Text of one form only: left to itself pydantic takes ``0.0`` for a day and ``+1_0`` for a number."""

    def checked(told: Any) -> Any:
        if isinstance(told, str) and not re.fullmatch(form, told):
            raise ValueError(f"write it as {example}")
        return told

    return BeforeValidator(checked)


Number = Annotated[int, _as("0|-?[1-9][0-9]*", "50")]
Day = Annotated[date, _as("[0-9]{4}-[0-9]{2}-[0-9]{2}", "2025-11-17")]
Limit = Annotated[Number, Query(ge=1, le=100)]
Offset = Annotated[Number, Query(ge=0, le=10_000_000)]


@router.get("/papers", response_model=Papers)
def papers(
    request: Request,
    first: Annotated[Day | None, Query(description="Listed or published on this day or later")] = None,
    last: Annotated[Day | None, Query(description="On this day or earlier")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> Response:
    """Papers by day, the newest first; without days also those whose day nobody told."""
    connection = feed_of(request).database.read()
    if first or last:
        days = (first or date.min, last or date.max)
        found = store.between(connection, *days, limit, offset)
        total = store.count_between(connection, *days)
    else:
        rows = connection.execute(
            "SELECT id FROM paper ORDER BY day DESC, source_upvotes DESC, id LIMIT ? OFFSET ?", (limit, offset)
        )
        found = store.entries(connection, [row[0] for row in rows.fetchall()])
        total = connection.execute("SELECT count(*) FROM paper").fetchone()[0]
    return _told(request, Papers(total=total, papers=[PaperOut(**_paper(entry)) for entry in found]))


@router.get("/papers/{key:path}", response_model=WholePaper, responses=_MISSING)
def paper(request: Request, key: Annotated[str, InPath(description="Key, arXiv identifier or slug")]) -> Response:
    """One paper."""
    entry = found_paper(request, key)
    told = _paper(entry) | {name: getattr(entry, name) for name in ("abstract", "updated", "tags", "doi")}
    told |= {name: outside(getattr(entry, name)) for name in ("code_url", "project_url")}
    return _told(request, WholePaper(**told))


@router.get("/search", response_model=FoundOut)
def find(
    request: Request,
    q: Annotated[str, Query(max_length=1000, description='Words, "phrases", begin*, -without, site:, verdict:, year:')],
    limit: Limit = 20,
    offset: Annotated[Number, Query(ge=0, le=10_000)] = 0,
) -> Response:
    """Papers by words and by meaning, the best first."""
    limited(request, "search", SEARCHES, 60)
    feed = feed_of(request)
    found = search.search(feed.database.read(), q, limit=limit, offset=offset, meaning=feed.meaning)
    hits = [
        HitOut(paper=PaperOut(**_paper(hit.entry)), snippet=[Piece(text=t, match=m) for t, m in hit.snippet])
        for hit in found.hits
    ]
    return _told(request, FoundOut(total=found.total, note=found.note, hits=hits))


@router.get("/evidence/{slug}", response_model=dict[str, Any], responses=_MISSING)
def one_evidence(request: Request, slug: str) -> Response:
    """What was measured of a paper: the newest registered record, judged from its raw scores."""
    found = evidence.evidence(slug)
    if found is None:
        raise Refused(404, "No evidence", f"Nothing was measured of {slug!r} here.")
    return _told(request, found.as_json())


def _paper(entry: Entry) -> dict[str, Any]:
    same = ("key", "arxiv", "slug", "title", "summary", "published", "listed", "year", "organisation", "sites")
    return {
        **{name: getattr(entry, name) for name in (*same, "verdict", "has_method")},
        "authors": entry.author_count,
        "author_names": entry.people,
        "upvotes": entry.source_upvotes,
        "comments": entry.source_comments,
    }


def _told(request: Request, answer: BaseModel | dict[str, Any]) -> Response:
    """The answer as JSON, or that it is as the asker has it already."""
    plain = answer.model_dump_json() if isinstance(answer, BaseModel) else json.dumps(answer, ensure_ascii=False)
    return unchanged(request, plain, "application/json")
