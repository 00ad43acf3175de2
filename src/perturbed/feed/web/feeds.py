"""The Atom feeds: by day, of new evidence, of a topic, of a site."""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, date, datetime
from email.utils import format_datetime, parsedate_to_datetime
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from perturbed.feed import atom, store, topics
from perturbed.feed.atom import PAGE, Source
from perturbed.feed.papers import SITES, spaced
from perturbed.feed.web.pages import page as html_page
from perturbed.feed.web.security import Refused
from perturbed.feed.web.state import feed_of

router = APIRouter()
LONGEST = 500  # of a topic, as of a search
_METHODS = ["GET", "HEAD"]
Page = Annotated[int, Query(ge=1, le=1_000_000)]


@router.get("/feeds")
def listed(request: Request) -> Response:
    """What feeds there are."""
    return html_page(request, "feeds.html", base=feed_of(request).settings.base, sites=SITES)


@router.api_route("/feeds/days.atom", methods=_METHODS)
def days(request: Request, page: Page = 1) -> Response:
    """All papers, by the day on which they were listed or published."""
    feed = feed_of(request)
    connection, base = feed.database.read(), feed.settings.base
    found = store.between(connection, date.min, date.max, PAGE, (page - 1) * PAGE)
    return _answer(
        request,
        Source(
            name="feed/days",
            title="perturbed: papers by day",
            subtitle="Every paper, the newest day first, with what was measured of it.",
            path="/feeds/days.atom",
            page_path="/",
            items=atom.papers(connection, found, base),
            page=page,
            total=store.count_between(connection, date.min, date.max),
        ),
    )


@router.api_route("/feeds/evidence.atom", methods=_METHODS)
def evidence(request: Request, page: Page = 1) -> Response:
    """Verdicts, as they come and change."""
    feed = feed_of(request)
    connection, base = feed.database.read(), feed.settings.base
    return _answer(
        request,
        Source(
            name="feed/evidence",
            title="perturbed: new evidence",
            subtitle="What a paper’s claim came to when it was tried here; supported, null and contradicted alike.",
            path="/feeds/evidence.atom",
            page_path="/search?q=verdict:any",
            items=atom.findings(connection, PAGE, (page - 1) * PAGE, base),
            page=page,
            total=atom.count_findings(connection),
        ),
    )


@router.api_route("/feeds/topic.atom", methods=_METHODS)
def topic(request: Request, q: str = "", page: Page = 1) -> Response:
    """The papers that answer a search, the newest first."""
    asked = spaced("".join(c if c.isprintable() else " " for c in q))
    if not asked or len(asked) > LONGEST:
        raise Refused(400, "Which topic?", f"Put its words behind ?q=, at most {LONGEST} letters.")
    if why := topics.unclear(asked):
        raise Refused(400, "The topic is not clear", why)
    feed = feed_of(request)
    connection, base = feed.database.read(), feed.settings.base
    ids, total = topics.newest(connection, asked, PAGE, (page - 1) * PAGE)
    return _answer(
        request,
        Source(
            name=f"feed/topic/{_named(asked)}",
            title=f"perturbed: {asked}",
            subtitle=f"Papers that answer the search “{asked}”, the newest first.",
            path="/feeds/topic.atom",
            asked=(("q", asked),),
            page_path=f"/search?q={_named(asked)}",
            items=atom.papers(connection, store.entries(connection, ids), base),
            page=page,
            total=total,
        ),
    )


@router.api_route("/feeds/site/{site}.atom", methods=_METHODS)
def site(request: Request, site: str, page: Page = 1) -> Response:
    """The papers that act on a site, the newest first."""
    if site not in SITES:
        raise HTTPException(404)
    feed = feed_of(request)
    connection, base = feed.database.read(), feed.settings.base
    ids, total = topics.newest(connection, f"site:{site}", PAGE, (page - 1) * PAGE)
    return _answer(
        request,
        Source(
            name=f"feed/site/{site}",
            title=f"perturbed: papers that act on {site}",
            subtitle=f"Papers whose method changes a run at its {site}, the newest first.",
            path=f"/feeds/site/{site}.atom",
            page_path=f"/map#{site}",
            items=atom.papers(connection, store.entries(connection, ids), base),
            page=page,
            total=total,
        ),
    )


def _answer(request: Request, source: Source) -> Response:
    if source.page > source.pages:
        raise HTTPException(404)
    body = atom.document(source, feed_of(request).settings.base)
    changed = math.floor(source.updated)
    headers = {
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Last-Modified": format_datetime(datetime.fromtimestamp(changed, UTC), usegmt=True),
        "Cache-Control": "public, max-age=300",
    }
    if _known(request, headers["ETag"], changed):
        return Response(status_code=304, headers=headers)
    # The server leaves the body of an answer to HEAD out.
    return Response(body, headers=headers, media_type="application/atom+xml; charset=utf-8")


def _known(request: Request, tag: str, changed: int) -> bool:
    """Whether who asks has this already: by the tag, else by the time (RFC 9110, 13.2.2)."""
    tags = request.headers.get("if-none-match")
    if tags is not None:
        return tags.strip() == "*" or tag in {told.strip().removeprefix("W/") for told in tags.split(",")}
    try:
        return parsedate_to_datetime(request.headers.get("if-modified-since", "")).timestamp() >= changed
    except ValueError:
        return False


def _named(topic: str) -> str:
    return quote(topic, safe="")
