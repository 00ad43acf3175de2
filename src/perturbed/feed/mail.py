"""Mail: what a message must carry, through which server it goes, and what became of it.

The server is `PERTURBED_SMTP`, the sender `PERTURBED_MAIL_FROM`. Messages follow RFC 5322, 2369, 2919, 3834 and 8058;
signing them (DKIM must cover both List-Unsubscribe fields) is the relay's part.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import textwrap
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import unquote, urlsplit

import aiosmtplib
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from perturbed.errors import PerturbedError
from perturbed.evidence.figures import PALETTE
from perturbed.evidence.report import KINDS
from perturbed.feed.store import Entry
from perturbed.feed.web.settings import is_loopback

Fate = Literal["sent", "no such address", "refused", "later", "uncertain"]

# At the default of 78 characters a longer unsubscribe address is folded into encoded words, which no program opens.
POLICY = SMTP.clone(max_line_length=998)
_EXAMPLE = "smtp://user:password@mail.example.org:587, smtps://…:465 or smtp://localhost:1025"
_PORTS = {"smtp": 25, "smtps": 465}
_SECONDS, _DATA_SECONDS = 30.0, 120.0  # for one answer of the server, and for the one that takes the message
_SHORT, _NAMED = 480, 3  # letters of a summary, and authors by name
_COLOURS = {  # as on the pages of reports
    "supported": "arm1",
    "contradicted": "arm2",
    "null": "arm4",
    "deterministic": "arm6",
    "diverged": "arm7",
    "invalid": "arm5",
}
_UNTENDED = ("noreply", "no-reply", "no_reply", "donotreply", "do-not-reply")


class MailError(PerturbedError):
    """Mail cannot be sent: the settings are missing or wrong, or the server cannot be used. Nothing has been sent."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """The SMTP server that takes our mail.

    Args:
        host: Name or address.
        port: Of the server.
        user: To log in with, if the server wants that; never without TLS.
        password: Of the user.
        implicit_tls: Whether the connection begins with TLS (``smtps``), rather than turning to it (STARTTLS).
        sender: Whose mail it is.
    """

    host: str
    port: int
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    implicit_tls: bool = False
    sender: Address

    @property
    def start_tls(self) -> bool | None:
        """Whether to turn to TLS: always with a password; else where it is offered, but not on this machine."""
        if self.implicit_tls:
            return False
        if self.user is not None:
            return True
        return False if is_loopback(self.host) else None


def server(environ: Mapping[str, str] | None = None) -> Server | None:
    """The SMTP server of the environment, or None where none is named.

    Raises:
        MailError: A setting is not of its form, or there is no sender. The message never holds the password.
    """
    environ = os.environ if environ is None else environ
    address = environ.get("PERTURBED_SMTP")
    if not address:
        return None
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _PORTS or parts.path.strip("/") or parts.query or parts.fragment:
        raise MailError(f"PERTURBED_SMTP is not of the form {_EXAMPLE} (signs in a password as %XX)")
    if (parts.username is None) != (parts.password is None):
        raise MailError(f"PERTURBED_SMTP needs user and password or neither: {_EXAMPLE}")
    if not environ.get("PERTURBED_MAIL_FROM"):
        raise MailError("PERTURBED_MAIL_FROM is not set: name the sender, such as papers@example.org")
    return Server(
        host=host,
        port=port or (587 if parts.scheme == "smtp" and parts.username else _PORTS[parts.scheme]),
        user=unquote(parts.username) if parts.username is not None else None,
        password=unquote(parts.password) if parts.password is not None else None,
        implicit_tls=parts.scheme == "smtps",
        sender=sender(environ),
    )


def sender(environ: Mapping[str, str] | None = None) -> Address:
    """The sender of the environment; where none is named, one that nobody can answer, for previews.

    Raises:
        MailError: It is no address.
    """
    told = (os.environ if environ is None else environ).get("PERTURBED_MAIL_FROM") or "papers@perturbed.invalid"
    name, address = parseaddr(told)
    try:
        if not told.isprintable() or "@" not in address:
            raise ValueError("an address has an @ and no control characters")
        return Address(name or "perturbed papers", addr_spec=address)
    except (ValueError, IndexError) as e:
        raise MailError("PERTURBED_MAIL_FROM is no address; write papers@example.org or Papers <…>") from e


def needed() -> Server:
    """The server of the environment.

    Raises:
        MailError: There is none, or a setting is wrong.
    """
    found = server()
    if found is None:
        raise MailError(f"no mail server is named: set PERTURBED_SMTP ({_EXAMPLE}) and PERTURBED_MAIL_FROM")
    return found


# --- messages ----------------------------------------------------------------------------------------------------


def compose(
    *, origin: Address, to: str, subject: str, text: str, html: str, now: float, name: str, unsubscribe: str | None
) -> EmailMessage:
    """A message with its text and the same as HTML.

    Args:
        origin: Of whom it is.
        to: To whom it goes, normalised.
        subject: One line of ASCII: what is not would be encoded, and longer than an encoded word may be.
        text: The message in plain text.
        html: The message with its looks.
        now: Seconds since 1970, for the date.
        name: That tells this message from every other and is the same if it is made again.
        unsubscribe: Address that ends the subscription on a POST, for what is sent to a list.

    Raises:
        ValueError: A header would hold a line break.
    """
    message = EmailMessage(policy=POLICY)
    message["From"] = origin
    message["To"] = Address(addr_spec=to)
    message["Subject"] = subject
    message["Date"] = format_datetime(datetime.fromtimestamp(now, UTC))
    message["Message-ID"] = f"<{name}@{origin.domain}>"
    message["Auto-Submitted"] = "auto-generated"
    if unsubscribe is not None:
        ways = [f"<{unsubscribe}>"]
        if not origin.username.lower().startswith(_UNTENDED) and not origin.domain.endswith((".invalid", "localhost")):
            ways.append(f"<mailto:{origin.addr_spec}?subject=unsubscribe>")
        message["List-Unsubscribe"] = ", ".join(ways)
        message["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        message["List-Id"] = f"perturbed papers <papers.{origin.domain}>"
    # 7-bit on the way: not every server takes 8BITMIME, and none may wrap our lines.
    message.set_content(text, cte="quoted-printable")
    message.add_alternative(html, subtype="html", cte="quoted-printable")
    return message


def render(template: str, **values: Any) -> str:
    """A template of ``web/templates/mail``: HTML with every value escaped, plain text as it is."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "web" / "templates" / "mail"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(wrapped=_wrapped, short=_short, byline=_byline, kind=_kind)
    made.globals.update(colours={name: light for name, (light, _) in PALETTE.items()})
    return made


def _kind(verdict: str) -> dict[str, str]:
    """How a verdict is shown; one of a later version is shown as it is written."""
    known = KINDS.get(verdict)
    return {
        "sign": known.sign if known else "·",
        "meaning": known.meaning if known else "",
        "colour": PALETTE[_COLOURS.get(verdict, "muted")][0],
    }


def _wrapped(text: str) -> str:
    """Lines of a width that is easy to read; an address is never broken."""
    return textwrap.fill(" ".join(text.split()), 76, break_long_words=False, break_on_hyphens=False)


def _short(text: str) -> str:
    return textwrap.shorten(text, _SHORT, placeholder=" …")


def _byline(entry: Entry) -> str:
    names = list(entry.people[:_NAMED])
    rest = (entry.author_count or len(entry.people)) - len(names)
    if names and rest > 0:
        names[-1] += f" and {rest} more"
    elif rest > 0:
        names = [f"{rest} author{'s' if rest > 1 else ''}"]
    day = f"{entry.published.day} {entry.published:%B %Y}" if entry.published else str(entry.year or "")
    acts = f"acts on {', '.join(entry.sites)}" if entry.sites else ""
    return " · ".join(part for part in (", ".join(names), entry.organisation, day, acts) if part)


# --- the server --------------------------------------------------------------------------------------------------


class _Client(aiosmtplib.SMTP):
    """Whose connection is over once it is closed.

    Closing TLS waits for the server's answer, and the event loop may end before that: the socket would stay open.
    """

    def close(self) -> None:
        transport = cast(asyncio.Transport | None, self.transport)
        super().close()
        if transport is not None:
            transport.abort()


@asynccontextmanager
async def connected(to: Server) -> AsyncIterator[aiosmtplib.SMTP]:
    """A session with the server, logged in.

    Raises:
        MailError: It cannot be reached, offers no TLS where a password would be sent, or refuses the login.
    """
    client = _Client(
        hostname=to.host,
        port=to.port,
        username=to.user,
        password=to.password,
        timeout=_SECONDS,
        use_tls=to.implicit_tls,
        start_tls=to.start_tls,
    )
    where = f"the mail server {to.host}:{to.port}"
    try:
        await client.connect()
    except aiosmtplib.SMTPAuthenticationError as e:
        raise MailError(f"{where} refuses the user or password of PERTURBED_SMTP ({e.code})") from e
    except (aiosmtplib.SMTPException, OSError, ssl.SSLError) as e:
        raise MailError(f"{where} cannot be used: {_one_line(e)}; see PERTURBED_SMTP") from e
    try:
        yield client
    finally:
        with suppress(aiosmtplib.SMTPException, OSError):
            await client.quit()
        client.close()


async def deliver(client: aiosmtplib.SMTP, message: EmailMessage, to: str) -> tuple[Fate, str]:
    """Hand one message to the server.

    Returns:
        What became of it, and the server's words. ``later``: it is certain that the server did not take it.
        ``uncertain``: the connection ended between the last byte and the server's answer, so nobody knows.
    """
    origin = message["From"].addresses[0].addr_spec
    try:
        await client.mail(origin)
        await client.rcpt(to)
    except aiosmtplib.SMTPRecipientRefused as e:
        await _begin_anew(client)
        return ("no such address" if _is_about_address(e) else "later"), _one_line(e)
    except (aiosmtplib.SMTPException, OSError) as e:
        await _begin_anew(client)
        return "later", _one_line(e)
    try:
        await client.data(message.as_bytes(policy=POLICY), timeout=_DATA_SECONDS)
    except aiosmtplib.SMTPDataError as e:
        await _begin_anew(client)
        return ("refused" if e.code >= 500 else "later"), _one_line(e)
    except (aiosmtplib.SMTPException, OSError) as e:
        return "uncertain", _one_line(e)
    return "sent", ""


async def send_one(to: Server, message: EmailMessage, address: str) -> tuple[Fate, str]:
    """Connect, hand over one message, and take leave.

    Raises:
        MailError: As `connected`.
    """
    async with connected(to) as client:
        return await deliver(client, message, address)


def _is_about_address(e: aiosmtplib.SMTPRecipientRefused) -> bool:
    """Whether the refusal is for good and of this address, not of us (no login, no relaying, a policy).

    A full mailbox may have room tomorrow, and 552 in answer to RCPT is taken as temporary (RFC 5321, 4.5.3.1.10).
    """
    return e.code >= 500 and e.code not in (503, 530, 535, 538, 552) and not e.message.startswith(("5.2.2", "5.7."))


async def _begin_anew(client: aiosmtplib.SMTP) -> None:
    with suppress(aiosmtplib.SMTPException, OSError):
        await client.rset()


def _one_line(e: BaseException) -> str:
    told = f"{e.code} {e.message}" if isinstance(e, aiosmtplib.SMTPResponseException) else str(e) or type(e).__name__
    return " ".join(told.split())[:300]
