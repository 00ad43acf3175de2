"""The web application: the parts of the feed, the guards before them, and the pages behind."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import PurePosixPath

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perturbed.feed import catalogue, subscriptions, verdicts
from perturbed.feed.database import Database, DatabaseError, damaged
from perturbed.feed.meaning import Meaning
from perturbed.feed.runs import Runs
from perturbed.feed.web import api, browse, feeds, owner, subscribe
from perturbed.feed.web.pages import refusal, static_file
from perturbed.feed.web.security import Guard, Headed, KnownHost, Limiter, Refused, is_owner
from perturbed.feed.web.settings import Settings
from perturbed.feed.web.state import Feed

_LOG = logging.getLogger("perturbed.feed")
_EVERY = 10.0  # seconds between two looks at the ledgers
_BATCH = 32  # papers embedded at once
_REMEDIES = {  # by SQLite's code: what is no defect of ours
    sqlite3.SQLITE_FULL: "Make room on the disk, then repeat it.",
    sqlite3.SQLITE_IOERR: "See whether the disk has room and is well, then repeat it.",
    sqlite3.SQLITE_READONLY: "Give the user who started the server the right to write it, then repeat it.",
    sqlite3.SQLITE_CANTOPEN: "See whether it is still in its place, then stop the server and start it again.",
    sqlite3.SQLITE_BUSY: "Another process writes to it; repeat it in a moment.",
}


def create_app(settings: Settings, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """The application over the database of `settings`, which is made and given the catalogue where it is new.

    Args:
        settings: Of the server.
        clock: Seconds since 1970.

    Raises:
        DatabaseError: The database cannot be used.
    """
    database = Database(settings.database)
    catalogue.seed(database, clock())
    verdicts.sync(database, clock())
    app = FastAPI(
        title="perturbed feed",
        description="The papers, what was measured of each, and search over them. Read only.",
        version=version("perturbed"),
        openapi_url="/api/openapi.json",
        docs_url=None,  # they load third-party script
        redoc_url=None,
        redirect_slashes=False,  # it would name the host of the request
        lifespan=_lifespan,
        middleware=[
            Middleware(HeadAsGet),
            Middleware(Headed),
            Middleware(KnownHost, settings=settings),
            Middleware(Caught),
            Middleware(Guard, refuse=refusal),
        ],
    )
    app.state.feed = Feed(
        database=database, meaning=Meaning(database), runs=Runs(database), settings=settings, clock=clock
    )
    app.state.limiter = Limiter(clock)
    app.state.ended = set()  # the owner's sessions that were ended before their time
    for part in (browse.router, owner.router, subscribe.router, feeds.router):
        app.include_router(part, include_in_schema=False)
    app.include_router(api.router)
    app.add_api_route("/static/{name}", _static, include_in_schema=False)
    answers = ((Refused, _refused), (HTTPException, _http_error), (RequestValidationError, _unfit))
    for error, answer in (*answers, (DatabaseError, _unusable), (sqlite3.Error, _unusable)):
        app.add_exception_handler(error, answer)
    return app


class HeadAsGet:
    """Answers HEAD wherever GET is answered; the server under us leaves the body out."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


class Caught:
    """Answers for a page that failed with a page, headed as every other, and one entry in the log."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        begun = False

        async def told(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, told)
        except Exception:
            if scope["type"] != "http" or begun:
                raise
            _LOG.exception("%s %s failed", scope["method"], PurePosixPath(scope["path"]).parts[:2])
            failed = Refused(
                500,
                "This page failed",
                "That is a defect of perturbed, and the terminal in which it was started shows where. "
                "Other pages go on working; if none does, stop the server and start it again.",
            )
            await refusal(Request(scope), failed)(scope, receive, send)


def _static(name: str) -> Response:
    found = static_file(name)
    if found is None:
        raise HTTPException(404)
    content, kind, tag = found
    return Response(
        content, media_type=kind, headers={"ETag": f'"{tag}"', "Cache-Control": "public, max-age=31536000, immutable"}
    )


# --- refusals ----------------------------------------------------------------------------------------------------


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return refusal(request, error)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {
        404: Refused(404, "There is no such page", "Look for the paper by its title, its words or its meaning."),
        405: Refused(405, "Not this way", "This address takes another kind of request.", dict(error.headers or {})),
    }
    return refusal(request, told.get(error.status_code) or Refused(error.status_code, "Not possible", error.detail))


def _unfit(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    text = "; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())
    return refusal(request, Refused(422 if request.url.path.startswith("/api/") else 400, "Not understood", text))


def _unusable(request: Request, error: Exception) -> Response:
    """Where the database cannot be used, the owner learns why; any other error of SQLite is a defect of ours."""
    told = _trouble(request.app.state.feed, error)
    if told is None:
        raise error
    _LOG.warning("a page could not be shown: %s", told)
    text = "Its owner finds the reason in the terminal; try again later."
    return refusal(request, Refused(503, "The database cannot be used", told if is_owner(request) else text))


def _trouble(feed: Feed, error: Exception) -> str | None:
    """What is wrong with the database and what to do, or None where the error is not about that."""
    path = feed.settings.database
    if not isinstance(error, sqlite3.Error):
        return f"{error}." if isinstance(error, DatabaseError) else None
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return f"{damaged(path, error)}."
    return f"{path}: {error}. {_REMEDIES[code]}" if code in _REMEDIES else None


# --- beside the pages --------------------------------------------------------------------------------------------


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    feed: Feed = app.state.feed
    feed.runs.start()
    tending = asyncio.create_task(_tend(feed))
    try:
        yield
    finally:
        tending.cancel()
        await asyncio.gather(tending, return_exceptions=True)
        await asyncio.to_thread(feed.runs.stop)
        feed.meaning.close()


async def _tend(feed: Feed) -> None:
    """Keep what pages show of the ledgers fresh, forget who never confirmed, and embed new papers."""
    said = None
    while True:
        try:
            await asyncio.to_thread(verdicts.sync, feed.database, feed.clock())
            await asyncio.to_thread(subscriptions.forget_unanswered, feed.database, feed.clock())
            while await asyncio.to_thread(feed.meaning.embed_missing, _BATCH):
                await asyncio.sleep(0.1)
            said = None
        except Exception as e:
            told = _trouble(feed, e)
            if told is None:
                _LOG.exception("evidence, subscribers or meaning could not be brought up to date; it is tried again")
            elif told != said:  # once, not every ten seconds
                _LOG.warning("evidence and meaning wait: %s", told)
            said = told
        await asyncio.sleep(_EVERY)
