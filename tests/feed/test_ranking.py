"""The trending formula: in closed form, as published, and over a feed."""

import re
from datetime import UTC, date, datetime, timedelta

import pytest

from perturbed.feed import ranking, store
from perturbed.feed.papers import Paper
from perturbed.feed.ranking import FORMULA, score, trending

DAY = date(2025, 11, 17)
NOW = datetime(2025, 11, 17, tzinfo=UTC).timestamp()
SECONDS = 86400.0


def add(connection, title, back=0, **facts):
    paper = Paper(title=title, source="hub", listed=DAY - timedelta(back), **facts)
    return store.upsert(connection, paper, NOW).paper


def find(connection, paper, at):
    connection.execute(
        "INSERT INTO finding (paper, record, verdict, at) VALUES (?, ?, 'null', ?)", (paper, f"{paper}-{at}", at)
    )


def order(database, **kw):
    return [entry.title for entry in trending(database.read(), NOW, **kw)]


def test_the_score_in_closed_form():
    assert score(NOW, DAY) == 1
    assert score(NOW, DAY, upvotes=10, comments=3, own_votes=1, own_comments=1) == 1 + 10 + 6 + 10 + 5
    assert score(NOW, DAY - timedelta(7), upvotes=10, comments=3) == (1 + 10 + 6) / 2
    assert score(NOW, DAY - timedelta(14), upvotes=10, comments=3, evidence_at=NOW - 7 * SECONDS) == 17 / 4 + 50 / 2
    assert score(NOW + 3.5 * SECONDS, DAY) == pytest.approx(2**-0.5)
    assert score(NOW, DAY + timedelta(3), evidence_at=NOW + 9) == 51  # nothing grows before its time
    assert score(NOW, DAY - timedelta(36500), upvotes=1) == 0.0


def test_the_published_words_are_those_that_are_computed():
    """The page's formula, read as arithmetic, gives the code's numbers."""
    right = FORMULA.split("score = ")[1].split(". ")[0]
    names = {
        "the source's upvotes": 9,
        "the source's comments": 4,
        "votes here": 2,
        "comments here": 3,
        "age of the newest evidence": 3,
        "age": 5,
    }
    for name, value in names.items():
        right = right.replace(name, str(value))
    right = right.replace("×", "*").replace("½", "0.5").replace("^", "**").replace(" days", "")
    assert re.fullmatch(r"[\d\s.()*+/]+", right)
    value = score(NOW, DAY - timedelta(5), 9, 4, 2, 3, NOW - 3 * SECONDS)
    assert eval(right) == pytest.approx(value)
    assert f"{ranking.WINDOW} days" in FORMULA
    assert f"newest {ranking.AT_LEAST}" in FORMULA


def test_the_text_moves_with_the_numbers(monkeypatch):
    """A published formula of fixed words would go wrong as soon as a constant is changed."""
    import importlib

    source = importlib.util.find_spec("perturbed.feed.ranking").loader.get_source("perturbed.feed.ranking")
    changed: dict = {"__name__": "changed"}
    exec(source.replace("HALF_LIFE = 7", "HALF_LIFE = 3").replace("EVIDENCE = 50", "EVIDENCE = 41"), changed)
    assert "/ 3 days" in changed["FORMULA"]
    assert "41 ×" in changed["FORMULA"]
    assert changed["score"](NOW, DAY - timedelta(3)) == 0.5


def test_what_trends(database):
    with database.write() as connection:
        add(connection, "old and loved", 14, upvotes=100)  # 101 / 4
        add(connection, "new", 0, upvotes=20, comments=2)  # 25
        own = add(connection, "ours", 7)  # (1 + 10 + 5) / 2
        measured = add(connection, "measured", 21)  # 1/8 + 50
        unknown = store.upsert(connection, Paper(title="of no day", source="page", upvotes=999), NOW).paper
        store.vote(connection, own, "owner", NOW)
        store.comment(connection, own, "owner", "Good.", NOW)
        store.vote(connection, unknown, "owner", NOW)
        for back in (40, 0, 10):  # the newest counts
            find(connection, measured, NOW - back * SECONDS)
    assert order(database) == ["measured", "old and loved", "new", "ours"]
    assert order(database, limit=2, offset=1) == ["old and loved", "new"]


def test_time_alone_changes_no_order(database):
    with database.write() as connection:
        for i in range(30):
            paper = add(connection, f"Paper {i}", i * 11 % 40, upvotes=i * i % 37)
            if i % 5 == 0:
                find(connection, paper, NOW - i * SECONDS)
    orders = [[e.title for e in trending(database.read(), NOW + days * SECONDS, 30)] for days in (0, 1, 100, 400)]
    assert orders[0] == orders[1] == orders[2] == orders[3]


def test_what_is_considered(database, monkeypatch):
    monkeypatch.setattr(ranking, "AT_LEAST", 3)
    with database.write() as connection:
        add(connection, "newest", 0)
        add(connection, "within", 56)
        add(connection, "filled up", 60)
        add(connection, "left out", 61, upvotes=10_000)
        find(connection, add(connection, "measured long ago", 700), NOW - 700 * SECONDS)
        store.vote(connection, add(connection, "voted", 800), "owner", NOW)
    assert set(order(database)) == {"newest", "within", "filled up", "measured long ago", "voted"}
    monkeypatch.setattr(ranking, "AT_LEAST", 4)
    assert order(database)[0] == "left out"


def test_an_empty_feed(database):
    assert order(database) == []
