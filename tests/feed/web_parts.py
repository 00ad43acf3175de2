"""What the tests of the pages share: an app over a fresh database, papers to read, an owner and a visitor."""

from __future__ import annotations

import re
import sqlite3
from datetime import UTC, date, datetime
from unittest import mock
from urllib.parse import unquote

from starlette.testclient import TestClient

from perturbed.evidence import ledger
from perturbed.feed import catalogue, store
from perturbed.feed.papers import Paper
from perturbed.feed.web.app import create_app
from perturbed.feed.web.settings import Settings

HERE = "http://127.0.0.1:8000"
TOKEN = "the-token-of-this-start-0123456789abcdef"
NOW = datetime(2025, 11, 20, 9, 0, tzinfo=UTC).timestamp()
OURS = {"Sec-Fetch-Site": "same-origin"}


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now=NOW):
        self.now = now

    def __call__(self):
        return self.now


_seeded = {}  # databases with the catalogue and its findings, as bytes by their time: making one takes a while


def app_of(tmp_path, *, clock=None, fresh=False, **settings):
    settings = {"database": tmp_path / "feed.sqlite", "owner_token": TOKEN, **settings}
    clock = clock or Clock()
    begun = clock()
    if begun in _seeded and not fresh:
        tmp_path.mkdir(exist_ok=True)
        settings["database"].touch(0o600)
        settings["database"].write_bytes(_seeded[begun])
    with mock.patch("perturbed.feed.meaning._installed", return_value=False):  # else each app starts the model
        app = create_app(Settings(**settings), clock=clock)
    if begun not in _seeded:
        _seeded[begun] = app.state.feed.database.read().serialize()
    return app


def visitor(app, base=HERE, **headers):
    return TestClient(app, base_url=base, headers=headers, follow_redirects=False)


def owner(app, base=HERE):
    client = visitor(app, base, **OURS)
    assert client.get("/owner", params={"token": TOKEN}).status_code == 303
    return client


def form_token(client, at="/settings"):
    return re.search(r'name="csrf" value="([0-9a-f]+)"', client.get(at).text)[1]


def post(client, address, data=None, **more):
    """As the owner's forms do."""
    return client.post(address, data={"csrf": form_token(client), **(data or {})}, **more)


def add(app, *papers, now=NOW):
    with app.state.feed.database.write() as connection:
        return [store.upsert(connection, paper, now).paper for paper in papers]


def papers(day=date(2025, 11, 17)):
    """Invented papers of two days."""
    return (
        Paper(
            title="Counting sheep improves calibration of sleepy networks",
            source="hub",
            arxiv="2511.09001",
            abstract="Networks that rest between epochs are better calibrated. We count sheep.",
            authors=("Ada Wool", "Ben Fleece"),
            published=date(2025, 11, 12),
            listed=day,
            upvotes=41,
            comments=3,
            code_url="https://example.org/sheep",
        ),
        Paper(
            title="Gradients in the rain",
            source="hub",
            arxiv="2511.09002",
            abstract="Descent slows down on wet slopes.",
            author_count=5,
            published=date(2025, 11, 13),
            listed=day,
            upvotes=0,
        ),
        Paper(title="A title and nothing else", source="page", listed=date(2025, 11, 10)),
    )


def dump(app):
    """Everything in the database, to compare before and after."""
    with sqlite3.connect(app.state.feed.settings.database) as connection:
        return list(connection.iterdump())


def links(text):
    """The addresses that a page links to, posts to or loads."""
    return [unquote(a.replace("&amp;", "&")) for a in re.findall(r'(?:href|src|action|data-poll)="([^"]*)"', text)]


def card(slug="sltrain"):
    """A catalogued paper that has evidence."""
    return catalogue.item(slug)


def record(slug="pag"):
    """The newest committed record at laptop scale."""
    return ledger.latest(slug)
