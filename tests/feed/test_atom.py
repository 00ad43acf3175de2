"""The Atom feeds: valid by a strict schema, permanent names, dates that move with verdicts, pages and 304."""

import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from urllib.parse import urljoin

import feedparser
import pytest
from lxml import etree
from mail_parts import BASE, DAY, NOW, add, application
from web_parts import Clock

from perturbed.feed import store, verdicts
from perturbed.feed.atom import ATOM, PAGE
from perturbed.feed.papers import SITES, Paper

RNG = etree.RelaxNG(etree.parse(Path(__file__).with_name("atom.rng")))
NS = {"a": ATOM}
FEEDS = ("/feeds/days.atom", "/feeds/evidence.atom", "/feeds/topic.atom?q=training", "/feeds/site/optim.atom")
NASTY = "<script>alert(1)</script> ]]> & \x0b\ufffe “signs” \U0001f9ea"


@pytest.fixture
def clock():
    return Clock(NOW)


@pytest.fixture
def feed(tmp_path, clock):
    app, client = application(tmp_path, clock=clock)
    verdicts.sync(app.state.feed.database, NOW)
    yield app.state.feed.database, client
    app.state.feed.database.close()


def parsed(client, path):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/atom+xml; charset=utf-8"
    return etree.fromstring(answer.content)


def check(root):
    """RFC 4287: the schema, and what a schema cannot say."""
    assert RNG.validate(root), RNG.error_log
    entries = root.findall("a:entry", NS)
    assert root.find("a:author", NS) is not None or all(e.find("a:author", NS) is not None for e in entries)  # 4.1.1
    ids = [e.findtext("a:id", namespaces=NS) for e in entries]
    assert len(set(ids)) == len(ids)
    for one in (root, *entries):
        links = [(link.get("rel"), link.get("type"), link.get("hreflang")) for link in one.findall("a:link", NS)]
        assert len(set(links)) == len(links)  # no two alternates of one kind
        assert any(rel == "alternate" for rel, *_ in links)
    assert [link.get("rel") for link in root.findall("a:link", NS)].count("self") == 1
    newest = max((e.findtext("a:updated", namespaces=NS) for e in entries), default="2026-01-01T00:00:00.000Z")
    assert root.findtext("a:updated", namespaces=NS) == newest
    for href in root.xpath("//@href"):
        assert urljoin(BASE, href) == href
        assert href.startswith(BASE)  # never from a Host header


def entry(root, title):
    return next(e for e in root.findall("a:entry", NS) if title in e.findtext("a:title", namespaces=NS))


def field(element, name):
    return element.findtext(f"a:{name}", namespaces=NS)


def links(root):
    return {link.get("rel"): link.get("href") for link in root.findall("a:link", NS)}


# --- form --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FEEDS)
def test_every_feed_is_valid_and_reads(feed, path):
    _, client = feed
    root = parsed(client, path)
    check(root)
    read = feedparser.parse(client.get(path).content)
    assert not read.bozo
    assert len(read.entries) == len(root.findall("a:entry", NS)) > 0
    for one in read.entries:
        assert one.id.startswith("tag:perturbed.invalid,2026:")
        assert one.link.startswith(f"{BASE}/papers/")
        assert one.author
        assert one.content[0].type == "text/html"
        assert one.updated_parsed
        assert one.published_parsed


def test_the_schema_is_strict(feed):
    """What leaves an element out, doubles it or adds one is refused, else the other tests say nothing."""
    _, client = feed
    for spoil in (
        lambda root: root.remove(root.find("a:id", NS)),
        lambda root: root.remove(root.find("a:updated", NS)),
        lambda root: root.append(etree.Element(f"{{{ATOM}}}title")),
        lambda root: root.find("a:entry", NS).remove(root.find("a:entry/a:title", NS)),
        lambda root: root.find("a:entry", NS).append(etree.Element(f"{{{ATOM}}}rating")),
        lambda root: root.find("a:entry/a:updated", NS).__setattr__("text", "2025-11-17 18:00"),
        lambda root: root.find("a:entry/a:id", NS).__setattr__("text", "17"),
        lambda root: root.find("a:link", NS).attrib.pop("href"),
        lambda root: root.find("a:author", NS).remove(root.find("a:author/a:name", NS)),
        lambda root: root.find("a:entry/a:content", NS).append(etree.Element("{http://www.w3.org/1999/xhtml}p")),
    ):
        root = parsed(client, "/feeds/days.atom")
        spoil(root)
        assert not RNG.validate(root)


def test_a_feed_without_entries_is_valid(feed):
    _, client = feed
    root = parsed(client, "/feeds/topic.atom?q=xyzzyplugh")
    check(root)
    assert root.findall("a:entry", NS) == []


@pytest.mark.parametrize("title", [NASTY, "a]]>b", "\ud800 lone"])
def test_nothing_in_a_title_or_abstract_breaks_out(feed, title):
    database, client = feed
    with database.write() as connection:
        row = store.upsert(connection, Paper(title="plain", source="hub", listed=date(2026, 1, 2)), NOW)
        # Past the store, which cleans: what older files hold is met here too.
        connection.execute(
            "UPDATE paper SET title = ?, abstract = ?, people = ?, project_url = 'javascript:alert(1)' WHERE id = ?",
            (title.replace("\ud800", "\x01"), NASTY, "A <b>\x02 & B", row.paper),
        )
    root = parsed(client, "/feeds/days.atom")
    check(root)
    first = root.find("a:entry", NS)
    assert "\x01" not in field(first, "title")
    html = field(first, "content")
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "javascript:" not in html


@pytest.mark.parametrize(
    ("fields", "authors"),
    [
        ({"authors": ("Ann B", "Cy D")}, ["Ann B", "Cy D"]),
        ({"organisation": "A Lab", "author_count": 3}, ["A Lab"]),
        ({"author_count": 2}, ["2 authors"]),
        ({"author_count": 1}, ["1 author"]),
        ({}, ["authors unknown"]),
    ],
)
def test_authors(feed, fields, authors):
    database, client = feed
    add(database, 1, day=date(2026, 1, 2), **fields)
    first = parsed(client, "/feeds/days.atom").find("a:entry", NS)
    assert [name.text for name in first.findall("a:author/a:name", NS)] == authors


def test_categories_are_sites_and_verdict(feed):
    database, client = feed
    slug, verdict = database.read().execute("SELECT slug, verdict FROM paper WHERE verdict IS NOT NULL").fetchone()
    known = store.find(database.read(), slug)
    found = next(
        e
        for page in (1, 2)
        for e in parsed(client, f"/feeds/days.atom?page={page}").findall("a:entry", NS)
        if field(e, "title") == known.title
    )
    terms = {(c.get("scheme").rpartition(":")[2], c.get("term")) for c in found.findall("a:category", NS)}
    assert terms == {*(("site", site) for site in known.sites), ("verdict", verdict)}
    assert f"Measured here: {verdict}." in field(found, "content")
    assert verdicts.summary_of(slug).sentence.split("(")[0].strip() in field(found, "content").replace("&#39;", "'")


# --- names and dates ---------------------------------------------------------------------------------------------


def test_a_name_is_for_good(feed, clock):
    database, client = feed
    add(database, 1, arxiv=None, title="Known by its title", source="page", day=date(2026, 1, 2))
    before = entry(parsed(client, "/feeds/days.atom"), "Known by its title")
    clock.now = NOW + 10
    add(database, 1, title="Known by its title", source="arxiv", day=date(2026, 1, 2), now=NOW + 10)
    after = entry(parsed(client, "/feeds/days.atom"), "Known by its title")
    assert field(after, "id") == field(before, "id")
    assert after.find("a:link", NS).get("href") != before.find("a:link", NS).get("href")  # the address did change


def test_updated_moves_with_a_verdict_and_not_with_upvotes(feed):
    database, client = feed
    paper = add(database, 1, day=date(2026, 1, 2), upvotes=1)

    def updated():
        return field(parsed(client, "/feeds/days.atom").find("a:entry", NS), "updated")

    first = updated()
    add(database, 1, day=date(2026, 1, 2), upvotes=50, now=NOW + 10)
    assert store.find(database.read(), "2511.00001").source_upvotes == 50
    assert updated() == first
    with database.write() as connection:
        connection.execute("UPDATE paper SET verdict = 'null', changed = ? WHERE id = ?", (NOW + 20, paper))
    second = updated()
    assert second > first
    with database.write() as connection:  # a newer record with the same verdict: its numbers are others
        connection.execute(
            "INSERT INTO finding (paper, record, verdict, at, seen) VALUES (?, 'r', 'null', ?, ?)",
            (paper, NOW - 999, NOW + 30),
        )
    assert updated() > second
    assert datetime.fromisoformat(updated()) == datetime.fromtimestamp(NOW + 30, UTC)


def test_a_finding_keeps_its_name_and_says_when_it_was_overtaken(feed):
    database, client = feed
    paper = add(database, 1)

    def judge(verdict, record, seen):
        with database.write() as connection:
            connection.execute(
                "INSERT INTO finding (paper, record, verdict, at, seen) VALUES (?, ?, ?, ?, ?)",
                (paper, record, verdict, NOW - 5, seen),
            )

    judge("screening", "r1", NOW + 1)
    before = parsed(client, "/feeds/evidence.atom")
    old = entry(before, "screening: Paper 1")
    judge("contradicted", "r2", NOW + 2)
    after = parsed(client, "/feeds/evidence.atom")
    check(after)
    first, second = after.findall("a:entry", NS)[:2]
    assert field(first, "title") == "contradicted: Paper 1"
    assert field(first, "id") == "tag:perturbed.invalid,2026:finding/r2"
    assert field(second, "id") == field(old, "id")
    assert field(second, "updated") > field(old, "updated")
    assert "newer record" in field(second, "content")
    assert field(after, "updated") > field(before, "updated")


def test_the_evidence_feed_tells_what_the_ledgers_hold(feed):
    database, client = feed
    root = parsed(client, "/feeds/evidence.atom")
    judged = database.read().execute("SELECT slug, title, verdict FROM paper WHERE verdict IS NOT NULL").fetchall()
    assert len(judged) >= 5
    for row in judged:
        found = entry(root, f"{row['verdict']}: {row['title']}")
        assert verdicts.summary_of(row["slug"]).sentence.split("(")[0].strip() in field(found, "content").replace(
            "&#39;", "'"
        )


# --- pages -------------------------------------------------------------------------------------------------------


def test_the_pages_hold_every_paper_once_newest_day_first(feed):
    database, client = feed
    for number in range(PAGE):
        add(database, number, day=DAY - timedelta(days=number))
    path, seen, days, back = "/feeds/days.atom", [], [], None
    while path:
        root = parsed(client, path)
        check(root)
        found = links(root)
        assert found["self"] == (f"{BASE}/feeds/days.atom" if not seen else f"{BASE}{path}")
        assert found.get("previous") == back
        assert found["first"] == f"{BASE}/feeds/days.atom"
        seen += [field(e, "id") for e in root.findall("a:entry", NS)]
        days += [field(e, "published")[:10] for e in root.findall("a:entry", NS)]
        back, last = found["self"], found["last"]
        path = found.get("next", "").removeprefix(BASE)
    assert back == last
    assert days == sorted(days, reverse=True)
    total = database.read().execute("SELECT count(*) FROM paper WHERE day IS NOT NULL").fetchone()[0]
    assert len(seen) == len(set(seen)) == total > 2 * PAGE


@pytest.mark.parametrize("page", ["0", "-1", "99", "x", "1e3", "9" * 30])
def test_a_page_that_is_none(feed, page):
    _, client = feed
    assert client.get(f"/feeds/days.atom?page={page}").status_code in (400, 404)


def test_a_topic_is_a_search_newest_first_and_keeps_its_words(feed):
    database, client = feed
    for number in range(3):
        add(database, number, title=f"Pruning & more {number}", day=DAY + timedelta(days=number))
    root = parsed(client, "/feeds/topic.atom?q=%22pruning+%26+more%22")
    check(root)
    assert [field(e, "title") for e in root.findall("a:entry", NS)] == [f"Pruning & more {n}" for n in (2, 1, 0)]
    assert client.get(links(root)["self"]).content == client.get("/feeds/topic.atom?q=%22pruning+%26+more%22").content


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        *((asked, "Which topic?") for asked in ("", "?q=", "?q=%20%00%EF%BF%BE", "?q=" + "x" * 501)),
        *((f"?q={asked}", "neither a word nor a filter") for asked in ("%22", "(", "-", "*", "%F0%9F%98%80")),
        ("?q=noise+site:nowhere", "There is no site"),  # else it would be a feed of something else
        ("?q=verdict:refuted", "There is no verdict"),
        ("?q=year:soon", "year:2023"),
    ],
)
def test_a_topic_is_words_or_filters_that_there_are(feed, asked, why):
    told = feed[1].get(f"/feeds/topic.atom{asked}")
    assert told.status_code == 400
    assert why in told.text


@pytest.mark.parametrize("asked", ["site:data", "verdict:none", "title:(", "AND", "NEAR(a b)", "a" * 500, "-x"])
def test_no_topic_breaks_the_feed(feed, asked):
    check(parsed(feed[1], feed[1].build_request("GET", "/feeds/topic.atom", params={"q": asked}).url))


@pytest.mark.parametrize("path", ["/feeds/days.atom", "/feeds/evidence.atom"])
def test_a_paper_that_an_import_unites_with_another_meanwhile_is_left_out(feed, monkeypatch, path):
    """Between the two looks into the database that an entry needs, another process may take a row away."""
    database, client = feed
    papers = [add(database, number) for number in (1, 2)]
    with database.write() as connection:
        for number in papers:
            connection.execute(
                "INSERT INTO finding (paper, record, verdict, at) VALUES (?, ?, 'null', 1)", (number, number)
            )
    whole = client.get(path).text
    assert "Paper 1" in whole
    entries = store.entries

    def taken(connection, ids):
        late = path == "/feeds/days.atom"  # where the row is there at the first look, and for findings at none
        found = entries(connection, ids) if late else None
        with database.write() as writing:
            writing.execute("PRAGMA defer_foreign_keys = ON")
            writing.execute("DELETE FROM paper WHERE id = ?", (papers[0],))
        return found if late else entries(connection, ids)

    monkeypatch.setattr(store, "entries", taken)
    answer = client.get(path)
    assert answer.status_code == 200
    assert "Paper 2" in answer.text


def test_sites(feed):
    database, client = feed
    for site in SITES:
        root = parsed(client, f"/feeds/site/{site}.atom")
        assert {field(e, "title") for e in root.findall("a:entry", NS)} == {
            known.title for known in store.on_site(database.read(), site)
        }
    assert client.get("/feeds/site/nowhere.atom").status_code == 404


def test_the_list_of_feeds_links_to_feeds(feed):
    _, client = feed
    page = client.get("/feeds").text
    found = set(re.findall(r'href="(/feeds/[^"]+)"', page))
    assert len(found) == 2 + len(SITES)
    for path in found:
        check(parsed(client, path))


# --- asked again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FEEDS)
def test_what_is_unchanged_is_not_sent_again(feed, path):
    _, client = feed
    first = client.get(path)
    tag, modified = first.headers["etag"], first.headers["last-modified"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)  # strong
    for headers in (
        {"If-None-Match": tag},
        {"If-None-Match": f'"other", W/{tag}'},
        {"If-None-Match": "*"},
        {"If-Modified-Since": modified},
        {"If-None-Match": tag, "If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"},
    ):
        answer = client.get(path, headers=headers)
        assert answer.status_code == 304
        assert answer.content == b""
        assert answer.headers["etag"] == tag
    for headers in (
        {"If-None-Match": '"other"'},
        {"If-Modified-Since": "Mon, 01 Jan 2001 00:00:00 GMT"},
        {"If-None-Match": '"other"', "If-Modified-Since": modified},
        {"If-Modified-Since": "nonsense"},
        {"If-Modified-Since": "Mon, 99 Zzz 2001"},
    ):
        assert client.get(path, headers=headers).status_code == 200


def test_a_change_changes_the_tag(feed):
    database, client = feed
    before = client.get("/feeds/days.atom").headers
    add(database, 1, now=NOW + 60)
    after = client.get("/feeds/days.atom", headers={"If-None-Match": before["etag"]})
    assert after.status_code == 200
    assert after.headers["etag"] != before["etag"]
    assert client.get("/feeds/days.atom", headers={"If-Modified-Since": before["last-modified"]}).status_code == 200


def test_head_is_get_without_a_body(feed):
    _, client = feed
    got, asked = client.get("/feeds/days.atom"), client.head("/feeds/days.atom")
    assert asked.status_code == 200
    assert asked.headers["etag"] == got.headers["etag"]


def test_a_foreign_host_gets_into_no_link(tmp_path):
    app, client = application(tmp_path, public=None)
    answer = client.get("/feeds/days.atom", headers={"Host": "localhost:8000", "X-Forwarded-Host": "evil.example"})
    assert answer.status_code == 200
    assert set(re.findall(rb'<link [^>]*href="(https?://[^/"]+)', answer.content)) == {b"http://127.0.0.1:8000"}
    app.state.feed.database.close()
