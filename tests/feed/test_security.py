"""Who may do what: each guard of the pages, by a request that it must refuse."""

import errno
import re
import stat
from html import unescape
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from waiting import SECONDS
from web_parts import (
    HERE,
    NOW,
    OURS,
    TOKEN,
    Clock,
    add,
    app_of,
    dump,
    form_token,
    links,
    owner,
    papers,
    post,
    visitor,
)

from perturbed.feed import store
from perturbed.feed.papers import Paper
from perturbed.feed.web import security
from perturbed.feed.web.pages import static_file
from perturbed.feed.web.settings import Settings

PAGES = ("/", "/day/2025-11-17", "/week/2025-W47", "/month/2025-11", "/trending", "/search", "/search?q=sheep", "/map")
PAGES += ("/papers/2511.09001", "/papers/2406.02214", "/runs", "/about", "/feeds", "/owner", "/settings", "/subscribe")
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


@pytest.fixture
def app(tmp_path):
    app = app_of(tmp_path)
    add(app, *papers())
    return app


# --- what is shown -----------------------------------------------------------------------------------------------


def test_whatever_a_source_says_is_text(app):
    (number,) = add(
        app,
        Paper(
            title=f"Evil {EVIL}",
            source="hub",
            arxiv="2511.09666",
            abstract=f"needle {EVIL} and words",
            authors=(f"Eve {EVIL}",),
            organisation=EVIL,
            listed=papers()[0].listed,
            code_url="javascript:alert(3)",
            project_url="data:text/html,<script>alert(4)</script>",
            doi='10.1/"><script>alert(5)</script>',
        ),
    )
    with app.state.feed.database.write() as connection:
        store.comment(connection, number, "owner", EVIL, NOW)
    client = owner(app)
    for address in ("/day/2025-11-17", "/papers/2511.09666", "/search?q=needle", "/search?q=alert", "/trending"):
        text = client.get(address).text
        assert "Evil &lt;script&gt;" in text
        assert "<script>alert" not in text
        assert "<img src=x" not in text
        assert not any(re.match(r"(javascript|data):", link) for link in links(text))
    found = client.get("/search", params={"q": EVIL}).text
    assert "<script>alert" not in found
    assert "alert" in found
    mark = re.search(r"<mark>(.*?)</mark>", client.get("/search?q=needle").text)
    assert mark
    assert mark[1] == "needle"


def test_a_snippet_is_escaped_piece_by_piece(app):
    add(app, Paper(title="S", source="hub", arxiv="2511.09667", abstract="before <b>haystack</b> after", listed=None))
    text = visitor(app).get("/search?q=haystack").text
    assert "&lt;b&gt;<mark>haystack</mark>&lt;/b&gt;" in text


def test_every_answer_is_headed(app):
    client = owner(app)
    for address in (*PAGES, "/static/feed.css", "/nowhere", "/api/papers", "/static/nothing.css", "/search?page=0"):
        headers = client.get(address).headers
        policy = headers["content-security-policy"]
        for part in ("default-src 'self'", "base-uri 'none'", "frame-ancestors 'none'", "form-action 'self'"):
            assert part in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert "camera=()" in headers["permissions-policy"]
    assert "content-security-policy" in client.post("/import").headers  # refused before the pages
    figure = client.get("/papers/2406.02214/figures/differences.svg")
    assert figure.headers["content-security-policy"].startswith("default-src 'none'")


def test_pages_hold_nothing_that_the_policy_forbids(app):
    client = owner(app)
    for address in PAGES:
        text = client.get(address).text
        assert not re.search(r'\sstyle\s*=\s*["\']', text), address
        assert not re.search(r"\son\w+\s*=", re.sub(r'"[^"]*"', '""', text)), address
        assert not re.search(r"<style|<script(?![^>]*\ssrc=)", text), address


def test_links_stay_on_this_server_or_lead_to_known_places(app):
    client = owner(app)
    for address in PAGES:
        for link in links(client.get(address).text):
            assert re.match(r"[/#](?!/)|https://(arxiv|doi|example)\.org/", link), (address, link)


def test_pages_are_small(app):
    long = "A sentence of the abstract that says nothing at all. " * 60
    add(
        app,
        *(
            Paper(title=f"Long {i}", source="hub", arxiv=f"2511.1{i:04}", abstract=long, listed=papers()[0].listed)
            for i in range(60)
        ),
    )
    client = owner(app)
    for address in PAGES:
        assert len(client.get(address).content) <= 60_000, address


def test_pages_stay_small_whatever_there_is_to_show(app):
    """A day of papers that tell all they can, long searches in any script, and a catalogue of which all is measured."""
    abstract = "A 'sentence' of the <abstract> that says nothing at all. " * 34
    people = tuple(f"Firstname{i} Lastname{i}" for i in range(40))
    add(
        app,
        *(
            Paper(
                title=f"Heavy {i} " + "words of a title " * 15,
                source="hub",
                arxiv=f"2511.1{i:04}",
                abstract=abstract,
                authors=people,
                organisation="An organisation of some size",
                listed=papers()[0].listed,
                upvotes=1000,
                comments=9,
                code_url="https://example.org/" + "c" * 80,
                project_url="https://example.org/" + "p" * 80,
                doi="10.1/" + "x" * 50,
            )
            for i in range(60)
        ),
    )
    with app.state.feed.database.write() as connection:
        connection.execute("UPDATE paper SET verdict = 'contradicted', has_method = 1 WHERE slug IS NOT NULL")
    client = owner(app)
    searches = ("sentence " * 30, "sentence " + "שלום " * 150, "sentence " + "😀" * 400, "sentence " + "x" * 20_000)
    asked = [("/search", {"q": q, "page": str(number)}) for q in searches for number in (1, 2)]
    shown = 0
    for address, query in [("/day/2025-11-17", {}), ("/trending", {}), ("/map", {}), ("/", {}), *asked]:
        answer = client.get(address, params=query)
        shown += answer.text.count("<article")
        assert len(answer.content) <= 60_000, (address, query)
    assert shown >= 100
    assert "says nothing" in client.get("/day/2025-11-17").text.partition("Full entry")[2]  # less of it, yet some


# --- where a request comes from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example.org", "127.0.0.1", "127.0.0.1:9999", "127.0.0.1:8000.evil.org", ""])
def test_only_the_servers_own_names_are_answered(app, host):
    client = visitor(app)
    answer = client.get("/", headers={"Host": host})
    assert answer.status_code == 421
    assert "Papers" not in answer.text
    for name in ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST:8000"):
        assert client.get("/", headers={"Host": name}).status_code == 200


def test_the_public_name_is_answered_where_there_is_one(tmp_path):
    app = app_of(tmp_path, public_url="https://papers.example.org")
    assert visitor(app, "https://papers.example.org").get("/").status_code == 200
    assert visitor(app, "https://other.example.org").get("/").status_code == 421


@pytest.mark.parametrize(
    ("headers", "accepted"),
    [
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "null"}, True),  # a browser, under our own Referrer-Policy
        ({"Origin": HERE}, True),
        ({}, False),
        ({"Origin": "null"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),  # another server of this machine, on another port
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": HERE}, False),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example.org"}, False),
        ({"Origin": "http://127.0.0.1:8001"}, False),
        ({"Origin": "http://evil.example.org"}, False),
        ({"Referer": f"{HERE}/"}, False),
    ],
)
def test_a_change_must_come_from_a_page_of_this_server(app, headers, accepted):
    client = owner(app)
    token = form_token(client)
    client.headers.pop("sec-fetch-site")
    before = dump(app)
    answer = client.post("/papers/2511.09001/vote", data={"csrf": token}, headers=headers)
    assert (answer.status_code == 303) is accepted
    assert (dump(app) != before) is accepted
    assert accepted or answer.status_code == 403


@pytest.mark.parametrize("told", [None, "", "0" * 64, "x"])
def test_the_owners_forms_carry_a_token_of_the_session(app, told):
    client = owner(app)
    before = dump(app)
    data = {} if told is None else {"csrf": told}
    assert client.post("/papers/2511.09001/vote", data=data).status_code == 403
    files = {"file": ("x.txt", b"x")}
    assert client.post("/import", data=data, files=files).status_code == 403
    assert dump(app) == before
    assert client.post("/papers/2511.09001/vote", headers={"X-CSRF-Token": form_token(client)}).status_code == 303


def test_the_form_token_of_another_session_does_not_serve(app):
    first, app.state.feed.clock.now = owner(app), NOW + 1
    second = owner(app)
    theirs = form_token(first)
    assert theirs != form_token(second)
    assert second.post("/papers/2511.09001/vote", data={"csrf": theirs}).status_code == 403


# --- the owner ---------------------------------------------------------------------------------------------------

CHANGES = {
    "/papers/2511.09001/vote": {},
    "/papers/2511.09001/comments": {"body": "hello"},
    "/papers/2511.09001/comments/1/delete": {},
    "/subscribers/again": {"address": "gone@example.org"},
    "/runs": {"slug": "pag", "scale": "smoke"},
    "/runs/1/cancel": {},
    "/import": {"saved_on": "2025-11-17"},
    "/owner/end": {},
}


def refuse(app, address):
    """As if a mail server had said that there is no such address."""
    with app.state.feed.database.write() as connection:
        connection.execute(
            "INSERT INTO subscriber (address, state, every, wants, created, asked) "
            "VALUES (?, 'suppressed', 'day', '{}', 0, 0)",
            (address,),
        )


@pytest.mark.parametrize("public", [None, "https://papers.example.org"])
def test_visitors_change_nothing(tmp_path, public):
    app = app_of(tmp_path, public_url=public)
    add(app, *papers())
    post(owner(app, public or HERE), "/papers/2511.09001/comments", {"body": "The owner's own."})
    refuse(app, "gone@example.org")
    client = visitor(app, public or HERE, **OURS)
    before = dump(app)
    for address, data in CHANGES.items():
        files = {"file": ("x.txt", b"Daily Papers")} if address == "/import" else None
        answer = client.post(address, data=data, files=files)
        assert answer.status_code == 403, address
        assert "owner" in answer.text
    assert client.get("/settings").status_code == 403
    assert dump(app) == before
    for address in ("/", "/search?q=rain", "/papers/2511.09001", "/runs", "/feeds", "/api/papers"):
        assert client.get(address).status_code == 200


def test_every_changing_address_is_the_owners_or_named_here(app):
    """A new address that takes POST must be thought about."""
    for_all = {"/owner", "/subscribe", "/confirm/{token}", "/unsubscribe/{token}", "/unsubscribe/one-click/{token}"}
    seen = set()
    for route in _routes(app.routes):
        if {"POST", "PUT", "PATCH", "DELETE"} & (route.methods or set()):
            guards = [d.dependency for d in getattr(route, "dependencies", [])]
            if security.owner not in guards:
                seen.add(route.path)
    assert seen == for_all


def _routes(routes):
    for route in routes:
        if hasattr(route, "methods"):
            yield route
        inner = getattr(route, "original_router", None) or getattr(route, "app", None)
        yield from _routes(getattr(inner, "routes", []))


def test_subscribing_is_for_the_owner_and_where_there_is_a_public_address_for_all(tmp_path):
    closed = visitor(app_of(tmp_path))
    refused = closed.get("/subscribe")
    assert refused.status_code == 403
    assert "<code>perturbed serve</code>" in refused.text
    assert not any("/subscribe" in link for at in ("/", "/search?q=x") for link in links(closed.get(at).text))
    app = app_of(tmp_path, public_url="https://papers.example.org")
    assert visitor(app, "https://papers.example.org").get("/subscribe").status_code == 200


def test_the_session_cookie(app, tmp_path):
    answer = visitor(app).get("/owner", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    told = answer.headers["set-cookie"].lower()
    assert "httponly" in told
    assert "samesite=strict" in told
    assert "secure" not in told
    assert TOKEN not in told
    public = app_of(tmp_path / "public", public_url="https://papers.example.org")
    answer = visitor(public, "https://papers.example.org").get("/owner", params={"token": TOKEN})
    assert "secure" in answer.headers["set-cookie"].lower()


@pytest.mark.parametrize("token", ["x", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "ü"])
def test_another_token_opens_nothing(app, token):
    client = visitor(app, **OURS)
    for answer in (client.get("/owner", params={"token": token}), client.post("/owner", data={"token": token})):
        assert answer.status_code == 403
        assert "set-cookie" not in answer.headers
    assert client.post("/owner", data={"token": TOKEN}).status_code == 303


def test_tokens_are_compared_in_constant_time(app, monkeypatch):
    compared = []
    real = security.hmac.compare_digest
    monkeypatch.setattr(security.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    visitor(app).get("/owner", params={"token": "guess"})
    assert any(len(a) == len(b) == 32 for a, b in compared)  # of hashes: not even the length shows


def test_a_session_ends(app):
    client = owner(app)
    assert client.get("/settings").status_code == 200
    app.state.feed.clock.now += security.SESSION_SECONDS - 60
    assert client.get("/settings").status_code == 200
    app.state.feed.clock.now += 120
    assert client.get("/settings").status_code == 403


def test_a_session_can_be_ended(app):
    client = owner(app)
    copy, other = dict(client.cookies), owner(app)
    assert post(client, "/owner/end").status_code == 303
    assert client.get("/settings").status_code == 403
    client.cookies.update(copy)  # who has a copy of the cookie has nothing of it either
    assert client.get("/settings").status_code == 403
    assert other.get("/settings").status_code == 200


def test_a_session_cannot_be_made_up_or_carried_to_another_start(app, tmp_path):
    client = owner(app)
    (name, value), *_ = client.cookies.items()
    until, rest = value.split(".", 1)
    for forged in (f"{int(until) + 9}.{rest}", f"{until}.x.{'0' * 64}", "", ".", "..", value[:-1], f"{until}.{rest}0"):
        client.cookies.clear()
        assert client.get("/settings", headers={"Cookie": f"{name}={forged}"}).status_code == 403
    again = Settings(database=tmp_path / "feed.sqlite", owner_token="another-token")
    app.state.feed.__dict__["settings"] = again
    assert client.get("/settings", headers={"Cookie": f"{name}={value}"}).status_code == 403


# --- limits ------------------------------------------------------------------------------------------------------


def test_who_asks_too_often_waits(app, monkeypatch):
    monkeypatch.setattr(security, "GETS", 20)
    client = visitor(app)
    answers = [client.get("/about") for _ in range(21)]
    assert [a.status_code for a in answers] == [200] * 20 + [429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60
    assert re.search(r"Try again in \d+ s\.", unescape(answers[-1].text))
    assert security.too_many(3599).text == "Try again in 60 minutes."
    app.state.feed.clock.now += 61
    assert client.get("/about").status_code == 200


def test_changes_and_tokens_are_limited_harder(app):
    client = visitor(app, **OURS)
    answers = [client.post("/papers/2511.09001/vote").status_code for _ in range(security.POSTS + 1)]
    assert set(answers[:-1]) == {403}
    assert answers[-1] == 429
    app.state.feed.clock.now += 61
    guesses = [client.get("/owner", params={"token": f"guess-{i}"}).status_code for i in range(11)]
    assert guesses == [403] * 10 + [429]


def test_searches_are_limited(app, monkeypatch):
    from perturbed.feed.web import api, browse

    monkeypatch.setattr(browse, "SEARCHES", 3)
    monkeypatch.setattr(api, "SEARCHES", 3)
    client = visitor(app)
    assert [client.get("/search?q=rain").status_code for _ in range(4)] == [200] * 3 + [429]
    answer = client.get("/api/search?q=rain")
    assert answer.status_code == 429
    assert "Too many" in answer.json()["detail"]


def test_the_limiter_forgets(app):
    clock = Clock(0.0)
    limiter = security.Limiter(clock, most=100)
    for i in range(1000):
        assert limiter.wait("x", f"10.0.{i // 250}.{i % 250}", 1, 60) == 0
        clock.now += 1
    assert len(limiter._seen) <= 101
    assert limiter.wait("y", "a", 1, 60) == 0
    assert limiter.wait("y", "a", 1, 60) == 60


@pytest.mark.parametrize(
    ("peer", "told", "address"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),  # not a proxy of ours: what it says is ignored
        ("10.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("10.0.0.1", "1.2.3.4, 198.51.100.1", "198.51.100.1"),  # what the client wrote itself comes first
        ("10.0.0.1", "198.51.100.1, 10.0.0.2", "198.51.100.1"),
        ("10.0.0.1", "nonsense", "10.0.0.1"),
        ("10.0.0.1", None, "10.0.0.1"),
        ("2001:db8:1:2:3::4", None, "2001:db8:1:2::/64"),
        ("::ffff:203.0.113.9", None, "203.0.113.9"),  # at a socket of IPv6 that takes IPv4 too
        ("::ffff:10.0.0.1", "198.51.100.1", "198.51.100.1"),
    ],
)
def test_whose_request_it_is(tmp_path, peer, told, address):
    app = app_of(tmp_path, public_url="https://papers.example.org", trusted_proxies=("10.0.0.0/8",))
    client = TestClient(app, base_url="https://papers.example.org", client=(peer, 1))
    headers = [("X-Forwarded-For", told)] if told else []
    assert client.get("/about", headers=headers).status_code == 200
    assert [key[1] for key in app.state.limiter._seen] == [address]


def test_forwarded_headers_change_neither_host_nor_scheme(app):
    headers = {"X-Forwarded-Host": "evil.example.org", "X-Forwarded-Proto": "https", "Forwarded": "host=evil"}
    answer = visitor(app).get("/papers/2511.09001v2", headers=headers)
    assert answer.headers["location"] == "/papers/2511.09001"
    assert "evil" not in visitor(app).get("/feeds/days.atom", headers=headers).text


@pytest.mark.parametrize(("address", "most"), [("/papers/2511.09001/comments", 64 * 2**10), ("/import", 20 * 2**20)])
def test_a_body_has_a_largest_size(app, address, most):
    client = owner(app)
    before = dump(app)
    sent = 0

    def body():
        nonlocal sent
        while sent < 2 * most:
            sent += 2**18
            yield b"x" * 2**18

    answer = client.post(address, content=body(), headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 413
    assert dump(app) == before


def test_a_visitor_cannot_send_a_large_import(app):
    answer = visitor(app, **OURS).post("/import", files={"file": ("x", b"x" * 2**17)})
    assert answer.status_code == 413


def test_a_body_that_does_not_come_is_given_up(app, monkeypatch):
    monkeypatch.setattr(security, "BODY_SECONDS", 0.2)
    import anyio

    async def run():
        answers = []

        async def receive():
            await anyio.sleep(600)

        async def send(message):
            answers.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/papers/2511.09001/vote",
            "raw_path": b"/",
            "query_string": b"",
            "headers": [(b"host", b"127.0.0.1:8000"), (b"sec-fetch-site", b"same-origin")],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8000),
            "scheme": "http",
            "root_path": "",
            "http_version": "1.1",
        }
        with anyio.fail_after(SECONDS):
            await app(scope, receive, send)
        return answers[0]["status"]

    assert anyio.run(run) == 408


# --- nothing changes by reading ----------------------------------------------------------------------------------


def test_the_database_is_the_owners_alone(tmp_path):
    app = app_of(tmp_path, fresh=True)
    path = app.state.feed.settings.database
    for file in path.parent.glob(f"{path.name}*"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_get_changes_nothing(app):
    """Every link that the owner's pages show, and every address there is, by GET."""
    app.state.limiter = security.Limiter(Clock())
    client = owner(app)
    app.state.limiter.wait = lambda *_: 0.0
    post(client, "/papers/2511.09001/vote")
    post(client, "/papers/2511.09001/comments", {"body": "To stay."})
    refuse(app, "gone@example.org")
    post(client, "/runs", {"slug": "pag", "scale": "smoke"})
    before = dump(app)
    waiting, seen = ["/", "/settings", "/runs/1", "/papers/2511.09001", "/day/2025-11-17"], set()
    waiting.append("/subscribers/again?address=gone@example.org")
    for route in _routes(app.routes):
        path = route.path.replace("{key:path}", "2511.09001").replace("{number}", "1").replace("{slug}", "pag")
        waiting.append(re.sub(r"\{.*?\}", "x", path))
    while waiting and len(seen) < 200:
        address = waiting.pop(0).partition("#")[0]
        if not address.startswith("/") or address in seen:
            continue
        seen.add(address)
        answer = client.get(address)
        assert answer.status_code < 500, address
        if "html" in answer.headers.get("content-type", ""):
            waiting += links(answer.text)
    assert len(seen) > 100
    assert {"/papers/2511.09001/vote", "/runs/1/cancel", "/import"} <= seen
    assert {"/papers/2511.09001/comments/1/delete", "/subscribers/again"} <= seen
    assert dump(app) == before


def test_no_page_is_kept_for_others(app):
    for client in (visitor(app), owner(app)):
        answer = client.get("/")
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["vary"] == "Cookie"


def test_no_static_file_lies_outside(app):
    client = visitor(app)
    for name in ("../pages.py", "..%2fpages.py", "%2e%2e/pages.py", "pages.py", "feed.css/"):
        assert client.get(f"/static/{name}").status_code == 404
        assert static_file(name) is None
    assert Path(security.__file__).with_name("static").joinpath("feed.js").stat().st_size <= 8192


def test_nobody_uses_up_what_the_owner_may_do(app, monkeypatch):
    """Another user of the machine, or a page of another site in the owner's browser, comes from the same address."""
    monkeypatch.setattr(security, "GETS", 20)
    client, other = owner(app), visitor(app)
    assert [other.get("/about").status_code for _ in range(21)][-1] == 429
    assert [other.get("/owner", params={"token": "guess"}).status_code for _ in range(11)][-1] == 429
    for _ in range(security.POSTS + 1):
        other.post("/papers/2511.09001/vote")
    assert client.get("/about").status_code == 200
    assert post(client, "/papers/2511.09001/vote").status_code == 303
    assert visitor(app).get("/owner", params={"token": TOKEN}).status_code == 303
    assert visitor(app, **OURS).post("/owner", data={"token": TOKEN}).status_code == 303
    assert [client.get("/about").status_code for _ in range(21)][-1] == 429  # the owner's own window


def test_a_clock_set_back_ends_a_window():
    clock = Clock(1_000_000.0)
    limiter = security.Limiter(clock)
    assert [limiter.wait("x", "a", 1, 60) > 0 for _ in range(2)] == [False, True]
    clock.now -= 86_400
    assert limiter.wait("x", "a", 1, 60) == 0
    assert limiter.wait("x", "a", 1, 60) > 0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"--b\r\nbroken"),
        ("multipart/form-data; boundary=b",
         b"".join(b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' for _ in range(1001)) + b"--b--"),
    ],
)  # fmt: skip
def test_a_form_that_cannot_be_read_is_refused_in_words(app, kind, body):
    answer = owner(app).post("/papers/2511.09001/vote", content=body, headers={"Content-Type": kind})
    assert answer.status_code in (400, 403)
    assert "defect" not in answer.text


@pytest.mark.parametrize("size", [100, 3 * 2**20])  # kept in memory by the form, and by it in a file
def test_no_room_for_temporary_files_is_said_and_is_no_defect(app, monkeypatch, size):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    client = owner(app)
    before = dump(app)
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    answer = post(client, "/import", files={"file": ("x.txt", b"x" * size)})
    assert answer.status_code == 507
    assert "No space left on device" in answer.text
    assert dump(app) == before
