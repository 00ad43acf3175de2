"""What the pages show, over a real database and the committed evidence."""

import asyncio
import contextlib
import itertools
import json
import re
import sqlite3
from datetime import date
from html import unescape

import lxml.html
import pytest
from web_parts import NOW, add, app_of, card, form_token, links, owner, papers, post, record, visitor

from perturbed.evidence.report import KINDS
from perturbed.feed import ranking, store
from perturbed.feed.catalogue import catalogue
from perturbed.feed.importers.harvest import Report
from perturbed.feed.knobs import Field
from perturbed.feed.papers import SITES, Paper
from perturbed.feed.web.app import _tend
from perturbed.feed.web.browse import PER_PAGE
from perturbed.feed.web.pages import CUT, attributes, clipped, outside, unbroken


@pytest.fixture
def app(tmp_path):
    return app_of(tmp_path)


def text_of(answer):
    """What a reader sees."""
    body = re.sub(r"<(head|script)\b.*?</\1>", "", answer.text, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def titles(answer):
    return [unescape(t) for t in re.findall(r'<h[23] id="p\d+"><a [^>]*>(.*?)</a>', answer.text)]


# --- by day ------------------------------------------------------------------------------------------------------


def test_an_empty_machine_shows_the_catalogue_and_its_evidence(app):
    client = visitor(app)
    answer = client.get("/")
    told = text_of(answer)
    assert "87 papers" in told
    assert "No daily papers yet" in told
    assert "perturbed feed import" in told
    measured = re.search(r'<h2 id="measured".*?</section>', answer.text, re.DOTALL)[0]
    assert card("sltrain").title in unescape(measured)
    assert measured.count('class="pt-spark"') == measured.count('class="tile ') >= 8
    assert {"supported", "contradicted", "inconclusive"} <= set(re.findall(r'class="tile v-(\w+)"', measured))
    seen = []
    for number in range(1, 87 // PER_PAGE + 2):
        seen += titles(client.get("/", params={"page": number}))
    assert sorted(seen) == sorted(item.title for item in catalogue())
    assert client.get("/?page=99").status_code == 404


def test_the_front_page_is_the_newest_day(app):
    add(app, *papers())
    answer = visitor(app).get("/")
    assert "Monday, 17 November 2025" in text_of(answer)
    assert titles(answer) == ["Counting sheep improves calibration of sleepy networks", "Gradients in the rain"]
    assert "Measured here" in text_of(answer)


def test_counts_of_the_source_stand_apart_from_those_here(app):
    number, *_ = add(app, *papers())
    with app.state.feed.database.write() as connection:
        store.vote(connection, number, "owner", NOW)
        store.comment(connection, number, "owner", "Nice.", NOW)
    told = text_of(visitor(app).get("/day/2025-11-17"))
    assert "2 authors" in told
    assert "at the source: 41 upvotes , 3 comments" in told or "at the source: 41 upvotes, 3 comments" in told
    assert "here: ▲ 1 1 comment" in told
    assert "at the source: 0 upvotes" in told  # nought is a count, and not nothing


def test_previous_and_next_skip_days_without_papers(app):
    add(app, *papers())
    client = visitor(app)
    answer = client.get("/day/2025-11-10")
    turns = re.findall(r'<a (?:class="next" )?href="([^"]+)" rel="(prev|next)">', answer.text)
    assert ("/day/2025-11-17", "next") in turns
    assert dict((rel, at) for at, rel in turns)["prev"] == "/day/2025-10-22"
    assert "/week/2025-W47" in client.get("/week/2025-W46").text
    assert "/month/2025-10" in client.get("/month/2025-11").text
    assert "No papers on this day" in text_of(client.get("/day/2025-11-11"))


def test_from_a_week_or_a_month_one_comes_to_a_day_with_papers(app):
    add(app, *papers())
    client = visitor(app)
    for address in ("/month/2025-11", "/week/2025-W47"):
        spans = re.search(r'aria-label="Span">(.*?)</nav>', client.get(address).text, re.DOTALL)[1]
        days = ["/day/2025-11-17", "/week/2025-W47", "/month/2025-11"]  # none of the empty days at its end
        assert re.findall(r'href="([^"]+)"( aria-current)?', spans) == [
            (at, " aria-current" if at == address else "") for at in days
        ]
    assert 'href="/day/2025-12-31"' in client.get("/month/2025-12").text  # where all are empty


def test_weeks_and_months_hold_their_days(app):
    add(app, *papers(), Paper(title="On a Sunday", source="hub", arxiv="2511.09009", listed=date(2025, 11, 23)))
    client = visitor(app)
    assert titles(client.get("/week/2025-W47"))[0] == "On a Sunday"
    assert len(titles(client.get("/week/2025-W47"))) == 3
    assert titles(client.get("/week/2025-W48")) == []
    assert len(titles(client.get("/month/2025-11"))) == 4
    assert client.get("/week/2020-W53").status_code == 200


@pytest.mark.parametrize(
    "address",
    [
        *("/day/2025-02-30", "/day/20251117", "/day/x", "/day/0001-01-01", "/day/9999-12-31", "/day/2025-11-17?page=2"),
        *("/week/2025-W54", "/week/2025-47", "/week/9999-W52", "/month/2025-13", "/month/2025"),
        *("/nowhere", "/papers/nothing"),
    ],
)
def test_addresses_of_nothing_say_so(app, address):
    answer = visitor(app).get(address)
    assert answer.status_code == 404
    assert "There is no such page" in answer.text
    assert 'role="search"' in answer.text


def test_the_calendar_links_to_the_days_that_have_papers(app):
    add(app, *papers())
    calendar = re.search(r'<table class="calendar">.*?</table>', visitor(app).get("/day/2025-11-17").text, re.DOTALL)[0]
    assert re.findall(r'href="(/day/[^"]+)"', calendar) == ["/day/2025-11-10", "/day/2025-11-17"]
    assert "2 papers" in calendar


def test_long_days_have_pages(app):
    many = [
        Paper(title=f"Paper {i:03}", source="hub", arxiv=f"2511.1{i:04}", listed=date(2025, 11, 18), upvotes=i)
        for i in range(7 * PER_PAGE + 1)
    ]
    add(app, *many)
    client = visitor(app)
    first = client.get("/day/2025-11-18")
    assert f"{7 * PER_PAGE + 1} papers · page 1 of 8" in text_of(first)
    assert titles(first)[0] == f"Paper {7 * PER_PAGE:03}"
    assert len(titles(client.get("/day/2025-11-18?page=8"))) == 1
    assert '<a href="/day/2025-11-18?page=2" rel="next">' in first.text
    assert '<a href="/day/2025-11-18" rel="prev">' in client.get("/day/2025-11-18?page=2").text
    seen = {title for n in range(1, 9) for title in titles(client.get("/day/2025-11-18", params={"page": n}))}
    assert len(seen) == 7 * PER_PAGE + 1
    assert client.get("/day/2025-11-18?page=0").status_code == 400


def test_a_card_opens_to_the_full_entry(app):
    long = "First sentence here. " + "word " * 300 + "the very end"
    add(app, Paper(title="Long", source="hub", arxiv="2511.1", abstract=long, listed=date(2025, 11, 18)))
    text = visitor(app).get("/day/2025-11-18").text
    opening, rest = re.search(r"<p>(First sentence.*?)</p>.*<p class=\"abstract\">(.*?)</p>", text, re.DOTALL).groups()
    assert opening.endswith(CUT)
    assert (opening.removesuffix(CUT) + " " + rest.removeprefix("… ")).split() == long.split()


@pytest.mark.parametrize("text", ["", "short", "word " * 100, "ü" * 300, "漢字" * 200, "x" * 500])
def test_clipping_keeps_to_the_bytes_and_the_beginning(text):
    cut = clipped(text, 90)
    kept = cut.removesuffix(CUT)
    assert text.startswith(kept)
    assert len(kept.encode()) <= 90
    assert (cut == text) == (len(text.encode()) <= 90)


# --- trending, search, map ---------------------------------------------------------------------------------------


def test_per_cent_signs_and_arrows_are_not_torn():
    assert (
        unbroken("95 % interval: 5 % -> 7 %")
        == "95\N{NO-BREAK SPACE}% interval: 5\N{NO-BREAK SPACE}% → 7\N{NO-BREAK SPACE}%"
    )


def test_trending_follows_the_formula_that_it_shows(app):
    add(app, *papers())
    answer = visitor(app).get("/trending")
    shown = re.sub(r"<[^>]+>", " ", unescape(answer.text))
    assert " ".join(ranking.FORMULA.split()) in " ".join(shown.split())
    found = ranking.trending(app.state.feed.database.read(), NOW, PER_PAGE)
    assert titles(answer) == [entry.title for entry in found]


def test_search_finds_words_and_marks_them(app):
    add(app, *papers())
    client = visitor(app)
    answer = client.get("/search", params={"q": "sheep calibrated"})
    assert titles(answer)[0].startswith("Counting sheep")
    assert re.search(r"<mark>(sheep|calibrated)</mark>", answer.text)
    assert 'value="sheep calibrated"' in answer.text
    assert "Nothing found" in text_of(client.get("/search?q=zzzzzzz%20qqqqqq"))
    assert client.get("/search", params={"q": "sheep", "page": 2}).status_code == 404  # and not "nothing found"


@pytest.mark.parametrize(
    "q", ['"', "c++", "title:(", "NEAR(", "*", "-", "site:", "site:nowhere", "year:abc", "\0x", "%", "漢"]
)
def test_no_query_fails(app, q):
    assert visitor(app).get("/search", params={"q": q}).status_code == 200


def test_of_a_search_that_is_too_long_the_beginning_counts_and_the_page_says_so(app):
    add(app, *papers())
    client = visitor(app)
    answer = client.get("/search", params={"q": "sheep " * 2000})
    assert titles(answer)[0].startswith("Counting sheep")
    told = text_of(answer)
    assert "Only the beginning of what was asked counts." in told
    assert "too long for filters" in told
    assert len(re.search(r"<h1>(.*?)</h1>", answer.text)[1]) < 200
    assert not any("site:weights" in link for link in links(answer.text))
    assert "Only the beginning" not in text_of(client.get("/search?q=sheep"))
    assert 'value="sheep"' in client.get("/search?q=sheep%00%E2%80%AE").text  # as it was looked for


def test_a_filter_that_does_not_exist_is_explained(app):
    assert "there is data, inputs" in text_of(visitor(app).get("/search?q=site:nowhere"))


def test_filters_are_links_that_come_and_go(app):
    client = visitor(app)
    plain = links(client.get("/search?q=noise").text)
    assert "/search?q=noise+site:weights" in plain
    on = client.get("/search?q=noise+site:weights")
    assert re.search(r'href="/search\?q=noise" aria-current="true">weights', on.text)
    assert "/search?q=noise+site:data" in links(on.text)  # one of a kind at a time
    for entry in client.get("/api/search", params={"q": "site:weights verdict:any"}).json()["hits"]:
        assert "weights" in entry["paper"]["sites"]
        assert entry["paper"]["verdict"]


def test_the_map_has_eight_rooms_in_order_and_every_paper(app):
    answer = visitor(app).get("/map")
    assert re.findall(r'<li><a href="#(\w+)"><b>', answer.text) == list(SITES)
    for item in catalogue():
        for site in item.sites:
            room = re.search(rf'<section class="room" id="{site}".*?</section>', answer.text, re.DOTALL)[0]
            assert item.title in unescape(room)
    assert re.search(r'<i class="lit v-supported">✓</i>', answer.text)
    rooms = re.findall(r'<span class="number">(\d+) papers?</span>', answer.text)
    assert list(map(int, rooms)) == [sum(site in item.sites for item in catalogue()) for site in SITES]


# --- one paper ---------------------------------------------------------------------------------------------------


def test_the_page_of_a_measured_paper(app):
    item, client = card("sltrain"), visitor(app)
    answer = client.get(f"/papers/{item.arxiv}")
    told = text_of(answer)
    assert item.summary in told
    kept = record("sltrain")
    assert KINDS[kept["verdict"]].meaning in told
    assert "34.06" in told  # the paper's own number
    assert "paired seeds" in told
    for arm in kept["arms"]:
        assert arm in told
    for gate in kept["gates"]:
        assert gate.replace("_", " ") in told
    assert "perturbed run sltrain --scale laptop" in told
    assert "What it cost" in told
    for name, (low, high) in item.knobs.items():
        assert f"{name} {low}–{high}" in told
    assert f"https://arxiv.org/abs/{item.arxiv}" in links(answer.text)
    figures = [link for link in links(answer.text) if "/figures/" in link]
    assert len(figures) >= 2
    for image in re.findall(r"<img [^>]*figures[^>]*>", answer.text):
        assert len(re.search(r'alt="([^"]*)"', image)[1]) > 30
    drawn = client.get(figures[0])
    assert drawn.headers["content-type"] == "image/svg+xml"
    assert drawn.text.startswith("<svg")
    again = client.get(figures[0], headers={"If-None-Match": drawn.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(f"/papers/{item.arxiv}/figures/nothing.svg").status_code == 404


def test_a_contradiction_is_shown_as_prominently_as_support(app):
    client = visitor(app)
    shapes = []
    for slug in ("sltrain", "ul2"):
        text = client.get(f"/papers/{card(slug).arxiv}").text
        shapes.append(re.findall(r'<section[^>]*aria-labelledby="(\w+)"', text)[:4])
        assert re.search(rf'class="hero v-{record(slug)["verdict"]}"', text)
    assert shapes[0] == shapes[1]


def test_a_paper_whose_method_is_to_come_says_so(app):
    item = next(item for item in catalogue() if not item.has_method and item.arxiv)
    told = text_of(visitor(app).get(f"/papers/{item.arxiv}"))
    assert "No method here yet" in told
    assert item.summary in told
    assert item.claim_text[1:] in told
    assert "Run it here" not in told


def test_other_names_of_a_paper_lead_to_its_page(app):
    client = visitor(app)
    item = card("sltrain")
    for name in ("sltrain", "SLTRAIN", f"{item.arxiv}v3"):
        answer = client.get(f"/papers/{name}")
        assert (answer.status_code, answer.headers["location"]) == (302, f"/papers/{item.arxiv}")


def test_identifiers_with_a_slash(app):
    add(app, Paper(title="Old numbering", source="arxiv", arxiv="hep-ex/0307015"))
    client = owner(app)
    assert "Old numbering" in client.get("/papers/hep-ex/0307015").text
    assert client.get("/papers/hep-ex/0307015v2").headers["location"] == "/papers/hep-ex/0307015"
    assert post(client, "/papers/hep-ex/0307015/vote").status_code == 303
    assert "@misc" in client.get("/papers/hep-ex/0307015/cite.bib").text
    assert client.get("/api/papers/hep-ex/0307015").json()["arxiv"] == "hep-ex/0307015"


def test_bibtex_and_json_of_a_paper(app):
    add(app, *papers())
    client = visitor(app)
    bib = client.get("/papers/2511.09001/cite.bib")
    assert bib.headers["content-type"].startswith("application/x-bibtex")
    assert "Ada Wool and Ben Fleece" in bib.text
    assert client.get("/api/papers/2511.09001").json()["upvotes"] == 41


@pytest.mark.parametrize("address", ["javascript:x", "data:x", "//evil.org", "ftp://x", "HTTP", "http://[", None])
def test_only_http_addresses_become_links(address):
    assert outside(address) is None
    assert outside("https://example.org/x") == "https://example.org/x"


def test_figures_within_pages_have_no_style():
    svg = '<svg style="fill: var(--pt-ink)"><path d="M0 0" style="stroke: red; stroke-width: 1.2"/></svg>'
    assert attributes(svg) == '<svg fill="var(--pt-ink)"><path d="M0 0" stroke="red" stroke-width="1.2"/></svg>'


# --- the owner's -------------------------------------------------------------------------------------------------


def test_upvotes_count_once_and_can_be_taken_back(app):
    add(app, *papers())
    client = owner(app)
    for _ in range(2):
        answer = post(client, "/papers/2511.09001/vote", {"back": "/day/2025-11-17"})
        assert re.fullmatch(r"/day/2025-11-17#p\d+", answer.headers["location"])
    assert "here: ▲ 1" in text_of(client.get("/papers/2511.09001"))
    answer = post(client, "/papers/2511.09001/vote", {"undo": "1"}, headers={"Accept": "application/json"})
    assert answer.json() == {"voted": False}
    assert "here:" not in text_of(client.get("/papers/2511.09001"))


@pytest.mark.parametrize("back", ["https://evil.org", "//evil.org", "/\\evil.org", "javascript:x", "/a b", "/#x", ""])
def test_the_way_back_stays_here(app, back):
    add(app, *papers())
    assert post(owner(app), "/papers/2511.09001/vote", {"back": back}).headers["location"] == "/papers/2511.09001"


def test_comments_are_plain_text(app):
    add(app, *papers())
    client = owner(app)
    answer = post(client, "/papers/2511.09001/comments", {"body": "**two**\nlines <b>"})
    assert answer.headers["location"] == "/papers/2511.09001#comments"
    assert "**two**\nlines &lt;b&gt;" in client.get("/papers/2511.09001").text
    assert post(client, "/papers/2511.09001/comments", {"body": " \n "}).status_code == 400
    assert post(client, "/papers/2511.09001/comments", {"body": "x" * 5001}).status_code == 400
    assert post(client, "/papers/nothing/comments", {"body": "x"}).status_code == 404


def comments(app):
    return [tuple(row) for row in app.state.feed.database.read().execute("SELECT id, body FROM comment ORDER BY id")]


def test_a_comment_is_deleted_where_it_stands(app):
    add(app, *papers())
    client = owner(app)
    for body in ("First.", "Second.", "Third."):
        post(client, "/papers/2511.09001/comments", {"body": body})
    shown = client.get("/papers/2511.09001").text
    addresses = [f"/papers/2511.09001/comments/{number}/delete" for number in (1, 2, 3)]
    assert re.findall(r'action="(/papers/[^"]*/delete)"', shown) == addresses
    # The button is folded away: a second deliberate act, without a script.
    for part in re.findall(r'<details class="delete">.*?</details>', shown, re.DOTALL):
        assert " open" not in part.partition(">")[0]
        assert re.search(r'<summary>Delete.*</summary>\s*<form method="post" .*name="csrf".*<button', part, re.DOTALL)
    for _ in range(2):  # pressed twice it is no mistake
        answer = post(client, addresses[1])
        assert (answer.status_code, answer.headers["location"]) == (303, "/papers/2511.09001#comments")
        assert comments(app) == [(1, "First."), (3, "Third.")]
    assert "Second." not in client.get("/papers/2511.09001").text
    assert post(client, "/papers/2511.09001/comments/99999999999999999999/delete").status_code == 400
    assert post(client, "/papers/nothing/comments/1/delete").status_code == 404


def test_the_button_of_an_old_page_deletes_no_later_comment(app):
    add(app, *papers())
    client = owner(app)
    post(client, "/papers/2511.09001/comments", {"body": "Deleted in another tab."})
    for _ in range(2):
        post(client, "/papers/2511.09001/comments/1/delete")
        post(client, "/papers/2511.09001/comments", {"body": "Written since."})
    assert [body for _, body in comments(app)] == ["Written since."] * 2


def test_only_an_own_comment_is_deleted_and_only_by_its_papers_address(app):
    first, _, _ = add(app, *papers())
    with app.state.feed.database.write() as connection:
        store.comment(connection, first, "somebody else", "Not the owner's.", NOW)
        store.comment(connection, first, "owner", "Mine.", NOW)
    client = owner(app)
    shown = client.get("/papers/2511.09001").text
    assert re.findall(r'action="(/papers/[^"]*/delete)"', shown) == ["/papers/2511.09001/comments/2/delete"]
    post(client, "/papers/2511.09001/comments/1/delete")
    post(client, "/papers/2511.09002/comments/2/delete")
    assert comments(app) == [(1, "Not the owner's."), (2, "Mine.")]


def test_visitors_delete_no_comment_and_see_no_button(app):
    add(app, *papers())
    post(owner(app), "/papers/2511.09001/comments", {"body": "To stay."})
    client = visitor(app, **{"Sec-Fetch-Site": "same-origin"})
    shown = client.get("/papers/2511.09001").text
    assert "To stay." in shown
    assert "/delete" not in shown
    assert client.post("/papers/2511.09001/comments/1/delete").status_code == 403
    for each in (client, owner(app)):
        for method in ("GET", "HEAD"):
            assert each.request(method, "/papers/2511.09001/comments/1/delete").status_code in (404, 405)
    assert comments(app) == [(1, "To stay.")]


def test_each_field_is_tied_to_its_explanation_and_its_bounds(app, monkeypatch):
    fields = [
        Field("density", 0, 1, about="share of ``these`` & <those>."),
        Field("rank", 0, 128, whole=True, about="how many."),
        Field("mute", 0.5, 2),
    ]
    monkeypatch.setattr(app.state.feed.runs, "fields", lambda slug: fields)
    shown = lxml.html.fromstring(owner(app).get(f"/papers/{card('sltrain').arxiv}").text)
    said = {}
    for box in shown.xpath("//input[starts-with(@name, 'set.')]"):
        parts = [shown.get_element_by_id(part).text_content() for part in box.get("aria-describedby").split()]
        said[box.get("name").removeprefix("set.")] = box.get("step"), parts
    assert said == {
        "density": ("any", ["share of these & <those>.", "0 to 1"]),
        "rank": ("1", ["how many.", "a whole number, 0 to 128"]),
        "mute": ("any", ["0.5 to 2"]),
    }


def test_running_a_study_is_asked_for_with_bounded_fields(app):
    item, client = card("sltrain"), owner(app)
    text = client.get(f"/papers/{item.arxiv}").text
    for name, (low, high) in item.knobs.items():
        field = re.search(rf'<input id="set-{name}"[^>]*>', text)[0]
        bounds = {k: float(v) for k, v in re.findall(r'(min|max)="([^"]+)"', field)}
        assert bounds == {"min": low, "max": high}
        assert 'type="number"' in field
    assert app.state.feed.runs.isolation().note in unescape(text)
    answer = post(client, "/runs", {"slug": "sltrain", "scale": "smoke", "set.density": "0.05", "set.rank": ""})
    number = int(answer.headers["location"].rsplit("/", 1)[1])
    run = app.state.feed.runs.get(number)
    assert (run.slug, run.scale, dict(run.settings), run.state) == ("sltrain", "smoke", {"density": 0.05}, "queued")
    page = client.get(f"/runs/{number}")
    assert f'data-poll="/runs/{number}"' in page.text
    assert "density" in text_of(page)
    assert "sltrain" in text_of(client.get("/runs"))
    assert post(client, f"/runs/{number}/cancel").status_code == 303
    after = client.get(f"/runs/{number}").text
    assert "data-poll" not in after
    assert "cancelled" in after


@pytest.mark.parametrize(
    "told",
    [
        {"scale": "paper"},
        {"scale": "full"},
        {"scale": ""},
        {"slug": "no-such-method"},
        {"slug": "../x"},
        {"set.density": "2"},
        {"set.density": "nan"},
        {"set.density": "/etc/passwd"},
        {"set.data": "1"},
        {"set.plan.steps": "1"},
    ],
)
def test_anything_else_is_not_run(app, told):
    client = owner(app)
    answer = post(client, "/runs", {"slug": "sltrain", "scale": "smoke", **told})
    assert answer.status_code == 400
    assert "Not run" in answer.text
    assert app.state.feed.runs.recent(5) == []


def test_a_finished_run_shows_its_result(app):
    kept = {name: value for name, value in record("pag").items() if name not in ("hash", "verdict_version")}
    with app.state.feed.database.write() as connection:
        connection.execute(
            "INSERT INTO run (slug, scale, settings, state, asked, started, ended, done, total, record) "
            "VALUES ('pag', 'laptop', '{}', 'done', ?, ?, ?, 24, 24, ?)",
            (NOW, NOW, NOW + 90, json.dumps(kept)),
        )
        connection.execute(
            "INSERT INTO run (slug, scale, settings, state, asked, error) "
            "VALUES ('pag', 'smoke', '{}', 'failed', ?, ?)",
            (NOW, "perturbed: error: <b>no room</b> in /home/somebody"),
        )
    client = owner(app)
    told = text_of(client.get("/runs/1"))
    assert KINDS[kept["verdict"]].meaning in told
    assert "24" in text_of(client.get("/runs"))
    assert "&lt;b&gt;no room" in client.get("/runs/2").text
    assert "somebody" not in visitor(app).get("/runs/2").text  # paths are the owner's
    for nothing in ("/runs/99", "/runs/0", "/runs/-1", "/runs/99999999999999999999"):
        assert client.get(nothing).status_code == 404


PAGE = """Daily Papers

by AK and the research community

Nov 17

A first invented paper about umbrellas

Rain is noise. We hold an umbrella over the gradient.

  • 4 authors
·
Nov 3

A second one

It has an abstract that ends.

  • 2 authors
·
Jun 8, 2024

This line belongs to nothing
"""


def test_a_saved_page_is_imported(app):
    client = owner(app)
    files = {"file": ("../../saved page.txt", PAGE.encode())}
    answer = post(client, "/import", {"saved_on": "2025-11-17"}, files=files)
    assert answer.status_code == 303, answer.text
    told = text_of(client.get(answer.headers["location"]))
    assert re.search(r"new 2 merged 0 changed 0", told), told
    assert "saved-page.txt" in told
    assert "Not understood: 1" in told
    assert re.search(r"line \d+ This line belongs to nothing", told)
    day = client.get("/")
    assert titles(day) == ["A first invented paper about umbrellas", "A second one"]
    assert "3 November 2025" in text_of(day)
    assert "8 June 2024" in text_of(day)
    post(client, "/import", {"saved_on": "2025-11-17"}, files=files)
    assert re.search(r"new 0 merged 0 changed 0 same 2", text_of(client.get("/settings")))


def test_of_an_update_that_read_nothing_it_is_not_said_that_all_was_understood(app):
    client = owner(app)
    for failed, understood in (((), True), (("hub: cannot be reached",), False)):
        report = json.dumps(Report("update from hub", failed=failed).as_json())
        with app.state.feed.database.write() as connection:
            connection.execute("DELETE FROM import")
            connection.execute("INSERT INTO import (source, started, ended, report) VALUES ('x', 1, 2, ?)", (report,))
        told = text_of(client.get("/settings"))
        assert ("Every line was understood" in told) is understood
        assert ("hub: cannot be reached" in told) is not understood


@pytest.mark.parametrize(
    ("content", "saved_on", "why"),
    [
        (b"", "2025-11-17", "x.txt: the file is empty"),
        (b"hello", "2025-11-17", "Not imported"),
        (PAGE.encode(), "", "saved"),
        (PAGE.encode(), "17.11.2025", "YYYY-MM-DD"),
        (b"\xff\xfe\x00\x01", "2025-11-17", "Not imported"),
    ],
)
def test_what_cannot_be_imported_is_explained(app, content, saved_on, why):
    answer = post(owner(app), "/import", {"saved_on": saved_on}, files={"file": ("x.txt", content)})
    assert answer.status_code == 400
    assert why in text_of(answer)
    assert "/tmp" not in answer.text
    assert 'href="/settings#import"' in answer.text  # the way back to the form


def test_a_damaged_ledger_takes_no_page_down(app, monkeypatch, tmp_path):
    from perturbed.evidence import ledger

    folder = tmp_path / "ledger"
    folder.mkdir()
    for path in ledger.package_folder().glob("*.jsonl"):
        text = path.read_text()
        (folder / path.name).write_text(text.replace('"verdict":"supported"', '"verdict":"contradicted"'))
    monkeypatch.setattr(ledger, "package_folder", lambda: folder)
    client = visitor(app)
    assert "could not be read" in text_of(client.get("/papers/2406.02214"))
    for address in ("/", "/map", "/search?q=low+rank", "/trending"):
        assert client.get(address).status_code == 200


def test_a_page_that_fails_is_a_page(app, monkeypatch, caplog):
    from perturbed.feed.web import browse

    monkeypatch.setattr(browse.ranking, "trending", lambda *_: 1 / 0)
    answer = visitor(app).get("/trending")
    assert answer.status_code == 500
    assert "This page failed" in answer.text
    assert "content-security-policy" in answer.headers
    assert "ZeroDivisionError" in caplog.text
    assert "division" not in answer.text


def test_every_page_has_one_title_headings_in_order_and_labels(app):
    add(app, *papers())
    client = owner(app)
    for address in (
        "/",
        "/day/2025-11-17",
        "/trending",
        "/search?q=noise",
        "/map",
        "/papers/2406.02214",
        "/runs",
        "/about",
        "/settings",
        "/feeds",
        "/subscribe",
        "/owner",
    ):
        text = client.get(address).text
        levels = [int(n) for n in re.findall(r"<h([1-6])", text)]
        assert levels.count(1) == 1, address
        assert levels[0] == 1, address
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), (address, levels)
        named = re.findall(r'\bid="([^"]+)"', text)
        assert len(named) == len(set(named)), address
        assert '<html lang="en">' in text
        assert '<a class="skip" href="#main">' in text
        for field in re.findall(r"<(?:input|textarea|select)\b[^>]*>", text):
            if 'type="hidden"' not in field and 'type="radio"' not in field and 'type="checkbox"' not in field:
                name = re.search(r'\bid="([^"]+)"', field)
                assert name, field
                assert f'for="{name[1]}"' in text, field


def test_times_are_utc_and_days_long(app):
    add(app, *papers())
    post(owner(app), "/papers/2511.09001/comments", {"body": "x"})
    assert "20 November 2025, 09:00 UTC" in text_of(visitor(app).get("/papers/2511.09001"))


def test_a_database_that_cannot_be_used_is_said_to_the_owner_and_is_no_defect(tmp_path, caplog):
    app = app_of(tmp_path)
    client = owner(app)
    token = form_token(client)
    (tmp_path / "feed.sqlite").rename(tmp_path / "away")
    for answer in (client.get("/"), client.post("/papers/2406.02214/vote", data={"csrf": token})):
        assert answer.status_code == 503
        assert "moved, removed or replaced" in answer.text
    other = visitor(app).get("/")
    assert other.status_code == 503
    assert str(tmp_path) not in other.text
    assert visitor(app).get("/api/papers").status_code == 503
    assert not any(record.exc_info for record in caplog.records)
    (tmp_path / "away").rename(tmp_path / "feed.sqlite")
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (sqlite3.SQLITE_FULL, "Make room on the disk"),
        (sqlite3.SQLITE_IOERR | 3 << 8, "has room and is well"),  # an extended code: SQLITE_IOERR_WRITE
        (sqlite3.SQLITE_READONLY, "the right to write it"),
        (sqlite3.SQLITE_BUSY, "Another process writes"),
        (sqlite3.SQLITE_CORRUPT, "feed export --database"),
        (sqlite3.SQLITE_ERROR, "defect of perturbed"),
    ],
)
def test_what_is_wrong_with_the_database_is_told_with_its_remedy(tmp_path, monkeypatch, code, said):
    app = app_of(tmp_path)
    client = owner(app)
    error = sqlite3.OperationalError("as SQLite says")
    error.sqlite_errorcode = code

    def fail(*_):
        raise error

    monkeypatch.setattr(store, "vote", fail)
    answer = post(client, "/papers/2406.02214/vote")
    assert answer.status_code == (500 if code == sqlite3.SQLITE_ERROR else 503)
    assert said in unescape(answer.text)


def test_what_is_wrong_with_the_database_is_logged_once_and_not_every_ten_seconds(tmp_path, monkeypatch, caplog):
    app = app_of(tmp_path)
    (tmp_path / "feed.sqlite").rename(tmp_path / "away")
    rounds = itertools.count()
    monkeypatch.setattr("perturbed.feed.web.app._EVERY", 0.0)
    monkeypatch.setattr("perturbed.feed.verdicts.sync", lambda database, now: (next(rounds), database.read()))

    async def some_rounds():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(_tend(app.state.feed), 1.0)

    asyncio.run(some_rounds())
    assert next(rounds) > 3
    assert len([record for record in caplog.records if "moved, removed" in record.getMessage()]) == 1
    assert not any(record.exc_info for record in caplog.records)


def test_what_keeps_runs_waiting_is_said(app):
    client = visitor(app)
    assert "queue cannot be used" not in client.get("/runs").text
    app.state.feed.runs.trouble = "runs wait, as their queue cannot be used: disk <full>"
    assert "queue cannot be used: disk &lt;full&gt;" in client.get("/runs").text
