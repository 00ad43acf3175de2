"""Subscribing: confirmed by the address itself, ended for good, and nothing to be had from the database."""

import dataclasses
import gc
import hashlib
import socket
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from mail_parts import BASE, HOUR, NOW, Catcher, add, dump, html_of, link_of, self_signed, text_of
from waiting import SECONDS

from perturbed.feed import mail, subscriptions
from perturbed.feed.database import Database
from perturbed.feed.mail import MailError
from perturbed.feed.schema import STEPS
from perturbed.feed.subscriptions import SubscriptionError, Wants, ask, confirm, look, unsubscribe

ANN = "ann@example.org"


def state(database, address=ANN):
    row = database.read().execute("SELECT state FROM subscriber WHERE address = ?", (address,)).fetchone()
    return row["state"] if row else None


def subscriber(database, address=ANN):
    return dict(database.read().execute("SELECT * FROM subscriber WHERE address = ?", (address,)).fetchone())


def unsubscribe_token(database, address=ANN):
    token = subscriptions.new_token()
    with database.write() as connection:
        subscriptions.keep_unsubscribe_token(connection, token, subscriber(database, address)["id"])
    return token


# --- addresses and wishes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("Ann@Example.ORG", "ann@example.org"),
        (" ann@example.org ", "ann@example.org"),
        ("ann@bücher.example.org", "ann@xn--bcher-kva.example.org"),
        ("ann+papers@example.org", "ann+papers@example.org"),
    ],
)
def test_an_address_is_kept_in_one_writing(typed, kept):
    assert subscriptions.normalised(typed) == kept


@pytest.mark.parametrize(
    "typed",
    [
        "",
        "ann",
        "ann@localhost",
        "ünn@example.org",
        '"ann bo"@example.org',
        "Ann <ann@example.org>",
        "ann@example.org, bo@example.org",
        "ann@example.org\r\nBcc: all@example.org",
        "ann@example.org\nBcc: all@example.org",
        "ann@example.org\n",
        "ann\x00@example.org",
        "ann@example.org\u2028",
        "a" * 300 + "@example.org",
    ],
)
def test_what_is_no_address_is_refused(database, typed):
    with pytest.raises(SubscriptionError, match="no address"):
        ask(database, typed, Wants(), "day", NOW)
    assert database.read().execute("SELECT count(*) FROM subscriber").fetchone()[0] == 0


def test_wishes_are_checked():
    assert Wants(query="  flat   minima ", sites=("optim", "data", "optim")).sites == ("data", "optim")
    assert Wants(query="  flat   minima ").query == "flat minima"
    assert Wants(query="  ").query is None
    with pytest.raises(SubscriptionError, match="neither"):
        Wants(papers=False, evidence=False)
    with pytest.raises(SubscriptionError, match=r"weigths.*weights"):
        Wants(sites=("weigths",))
    with pytest.raises(SubscriptionError, match="200"):
        Wants(query="x" * 201)
    with pytest.raises(SubscriptionError, match="printable"):
        Wants(query="a\x00b")


def test_wishes_come_back_and_read_well():
    wants = Wants(query="flat minima", sites=("weights", "optim"), evidence=False)
    assert Wants.from_json(wants.as_json()) == wants
    assert wants.in_words() == "new papers, on “flat minima”, acting on weights or optim"
    assert Wants().in_words() == "new papers and new evidence"


def test_only_every_day_or_week(database):
    with pytest.raises(SubscriptionError, match="hour"):
        ask(database, ANN, Wants(), "hour", NOW)


# --- asking and confirming ---------------------------------------------------------------------------------------


def test_nothing_is_in_force_before_the_address_confirms(database):
    outcome = ask(database, "ANN@example.org", Wants(query="x"), "week", NOW)
    assert outcome.address == ANN
    assert state(database) == "pending"
    assert confirm(database, outcome.token, NOW + 60).wants == Wants(query="x")
    row = subscriber(database)
    assert (row["state"], row["every"], row["confirmed"]) == ("confirmed", "week", NOW + 60)


def test_only_the_hash_of_a_token_is_kept(database):
    token = ask(database, ANN, Wants(), "day", NOW).token
    other = unsubscribe_token(database)
    stored = "\n".join(dump(database))
    for secret in (token, other):
        assert len(secret) == 43  # 256 bits
        assert secret not in stored
        assert hashlib.sha256(secret.encode()).hexdigest() in stored


def test_one_confirmation_an_hour_however_the_address_is_written(database):
    assert ask(database, ANN, Wants(), "day", NOW).token
    assert ask(database, "Ann@EXAMPLE.org", Wants(query="x"), "day", NOW + HOUR - 1).token is None
    assert ask(database, ANN, Wants(), "day", NOW + HOUR).token


def test_a_clock_that_was_ahead_keeps_nobody_waiting(database):
    assert ask(database, ANN, Wants(), "day", NOW + 400 * 24 * HOUR).token
    assert ask(database, ANN, Wants(), "day", NOW).token
    assert ask(database, ANN, Wants(), "day", NOW + 60).token is None


def test_words_of_a_stranger_are_mailed_to_nobody():
    """Else the form would send whatever somebody types to whomever, in our name."""
    wants = Wants(query="cheap pills at pills.example", sites=("data",))
    about = subscriptions.Subscription(wants=wants, every="day")
    origin = mail.sender({"PERTURBED_MAIL_FROM": "papers@example.org"})
    message = subscriptions.invitation(ANN, "t" * 43, about, origin, NOW, BASE)
    for text in (text_of(message), html_of(message), str(message["Subject"])):
        assert "pills" not in text
    assert "on a topic that the page shows, acting on data" in " ".join(text_of(message).split())


def test_a_confirmed_address_is_limited_alike(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    assert ask(database, ANN, Wants(query="x"), "day", NOW + 60).token is None


def test_a_confirmation_lives_two_days(database):
    token = ask(database, ANN, Wants(), "day", NOW).token
    late = NOW + subscriptions.CONFIRM_SECONDS
    assert look(database, token, "confirm", late - 1)
    assert look(database, token, "confirm", late) is None
    assert confirm(database, token, late) is None
    assert state(database) == "pending"


def test_a_token_serves_one_purpose(database):
    asked = ask(database, ANN, Wants(), "day", NOW).token
    assert not unsubscribe(database, asked)
    assert look(database, asked, "unsubscribe", NOW) is None
    confirm(database, asked, NOW)
    ends = unsubscribe_token(database)
    assert confirm(database, ends, NOW) is None
    assert look(database, ends, "confirm", NOW) is None
    assert unsubscribe(database, ends)


@pytest.mark.parametrize("token", ["", "x", "' OR 1=1 --", "a" * 43, "ü" * 43, "a" * 10_000])
def test_a_made_up_token_does_nothing(database, token):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    before = dump(database)
    assert confirm(database, token, NOW) is None
    assert not unsubscribe(database, token)
    assert dump(database) == before


def test_confirming_twice_changes_nothing_more(database):
    token = ask(database, ANN, Wants(query="x"), "day", NOW).token
    first = confirm(database, token, NOW)
    before = dump(database)
    assert confirm(database, token, NOW + 5) == first
    assert dump(database) == before


def test_a_used_confirmation_brings_nobody_back(database):
    token = ask(database, ANN, Wants(), "day", NOW).token
    confirm(database, token, NOW)
    unsubscribe(database, unsubscribe_token(database))
    assert confirm(database, token, NOW + 5) is None
    assert state(database) == "unsubscribed"


def test_looking_changes_nothing(database):
    token = ask(database, ANN, Wants(query="x"), "day", NOW).token
    ends = unsubscribe_token(database)
    before = dump(database)
    assert look(database, token, "confirm", NOW).wants.query == "x"
    assert look(database, ends, "unsubscribe", NOW)
    assert dump(database) == before


def test_a_change_needs_confirming_too(database):
    confirm(database, ask(database, ANN, Wants(query="old"), "day", NOW).token, NOW)
    token = ask(database, ANN, Wants(query="new"), "week", NOW + HOUR).token
    assert Wants.from_json(subscriber(database)["wants"]).query == "old"
    assert state(database) == "confirmed"
    confirm(database, token, NOW + HOUR)
    row = subscriber(database)
    assert (Wants.from_json(row["wants"]).query, row["every"]) == ("new", "week")


def test_of_two_confirmations_one_counts(database):
    first = ask(database, ANN, Wants(query="first"), "day", NOW).token
    second = ask(database, ANN, Wants(query="second"), "day", NOW + HOUR).token
    assert confirm(database, second, NOW + HOUR)
    assert confirm(database, first, NOW + HOUR) is None
    assert Wants.from_json(subscriber(database)["wants"]).query == "second"


def test_who_changes_loses_no_finding(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    paper = add(database, 1)
    with database.write() as connection:
        connection.execute("INSERT INTO finding (paper, record, verdict, at) VALUES (?, 'aa', 'null', ?)", (paper, NOW))
    confirm(database, ask(database, ANN, Wants(query="x"), "day", NOW + HOUR).token, NOW + HOUR)
    assert subscriber(database)["findings"] == 0  # the verdict is still to be told
    confirm(database, ask(database, "bo@example.org", Wants(), "day", NOW).token, NOW)
    assert subscriber(database, "bo@example.org")["findings"] == 1  # it was there before


def test_who_never_confirms_is_forgotten(database):
    ask(database, ANN, Wants(), "day", NOW)
    confirm(database, ask(database, "bo@example.org", Wants(), "day", NOW).token, NOW)
    ask(database, "cy@example.org", Wants(), "day", NOW + subscriptions.CONFIRM_SECONDS)
    assert state(database) is None
    assert ANN not in "\n".join(dump(database))
    assert state(database, "bo@example.org") == "confirmed"


# --- ending ------------------------------------------------------------------------------------------------------


def test_ending_twice_is_ending_once(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    token, earlier = unsubscribe_token(database), unsubscribe_token(database)
    assert unsubscribe(database, token)
    before = dump(database)
    assert unsubscribe(database, token)
    assert unsubscribe(database, earlier)
    assert dump(database) == before
    assert state(database) == "unsubscribed"


def test_who_ended_can_come_back_by_confirming(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    unsubscribe(database, unsubscribe_token(database))
    token = ask(database, ANN, Wants(), "day", NOW + HOUR).token
    assert state(database) == "unsubscribed"
    confirm(database, token, NOW + HOUR)
    assert state(database) == "confirmed"


def test_ending_takes_an_open_change_back(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    change = ask(database, ANN, Wants(query="x"), "day", NOW + HOUR).token
    unsubscribe(database, unsubscribe_token(database))
    assert confirm(database, change, NOW + HOUR) is None
    assert state(database) == "unsubscribed"


def test_a_later_mail_that_did_not_go_out_leaves_the_earlier_one_good(database):
    token = ask(database, ANN, Wants(), "day", NOW).token
    with Catcher(refuse_rcpt={ANN: "450 4.2.1 try again later"})() as catcher:
        assert invite(database, catcher, now=NOW + 2 * HOUR) == "later"
    subscriptions.forget_unanswered(database, NOW + 2 * HOUR)
    ask(database, "bo@example.org", Wants(), "day", NOW + 2 * HOUR)
    assert confirm(database, token, NOW + 3 * HOUR) is not None
    assert state(database) == "confirmed"


def test_a_suppressed_address_stays_so(database):
    token = ask(database, ANN, Wants(), "day", NOW).token
    with database.write() as connection:
        subscriptions.suppress(connection, subscriber(database)["id"], "550 no such user", NOW)
    assert confirm(database, token, NOW) is None
    assert ask(database, ANN, Wants(), "day", NOW + 100 * HOUR).token is None
    assert unsubscribe(database, unsubscribe_token(database))
    assert state(database) == "suppressed"


def suppressed(database):
    return [(one.address, one.since, one.words) for one in subscriptions.suppressed(database.read())]


def test_a_refused_address_is_listed_with_the_servers_words(database):
    with Catcher(refuse_rcpt={ANN: "550 5.1.1 no\u202e such <b>user</b>"})() as catcher:
        invite(database, catcher)
    ask(database, "bo@example.org", Wants(), "day", NOW)
    assert suppressed(database) == [(ANN, NOW, "550 5.1.1 no such <b>user</b>")]


def test_an_address_that_may_be_asked_again_has_to_confirm_again(database):
    confirm(database, ask(database, ANN, Wants(query="old"), "day", NOW).token, NOW)
    left = unsubscribe_token(database)
    with database.write() as connection:
        subscriptions.suppress(connection, subscriber(database)["id"], "550 gone", NOW)
    assert subscriptions.allow_again(database, ANN)
    assert suppressed(database) == []
    assert state(database) == "unsubscribed"  # which gets nothing
    assert not subscriptions.allow_again(database, ANN)
    token = ask(database, ANN, Wants(query="new"), "week", NOW + 1).token
    assert token, "the hour since the last asking is not waited for"
    assert state(database) == "unsubscribed"
    assert confirm(database, token, NOW + 2).wants == Wants(query="new")
    row = subscriber(database)
    assert (row["state"], row["refused"], row["refusal"]) == ("confirmed", None, None)
    assert unsubscribe(database, left)  # the links in earlier mails stay good


def test_one_that_never_confirmed_is_forgotten_when_it_may_be_asked_again(database):
    with Catcher(refuse_rcpt={ANN: "550 5.1.1 no such user"})() as catcher:
        invite(database, catcher)
    assert subscriptions.allow_again(database, ANN)
    assert state(database) is None
    with Catcher()() as catcher:
        assert invite(database, catcher, now=NOW + 1) == "sent"
    assert state(database) == "pending"


@pytest.mark.parametrize("was", ["pending", "confirmed", "unsubscribed"])
def test_only_a_suppressed_address_is_changed(database, was):
    ask(database, ANN, Wants(), "day", NOW)
    with database.write() as connection:
        connection.execute("UPDATE subscriber SET state = ?", (was,))
        connection.execute(
            "INSERT INTO subscriber (address, state, every, wants, created, asked) "
            "VALUES ('gone@example.org', 'suppressed', 'day', '{}', 0, 0)"
        )
    before = dump(database)
    assert not subscriptions.allow_again(database, ANN)
    assert not subscriptions.allow_again(database, "nobody@example.org")
    with pytest.raises(SubscriptionError, match="no address"):
        subscriptions.allow_again(database, "1")
    assert dump(database) == before


def test_an_address_is_let_go_however_it_is_written(database):
    ask(database, ANN, Wants(), "day", NOW)
    with database.write() as connection:
        subscriptions.suppress(connection, subscriber(database)["id"], "550 gone", NOW)
    assert subscriptions.allow_again(database, f" {ANN.upper()} ")
    assert suppressed(database) == []


def test_addresses_refused_before_the_words_were_kept_are_listed_too(tmp_path, monkeypatch):
    """A file of the first version, with a suppressed address in it."""
    path = tmp_path / "old.sqlite"
    with monkeypatch.context() as old:
        old.setattr("perturbed.feed.database.STEPS", STEPS[:1])
        first = Database(path)
        with first.write() as connection:
            connection.execute(
                "INSERT INTO subscriber (address, state, every, wants, created, asked) VALUES (?, ?, ?, ?, ?, ?)",
                (ANN, "suppressed", "day", Wants().as_json(), NOW, NOW),
            )
        first.close()
    with closing(Database(path)) as database:
        assert suppressed(database) == [(ANN, None, "")]
        assert subscriptions.allow_again(database, ANN)
    assert path.with_name("old.sqlite.v1.backup").exists()


def test_counts_by_state(database):
    confirm(database, ask(database, ANN, Wants(), "day", NOW).token, NOW)
    ask(database, "bo@example.org", Wants(), "day", NOW)
    assert subscriptions.counts(database.read()) == {"confirmed": 1, "pending": 1}


# --- the mail that asks ------------------------------------------------------------------------------------------


def invite(database, catcher, address=ANN, now=NOW):
    return subscriptions.invite(database, address, Wants(), "day", now, to=catcher.server, base=BASE)


def test_the_link_in_the_mail_confirms(database):
    with Catcher()() as catcher:
        assert invite(database, catcher) == "sent"
        assert invite(database, catcher, now=NOW + 60) is None  # within the hour
    (message,) = catcher.messages
    assert catcher.to == [ANN]
    assert message["To"] == ANN
    assert message["From"] == "Papers <papers@example.org>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert f"{BASE}/confirm/" in text_of(message)
    assert confirm(database, link_of(message, "confirm"), NOW) is not None


@pytest.mark.parametrize(
    ("answer", "fate", "then"),
    [
        ("550 5.1.1 no such user", "no such address", "suppressed"),
        ("552 mailbox full", "later", "pending"),
        ("550 5.2.2 over quota", "later", "pending"),
        ("550 5.7.1 relaying denied", "later", "pending"),
        ("530 log in first", "later", "pending"),
        ("451 greylisted", "later", "pending"),
    ],
)
def test_what_the_server_says_of_the_address(database, answer, fate, then):
    with Catcher(refuse_rcpt={ANN: answer})() as catcher:
        assert invite(database, catcher) == fate
    assert state(database) == then
    again = ask(database, ANN, Wants(), "day", NOW + 60).token
    assert (again is None) == (then == "suppressed")  # what was not mailed can be asked for again at once


def test_an_unreachable_server_takes_nothing_and_says_so(database, unused_port):
    server = dataclasses.replace(Catcher_server(), port=unused_port)
    with pytest.raises(MailError, match=f"127.0.0.1:{unused_port} cannot be used.*PERTURBED_SMTP"):
        subscriptions.invite(database, ANN, Wants(), "day", NOW, to=server, base=BASE)
    assert ask(database, ANN, Wants(), "day", NOW).token


def Catcher_server():
    catcher = Catcher()
    catcher.port = 1
    return catcher.server


@pytest.fixture
def unused_port():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# --- the server's settings ---------------------------------------------------------------------------------------

FROM = {"PERTURBED_MAIL_FROM": "Papers <papers@example.org>"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("smtp://ann:s3cret%2F%3A%40@mail.example.org", ("mail.example.org", 587, "ann", "s3cret/:@", False, True)),
        ("smtp://ann:x@mail.example.org:2525", ("mail.example.org", 2525, "ann", "x", False, True)),
        ("smtps://ann:x@mail.example.org", ("mail.example.org", 465, "ann", "x", True, False)),
        ("smtp://localhost:1025", ("localhost", 1025, None, None, False, False)),
        ("smtp://[::1]:1025", ("::1", 1025, None, None, False, False)),
        ("smtp://relay.example.org", ("relay.example.org", 25, None, None, False, None)),
        ("smtp://ann:x@localhost:1025", ("localhost", 1025, "ann", "x", False, True)),
    ],
)
def test_server_of_the_environment(address, expected):
    found = mail.server({"PERTURBED_SMTP": address, **FROM})
    assert (found.host, found.port, found.user, found.password, found.implicit_tls, found.start_tls) == expected
    assert str(found.sender) == "Papers <papers@example.org>"


def test_no_server_is_none(monkeypatch):
    monkeypatch.delenv("PERTURBED_SMTP", raising=False)
    assert mail.server({}) is None
    with pytest.raises(MailError, match="PERTURBED_SMTP"):
        mail.needed()


@pytest.mark.parametrize(
    "address",
    [
        "mail.example.org",
        "http://mail.example.org",
        "smtp://",
        "smtp://ann:s3cret@mail.example.org:port",
        "smtp://ann@mail.example.org",
        "smtp://ann:s3cret@mail.example.org/path",
        "smtp://ann:s3cret#@mail.example.org",
    ],
)
def test_a_wrong_server_is_refused_without_telling_the_password(address):
    with pytest.raises(MailError, match="PERTURBED_SMTP") as told:
        mail.server({"PERTURBED_SMTP": address, **FROM})
    assert "s3cret" not in str(told.value)


def test_the_password_is_in_no_repr():
    assert "s3cret" not in repr(mail.server({"PERTURBED_SMTP": "smtp://ann:s3cret@mail.example.org", **FROM}))


@pytest.mark.parametrize("sender", ["papers", "", "a@b.org\r\nBcc: c@example.org", "x\n <a@b.org>"])
def test_a_sender_that_is_no_address_is_refused(sender):
    with pytest.raises(MailError, match="PERTURBED_MAIL_FROM"):
        mail.server({"PERTURBED_SMTP": "smtp://localhost:1025", "PERTURBED_MAIL_FROM": sender})


def test_a_password_is_never_sent_in_the_clear(database):
    with Catcher(require_auth=True)() as catcher:  # offers AUTH, and no STARTTLS
        server = dataclasses.replace(catcher.server, user="ann", password="s3cret/:@")
        with pytest.raises(MailError, match="STARTTLS"):
            subscriptions.invite(database, ANN, Wants(), "day", NOW, to=server, base=BASE)
    assert catcher.logins == []
    assert catcher.to == []


def test_login_after_starttls(database, tmp_path, monkeypatch):
    context, certificate = self_signed(tmp_path)
    with Catcher(tls=context, require_auth=True)() as catcher:
        server = dataclasses.replace(catcher.server, host="localhost", user="ann", password="s3cret/:@")
        with pytest.raises(MailError, match="certificate"):  # nobody vouches for it
            subscriptions.invite(database, ANN, Wants(), "day", NOW, to=server, base=BASE)
        assert catcher.logins == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        wrong = dataclasses.replace(server, password="wr0ng")
        with pytest.raises(MailError, match="refuses the user or password") as told:
            subscriptions.invite(database, ANN, Wants(), "day", NOW, to=wrong, base=BASE)
        assert "wr0ng" not in str(told.value)
        assert subscriptions.invite(database, ANN, Wants(), "day", NOW, to=server, base=BASE) == "sent"
    assert (b"ann", b"s3cret/:@") in catcher.logins


def test_no_connection_is_left_to_a_server_that_does_not_end_tls(database, tmp_path, monkeypatch):
    context, certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    listener, looked = socket.create_server(("127.0.0.1", 0)), threading.Event()
    listener.settimeout(SECONDS)
    server = dataclasses.replace(
        Catcher_server(), host="localhost", port=listener.getsockname()[1], user="ann", password="wr0ng"
    )

    def serve():
        plain, _ = listener.accept()
        with plain:
            told(plain, None, b"220 at your service")
            told(plain, b"EHLO", b"250-here\r\n250 STARTTLS")
            told(plain, b"STARTTLS", b"220 go on")
            with context.wrap_socket(plain, server_side=True) as secret:
                told(secret, b"EHLO", b"250-here\r\n250 AUTH PLAIN")
                told(secret, b"AUTH PLAIN", b"535 no")
                assert looked.wait(SECONDS)

    with listener, ThreadPoolExecutor(1) as pool, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        serving = pool.submit(serve)
        with pytest.raises(MailError, match="refuses the user or password"):
            subscriptions.invite(database, ANN, Wants(), "day", NOW, to=server, base=BASE)
        gc.collect()
        looked.set()
        serving.result(SECONDS)
    assert [str(one.message) for one in warned if one.category is ResourceWarning] == []


def told(connection, expected, answer):
    if expected is not None:
        assert connection.recv(1000).startswith(expected)
    connection.sendall(answer + b"\r\n")


# --- headers -----------------------------------------------------------------------------------------------------


def compose(**more):
    fields = {
        "origin": Catcher_server().sender,
        "to": ANN,
        "subject": "x",
        "text": "x",
        "html": "<p>x",
        "now": NOW,
        "name": "n",
        "unsubscribe": f"{BASE}/unsubscribe/one-click/{'a' * 43}",
    }
    return mail.compose(**{**fields, **more})


@pytest.mark.parametrize("field", ["to", "subject", "unsubscribe", "name"])
def test_no_header_can_be_smuggled_in(field):
    with pytest.raises(ValueError, match=r"(?i)linefeed|newline|CR|LF|invalid|expected"):
        compose(**{field: "x@example.org\r\nBcc: all@example.org"}).as_bytes(policy=mail.POLICY)


def test_a_long_unsubscribe_address_stays_whole():
    address = f"https://{'papers.' * 12}example.org/unsubscribe/one-click/{'a' * 43}"
    raw = compose(unsubscribe=address).as_bytes(policy=mail.POLICY).decode("ascii")
    line = f"List-Unsubscribe: <{address}>, <mailto:papers@example.org?subject=unsubscribe>\r\n"
    assert len(line) > 78
    assert line in raw
    assert "List-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n" in raw
    assert max(map(len, raw.split("\r\n"))) <= 998


@pytest.mark.parametrize("sender", ["no-reply@example.org", "NoReply@example.org", "papers@perturbed.invalid"])
def test_nobody_is_asked_to_write_where_nobody_reads(sender):
    message = compose(origin=mail.sender({"PERTURBED_MAIL_FROM": sender}))
    assert "mailto:" not in message["List-Unsubscribe"]
