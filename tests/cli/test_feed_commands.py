"""The feed on the command line: files in, papers found, mail previewed, everything out; one line for what is wrong."""

import email
import email.policy
import json
from datetime import date
from pathlib import Path

import bibtexparser
import pytest
from answers import refused

from perturbed.feed import subscriptions
from perturbed.feed.database import Database, default_path
from perturbed.feed.importers import http
from perturbed.feed.subscriptions import Wants

GIVEN = Path(__file__).parents[3] / "shared" / "seed" / "daily-papers-page.txt"
PAGE = """Daily Papers

by AK and the research community

Nov 17

Sheep counted by drone

A camera above the meadow learns which white spots are sheep and which are stones.

  • 7 authors
·
Jun 8, 2024

Listening to ice

Microphones under a frozen lake tell thick ice from thin before anyone steps on it.

  • 2 authors
·
Sep 27
3
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.txt"
    path.write_text(PAGE)
    return path


def exported(perturbed, *arguments):
    code, out, _ = perturbed("feed", "export", "--json", *arguments)
    assert code == 0
    return {paper["title"]: paper for paper in json.loads(out)}


def test_a_page_is_imported_and_exported(perturbed, page):
    code, out, err = perturbed("feed", "import", page, "--saved-on", "2025-11-17")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == (
        "page.txt: 2 papers (2 new, 0 merged, 0 changed, 0 same, 0 skipped), 0 not understood"
    )
    papers = exported(perturbed)
    assert len(papers) == 89, "the catalogue comes first"
    ice = papers["Listening to ice"]
    assert (ice["published"], ice["authors"], ice["comments"], ice["upvotes"], ice["arxiv"]) == (
        *("2025-09-27", 2, 3, None, None),
    )
    again = json.loads(perturbed("feed", "import", page, "--saved-on", "2025-11-17", "--json")[1])
    assert (again["new"], again["same"]) == (0, 2)


@pytest.mark.skipif(not GIVEN.exists(), reason="the given page is not on this machine")
def test_the_given_page_meets_the_catalogue(perturbed):
    assert perturbed("feed", "import", GIVEN, "--saved-on", "2025-11-17")[0] == 0
    papers = exported(perturbed).values()
    assert len(papers) == 87
    assert sum(p["published"] is not None and p["authors"] is not None for p in papers) == 85
    assert all(p["arxiv"] or p["title"] == "Policy Gradient-Driven Noise Mask" for p in papers)
    assert max(p["published"] for p in papers if p["published"]) < "2025-11-17", "a day without a year is of the save's"


def test_another_database_and_bibtex(perturbed, page, tmp_path):
    other = tmp_path / "elsewhere" / "papers.sqlite"
    perturbed("feed", "import", page, "--saved-on", "2025-11-17", "--database", other)
    assert "Listening to ice" not in exported(perturbed)
    out = tmp_path / "papers.bib"
    assert perturbed("feed", "export", "--bibtex", "--database", other, "--out", out) == (0, "", "")
    read = bibtexparser.parse_string(out.read_text())
    assert not read.failed_blocks
    assert len(read.entries) == 89
    assert not list(tmp_path.glob("*.part"))


def test_search_by_words(perturbed):
    code, out, _ = perturbed("feed", "search", "self-rectifying diffusion", "--words", "--limit", "1")
    assert code == 0
    assert "2403.17377" in out
    found = json.loads(perturbed("feed", "search", "verdict:supported site:data", "--words", "--json")[1])
    assert [paper["slug"] for paper in found["papers"]] == ["hubble"]


@pytest.mark.slow
def test_search_by_meaning_waits_for_the_model(perturbed, page):
    perturbed("feed", "import", page, "--saved-on", "2025-11-17")
    code, out, _ = perturbed("feed", "search", "winter safety acoustics", "--json", "--limit", "3")
    assert code == 0
    assert json.loads(out)["papers"][0]["title"] == "Listening to ice"


def test_what_can_be_read_of_a_damaged_file_is_exported(perturbed, page, tmp_path):
    path = tmp_path / "feed.sqlite"
    perturbed("feed", "import", page, "--saved-on", "2025-11-17", "--database", path)
    database = Database(path)
    database.read().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40_000] = b"\xff" * 40_000
    path.write_bytes(content)
    code, out, err = perturbed("feed", "export", "--database", path)
    assert code == 0, err
    assert "exporting what can be read" in err
    assert len(json.loads(out)) > 10


def test_a_digest_is_previewed_and_nothing_is_sent(perturbed, page, tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBED_MAIL_FROM", "papers@example.org")
    path = tmp_path / "feed.sqlite"
    perturbed("feed", "import", page, "--saved-on", "2025-11-17", "--database", path)
    database, now = Database(path), 1_763_300_000.0
    token = subscriptions.ask(database, "reader@example.org", Wants(), "day", now).token
    subscriptions.confirm(database, token, now)
    options = ("--every", "day", "--on", "2025-11-17", "--database", path, "--public-url", "https://papers.example.org")
    code, out, _ = perturbed("feed", "digest", "--dry-run", *options)
    assert code == 0
    (written,) = out.splitlines()
    mail = email.message_from_bytes(Path(written).read_bytes(), policy=email.policy.default)
    assert mail["To"] == "reader@example.org"
    assert "Listening to ice" in mail.get_body(("plain",)).get_content()
    assert mail["List-Unsubscribe"].startswith("<https://papers.example.org/")
    assert database.read().execute("SELECT count(*) FROM delivery").fetchone()[0] == 0
    refused(perturbed("feed", "digest", *options), "PERTURBED_SMTP")
    other = (*options[:3], "2025-11-16", *options[4:])
    code, out, err = perturbed("feed", "digest", "--dry-run", *other)
    assert (code, out) == (0, "")
    assert "digest 2025-11-16: nothing to send" in err


def test_update_says_what_could_not_be_read(perturbed, monkeypatch):
    monkeypatch.setattr(http, "resolve", lambda host, port: ["127.0.0.1"])
    code, out, err = perturbed("feed", "update", "--source", "hub")
    assert (code, out) == (2, "")
    assert "hub" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("import", "nothing.txt"), ["nothing.txt", "cannot be read"]),
        (("import", "page.txt"), ["--saved-on YYYY-MM-DD"]),
        (("import", "page.txt", "--saved-on", "17.11.2025"), ["--saved-on 17.11.2025", "YYYY-MM-DD"]),
        (("import", "page.txt", "--saved-on", "2999-01-01"), ["saved on 2999-01-01", "still to come"]),
        (("update", "--source", "scholar"), ["scholar", "hub"]),
        (("update", "--category", "http://x"), ["http://x", "cs.LG"]),
        (("export", "--json", "--bibtex"), ["choose one"]),
        (("export", "--out", "no/such/folder/papers.json"), ["no/such/folder/papers.json", "--out"]),
        (("subscribe", "reader@example.org"), ["PERTURBED_SMTP"]),
        (("subscribe", "nobody"), ["no address", "@-sign"]),
        (("digest", "--every", "year"), ["--every year", "day or week"]),
        (("digest", "--on", "today"), ["--on today", "YYYY-MM-DD"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(perturbed, page, monkeypatch, arguments, words):
    monkeypatch.delenv("PERTURBED_SMTP", raising=False)
    refused(perturbed("feed", *arguments), *words)


def test_serving_others_needs_a_public_address(perturbed):
    refused(perturbed("serve", "--host", "0.0.0.0"), "--host 0.0.0.0", "--public-url")
    refused(perturbed("serve", "--public-url", "http://papers.example.org"), "https")


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "noise", "--words"),
        ("export", "--json"),
        ("export", "--bibtex"),
        ("digest", "--dry-run"),
        ("digest",),
        ("subscribe", "reader@example.org"),
    ],
)
def test_a_mistyped_database_is_refused_and_not_made(perturbed, page, tmp_path, arguments):
    path = tmp_path / "feeds" / "papers.sqlite"
    perturbed("feed", "import", page, "--saved-on", "2025-11-17", "--database", path)
    wrong = path.with_name("paper.sqlite")
    answer = perturbed("feed", *arguments, "--database", wrong)
    refused(answer, f"--database {wrong}: there is no such file; did you mean {path}? (`perturbed feed import`")
    for other in (tmp_path / "feeds" / "zzz", tmp_path / "nowhere" / "papers.sqlite", page / "papers.sqlite"):
        answer = perturbed("feed", *arguments, "--database", other)
        refused(answer, f"--database {other}: there is no such file (`perturbed feed import`")
        assert not other.exists()
    assert all(file.name.startswith("papers.sqlite") for file in path.parent.iterdir())  # SQLite's own come and go
    assert not (tmp_path / "nowhere").exists()


def test_the_default_database_is_made_by_whoever_comes_first(perturbed):
    assert not default_path().exists()
    assert perturbed("feed", "search", "noise", "--words")[0] == 0
    assert default_path().exists()


def test_days_by_default_are_of_the_last_whole_issue(perturbed, monkeypatch):
    from perturbed.feed import digest

    asked = []
    monkeypatch.setattr(digest, "preview", lambda store, every, day, now, **kw: asked.append((every, day)) or [])
    for every in ("day", "week"):
        perturbed("feed", "digest", "--dry-run", "--every", every)
    today = digest.datetime.now(digest.UTC).date() if hasattr(digest, "UTC") else date.today()
    assert [(today - day).days for _, day in asked] == [1, 7]
