"""Subscribing over the pages: nobody learns who is subscribed, no link does anything by being opened."""

import re
from http.cookies import SimpleCookie

import pytest
from mail_parts import BASE, DAY, HOUR, NOW, Catcher, add, application, dump, link_of, subscribed
from waiting import SECONDS, until
from web_parts import Clock

from perturbed.feed import subscriptions
from perturbed.feed.digest import send
from perturbed.feed.subscriptions import Wants
from perturbed.feed.web import subscribe

ANN, BO = "ann@example.org", "bo@example.org"
FILLED = {"email": ANN, "papers": "1", "evidence": "1", "query": "", "every": "day"}
ONE_CLICK = {"List-Unsubscribe": "One-Click"}


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def catcher(monkeypatch):
    with Catcher()() as made:
        monkeypatch.setenv("PERTURBED_SMTP", f"smtp://127.0.0.1:{made.port}")
        monkeypatch.setenv("PERTURBED_MAIL_FROM", "Papers <papers@example.org>")
        yield made


@pytest.fixture
def feed(tmp_path, clock, catcher):
    app, client = application(tmp_path, clock=clock)
    yield app.state.feed.database, client
    app.state.feed.database.close()


def state(database, address=ANN):
    row = database.read().execute("SELECT state FROM subscriber WHERE address = ?", (address,)).fetchone()
    return row["state"] if row else None


def digest_token(database, catcher, address=ANN):
    """Of a real digest that the server received."""
    subscribed(database, address)
    add(database, 1)
    send(database, "day", DAY, NOW, to=catcher.server, base=BASE)
    return link_of(catcher.messages[-1], "unsubscribe")


# --- the walk ----------------------------------------------------------------------------------------------------


def test_from_the_form_to_the_end(feed, catcher):
    database, client = feed
    assert 'action="/subscribe"' in client.get("/subscribe").text
    told = client.post("/subscribe", data={**FILLED, "query": "training", "site": ["optim", "data"], "every": "week"})
    assert told.status_code == 200
    assert "new papers and new evidence, on “training”, acting on data or optim" in told.text
    (message,) = catcher.messages
    token = link_of(message, "confirm")
    asked = client.get(f"/confirm/{token}")
    assert f'action="/confirm/{token}"' in asked.text
    assert state(database) == "pending"
    assert "Subscribed" in client.post(f"/confirm/{token}").text
    row = database.read().execute("SELECT * FROM subscriber").fetchone()
    assert (row["state"], row["every"]) == ("confirmed", "week")
    assert Wants.from_json(row["wants"]) == Wants(query="training", sites=("data", "optim"))
    with database.write() as connection:
        ends = subscriptions.new_token()
        subscriptions.keep_unsubscribe_token(connection, ends, row["id"])
    assert f'action="/unsubscribe/{ends}"' in client.get(f"/unsubscribe/{ends}").text
    assert state(database) == "confirmed"
    assert "Unsubscribed" in client.post(f"/unsubscribe/{ends}").text
    assert state(database) == "unsubscribed"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"email": "nobody"}, "no address"),
        ({"email": "ann@example.org\r\nBcc: all@example.org"}, "no address"),
        ({"every": "hour"}, "every day or every week"),
        ({"papers": None, "evidence": None}, "neither"),
        ({"query": "x" * 201}, "200"),
        ({"site": "<b>"}, "no site is called"),
        ({"query": "noise verdict:refuted"}, "There is no verdict"),  # else it would be all of noise, for good
        ({"query": "…"}, "neither a word nor a filter"),
    ],
)
def test_a_mistake_is_said_and_the_rest_kept(feed, catcher, wrong, said):
    database, client = feed
    before = dump(database)
    filled = {**FILLED, "query": '<i>"quoted"</i>', **wrong}
    told = client.post("/subscribe", data={name: value for name, value in filled.items() if value is not None})
    assert told.status_code == 400
    assert said in told.text
    assert 'role="alert"' in told.text
    assert "<i>" not in told.text
    assert "<b>" not in told.text.replace("<b>Not asked yet:</b>", "")
    if "query" not in wrong:
        assert 'value="&lt;i&gt;&#34;quoted&#34;&lt;/i&gt;"' in told.text
    assert dump(database) == before
    assert catcher.to == []


def test_a_file_in_the_place_of_words_is_none(feed):
    database, client = feed
    told = client.post("/subscribe", files={"email": ("x", b"x")}, data={"every": "day"})
    assert told.status_code == 400
    assert database.read().execute("SELECT count(*) FROM subscriber").fetchone()[0] == 0


def test_without_a_mail_server_the_page_says_so(feed, monkeypatch):
    database, client = feed
    monkeypatch.delenv("PERTURBED_SMTP")
    assert "No mail goes out from here" in client.get("/subscribe").text
    assert "<form method" not in client.get("/subscribe").text
    assert client.post("/subscribe", data=FILLED).status_code == 503
    monkeypatch.setenv("PERTURBED_SMTP", "smtp://ann:s3cret@x:y")
    assert "s3cret" not in client.get("/subscribe").text
    assert state(database) is None


# --- what the answer does not tell -------------------------------------------------------------------------------


def test_the_answer_is_the_same_for_every_address(feed, catcher):
    database, client = feed
    known = {
        "fresh": "fresh@example.org",
        "pending": "pending@example.org",
        "confirmed": "confirmed@example.org",
        "unsubscribed": "unsubscribed@example.org",
        "suppressed": "suppressed@example.org",
        "allowed again": "again@example.org",
    }
    subscriptions.ask(database, known["pending"], Wants(), "day", NOW - 10)
    for kind in ("confirmed", "unsubscribed", "suppressed"):
        subscribed(database, known[kind], now=NOW - 10 * HOUR)
        with database.write() as connection:
            connection.execute("UPDATE subscriber SET state = ? WHERE address = ?", (kind, known[kind]))
    subscribed(database, known["allowed again"], now=NOW - 10 * HOUR)
    with database.write() as connection:
        number = connection.execute(
            "SELECT id FROM subscriber WHERE address = ?", (known["allowed again"],)
        ).fetchone()[0]
        subscriptions.suppress(connection, number, "550 gone", NOW - HOUR)
    assert subscriptions.allow_again(database, known["allowed again"])
    answers = {kind: client.post("/subscribe", data={**FILLED, "email": to}) for kind, to in known.items()}
    first = answers["fresh"]
    for kind, answer in answers.items():
        assert answer.status_code == 200
        assert answer.content == first.content, kind  # byte for byte
        assert answer.headers == first.headers, kind
    mailed = ("fresh", "confirmed", "unsubscribed", "allowed again")
    assert sorted(catcher.to) == sorted(known[kind] for kind in mailed)


def test_nothing_of_the_address_is_looked_up_before_the_answer(feed, monkeypatch):
    """So neither can the time tell: the answer is whole before the database or the mail server is asked."""
    _, client = feed
    order = []
    rendered = subscribe.page
    monkeypatch.setattr(subscribe, "page", lambda *a, **k: (order.append("answer"), rendered(*a, **k))[1])
    invite = subscriptions.invite
    monkeypatch.setattr(subscriptions, "invite", lambda *a, **k: (order.append("invite"), invite(*a, **k))[1])
    asked = subscriptions.ask
    monkeypatch.setattr(subscriptions, "ask", lambda *a, **k: (order.append("ask"), asked(*a, **k))[1])
    client.post("/subscribe", data=FILLED)
    assert order == ["answer", "invite", "ask"]


def test_a_mail_server_that_fails_is_the_owners_matter(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PERTURBED_SMTP", "smtp://127.0.0.1:1")
    monkeypatch.setenv("PERTURBED_MAIL_FROM", "papers@example.org")
    app, client = application(tmp_path)
    assert client.post("/subscribe", data=FILLED).status_code == 200
    assert "could not be mailed" in caplog.text
    assert ANN not in caplog.text
    app.state.feed.database.close()


# --- links that are only opened ----------------------------------------------------------------------------------


def test_a_scanner_that_opens_every_link_changes_nothing(feed, catcher):
    database, client = feed
    ends = digest_token(database, catcher)
    client.post("/subscribe", data={**FILLED, "email": BO})
    asked = link_of(catcher.messages[-1], "confirm")
    before = dump(database)
    seen, waiting = set(), {f"{BASE}/subscribe", f"{BASE}/feeds"}
    for message in catcher.messages:
        for part in message.walk():
            if part.get_content_maintype() == "text":
                waiting |= set(re.findall(r"https://papers\.example\.org[^\s\"<>]*", part.get_content()))
        waiting |= set(re.findall(r"<(https:[^>]+)>", message.get("List-Unsubscribe", "")))
    assert {f"{BASE}/confirm/{asked}", f"{BASE}/unsubscribe/{ends}", f"{BASE}/unsubscribe/one-click/{ends}"} <= waiting
    while waiting and len(seen) < 120:
        url = waiting.pop()
        seen.add(url)
        for method in ("GET", "HEAD"):
            answer = client.request(method, url, headers={"Origin": ""})
            assert answer.status_code < 500
        if "/papers/" not in url:
            more = {
                f"{BASE}{path}"
                for path in re.findall(r'(?:href|action)="(/(?:subscribe|confirm|unsub|feeds)[^"]*)"', answer.text)
            }
            waiting |= more - seen
    assert dump(database) == before
    assert (state(database), state(database, BO)) == ("confirmed", "pending")


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
def test_only_a_post_ends_or_confirms(feed, catcher, method):
    database, client = feed
    ends = digest_token(database, catcher)
    asked = subscriptions.ask(database, BO, Wants(), "day", NOW).token
    before = dump(database)
    for path in (f"/unsubscribe/{ends}", f"/unsubscribe/one-click/{ends}", f"/confirm/{asked}"):
        client.request(method, path, content="List-Unsubscribe=One-Click")
    assert dump(database) == before


# --- one click ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [{"data": ONE_CLICK}, {"files": {"List-Unsubscribe": (None, "One-Click")}}], ids=["urlencoded", "multipart"]
)
def test_one_click_ends_it(feed, catcher, body):
    database, client = feed
    token = digest_token(database, catcher)
    address = re.search(r"<(https:[^>]+)>", catcher.messages[0]["List-Unsubscribe"])[1]
    assert address == f"{BASE}/unsubscribe/one-click/{token}"
    client.headers.pop("Origin")  # a mail program has none, nor cookies
    for _ in range(2):  # idempotent
        answer = client.post(address, **body)
        assert answer.status_code == 200
        assert "location" not in answer.headers
        assert not SimpleCookie(answer.headers.get("set-cookie", ""))
        assert state(database) == "unsubscribed"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/x-www-form-urlencoded"),
        (b"List-Unsubscribe=No", "application/x-www-form-urlencoded"),
        (b"x=One-Click", "application/x-www-form-urlencoded"),
        (b"List-Unsubscribe=One-Click", "text/plain"),
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"nonsense", "multipart/form-data"),
        (b'--x\r\nContent-Disposition: form-data; name="List-Unsubscribe"; filename="f"\r\n\r\nOne-Click\r\n--x--\r\n',
         "multipart/form-data; boundary=x"),
    ],
)  # fmt: skip
def test_one_click_wants_its_words(feed, catcher, body, kind):
    database, client = feed
    token = digest_token(database, catcher)
    answer = client.post(f"/unsubscribe/one-click/{token}", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert state(database) == "confirmed"


def test_one_click_with_another_token(feed, catcher):
    database, client = feed
    digest_token(database, catcher)
    confirm = subscriptions.ask(database, BO, Wants(), "day", NOW).token
    for token in ("x" * 43, confirm, "x"):
        assert client.post(f"/unsubscribe/one-click/{token}", data=ONE_CLICK).status_code == 404
    assert (state(database), state(database, BO)) == ("confirmed", "pending")


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/confirm/", "/unsubscribe/"])
@pytest.mark.parametrize("token", ["x", "x" * 43, "%00", "a%2fb"])
def test_a_made_up_link_is_told_so(feed, path, token):
    _, client = feed
    for method in ("GET", "POST"):
        assert client.request(method, f"{path}{token}").status_code == 404


def test_a_confirmation_is_over_after_two_days(feed, clock):
    database, client = feed
    token = subscriptions.ask(database, ANN, Wants(), "day", NOW).token
    clock.now = NOW + 48 * HOUR
    assert client.get(f"/confirm/{token}").status_code == 404
    assert client.post(f"/confirm/{token}").status_code == 404
    assert state(database) == "pending"


@pytest.mark.parametrize("path", ["/subscribe", "/confirm/{confirm}", "/unsubscribe/{end}"])
def test_forms_of_other_sites_do_nothing(feed, catcher, path):
    database, client = feed
    end = digest_token(database, catcher)
    confirm = subscriptions.ask(database, BO, Wants(), "day", NOW).token
    before = dump(database)
    for headers in ({"Origin": "https://evil.example"}, {"Origin": ""}, {"Sec-Fetch-Site": "cross-site"}):
        answer = client.post(path.format(confirm=confirm, end=end), data=FILLED, headers=headers)
        assert answer.status_code == 403
    assert dump(database) == before


def test_who_asks_too_often_waits(feed, catcher):
    _, client = feed
    codes = [client.post("/subscribe", data={**FILLED, "email": f"n{n}@example.org"}).status_code for n in range(12)]
    assert codes == [200] * 10 + [429] * 2
    assert len(catcher.to) == 10


def test_on_loopback_only_the_owner_subscribes_but_links_work_for_all(tmp_path, catcher):
    app, client = application(tmp_path, public=None)
    database = app.state.feed.database
    assert client.get("/subscribe").status_code == 403
    assert client.post("/subscribe", data=FILLED).status_code == 403
    token = subscriptions.ask(database, ANN, Wants(), "day", NOW).token
    assert client.get(f"/confirm/{token}").status_code == 200
    assert client.post(f"/confirm/{token}").status_code == 200
    assert state(database) == "confirmed"
    client.cookies.clear()
    assert client.get(f"/owner?token={app.state.feed.settings.owner_token}").status_code == 303
    page = client.get("/subscribe").text
    csrf = re.search(r'name="csrf" value="([0-9a-f]+)"', page)[1]
    assert client.post("/subscribe", data={**FILLED, "email": BO}).status_code == 403  # without the form's token
    assert client.post("/subscribe", data={**FILLED, "email": BO, "csrf": csrf}).status_code == 200
    assert catcher.to == [BO]
    assert "http://127.0.0.1:8000/confirm/" in catcher.messages[0].get_body(("plain",)).get_content()
    database.close()


def test_pages_with_tokens_are_kept_by_nobody(feed):
    database, client = feed
    token = subscriptions.ask(database, ANN, Wants(), "day", NOW).token
    answer = client.get(f"/confirm/{token}")
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert "private" in answer.headers["cache-control"]
    assert 'content="noindex"' in answer.text


def test_the_answer_does_not_wait_for_the_mail_server(tmp_path, catcher):
    """Over a real socket: a server that hangs at the mail does not hold the page up."""
    import threading

    import httpx
    import uvicorn

    hang = threading.Event()

    async def slow(server, session, envelope, address, options):
        import asyncio

        await asyncio.to_thread(hang.wait, SECONDS)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    catcher.handle_RCPT = slow
    app, _ = application(tmp_path)
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        headers = {"Host": "papers.example.org", "Origin": BASE}
        answer = httpx.post(f"http://127.0.0.1:{port}/subscribe", data=FILLED, headers=headers, timeout=SECONDS / 2)
        assert answer.status_code == 200
        assert catcher.to == []  # and the mail server hangs for longer than the answer was waited for
    finally:
        hang.set()
        server.should_exit = True
        thread.join(SECONDS)
    assert catcher.to == [ANN]
    app.state.feed.database.close()


def test_a_provider_may_end_many_subscriptions_from_one_address(feed):
    _, client = feed
    codes = [client.post(f"/unsubscribe/one-click/{'x' * 43}", data=ONE_CLICK).status_code for _ in range(601)]
    assert codes == [404] * 600 + [429]


# --- refused addresses -------------------------------------------------------------------------------------------


def test_the_owner_lets_a_refused_address_be_asked_again(tmp_path, catcher):
    """The whole way: refused by a real server, listed, let go, asked again, and in force only once confirmed."""
    app, client = application(tmp_path, clock=Clock(NOW))
    database = app.state.feed.database
    catcher.refuse_rcpt[ANN] = "550 5.1.1 <b>unknown</b>"
    client.post("/subscribe", data=FILLED)
    assert state(database) == "suppressed"
    del catcher.refuse_rcpt[ANN]
    client.post("/subscribe", data=FILLED)
    assert catcher.to == []  # nothing goes there, whoever asks
    before = dump(database)
    assert client.post("/subscribers/again", data={"address": ANN}).status_code == 403
    assert ANN not in client.get("/settings").text
    assert dump(database) == before

    assert client.get(f"/owner?token={app.state.feed.settings.owner_token}").status_code == 303
    shown = client.get("/settings").text
    assert ANN in shown
    assert "550 5.1.1 &lt;b&gt;unknown&lt;/b&gt;" in shown
    assert "17 November 2025, 18:00 UTC" in shown
    assert client.get(f"/subscribers/again?address={ANN}").status_code == 405
    assert client.post("/subscribers/again", data={"address": ANN}).status_code == 403  # without the form's token
    token = re.search(r'name="csrf" value="([0-9a-f]+)"', shown)[1]
    assert client.post("/subscribers/again", data={"csrf": token, "address": "<b>"}).status_code == 400
    assert dump(database) == before
    form = re.search(r'action="/subscribers/again">(.*?)</form>', shown)[1]
    sent = dict(re.findall(r'name="(\w+)" value="([^"]*)"', form))
    for _ in range(2):  # pressed twice it is no mistake
        answer = client.post("/subscribers/again", data=sent)
        assert (answer.status_code, answer.headers["location"]) == (303, "/settings#suppressed")
    assert ANN not in client.get("/settings").text
    assert catcher.to == []  # nothing is mailed by that

    client.cookies.clear()
    client.post("/subscribe", data=FILLED)
    assert catcher.to == [ANN]
    assert state(database) == "pending"
    assert client.post(f"/confirm/{link_of(catcher.messages[0], 'confirm')}").status_code == 200
    assert state(database) == "confirmed"
    database.close()


def test_of_very_many_refused_addresses_the_latest_are_listed(tmp_path):
    app, client = application(tmp_path)
    database = app.state.feed.database
    values = "(address, state, every, wants, created, asked, refused) VALUES (?, 'suppressed', 'day', ?, 0, 0, ?)"
    with database.write() as connection:
        rows = [(f"n{n}@example.org", Wants().as_json(), NOW + n) for n in range(203)]
        connection.executemany(f"INSERT INTO subscriber {values}", rows)
    client.get(f"/owner?token={app.state.feed.settings.owner_token}")
    shown = client.get("/settings").text
    listed = [int(n) for n in re.findall(r'<th scope="row">n(\d+)@example.org', shown)]
    assert listed == list(range(202, 2, -1))
    assert "The latest 200 of 203." in shown
    token = re.search(r'name="csrf" value="([0-9a-f]+)"', shown)[1]
    # Whoever floods the list with addresses that are none hides no other: it is let go by its name.
    assert client.post("/subscribers/again", data={"csrf": token, "address": "n0@example.org"}).status_code == 303
    assert "The latest 200 of 202." in client.get("/settings").text
    assert state(database, "n0@example.org") is None
    database.close()
