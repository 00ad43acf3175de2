"""The digest: to each subscriber the papers of a day or a week that they want, and the verdicts since their last one.

No paper and no verdict goes to anybody twice, and none is left out because it came late: what was imported after
its day, or on a day without a digest, stands in the next one, up to a fortnight back. A digest with nothing to tell
is not sent.

Each mail is claimed in the database before it is handed to the server and marked after. If the process ends in
between, nobody knows whether the mail went out: it is never sent again, and the next runs say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import sqlite3
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.headerregistry import Address
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from perturbed.errors import PerturbedError
from perturbed.feed import mail, store, topics, verdicts
from perturbed.feed.database import Database
from perturbed.feed.mail import Fate, MailError, Server
from perturbed.feed.papers import paper_path
from perturbed.feed.store import Entry
from perturbed.feed.subscriptions import (
    OFTEN,
    Every,
    Subscription,
    Wants,
    drop_unsubscribe_token,
    keep_unsubscribe_token,
    new_token,
    suppress,
)

SHOWN = 40  # papers told in full; mail programs cut a message at about 100 kB
_LATE = timedelta(days=14)
_REMEMBERED = 7 * 86400.0  # seconds for which an uncertain mail is reported


@dataclass(frozen=True, kw_only=True)
class News:
    """A verdict that came, or changed.

    Args:
        entry: The paper.
        verdict: What it is now.
        before: What it was when the subscriber last heard of it, or None.
        sentence: What was found, in words, with the effect and its interval.
    """

    entry: Entry
    verdict: str
    before: str | None
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What one subscriber is to be told.

    Args:
        subscriber: Row.
        name: That tells its message from every other, and is the same if it is made again.
        address: Where it goes.
        subscription: What was asked for.
        issue: ``2025-11-17`` or ``2025-W47``.
        first: Day that it begins with.
        last: Day that it ends with.
        papers: The newest day first.
        news: The newest first.
        newest_finding: Row of the last finding when it was made.
    """

    subscriber: int
    name: str
    address: str
    subscription: Subscription
    issue: str
    first: date
    last: date
    papers: tuple[Entry, ...]
    news: tuple[News, ...]
    newest_finding: int


@dataclass(kw_only=True)
class Sending:
    """What became of an issue, by address; each with the server's words where it had some.

    Args:
        issue: Of the digest.
        sent: Taken by the server.
        bounced: There is no such address, says the server: suppressed from now on.
        refused: The server does not take this message; it is not tried again.
        later: Not taken this time; the next run tries again.
        uncertain: Claimed by this run or an earlier one that never learned the outcome; not sent again.
    """

    issue: str
    sent: list[str] = field(default_factory=list)
    bounced: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    later: list[tuple[str, str]] = field(default_factory=list)
    uncertain: list[tuple[str, str]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        told = [f"digest {self.issue}: {len(self.sent)} sent"]
        kinds = (
            ("no such address, never mailed again", self.bounced),
            ("refused, not tried again", self.refused),
            ("not taken, the next run tries again", self.later),
            ("uncertain, not sent again", self.uncertain),
        )
        told += [f"{address}: {what} ({why})" for what, found in kinds for address, why in found]
        return told


def issue_of(every: Every, day: date) -> tuple[str, date, date]:
    """The name of the issue that a day belongs to, and its first and last day."""
    if every == "day":
        return day.isoformat(), day, day
    year, week, weekday = day.isocalendar()
    monday = day - timedelta(days=weekday - 1)
    return f"{year}-W{week:02d}", monday, monday + timedelta(days=6)


def digests(database: Database, every: Every, day: date) -> list[Digest]:
    """The digests of an issue that are still to be sent. Changes nothing.

    Args:
        database: Of the feed.
        every: ``day`` or ``week``.
        day: Any day of the issue.
    """
    connection = database.read()
    connection.execute("BEGIN")  # one state of the database for all of it
    try:
        return _digests(connection, every, day)
    finally:
        connection.execute("ROLLBACK")


def send(database: Database, every: Every, day: date, now: float, *, to: Server, base: str) -> Sending:
    """Send the digests of an issue, each once.

    Args:
        database: Of the feed.
        every: ``day`` or ``week``.
        day: Any day of the issue.
        now: Seconds since 1970.
        to: Takes the mail.
        base: What links begin with.

    Raises:
        MailError: The server cannot be used. Nothing was sent.
    """
    report = Sending(issue=issue_of(every, day)[0], uncertain=_uncertain(database.read(), now))
    waiting = deque(digests(database, every, day))
    if waiting:
        asyncio.run(_send(database, waiting, now, to, base, report))
    return report


def preview(database: Database, every: Every, day: date, now: float, *, base: str, folder: Path) -> list[Path]:
    """Write the digests of an issue that are to be sent as ``.eml`` files; nothing is sent, kept or claimed.

    Their unsubscribe links are made up, so that a preview can be shown around.

    Args:
        database: Of the feed.
        every: ``day`` or ``week``.
        day: Any day of the issue.
        now: Seconds since 1970.
        base: What links begin with.
        folder: It is made where missing.

    Returns:
        The files; readable by the user alone, as they hold addresses.

    Raises:
        PerturbedError: A file cannot be written, or the sender is no address.
    """
    origin, written = mail.sender(), []
    for digest in digests(database, every, day):
        message = message_of(digest, new_token(), origin, now, base)
        name = re.sub(r"[^a-z0-9@.+-]", "_", digest.address)
        path = folder / f"{digest.issue}-{digest.subscriber}-{name}.eml"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(message.as_bytes(policy=mail.POLICY))
        except OSError as e:
            raise PerturbedError(f"{path}: cannot be written ({e.strerror}); choose another folder") from e
        written.append(path)
    return written


def message_of(digest: Digest, token: str, origin: Address, now: float, base: str) -> EmailMessage:
    """A digest as the message that goes out; ``token`` ends the subscription."""
    values = {
        "digest": digest,
        "heading": heading(digest),
        "summary": summary(digest),
        "base": base,
        "page": _page(digest),
        "shown": digest.papers[:SHOWN],
        "more": len(digest.papers) - SHOWN,
        "wants": digest.subscription.wants.in_words(),
        "often": OFTEN[digest.subscription.every],
        "unsubscribe": f"{base}/unsubscribe/{token}",
        "path": paper_path,
    }
    return mail.compose(
        origin=origin,
        to=digest.address,
        subject=f"perturbed {digest.issue}: {summary(digest)}",
        text=mail.render("digest.txt", **values),
        html=mail.render("digest.html", **values),
        now=now,
        name=digest.name,
        unsubscribe=f"{base}/unsubscribe/one-click/{token}",
    )


def heading(digest: Digest) -> str:
    """The day, or the days, in words."""
    if digest.first == digest.last:
        return f"{digest.first:%A}, {_day(digest.first)}"
    return f"{digest.first.day} {digest.first:%B} to {_day(digest.last)}"


def summary(digest: Digest) -> str:
    """``3 papers, 1 new verdict``."""
    counted = ((len(digest.papers), "paper"), (len(digest.news), "new verdict"))
    return ", ".join(f"{count} {word}{'s' if count > 1 else ''}" for count, word in counted if count)


# --- what is told ------------------------------------------------------------------------------------------------


def _digests(connection: sqlite3.Connection, every: Every, day: date) -> list[Digest]:
    issue, first, last = issue_of(every, day)
    subscribers = connection.execute(
        "SELECT * FROM subscriber WHERE state = 'confirmed' AND every = ? "
        "AND NOT EXISTS (SELECT 1 FROM delivery WHERE subscriber = subscriber.id AND issue = ?) ORDER BY id",
        (every, issue),
    ).fetchall()
    if not subscribers:
        return []
    late = min(row["papers"] for row in subscribers)
    ids = connection.execute(
        "SELECT id FROM paper WHERE day BETWEEN ? AND ? OR (id > ? AND (day IS NULL OR day BETWEEN ? AND ?)) "
        "ORDER BY day DESC, source_upvotes DESC, id",
        (first.isoformat(), last.isoformat(), late, (first - _LATE).isoformat(), last.isoformat()),
    ).fetchall()
    made = _Issue(connection, issue, first, last, store.entries(connection, [row[0] for row in ids]))
    found = [made.digest(row) for row in subscribers]
    return [digest for digest in found if digest.papers or digest.news]


class _Issue:
    """What the digests of one issue share: its papers, the findings, and what matches a topic."""

    def __init__(
        self, connection: sqlite3.Connection, issue: str, first: date, last: date, candidates: Sequence[Entry]
    ):
        self.connection, self.issue, self.first, self.last, self.candidates = connection, issue, first, last, candidates
        self.findings = connection.execute("SELECT id, paper, verdict FROM finding ORDER BY id").fetchall()
        about = store.entries(connection, {row["paper"] for row in self.findings})
        self.judged = {entry.id: entry for entry in about}
        self.topics: dict[str, set[int]] = {}

    def digest(self, row: sqlite3.Row) -> Digest:
        """What one subscriber is told."""
        wants = Wants.from_json(row["wants"])
        told, since = self._told(row)
        return Digest(
            subscriber=row["id"],
            # The address is in no header that others see, nor can it be guessed from the name without its row.
            name=hashlib.sha256(f"{row['id']} {row['created']!r} {row['address']} {self.issue}".encode()).hexdigest(),
            address=row["address"],
            subscription=Subscription(wants=wants, every=row["every"]),
            issue=self.issue,
            first=self.first,
            last=self.last,
            papers=tuple(self._papers(row, wants, told)),
            news=tuple(self._news(wants, since)),
            newest_finding=self.findings[-1]["id"] if self.findings else 0,
        )

    def _told(self, row: sqlite3.Row) -> tuple[set[int], int]:
        """The papers that a subscriber has been told of, under whatever key, and the last finding."""
        past = self.connection.execute(
            "SELECT told, findings FROM delivery WHERE subscriber = ?", (row["id"],)
        ).fetchall()
        keys = json.dumps([key for delivery in past for key in json.loads(delivery["told"])])
        ids = self.connection.execute(
            "SELECT id FROM paper WHERE key IN (SELECT value FROM json_each(:keys)) "
            "UNION SELECT paper FROM alias WHERE key IN (SELECT value FROM json_each(:keys))",
            {"keys": keys},
        )
        return {found[0] for found in ids}, max([row["findings"], *(delivery["findings"] for delivery in past)])

    def _papers(self, row: sqlite3.Row, wants: Wants, told: set[int]) -> list[Entry]:
        if not wants.papers:
            return []
        return [
            entry
            for entry in self._wanted(wants, self.candidates)
            if entry.id not in told
            and (entry.id > row["papers"] or (entry.day is not None and self.first <= entry.day <= self.last))
        ]

    def _news(self, wants: Wants, since: int) -> list[News]:
        if not wants.evidence:
            return []
        before = {row["paper"]: row["verdict"] for row in self.findings if row["id"] <= since}
        now = {row["paper"]: row["verdict"] for row in self.findings if row["id"] > since}
        newest_first = [self.judged[paper] for paper in reversed(now)]
        return [
            News(entry=entry, verdict=now[entry.id], before=before.get(entry.id), sentence=_sentence(entry))
            for entry in self._wanted(wants, newest_first)
        ]

    def _wanted(self, wants: Wants, entries: Sequence[Entry]) -> list[Entry]:
        found = [entry for entry in entries if not wants.sites or set(wants.sites) & set(entry.sites)]
        if wants.query is None:
            return found
        if wants.query not in self.topics:
            every = {entry.id for entry in self.candidates} | self.judged.keys()
            self.topics[wants.query] = topics.matching(self.connection, wants.query, every)
        return [entry for entry in found if entry.id in self.topics[wants.query]]


def _sentence(entry: Entry) -> str:
    found = verdicts.summary_of(entry.slug) if entry.slug else None
    return found.sentence if found is not None else ""


def _page(digest: Digest) -> str:
    """Path of the page that shows all of it."""
    return f"/day/{digest.issue}" if digest.subscription.every == "day" else f"/week/{digest.issue}"


def _day(day: date) -> str:
    return f"{day.day} {day:%B %Y}"


# --- sending -----------------------------------------------------------------------------------------------------


async def _send(database: Database, waiting: deque[Digest], now: float, to: Server, base: str, report: Sending) -> None:
    begun = False
    while waiting:
        try:
            async with mail.connected(to) as client:
                begun = True
                while waiting:
                    await _send_one(database, waiting.popleft(), now, client, to, base, report)
                    if not client.is_connected:
                        break
        except MailError as e:
            if not begun:
                raise
            report.later += [(digest.address, str(e)) for digest in waiting]
            return


async def _send_one(
    database: Database, digest: Digest, now: float, client: Any, to: Server, base: str, report: Sending
) -> None:
    token = new_token()
    message = message_of(digest, token, to.sender, now, base)
    if not _claim(database, digest, token, now):
        return  # ended, or claimed by another process, since it was made
    fate, why = await mail.deliver(client, message, digest.address)
    _settle(database, digest, token, fate, why, now)
    if fate == "sent":
        report.sent.append(digest.address)
    else:
        lists = {
            "no such address": report.bounced,
            "refused": report.refused,
            "later": report.later,
            "uncertain": report.uncertain,
        }
        lists[fate].append((digest.address, why))


def _claim(database: Database, digest: Digest, token: str, now: float) -> bool:
    told = json.dumps([entry.key for entry in digest.papers])
    with database.write() as connection:
        claimed = connection.execute(
            "INSERT OR IGNORE INTO delivery (subscriber, issue, state, at, told, findings) "
            "SELECT id, ?, 'claimed', ?, ?, ? FROM subscriber WHERE id = ? AND state = 'confirmed'",
            (digest.issue, now, told, digest.newest_finding, digest.subscriber),
        ).rowcount
        if claimed:
            keep_unsubscribe_token(connection, token, digest.subscriber)
    return bool(claimed)


def _settle(database: Database, digest: Digest, token: str, fate: Fate, why: str, now: float) -> None:
    row = (digest.subscriber, digest.issue)
    with database.write() as connection:
        if fate == "later":
            connection.execute("DELETE FROM delivery WHERE subscriber = ? AND issue = ?", row)
            drop_unsubscribe_token(connection, token)
        elif fate != "uncertain":
            state = "sent" if fate == "sent" else "refused"
            connection.execute("UPDATE delivery SET state = ? WHERE subscriber = ? AND issue = ?", (state, *row))
        if fate == "no such address":
            suppress(connection, digest.subscriber, why, now)


def _uncertain(connection: sqlite3.Connection, now: float) -> list[tuple[str, str]]:
    rows = connection.execute(
        "SELECT address, issue, at FROM delivery JOIN subscriber ON subscriber.id = delivery.subscriber "
        "WHERE delivery.state = 'claimed' AND at > ? ORDER BY at, address",
        (now - _REMEMBERED,),
    ).fetchall()
    return [
        (row["address"], f"{row['issue']}: a run begun {_when(row['at'])} ended without an answer, or is still at it")
        for row in rows
    ]


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
