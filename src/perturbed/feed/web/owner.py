"""What the owner does: opens a session, upvotes, comments, runs studies, imports, looks after refused addresses.

Everything that changes something is a POST.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Depends, Form, HTTPException, UploadFile
from fastapi import Path as InPath
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from perturbed.errors import PerturbedError
from perturbed.evidence.figures import sparkline
from perturbed.evidence.report import page_values
from perturbed.feed import store, subscriptions
from perturbed.feed.importers.harvest import import_file
from perturbed.feed.papers import paper_path
from perturbed.feed.runs import Run, RunError
from perturbed.feed.web.browse import VOTER, found_paper
from perturbed.feed.web.pages import page
from perturbed.feed.web.security import (
    GETS,
    IMPORT_BODY,
    SESSION_SECONDS,
    Refused,
    cookie_name,
    is_token,
    limit,
    new_session,
    no_room,
    owner,
    session_of,
)
from perturbed.feed.web.state import Feed, feed_of

router = APIRouter()
OWNER = [Depends(owner)]
Row = Annotated[int, InPath(ge=1, lt=2**63)]  # what SQLite takes for a row's number
_HERE = re.compile(r"/(?![/\\])[^\s\\#]*")


# --- the session -------------------------------------------------------------------------------------------------


@router.get("/owner")
def open_session(request: Request, token: str = "") -> Response:
    """Open the owner's session, with the token of this start; without one, ask for it."""
    if token:
        return _opened(request, token)
    limit(request, "get", GETS, 60)
    return page(request, "owner.html")


@router.post("/owner")
def open_session_by_form(request: Request, token: Annotated[str, Form()] = "") -> Response:
    """The same with the token in a form, which no proxy writes down."""
    return _opened(request, token.strip())


def _opened(request: Request, token: str) -> Response:
    feed = feed_of(request)
    if not is_token(feed.settings, token):
        limit(request, "owner", 10, 60)  # wrong ones alone: nobody can use up the owner's
        raise Refused(
            403,
            "Not the token of this server",
            "It is made anew at each start: use the address that `perturbed serve` printed last.",
        )
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        cookie_name(feed.settings),
        new_session(feed.settings, feed.clock()),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=feed.settings.public_url is not None,
    )
    return answer


@router.post("/owner/end", dependencies=OWNER)
def end_session(request: Request) -> Response:
    """End the session, also for whoever has come by a copy of its cookie."""
    request.app.state.ended.add(session_of(request))
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(cookie_name(feed_of(request).settings), httponly=True, samesite="strict")
    return answer


# --- upvotes and comments ----------------------------------------------------------------------------------------


@router.post("/papers/{key:path}/vote", dependencies=OWNER)
def vote(request: Request, key: str, undo: Annotated[str, Form()] = "", back: Annotated[str, Form()] = "") -> Response:
    """Upvote a paper, or take that back."""
    feed, entry = feed_of(request), found_paper(request, key)
    with feed.database.write() as connection:
        if undo:
            store.unvote(connection, entry.id, VOTER)
        else:
            store.vote(connection, entry.id, VOTER, feed.clock())
    if "application/json" in request.headers.get("accept", ""):
        return JSONResponse({"voted": not undo})
    return RedirectResponse(f"{back}#p{entry.id}" if _HERE.fullmatch(back) else paper_path(entry.key), 303)


@router.post("/papers/{key:path}/comments", dependencies=OWNER)
def comment(request: Request, key: str, body: Annotated[str, Form(max_length=5000)] = "") -> Response:
    """Comment on a paper, in plain text."""
    feed, entry = feed_of(request), found_paper(request, key)
    try:
        with feed.database.write() as connection:
            store.comment(connection, entry.id, VOTER, body, feed.clock())
    except ValueError as e:
        raise Refused(400, "An empty comment", "Write something, then send it again.") from e
    return RedirectResponse(f"{paper_path(entry.key)}#comments", 303)


@router.post("/papers/{key:path}/comments/{number}/delete", dependencies=OWNER)
def uncomment(request: Request, key: str, number: Row) -> Response:
    """Delete an own comment; that it is gone already is no mistake."""
    feed, entry = feed_of(request), found_paper(request, key)
    with feed.database.write() as connection:
        store.uncomment(connection, entry.id, VOTER, number)
    return RedirectResponse(f"{paper_path(entry.key)}#comments", 303)


# --- runs --------------------------------------------------------------------------------------------------------


async def form_of(request: Request) -> FormData:
    """The form that was sent, for fields whose names only the card knows."""
    return await request.form(max_files=0, max_fields=50)


@router.post("/runs", dependencies=OWNER)
def run(request: Request, form: Annotated[FormData, Depends(form_of)]) -> Response:
    """Queue a study."""
    limit(request, "run", 20, 60)
    slug, scale = str(form.get("slug", "")), str(form.get("scale", ""))
    told = {name.removeprefix("set."): str(v) for name, v in form.items() if name.startswith("set.") and str(v).strip()}
    try:
        number = feed_of(request).runs.ask(slug, scale, {name: _number(name, value) for name, value in told.items()})
    except PerturbedError as e:
        raise Refused(400, "Not run", f"{e}.") from e
    return RedirectResponse(f"/runs/{number}", 303)


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as e:
        raise PerturbedError(f"{name} must be a number, not {text!r}") from e


@router.get("/runs")
def runs(request: Request) -> Response:
    """The studies that were run here, the newest first."""
    feed = feed_of(request)
    return page(
        request, "runs.html", runs=feed.runs.recent(50), isolation=feed.runs.isolation(), trouble=feed.runs.trouble
    )


@router.get("/runs/{number}")
def one_run(request: Request, number: int) -> Response:
    """One run: its progress while it goes on, then what came out."""
    feed = feed_of(request)
    found = _run(feed, number)
    return page(
        request,
        "run.html",
        run=found,
        trouble=feed.runs.trouble,
        entry=store.find(feed.database.read(), found.slug),
        result=page_values(found.record) if found.record else None,
        spark=sparkline(found.record) if found.record else None,
    )


@router.post("/runs/{number}/cancel", dependencies=OWNER)
def cancel(request: Request, number: int) -> Response:
    """Stop a run, or take it out of the queue."""
    feed = feed_of(request)
    feed.runs.cancel(_run(feed, number).id)
    return RedirectResponse(f"/runs/{number}", 303)


def _run(feed: Feed, number: int) -> Run:
    try:
        return feed.runs.get(number)
    except RunError as e:
        raise HTTPException(404) from e


# --- settings and import -----------------------------------------------------------------------------------------


@router.get("/settings", dependencies=OWNER)
def settings(request: Request) -> Response:
    """What the database holds, what was imported, how mail goes out."""
    feed = feed_of(request)
    connection = feed.database.read()
    tables = ("paper", "vector", "finding", "comment", "vote", "run")
    counts = {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    counts["subscriber"] = connection.execute("SELECT count(*) FROM subscriber WHERE state = 'confirmed'").fetchone()[0]
    imports = connection.execute("SELECT * FROM import ORDER BY id DESC LIMIT 10").fetchall()
    return page(
        request,
        "settings.html",
        settings=feed.settings,
        counts=counts,
        size=sum(p.stat().st_size for p in feed.settings.database.parent.glob(f"{feed.settings.database.name}*")),
        imports=[{**dict(row), "report": json.loads(row["report"]) if row["report"] else None} for row in imports],
        mail=os.environ.get("PERTURBED_SMTP"),
        suppressed=subscriptions.suppressed(connection),
        refused=subscriptions.counts(connection).get("suppressed", 0),
        most=IMPORT_BODY // 2**20,
    )


@router.post("/subscribers/again", dependencies=OWNER)
def allow_again(request: Request, address: Annotated[str, Form()] = "") -> Response:
    """Let an address be asked again that a mail server refused; that it may be already is no mistake."""
    try:
        subscriptions.allow_again(feed_of(request).database, address)
    except subscriptions.SubscriptionError as e:
        raise Refused(400, "No address", f"{e}.") from e
    return RedirectResponse("/settings#suppressed", 303)


@router.post("/import", dependencies=OWNER)
def take(request: Request, file: UploadFile, saved_on: Annotated[str, Form()] = "") -> Response:
    """Import a file that was saved from a page or an interface of papers."""
    limit(request, "import", 20, 60)
    feed = feed_of(request)
    content = file.file.read()
    # Its own name stays in the report; where it lies on this disk is chosen here.
    name = re.sub(r"[^\w.-]+", "-", PurePosixPath((file.filename or "file").replace("\\", "/")).name).strip(".-")
    try:
        with tempfile.TemporaryDirectory(prefix="perturbed-import-") as folder:
            path = Path(folder) / (name[:80] or "file")
            path.write_bytes(content)
            try:
                import_file(feed.database, path, saved_on=_day(saved_on), now=feed.clock())
            except PerturbedError as e:
                raise Refused(400, "Not imported", f"{e}.".replace(f"{folder}/", "")) from e
    except OSError as e:
        raise no_room(e) from e
    return RedirectResponse("/settings#imports", 303)


def _day(text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError as e:
        raise PerturbedError(f"the day of the save, {text[:40]!r}, is to be written as YYYY-MM-DD") from e
