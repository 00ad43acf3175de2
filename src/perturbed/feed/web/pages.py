"""Pages: every one is a template rendered here, so that escaping and the owner's forms are settled in one place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from perturbed.evidence.figures import palette_css
from perturbed.evidence.report import STYLE, kind_of
from perturbed.feed.web.security import Refused, can_subscribe, csrf_token, is_owner
from perturbed.feed.web.state import feed_of

HERE = Path(__file__).parent
CUT = " …"
TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """Render a page.

    Args:
        request: That it answers.
        template: Name in ``templates/``; it extends ``base.html``.
        status: HTTP status.
        values: Of the template. It also has ``request``, ``owner`` (whether the reader is), ``public`` (whether the
            feed has an address for others), ``subscribing`` (whether the reader may), and ``csrf()``: the hidden field
            that every form holds.
    """
    field = Markup('<input type="hidden" name="csrf" value="{}">').format(csrf_token(request))
    own = is_owner(request)
    values = {
        "request": request,
        "owner": own,
        "public": feed_of(request).settings.public_url is not None,
        "subscribing": can_subscribe(request),
        "csrf": lambda: field if own else Markup(""),
        **values,
    }
    text = environment().get_template(template).render(values)
    return HTMLResponse(text, status, headers={"Cache-Control": "private, no-cache", "Vary": "Cookie"})


def unchanged(request: Request, content: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    """The content under a tag of its own, or that it is as the asker has it already."""
    tag = f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache", **(headers or {})}
    known = [part.strip().removeprefix("W/") for part in request.headers.get("if-none-match", "").split(",")]
    if tag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=kind, headers=headers)


def refusal(request: Request, refused: Refused) -> Response:
    """The answer to a request that is refused: a page, or JSON where the interface was asked."""
    if request.url.path.startswith("/api/"):
        told: Response = JSONResponse({"detail": f"{refused.title}: {refused.text}"}, refused.status)
    else:
        told = page(request, "refused.html", status=refused.status, refused=refused)
    told.headers.update(refused.headers)
    return told


@cache
def environment() -> Environment:
    """The templates, with every value escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals.update(static=static_address)
    filters = (outside, segment, day, when, iso, thousands, clipped, capital, unbroken, coded, kind, attributes)
    made.filters.update({each.__name__: each for each in filters})
    return made


# --- small words -------------------------------------------------------------------------------------------------


def outside(address: str | None) -> str | None:
    """An address that may stand in a link: http or https, else None."""
    try:
        return address if address and urlsplit(address).scheme in ("http", "https") else None
    except ValueError:
        return None


def segment(text: str) -> str:
    """A text as one part of a path; the slash of an old arXiv id stays."""
    return quote(text, safe="/")


def day(value: date) -> str:
    """A day in words: ``17 November 2025``."""
    return f"{value.day} {value:%B %Y}"


def when(seconds: float) -> str:
    """A time in words, in UTC."""
    at = datetime.fromtimestamp(seconds, UTC)
    return f"{at.day} {at:%B %Y, %H:%M} UTC"


def iso(seconds: float) -> str:
    """A time for machines."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def thousands(count: int) -> str:
    """``12345`` as ``12,345``."""
    return f"{count:,}"


def clipped(text: str, most: int) -> str:
    """The beginning of a text, ending with a word, of no more than so many bytes and the sign for what is left out."""
    raw = text.encode()
    if len(raw) <= most:
        return text
    kept = raw[:most].decode(errors="ignore")
    return (kept.rsplit(None, 1)[0] if " " in kept[-60:] else kept) + CUT


def capital(text: str) -> str:
    """The text as the beginning of a sentence."""
    return text[:1].upper() + text[1:]


def unbroken(text: str) -> str:
    """The text without places where a line would break badly: per cent signs stay with their numbers, arrows whole."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("->", "→")


def coded(text: str) -> Markup:
    """What stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # escaped before anything is put in


def kind(verdict: str) -> dict[str, str]:
    """How a verdict is shown: its sign, its class in the style, and what it means."""
    known, css = kind_of(verdict)
    return {"sign": known.sign, "css": css, "meaning": known.meaning}


def attributes(svg: str) -> Markup:
    """A figure to stand within a page, whose policy allows no ``style``: what it says becomes plain attributes."""

    def plain(style: re.Match[str]) -> str:
        pairs = (declaration.partition(":") for declaration in style[1].split(";"))
        return " ".join(f'{name.strip()}="{value.strip()}"' for name, _, value in pairs)

    return Markup(re.sub(r'style="([^"]*)"', plain, svg))  # drawn by evidence.figures, which escapes all text


# --- style and script --------------------------------------------------------------------------------------------


@cache
def static_file(name: str) -> tuple[bytes, str, str] | None:
    """A file of ``static/`` with its type and its tag, or None; the style begins with that of the reports."""
    path = HERE / "static" / name
    if path.suffix not in TYPES or path.name != name or not path.is_file():
        return None
    content = path.read_bytes()
    if name == "feed.css":
        content = (palette_css() + STYLE.read_text(encoding="utf-8")).encode() + content
    return content, TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:16]


def static_address(name: str) -> str:
    """Where a page finds a file of ``static/``; the address changes with the content, so that it is kept for good."""
    found = static_file(name)
    if found is None:
        raise FileNotFoundError(name)
    return f"/static/{name}?v={found[2]}"
