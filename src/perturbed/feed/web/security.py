"""Who may do what, and what is refused before a page is even looked for.

The owner is who has opened ``/owner?token=…`` with the token of this start: a cookie then holds when that was and an
HMAC of it under a key made from the token, so that nothing is stored and a restart ends every session. A form that
changes something must come from a page of this server (``Sec-Fetch-Site``, else ``Origin``) and, in the owner's
session, carry a token bound to that session. What says neither is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import secrets
import threading
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perturbed.feed.web.settings import Settings
from perturbed.feed.web.state import feed_of

SESSION_SECONDS = 7 * 86400
SMALL_BODY, IMPORT_BODY = 64 * 2**10, 20 * 2**20 + 64 * 2**10  # bytes; an imported file may have 20 MiB
BODY_SECONDS = 60
GETS, POSTS, SEARCHES = 900, 60, 240  # a minute and an address
ONE_CLICKS = 600  # as a large provider posts for many people from few addresses
ONE_CLICK = "/unsubscribe/one-click/"  # RFC 8058: a mail program posts here, from no page of ours
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})

CONTENT_POLICY = (
    "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'; img-src 'self' data:; "
    "object-src 'none'"
)
FIGURE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A request that is not answered as asked: shown as a page (or JSON) that says why and what to do.

    Args:
        status: HTTP status.
        title: What is wrong, in a few words.
        text: Why, and what to do.
        headers: Of the answer.
    """

    def __init__(self, status: int, title: str, text: str, headers: dict[str, str] | None = None):
        super().__init__(title)
        self.status, self.title, self.text, self.headers = status, title, text, headers or {}


# --- the owner ---------------------------------------------------------------------------------------------------


def cookie_name(settings: Settings) -> str:
    """One for each port, since browsers share cookies among the servers of one machine."""
    return f"perturbed-owner-{settings.port}"


def new_session(settings: Settings, now: float) -> str:
    """The value of the owner's cookie: when it ends, something random, and the seal over both."""
    told = f"{int(now) + SESSION_SECONDS}.{secrets.token_urlsafe(12)}"
    return f"{told}.{_seal(settings, 'session', told)}"


def session_of(request: Request) -> str | None:
    """The owner's session that a request carries, or None: none, not ours, or ended."""
    feed = feed_of(request)
    value = request.cookies.get(cookie_name(feed.settings), "")
    told, _, seal = value.rpartition(".")
    if not hmac.compare_digest(seal.encode(), _seal(feed.settings, "session", told).encode()):
        return None
    if value in request.app.state.ended:
        return None
    return value if float(told.partition(".")[0]) > feed.clock() else None


def is_owner(request: Request) -> bool:
    """Whether the request is the owner's."""
    return session_of(request) is not None


def owner(request: Request) -> None:
    """Dependency of what only the owner may see or do.

    Raises:
        Refused: 403, for anybody else.
    """
    if not is_owner(request):
        raise Refused(
            403,
            "This is the owner's",
            "Who started this server may do that: open the address with the token that `perturbed serve` printed.",
        )


def can_subscribe(request: Request) -> bool:
    """Whether it is the owner's, or a visitor's of a feed that has a public address."""
    return feed_of(request).settings.public_url is not None or is_owner(request)


def may_subscribe(request: Request) -> None:
    """Dependency of the subscription pages.

    Raises:
        Refused: 403, for other users of the machine where the feed is on loopback only.
    """
    if not can_subscribe(request):
        owner(request)


def is_token(settings: Settings, told: str) -> bool:
    """Whether this is the owner's token, in a time that does not tell how much of it is right."""
    digests = (hashlib.sha256(x.encode()).digest() for x in (told, settings.owner_token))
    return hmac.compare_digest(*digests)


def csrf_token(request: Request) -> str:
    """What the owner's forms carry; empty for visitors, who have no session to abuse."""
    session = session_of(request)
    return _seal(feed_of(request).settings, "form", session) if session else ""


def _seal(settings: Settings, purpose: str, told: str) -> str:
    key = hmac.digest(settings.owner_token.encode(), b"perturbed feed " + purpose.encode(), "sha256")
    return hmac.new(key, told.encode(), "sha256").hexdigest()


# --- how often ---------------------------------------------------------------------------------------------------


class Limiter:
    """Counts of what each address did, in windows that begin with the first of it.

    Args:
        clock: Seconds.
        most: Addresses kept; beyond, those whose window is over are forgotten, then all.
    """

    def __init__(self, clock: Callable[[], float], most: int = 20_000):
        self._clock, self._most, self._lock = clock, most, threading.Lock()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}  # until when, and how many

    def wait(self, name: str, address: str, per: int, seconds: float) -> float:
        """Count one; return how many seconds are left to wait: 0 while no more than ``per`` came."""
        now = self._clock()
        with self._lock:
            until, count = self._seen.get((name, address), (now + seconds, 0))
            if not now < until <= now + seconds:  # it is over, or the clock was set back
                until, count = now + seconds, 0
            self._seen[name, address] = (until, count + 1)
            if len(self._seen) > self._most:
                self._seen = {key: seen for key, seen in self._seen.items() if seen[0] > now}
                if len(self._seen) > self._most:
                    self._seen.clear()
        return 0.0 if count < per else until - now


def limit(request: Request, name: str, per: int, seconds: float) -> None:
    """Let an address do something ``per`` times in so many seconds.

    The owner counts apart: what others on this machine do, or a page of another site in the owner's own browser, must
    not lock the owner out.

    Raises:
        Refused: 429, with the time to wait.
    """
    limiter: Limiter = request.app.state.limiter
    wait = limiter.wait(name, "owner" if is_owner(request) else client_address(request), per, seconds)
    if wait:
        raise too_many(wait)


def too_many(wait: float) -> Refused:
    """The refusal of who asks too often."""
    whole = max(1, round(wait))
    said = f"{whole} s" if whole < 100 else f"{-(-whole // 60)} minutes"
    return Refused(429, "Too many requests", f"Try again in {said}.", {"Retry-After": str(whole)})


def no_room(error: OSError) -> Refused:
    """The refusal of what cannot be kept while it is read."""
    why = f"What you sent could not be kept while it was read ({error.strerror}): make room for temporary files."
    return Refused(507, "No room", why)


def client_address(request: Request) -> str:
    """Who asks: the peer, or where that is a trusted proxy, the nearest address before it that is none.

    An IPv6 address stands for its /64, which one household has whole.
    """
    trusted = [ipaddress.ip_network(proxy) for proxy in feed_of(request).settings.trusted_proxies]
    peer = request.client.host if request.client else ""
    told = [part.strip() for value in request.headers.getlist("x-forwarded-for") for part in value.split(",")]
    address = _parsed(peer)
    while told and address is not None and any(address in network for network in trusted):
        before = _parsed(told.pop())
        if before is None:
            break
        address = before
    if address is None:
        return peer
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found  # as IPv4 comes to a socket of IPv6


# --- before the pages --------------------------------------------------------------------------------------------


class Headed:
    """Puts the security headers on every answer that does not set its own."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, headed if scope["type"] == "http" else send)


class KnownHost:
    """Answers only to the server's own names, so that no other site's name can be pointed here (DNS rebinding)."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or Headers(scope=scope).get("host", "").lower() in self.settings.hosts:
            await self.app(scope, receive, send)
        else:
            told = f"This server does not go by that name. Its address is {self.settings.base}/\n"
            await PlainTextResponse(told, status_code=421)(scope, receive, send)


class Guard:
    """Limits by address; of what changes something, also size, origin and the owner's form token."""

    def __init__(self, app: ASGIApp, refuse: Callable[[Request, Refused], Response]):
        self.app, self.refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        try:
            _limit_all(request)
            if request.method not in SAFE:
                receive = await checked(request)
        except Refused as refusal:
            return await self.refuse(request, refusal)(scope, receive, send)
        except ClientDisconnect:
            return None
        await self.app(scope, receive, send)


def _limit_all(request: Request) -> None:
    if request.method in SAFE:
        if request.url.path != "/owner":  # which limits itself, so that nobody can use up the owner's opening
            limit(request, "get", GETS, 60)
    elif request.url.path.startswith(ONE_CLICK):
        limit(request, "one-click", ONE_CLICKS, 60)
    elif request.url.path != "/owner":
        limit(request, "post", POSTS, 60)


async def checked(request: Request) -> Receive:
    """Check a request that would change something; return what gives its body again.

    Raises:
        Refused: It does not come from a page of this server, lacks the token of the owner's session, or is too large.
    """
    one_click = request.url.path.startswith(ONE_CLICK)
    if not one_click:
        _check_origin(request)
    body = await _body(request)
    if not one_click and (wanted := csrf_token(request)):
        # A request of its own, so that the page can still read the form.
        try:
            form = await Request(request.scope, _replay(body)).form()
        except HTTPException as e:
            raise Refused(400, "Not understood", f"The form could not be read: {e.detail}") from e
        except OSError as e:  # of the temporary file that a large one goes to
            raise no_room(e) from e
        told = request.headers.get("x-csrf-token") or form.get("csrf")
        await form.close()
        if not isinstance(told, str) or not hmac.compare_digest(told.encode(), wanted.encode()):
            raise _foreign("its form was made for another session")
    return _replay(body)


def _check_origin(request: Request) -> None:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    # Under our Referrer-Policy browsers send "Origin: null" even from our own pages; Sec-Fetch-Site then says whose.
    ours = origin in feed_of(request).settings.origins
    if site is not None and (site != "same-origin" or (origin not in (None, "null") and not ours)):
        raise _foreign("it came from a page of another site")
    if site is None and not ours:
        raise _foreign("the browser did not say that it came from a page of this server")


def _foreign(why: str) -> Refused:
    return Refused(403, "Not accepted", f"Nothing was changed: {why}. Load the page again and repeat it there.")


async def _body(request: Request) -> bytes:
    large = request.url.path == "/import" and is_owner(request)
    most, body = IMPORT_BODY if large else SMALL_BODY, bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    size = f"{most // 2**20} MiB" if large else f"{most // 2**10} KiB"
                    raise Refused(413, "Too large", f"At most {size} are read here.", {"Connection": "close"})
    except TimeoutError as e:
        raise Refused(408, "Too slow", "The request did not arrive in time.", {"Connection": "close"}) from e
    return bytes(body)


def _replay(body: bytes) -> Receive:
    sent = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive
