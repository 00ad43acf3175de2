"""Subscribing by mail: the form, the page that confirms, the page that ends it, and the mail program's one click.

What the form answers depends on what was typed alone: whether the address is known is looked up, and mail sent, only
once the answer is out, so that neither its bytes nor its time tell.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Depends
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from perturbed.errors import PerturbedError
from perturbed.feed import mail, subscriptions
from perturbed.feed.mail import MailError, Server
from perturbed.feed.papers import SITES
from perturbed.feed.subscriptions import Every, Subscription, SubscriptionError, Wants
from perturbed.feed.web.pages import page
from perturbed.feed.web.security import Refused, limit, may_subscribe
from perturbed.feed.web.state import Feed, feed_of

router = APIRouter()
MAY_SUBSCRIBE = [Depends(may_subscribe)]
_LOG = logging.getLogger("perturbed.feed")


@router.get("/subscribe", dependencies=MAY_SUBSCRIBE)
def form(request: Request) -> Response:
    """The form."""
    return _form(
        request, {"query": request.query_params.get("q", "")[: subscriptions.QUERY_LENGTH], "sites": (), "every": "day"}
    )


@router.post("/subscribe", dependencies=MAY_SUBSCRIBE)
async def asked(request: Request) -> Response:
    """Take a wish, and say the same to everybody; the rest happens afterwards."""
    limit(request, "subscribe", 10, 3600)
    async with request.form(max_files=0) as told:
        filled: dict[str, Any] = {
            "email": told.get("email", ""),
            "query": told.get("query", ""),
            "sites": tuple(told.getlist("site")),
            "every": told.get("every", ""),
            "papers": "papers" in told,
            "evidence": "evidence" in told,
        }
    to = _server()
    if to is None:
        return _form(request, filled, status=503)
    try:
        address = subscriptions.normalised(filled["email"])
        every = _every(filled["every"])
        wants = Wants(
            query=filled["query"], sites=filled["sites"], papers=filled["papers"], evidence=filled["evidence"]
        )
        subscriptions.check_topic(wants)
    except SubscriptionError as e:
        return _form(request, filled, status=400, wrong=str(e))
    answer = page(request, "subscribe_asked.html", wants=wants.in_words(), often=subscriptions.OFTEN[every])
    answer.background = BackgroundTask(_invite, feed_of(request), address, wants, every, to)
    return answer


@router.get("/confirm/{token}")
def may_confirm(request: Request, token: str) -> Response:
    """The button; whatever opens the link (a mail scanner, a preview) has confirmed nothing yet."""
    limit(request, "token", 60, 60)
    feed = feed_of(request)
    found = subscriptions.look(feed.database, token, "confirm", feed.clock())
    if found is None:
        raise _spent()
    return _confirm(request, token, found, done=False)


@router.post("/confirm/{token}")
def confirmed(request: Request, token: str) -> Response:
    """Put it into force."""
    limit(request, "token", 60, 60)
    feed = feed_of(request)
    found = subscriptions.confirm(feed.database, token, feed.clock())
    if found is None:
        raise _spent()
    return _confirm(request, token, found, done=True)


# A mail program that does not know one-click opens its address in a browser: it gets the button too.
@router.get("/unsubscribe/one-click/{token}")
@router.get("/unsubscribe/{token}")
def may_unsubscribe(request: Request, token: str) -> Response:
    """The button."""
    limit(request, "token", 60, 60)
    feed = feed_of(request)
    if subscriptions.look(feed.database, token, "unsubscribe", feed.clock()) is None:
        raise _unknown()
    return page(request, "unsubscribe.html", done=False, token=token)


@router.post("/unsubscribe/{token}")
def unsubscribed(request: Request, token: str) -> Response:
    """End it."""
    limit(request, "token", 60, 60)
    if not subscriptions.unsubscribe(feed_of(request).database, token):
        raise _unknown()
    return page(request, "unsubscribe.html", done=True, token=token)


@router.post("/unsubscribe/one-click/{token}")
async def one_click(request: Request, token: str) -> Response:
    """End it at a mail program's request (RFC 8058): from no page of ours, without cookies, without a redirect."""
    try:
        async with request.form(max_files=0) as told:
            said = told.get("List-Unsubscribe")
    except HTTPException:  # no form
        said = None
    if said != "One-Click":
        return PlainTextResponse("Nothing was changed: the body must be List-Unsubscribe=One-Click\n", 400)
    if not subscriptions.unsubscribe(feed_of(request).database, token):
        return PlainTextResponse("Nothing was changed: this address ends no subscription\n", 404)
    return PlainTextResponse("Unsubscribed\n")


def _confirm(request: Request, token: str, found: Subscription, *, done: bool) -> Response:
    wants, often = found.wants.in_words(), subscriptions.OFTEN[found.every]
    return page(request, "confirm.html", done=done, token=token, wants=wants, often=often)


def _invite(feed: Feed, address: str, wants: Wants, every: Every, to: Server) -> None:
    try:
        fate = subscriptions.invite(feed.database, address, wants, every, feed.clock(), to=to, base=feed.settings.base)
    except PerturbedError as e:
        _LOG.warning("a confirmation could not be mailed: %s", e)
    else:
        if fate not in (None, "sent"):
            _LOG.warning("a confirmation could not be mailed: the mail server says %s", fate)


def _form(request: Request, filled: dict[str, Any], *, status: int = 200, wrong: str | None = None) -> Response:
    filled = {"email": "", "papers": True, "evidence": True, **filled}
    return page(
        request,
        "subscribe.html",
        status=status,
        filled=filled,
        wrong=wrong,
        sites=SITES,
        mail=_server() is not None,
        longest=subscriptions.QUERY_LENGTH,
    )


def _server() -> Server | None:
    try:
        return mail.server()
    except MailError as e:
        _LOG.warning("no mail can be sent: %s", e)
        return None


def _every(text: str) -> Every:
    if text == "day":
        return "day"
    if text == "week":
        return "week"
    raise SubscriptionError("choose whether it shall come every day or every week")


def _spent() -> Refused:
    return Refused(
        404,
        "This link does not confirm anything",
        "It was used, or is older than two days, or a later one took its place. If mail already comes, all is well; "
        "else ask again on the page Subscribe.",
    )


def _unknown() -> Refused:
    return Refused(
        404,
        "This link does not end any subscription",
        "Take the whole link from a digest: a mail program may have cut it off at the end of a line.",
    )
