"""What the server does beside the pages: ledgers and vectors are kept fresh, and one failure does not end that."""

import time

import pytest
from waiting import until
from web_parts import app_of, visitor

from perturbed.feed import subscriptions, verdicts
from perturbed.feed.subscriptions import Wants
from perturbed.feed.web import app as module


@pytest.fixture
def app(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_EVERY", 0.01)
    made = app_of(tmp_path)
    yield made
    made.state.feed.database.close()


@pytest.mark.parametrize("error", [RuntimeError("a defect"), KeyError("another")])
def test_a_failure_is_logged_and_tried_again(app, monkeypatch, caplog, error):
    looks = []

    def sync(database, now):
        looks.append(now)
        if len(looks) < 3:
            raise error
        return 0

    monkeypatch.setattr(verdicts, "sync", sync)
    with visitor(app) as client:
        until(lambda: len(looks) > 4)
        assert client.get("/about").status_code == 200
    assert len([r for r in caplog.records if r.exc_info and r.exc_info[1] is error]) == 2
    ended = len(looks)
    time.sleep(0.05)
    assert len(looks) == ended, "it goes on although the server has ended"


def test_an_address_that_does_not_confirm_is_forgotten_after_two_days(app):
    feed = app.state.feed
    begun = feed.clock.now
    for address, asked in (("ann@example.org", begun), ("bo@example.org", begun + 1)):
        assert subscriptions.ask(feed.database, address, Wants(), "day", asked).token
    feed.clock.now = begun + subscriptions.CONFIRM_SECONDS

    def left(table):
        return [row[0] for row in feed.database.read().execute(f"SELECT * FROM {table} ORDER BY 1")]

    with visitor(app):
        until(lambda: len(left("subscriber")) == 1)
        assert len(left("token")) == 1
        feed.clock.now += 1
        until(lambda: not left("subscriber"))
        assert not left("token")


def test_papers_are_embedded_until_none_is_missing(app, monkeypatch):
    left, asked = [2, 32, 32], []

    def embed_missing(limit):
        asked.append((limit, len(left)))
        return left.pop() if left else 0

    monkeypatch.setattr(module, "_EVERY", 3600)  # all of it within one look
    monkeypatch.setattr(app.state.feed.meaning, "embed_missing", embed_missing)
    with visitor(app):
        until(lambda: len(asked) == 4)
    assert asked == [(32, 3), (32, 2), (32, 1), (32, 0)]
