"""What the tests of mail share: a real SMTP server on loopback, and a feed with papers and real evidence."""

from __future__ import annotations

import re
import ssl
from contextlib import contextmanager
from datetime import UTC, date, datetime
from email import message_from_bytes, policy
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path

from aiosmtpd.smtp import AuthResult
from mail_server import MailServer
from waiting import SECONDS

from perturbed.feed import store, subscriptions
from perturbed.feed.database import Database
from perturbed.feed.mail import Server
from perturbed.feed.papers import Paper
from perturbed.feed.subscriptions import Wants

NOW = datetime(2025, 11, 17, 18, 0, tzinfo=UTC).timestamp()
DAY = date(2025, 11, 17)
HOUR = 3600.0
BASE = "https://papers.example.org"


class Catcher:
    """Takes mail as a server does; answers to RCPT and DATA can be set by address."""

    def __init__(self, *, refuse_rcpt=None, refuse_data=None, tls=None, require_auth=False):
        self.refuse_rcpt, self.refuse_data = refuse_rcpt or {}, refuse_data or {}
        self.envelopes, self.logins, self.sessions = [], [], 0
        self.tls, self.require_auth = tls, require_auth

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        self.sessions += 1
        session.host_name = hostname
        return responses

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address in self.refuse_rcpt:
            return self.refuse_rcpt[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        answer = self.refuse_data.get(envelope.rcpt_tos[0], "250 OK")
        if answer.startswith("250"):
            self.envelopes.append((envelope.rcpt_tos[0], envelope.content))
        return answer

    def login(self, server, session, envelope, mechanism, data):
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password == b"s3cret/:@", handled=False)

    @contextmanager
    def __call__(self):
        controller = MailServer(
            self,
            tls_context=self.tls,
            authenticator=self.login if self.require_auth else None,
            ready_timeout=SECONDS,
            auth_require_tls=False,
        )
        controller.start()
        try:
            self.port, self.listener = controller.port, controller.server
            yield self
        finally:
            controller.stop()

    @property
    def server(self) -> Server:
        return Server(host="127.0.0.1", port=self.port, sender=Address("Papers", addr_spec="papers@example.org"))

    @property
    def messages(self) -> list[EmailMessage]:
        return [message_from_bytes(content, policy=policy.default) for _, content in self.envelopes]

    @property
    def to(self) -> list[str]:
        return [address for address, _ in self.envelopes]


def text_of(message: EmailMessage) -> str:
    return message.get_body(("plain",)).get_content()


def html_of(message: EmailMessage) -> str:
    return message.get_body(("html",)).get_content()


def link_of(message: EmailMessage, what: str) -> str:
    """The token of a link in the text."""
    return re.search(rf"/{what}/([\w-]+)", text_of(message))[1]


def add(database: Database, number: int, *, day: date | None = DAY, now: float = NOW, **more) -> int:
    """A paper; its row."""
    fields = {"title": f"Paper {number}", "arxiv": f"2511.{number:05d}", "source": "hub", "listed": day, **more}
    with database.write() as connection:
        return store.upsert(connection, Paper(**fields), now).paper


def subscribed(database: Database, address: str, *, now: float = NOW - HOUR, every="day", **wants) -> None:
    token = subscriptions.ask(database, address, Wants(**wants), every, now).token
    assert subscriptions.confirm(database, token, now) is not None


def dump(database: Database) -> list[str]:
    """All that the database holds, as text."""
    return list(database.read().iterdump())


def self_signed(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's TLS for ``localhost``, and the certificate to trust."""
    import subprocess

    key, certificate = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
        timeout=SECONDS,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context, certificate


def application(folder: Path, *, public: str | None = BASE, clock=lambda: NOW):
    """The whole application as visitors reach it, and its client."""
    from starlette.testclient import TestClient
    from web_parts import app_of

    app = app_of(folder, clock=clock, public_url=public)
    base = app.state.feed.settings.base
    return app, TestClient(app, base_url=base, headers={"Origin": base}, follow_redirects=False)
