"""Who gets the digest: asked for by anybody, in force only once the address itself has confirmed, ended by one click.

Two kinds of token go out by mail, 256 random bits each, of which only the SHA-256 is kept, so that nobody who reads
the database (or a backup of it) can confirm or end a subscription in another's name. A confirmation is used once
and lives two days. Each digest has an unsubscribe token of its own: a token computed from a key in the database
could be computed by whoever has read it, and a preview (``--dry-run``) could then end a real subscription. Those
tokens stay good for as long as the mail is kept, and using one twice changes nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import sqlite3
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from typing import Literal

from email_validator import EmailNotValidError, validate_email

from perturbed.errors import PerturbedError, nearest
from perturbed.feed import mail, topics
from perturbed.feed.database import Database
from perturbed.feed.mail import Fate, Server
from perturbed.feed.papers import SITES, printed, spaced

Every = Literal["day", "week"]
Purpose = Literal["confirm", "unsubscribe"]

CONFIRM_SECONDS = 48 * 3600
OFTEN: dict[Every, str] = {"day": "every day", "week": "every week"}
ASK_SECONDS = 3600  # between two confirmations to one address
QUERY_LENGTH = 200
_TOKEN_BYTES = 32
_UNANSWERED = (  # of a time: who has never confirmed, and has no mail any more that could
    "FROM subscriber WHERE state = 'pending' "
    "AND id NOT IN (SELECT subscriber FROM token WHERE purpose = 'confirm' AND expires > ?)"
)


class SubscriptionError(PerturbedError, ValueError):
    """What was asked for cannot be subscribed to; the message says why, for the person who asked."""


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What a digest tells of.

    Args:
        query: Words of the search; only papers that match. None for all.
        sites: Only papers that act on one of these. Empty for all.
        papers: Whether it tells of new papers.
        evidence: Whether it tells of new verdicts.

    Raises:
        SubscriptionError: It tells of nothing, the query is too long or holds control characters, or a site is none
            of `papers.SITES`.
    """

    query: str | None = None
    sites: tuple[str, ...] = ()
    papers: bool = True
    evidence: bool = True

    def __post_init__(self) -> None:
        if not (self.papers or self.evidence):
            raise SubscriptionError("choose new papers, new evidence or both: a digest of neither is never sent")
        query = spaced(self.query or "")
        if len(query) > QUERY_LENGTH or not query.isprintable():
            raise SubscriptionError(f"the topic may have {QUERY_LENGTH} printable characters; shorten it")
        if unknown := set(self.sites) - set(SITES):
            raise SubscriptionError(f"no site is called {min(unknown)!r}: {nearest(min(unknown), SITES)}")
        object.__setattr__(self, "query", query or None)
        object.__setattr__(self, "sites", tuple(site for site in SITES if site in self.sites))

    def as_json(self) -> str:
        """For the database."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Wants:
        """The reverse of `as_json`."""
        told = json.loads(text)
        return cls(query=told["query"], sites=told["sites"], papers=told["papers"], evidence=told["evidence"])

    def in_words(self, *, topic: bool = True) -> str:
        """``new papers and new evidence, on “distillation”, acting on optim or weights``.

        Args:
            topic: Whether to repeat the words of the topic, or only that there is one.
        """
        kinds = [word for word, wanted in (("new papers", self.papers), ("new evidence", self.evidence)) if wanted]
        parts = [" and ".join(kinds)]
        if self.query:
            parts.append(f"on “{self.query}”" if topic else "on a topic that the page shows")
        if self.sites:
            parts.append("acting on " + _either(self.sites))
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What asking came to.

    Args:
        address: Normalised.
        token: To be mailed to the address and kept nowhere else; None when nothing is to be mailed.
    """

    address: str
    token: str | None


@dataclass(frozen=True, kw_only=True)
class Suppressed:
    """An address that gets no mail any more, because a mail server said that there is none.

    Args:
        address: Normalised.
        since: Seconds since 1970; None for one from before that was kept.
        words: The server's; empty where they were not kept.
    """

    address: str
    since: float | None
    words: str


@dataclass(frozen=True, kw_only=True)
class Subscription:
    """What a token is about."""

    wants: Wants
    every: Every


def check_topic(wants: Wants) -> None:
    """Refuse a topic of which a part would be left out, or that nothing could ever answer.

    Raises:
        SubscriptionError: It is one; the message says what was not understood.
    """
    if wants.query is not None and (why := topics.unclear(wants.query)) is not None:
        raise SubscriptionError(f"the topic “{wants.query}” is not clear: {why.rstrip('.')}")


def normalised(address: str) -> str:
    """An address as it is kept: its domain in ASCII, all in lower case, so that it is asked and counted once.

    Nothing is looked up.

    Raises:
        SubscriptionError: It is no address that mail can be sent to.
    """
    try:
        # The local part stays ASCII: beyond that a mail needs servers with SMTPUTF8 all the way.
        found = validate_email(address.strip(" "), check_deliverability=False, allow_smtputf8=False)
    except EmailNotValidError as e:
        raise SubscriptionError(f"this is no address that mail can be sent to: {str(e).rstrip('.')}") from e
    assert found.ascii_email is not None
    return found.ascii_email.lower()


def ask(database: Database, address: str, wants: Wants, every: Every, now: float) -> Outcome:
    """Ask for a subscription, or for a change of one; nothing is in force until the address confirms.

    Args:
        database: Of the feed.
        address: Where the digest shall go.
        wants: What it shall tell of.
        every: ``day`` or ``week``.
        now: Seconds since 1970.

    Returns:
        The token to mail. There is none where the address was sent one within the hour, or where a mail server said
        that there is no such address; the person who asked is told the same in all cases.

    Raises:
        SubscriptionError: The address is none, or ``every`` is neither.
    """
    if every not in ("day", "week"):
        raise SubscriptionError(f"a digest comes every day or every week, not every {every!r}")
    address = normalised(address)
    token = new_token()
    with database.write() as connection:
        _forget_unanswered(connection, now)
        row = connection.execute("SELECT id, state, asked FROM subscriber WHERE address = ?", (address,)).fetchone()
        if row and (row["state"] == "suppressed" or 0 <= now - row["asked"] < ASK_SECONDS):  # else: clock set back
            return Outcome(address=address, token=None)
        if row:
            subscriber = row["id"]
            connection.execute("UPDATE subscriber SET asked = ? WHERE id = ?", (now, subscriber))
        else:
            subscriber = connection.execute(
                "INSERT INTO subscriber (address, state, every, wants, created, asked) VALUES (?, ?, ?, ?, ?, ?)",
                (address, "pending", every, wants.as_json(), now, now),
            ).lastrowid
        asked = json.dumps({"every": every, "wants": wants.as_json()})
        connection.execute(
            "INSERT INTO token (hash, purpose, subscriber, wants, expires) VALUES (?, 'confirm', ?, ?, ?)",
            (_hash(token), subscriber, asked, now + CONFIRM_SECONDS),
        )
    return Outcome(address=address, token=token)


def invite(
    database: Database, address: str, wants: Wants, every: Every, now: float, *, to: Server, base: str
) -> Fate | None:
    """`ask`, and mail what confirms it.

    Args:
        database: Of the feed.
        address: Where the digest shall go.
        wants: What it shall tell of.
        every: ``day`` or ``week``.
        now: Seconds since 1970.
        to: Takes the mail.
        base: What links begin with.

    Returns:
        What became of the mail, or None where there was nothing to be mailed.

    Raises:
        SubscriptionError: As `ask`.
        MailError: The server cannot be used; it can be asked again at once.
    """
    outcome = ask(database, address, wants, every, now)
    if outcome.token is None:
        return None
    message = invitation(outcome.address, outcome.token, Subscription(wants=wants, every=every), to.sender, now, base)
    try:
        fate, words = asyncio.run(mail.send_one(to, message, outcome.address))
    except BaseException:
        _take_back(database, outcome.token)
        raise
    if fate in ("later", "refused"):
        _take_back(database, outcome.token)
    elif fate == "no such address":
        with database.write() as connection:
            row = connection.execute("SELECT id FROM subscriber WHERE address = ?", (outcome.address,)).fetchone()
            suppress(connection, row["id"], words, now)
    return fate


def invitation(
    address: str, token: str, subscription: Subscription, origin: Address, now: float, base: str
) -> EmailMessage:
    """The message that asks an address to confirm."""
    values = {
        "base": base,
        "confirm": f"{base}/confirm/{token}",
        "wants": subscription.wants.in_words(topic=False),  # a stranger's words go to nobody who has not asked
        "often": OFTEN[subscription.every],
    }
    return mail.compose(
        origin=origin,
        to=address,
        subject="Please confirm: papers by mail",
        text=mail.render("confirm.txt", **values),
        html=mail.render("confirm.html", **values),
        now=now,
        name=_hash(_hash(token)),
        unsubscribe=None,
    )


def _take_back(database: Database, token: str) -> None:
    """Take an asking back whose confirmation could not be mailed, so that it can be repeated at once."""
    with database.write() as connection:
        row = _token(connection, token, "confirm")
        if row is not None:
            connection.execute("UPDATE subscriber SET asked = 0 WHERE id = ?", (row["subscriber"],))
            connection.execute("DELETE FROM token WHERE hash = ?", (row["hash"],))


def look(database: Database, token: str, purpose: Purpose, now: float) -> Subscription | None:
    """What a token is about, or None if it is good for nothing (any more). Changes nothing."""
    connection = database.read()
    row = _token(connection, token, purpose)
    if row is None or (row["expires"] is not None and row["expires"] <= now):
        return None
    if row["wants"] is not None:
        return _asked(row["wants"])
    state = connection.execute(
        "SELECT state, every, wants FROM subscriber WHERE id = ?", (row["subscriber"],)
    ).fetchone()
    if purpose == "confirm" and state["state"] != "confirmed":
        return None
    return Subscription(wants=Wants.from_json(state["wants"]), every=state["every"])


def confirm(database: Database, token: str, now: float) -> Subscription | None:
    """Put into force what a confirmation token was asked for.

    Using it again changes nothing, and tells what is in force, until it expires or the subscription ends.

    Returns:
        What is now in force, or None: the token is unknown, expired, overtaken by another or was made for
        something else.
    """
    with database.write() as connection:
        row = _token(connection, token, "confirm")
        if row is None or row["expires"] <= now:
            return None
        if row["wants"] is not None:
            asked, subscriber = _asked(row["wants"]), row["subscriber"]
            # A digest begins with what comes from now on; who only changes what they want loses no verdict by it.
            connection.execute(
                "UPDATE subscriber SET every = ?, wants = ?, confirmed = ?, "
                "papers = (SELECT coalesce(max(id), 0) FROM paper), "
                "findings = CASE state WHEN 'confirmed' THEN findings "
                "ELSE (SELECT coalesce(max(id), 0) FROM finding) END, state = 'confirmed' "
                "WHERE id = ?",
                (asked.every, asked.wants.as_json(), now, subscriber),
            )
            connection.execute("UPDATE token SET wants = NULL WHERE hash = ?", (row["hash"],))
            connection.execute(
                "DELETE FROM token WHERE subscriber = ? AND purpose = 'confirm' AND hash <> ?",
                (subscriber, row["hash"]),
            )
            return asked
    return look(database, token, "confirm", now)


def unsubscribe(database: Database, token: str) -> bool:
    """End a subscription; whether the token is one of ours. Using it again changes nothing."""
    with database.write() as connection:
        row = _token(connection, token, "unsubscribe")
        if row is None:
            return False
        connection.execute(
            "UPDATE subscriber SET state = 'unsubscribed' WHERE id = ? AND state IN ('pending', 'confirmed')",
            (row["subscriber"],),
        )
        connection.execute("DELETE FROM token WHERE subscriber = ? AND purpose = 'confirm'", (row["subscriber"],))
    return True


def new_token() -> str:
    """A token that is good for nothing until its hash is kept."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def keep_unsubscribe_token(connection: sqlite3.Connection, token: str, subscriber: int) -> None:
    """Let a token end a subscription from now on; call it in the transaction that claims the mail with it."""
    connection.execute(
        "INSERT INTO token (hash, purpose, subscriber) VALUES (?, 'unsubscribe', ?)", (_hash(token), subscriber)
    )


def drop_unsubscribe_token(connection: sqlite3.Connection, token: str) -> None:
    """Forget the token of a mail that was never sent."""
    connection.execute("DELETE FROM token WHERE hash = ? AND purpose = 'unsubscribe'", (_hash(token),))


def suppress(connection: sqlite3.Connection, subscriber: int, words: str, now: float) -> None:
    """Mail an address no more, because a mail server said, in these words, that there is none."""
    connection.execute(
        "UPDATE subscriber SET state = 'suppressed', refused = ?, refusal = ? WHERE id = ?",
        (now, printed(words), subscriber),
    )
    connection.execute("DELETE FROM token WHERE subscriber = ? AND purpose = 'confirm'", (subscriber,))


def suppressed(connection: sqlite3.Connection, most: int = 200) -> list[Suppressed]:
    """The addresses that get no mail any more, for the owner, the latest first."""
    rows = connection.execute(
        "SELECT address, refused, refusal FROM subscriber WHERE state = 'suppressed' "
        "ORDER BY refused DESC, address LIMIT ?",
        (most,),
    ).fetchall()
    return [Suppressed(address=row["address"], since=row["refused"], words=row["refusal"] or "") for row in rows]


def allow_again(database: Database, address: str) -> bool:
    """Let a suppressed address be asked again; whether it was suppressed.

    Nothing is mailed by that, and nothing is in force: it is as an address that ended its subscription, or, where it
    never had one, as one that was never heard of.

    Raises:
        SubscriptionError: The address is none.
    """
    address = normalised(address)
    with database.write() as connection:
        row = connection.execute(
            "SELECT id, confirmed FROM subscriber WHERE address = ? AND state = 'suppressed'", (address,)
        ).fetchone()
        if row is None:
            return False
        if row["confirmed"] is None:
            connection.execute("DELETE FROM subscriber WHERE id = ?", (row["id"],))
        else:
            connection.execute(
                "UPDATE subscriber SET state = 'unsubscribed', asked = 0, refused = NULL, refusal = NULL WHERE id = ?",
                (row["id"],),
            )
    return True


def counts(connection: sqlite3.Connection) -> dict[str, int]:
    """How many subscribers there are by state, for the owner."""
    return dict(connection.execute("SELECT state, count(*) FROM subscriber GROUP BY state").fetchall())


def forget_unanswered(database: Database, now: float) -> None:
    """Forget addresses that did not confirm in time: they are nobody's subscribers, and not ours to keep."""
    if database.read().execute(f"SELECT 1 {_UNANSWERED}", (now,)).fetchone():  # to look makes no writer wait
        with database.write() as connection:
            _forget_unanswered(connection, now)


def _forget_unanswered(connection: sqlite3.Connection, now: float) -> None:
    connection.execute("DELETE FROM token WHERE expires <= ?", (now,))
    connection.execute(f"DELETE {_UNANSWERED}", (now,))


def _token(connection: sqlite3.Connection, token: str, purpose: Purpose) -> sqlite3.Row | None:
    if not re.fullmatch(r"[A-Za-z0-9_-]{43}", token):
        return None
    digest = _hash(token)
    row: sqlite3.Row | None = connection.execute(
        "SELECT hash, subscriber, wants, expires FROM token WHERE hash = ? AND purpose = ?", (digest, purpose)
    ).fetchone()
    return row if row is not None and hmac.compare_digest(row["hash"], digest) else None


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _asked(text: str) -> Subscription:
    told = json.loads(text)
    return Subscription(wants=Wants.from_json(told["wants"]), every=told["every"])


def _either(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
