"""Files of every kind into the database, and harvests that are cut off at any point: killed, and gone on with."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
import recorded_server as recorded
from waiting import SECONDS

from perturbed.errors import PerturbedError
from perturbed.feed.database import Database
from perturbed.feed.importers import harvest, hub
from perturbed.feed.importers.harvest import ImportFileError, import_file, sniff, update
from perturbed.feed.importers.http import Client
from perturbed.feed.importers.reading import FormatError

PAGE = """Daily Papers

by AK and the research community

Nov 17

Kettles Dream of Steam

We boil a kettle. It sings.

  • 8 authors
·
Jun 8 3

A stray remark

Cats Sit on Maps

They sit.

  • 2 authors
·
Sep 9, 2024
"""
SAVED = date(2025, 11, 17)
NOW = datetime(2025, 11, 20, tzinfo=UTC).timestamp()


@pytest.fixture
def server():
    with recorded.RecordedServer().running() as running:
        yield running


def client_of(database, server, clock=lambda: recorded.NOW):
    return Client(database, hosts=server.hosts, clock=clock, sleep=lambda seconds: None)


def run(database, server, **more):
    """An update three days back at noon of the recorded day, unless told otherwise."""
    now = more.pop("now", recorded.NOW)
    return update(database, client=client_of(database, server, lambda: now), now=now, **more)


def papers(database):
    """All of every paper but its row's number, by key."""
    rows = database.read().execute("SELECT * FROM paper ORDER BY key").fetchall()
    return [{name: row[name] for name in row.keys() if name != "id"} for row in rows]  # noqa: SIM118


def imports(database):
    return [dict(row) for row in database.read().execute("SELECT * FROM import ORDER BY id")]


def states(database):
    rows = database.read().execute("SELECT source, state FROM progress WHERE source NOT LIKE 'polite:%'")
    return {row["source"]: json.loads(row["state"]) for row in rows}


def saved(tmp_path, text, name="saved"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# Files


def test_a_saved_page(database, tmp_path):
    path = saved(tmp_path, PAGE)
    report = import_file(database, path, saved_on=SAVED, now=recorded.NOW)
    assert (report.new, report.merged, report.changed, report.same, report.papers) == (2, 0, 0, 0, 2)
    assert [(u.line, u.text) for u in report.unread] == [(15, "A stray remark")]
    assert "line 15" in "\n".join(report.lines())
    assert "2 new" in report.lines()[0]
    kettles = next(p for p in papers(database) if p["title"].startswith("Kettles"))
    assert (kettles["published"], kettles["listed"], kettles["source_comments"]) == ("2025-06-08", "2025-11-17", 3)
    again = import_file(database, path, saved_on=SAVED, now=recorded.NOW + 60)
    assert (again.new, again.same) == (0, 2)


def test_the_report_is_kept_with_the_import(database, tmp_path):
    report = import_file(database, saved(tmp_path, PAGE, "my page.txt"), saved_on=SAVED, now=recorded.NOW)
    (row,) = imports(database)
    assert json.loads(row["report"]) == json.loads(json.dumps(report.as_json()))
    assert row["source"] == "my page.txt"
    assert row["started"] == recorded.NOW <= row["ended"]
    assert report.as_json()["unread"][0]["line"] == 15


def test_a_page_needs_the_day_of_its_save(database, tmp_path):
    with pytest.raises(ImportFileError, match="--saved-on"):
        import_file(database, saved(tmp_path, PAGE), saved_on=None, now=0.0)
    assert not imports(database)


def test_every_kind_is_told_by_its_content(database, tmp_path):
    with recorded.RecordedServer(count=30).running() as server:
        hub = server.hub({"date": "2025-11-17", "p": "0", "limit": "100"})
        span = {"search_query": "submittedDate:[202511170000 TO 202511172359]", "start": "0", "max_results": "50"}
        texts = {"hub": hub, "atom": server.atom(span), "oai": server.oai({"from": "2025-11-17"}), "rss": server.rss()}
    for kind, text in texts.items():
        assert sniff(text.encode()) == kind
        report = import_file(database, saved(tmp_path, text), saved_on=None, now=recorded.NOW)
        assert report.papers == (20 if kind == "hub" else 8)
        assert not report.unread
    assert sniff(PAGE.encode()) == sniff(b"\xef\xbb\xbf" + PAGE.encode()) == sniff(PAGE.encode("utf-16")) == "page"
    assert len(papers(database)) == 20  # four sources, the same papers
    first = next(p for p in papers(database) if p["arxiv"] == "2511.00000")
    assert (first["source"], first["source_upvotes"], first["source_comments"]) == ("arxiv", 0, 1)


def test_pages_in_other_encodings(database, tmp_path):
    for data in (b"\xef\xbb\xbf" + PAGE.encode(), PAGE.encode("utf-16"), PAGE.replace("\n", "\r\n").encode()):
        assert import_file(database, saved(tmp_path, data), saved_on=SAVED, now=NOW).papers == 2
    with pytest.raises(FormatError, match="UTF-8"):
        import_file(database, saved(tmp_path, PAGE.encode("latin-1", "replace") + b"\xff"), saved_on=SAVED, now=NOW)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "as plain text"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "another kind"),
        (b"\x7fELF\x00\x01", "binary"),
        (b"just a letter", "looked for"),
        (b"[1, 2", "not whole JSON"),
        (b"<feed xmlns='http://www.w3.org/2005/Atom'><entry>", "not whole XML: line 1, column"),
        (b"<!-- x --><!DOCTYPE feed [<!ENTITY a 'b'>]><feed/>", "document type or entities|another kind"),
    ],
)
def test_what_cannot_be_imported_says_why_and_leaves_nothing(database, tmp_path, data, why):
    with pytest.raises((ImportFileError, FormatError), match=why) as refused:
        import_file(database, saved(tmp_path, data, "odd.bin"), saved_on=SAVED, now=NOW)
    assert "odd.bin" in str(refused.value)
    assert not imports(database)
    assert not papers(database)


def test_a_file_that_is_not_there_or_too_large(database, tmp_path, monkeypatch):
    with pytest.raises(ImportFileError, match="cannot be read"):
        import_file(database, tmp_path / "none", saved_on=SAVED, now=NOW)
    monkeypatch.setattr(harvest, "LARGEST_FILE", 10)
    with pytest.raises(ImportFileError, match="split it"):
        import_file(database, saved(tmp_path, PAGE), saved_on=SAVED, now=NOW)


def test_500_papers_to_a_transaction_and_progress_after_each(database, tmp_path):
    items = [{"id": f"2511.{i:05d}", "title": f"Kettle {i}"} for i in range(1201)]
    seen = []

    def progress(step):
        other = Database(database.path)
        seen.append((step.done, len(papers(other))))  # what another connection sees is there
        other.close()

    import_file(database, saved(tmp_path, json.dumps(items)), saved_on=None, now=0.0, progress=progress)
    assert seen == [(500, 500), (1000, 1000), (1201, 1201)]


# Updates


def test_update_from_the_hub_and_arxiv(database, server):
    steps = []
    report = run(database, server, days=2, categories=["cs.LG"], progress=steps.append)
    assert (report.new, report.merged) == (40, 40)  # the hub first, then arXiv knows the same papers
    assert report.failed == ()
    assert steps[-1].done == 80
    assert {p["listed"] for p in papers(database)} == {"2025-11-17", "2025-11-16"}
    assert states(database) == {}
    days = [path for host, path in server.asked if host == "huggingface.co"]
    assert [re.search(r"date=([\d-]+)", path)[1] for path in days] == ["2025-11-16", "2025-11-17"]
    starts = [re.search(r"start=(\d+)", path)[1] for host, path in server.asked if host == "export.arxiv.org"]
    assert starts == ["0", "8", "16", "24", "32"]
    (row,) = imports(database)
    assert json.loads(row["report"])["new"] == 40


def test_a_second_update_on_one_day_asks_nobody(database, server):
    for _ in range(2):
        report = run(database, server, days=2)
        asked = len(server.asked)
    assert len(server.asked) == asked
    assert (report.new, report.same) == (0, 80)


def test_the_hubs_days_of_more_than_one_answer(database):
    with recorded.RecordedServer(count=250, per_day=250).running() as server:
        report = run(database, server, days=1, sources=["hub"])
    assert report.new == 250
    assert len(server.asked) == 3


def test_a_hub_that_does_not_count_pages_is_not_asked_for_ever(database):
    with recorded.RecordedServer(count=150, per_day=150).running() as server:
        server.body = lambda host, path: server.hub({"date": "2025-11-17", "p": "0", "limit": "100"})
        run(database, server, days=1, sources=["hub"])
    assert len(server.asked) == 2


def test_oai_goes_on_from_the_last_harvest(database, server):
    report = run(database, server, days=3, sources=["oai"], categories=["cs.LG"])
    assert (report.new, report.failed) == (60, ())
    first = server.asked[0][1]
    assert "metadataPrefix=arXivRaw" in first
    assert "set=cs%3Acs%3ALG" in first
    assert "from=2025-11-15" in first
    assert all("metadataPrefix" not in path and "resumptionToken" in path for _, path in server.asked[1:])
    assert states(database) == {"oai:cs.LG": {"since": "2025-11-17"}}
    later = recorded.NOW + 5 * 86_400
    server.asked.clear()
    run(database, server, sources=["oai"], categories=["cs.LG"], now=later)
    assert "from=2025-11-17" in server.asked[0][1]
    assert states(database) == {"oai:cs.LG": {"since": "2025-11-22"}}


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("cs.LG", "cs:cs:LG"),
        ("stat.ML", "stat:stat:ML"),
        ("hep-ex", "physics:hep-ex"),
        ("astro-ph.GA", "physics:astro-ph:GA"),
    ],
)
def test_sets_of_oai(category, name):
    assert f"set={name.replace(':', '%3A')}&" in harvest._records(category, "2025-11-17", None)


def test_an_expired_token_starts_the_list_again(database, server):
    lost = recorded.says(recorded.oai_answer('<error code="badResumptionToken">expired</error>'))
    server.faults = [None, None, lost]
    report = run(database, server, days=3, sources=["oai"], categories=["cs.LG"])
    assert report.failed == ()
    assert len(papers(database)) == 60
    assert states(database) == {"oai:cs.LG": {"since": "2025-11-17"}}


def test_rss(database, server):
    report = run(database, server, sources=["rss"], categories=["cs.LG", "cs.CL"])
    assert report.new == 8
    assert server.asked == [("rss.arxiv.org", "/rss/cs.LG+cs.CL")]


def test_one_source_that_fails_does_not_stop_the_other(database, server):
    server.faults = [recorded.status(500)] * 5
    report = run(database, server, days=1)
    assert len(report.failed) == 1
    assert "status 500" in report.failed[0]
    assert "failed: hub: " in "\n".join(report.lines())
    assert report.new == 20
    server.faults = [recorded.error_entry]
    later = recorded.NOW + 2 * 86_400
    with pytest.raises(PerturbedError, match="incorrect id format"):
        run(database, server, days=4, sources=["arxiv"], now=later)
    assert "incorrect id format" in imports(database)[-1]["report"]


def test_a_truncated_page_stops_there_and_the_next_update_goes_on(database, server):
    server.faults = [None, None, recorded.truncated]
    with pytest.raises(PerturbedError, match=r"line \d+, column \d+"):
        run(database, server, days=3, sources=["arxiv"])
    assert len(papers(database)) == 16
    assert [s["place"] for s in states(database).values()] == [["16"]]
    server.asked.clear()
    report = run(database, server, days=3, sources=["arxiv"])
    assert report.new == 44
    assert "start=16" in server.asked[0][1]


def test_what_was_cut_off_is_finished_before_the_new_days(database, server):
    server.faults = [None, recorded.truncated]
    with pytest.raises(PerturbedError):
        run(database, server, days=2, sources=["arxiv"])
    server.asked.clear()
    later = recorded.NOW + 3 * 86_400
    run(database, server, days=1, sources=["arxiv"], now=later)
    spans = [re.search(r"(\d{8})0000.TO.(\d{8})", path).groups() for _, path in server.asked]
    assert spans[0] == ("20251116", "20251117")
    assert spans[-1] == ("20251120", "20251120")
    assert len(papers(database)) == 40


def test_a_server_that_counts_wrongly_is_not_asked_for_ever(database, server):
    server.body = lambda host, path: server.feed("".join(map(recorded.entry, server.papers[:8])), 60, 0)
    with pytest.raises(PerturbedError, match="answered page 8 when asked for 8"):
        run(database, server, sources=["arxiv"])
    for tokens in (["same"], ["one", "other"]):
        following = itertools.cycle(tokens)
        server.body = lambda host, path, following=following: recorded.oai_answer(
            f"<ListRecords>{recorded.record(server.papers[0])}"
            f"<resumptionToken>{next(following)}</resumptionToken></ListRecords>"
        )
        with pytest.raises(PerturbedError, match="in a circle"):
            run(database, server, sources=["oai"], categories=["cs.LG"])


def test_a_day_of_the_hub_has_an_end(database, server, monkeypatch):
    monkeypatch.setattr(harvest, "HUB_PAGE", 1)
    monkeypatch.setattr(harvest, "HUB_MOST", 3)
    with pytest.raises(PerturbedError, match="more than 3 papers of 2025-"):
        run(database, server, sources=["hub"], days=1)
    assert len(papers(database)) == 3, "what came before stays"


def test_more_than_arxiv_gives_out_is_said(database, server, monkeypatch):
    monkeypatch.setattr(harvest, "ATOM_MOST", 20)
    with pytest.raises(PerturbedError, match="fewer days"):
        run(database, server, days=3, sources=["arxiv"])


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"sources": ["hubb"]}, "did you mean 'hub'"),
        ({"categories": ["cs.LG&start=9"]}, "category"),
        ({"categories": ["cs.LG OR all:x"]}, "category"),
        ({"days": 0}, "at least one day"),
        ({"sources": []}, "one source"),
        ({"categories": []}, "one category"),
    ],
)
def test_wrong_questions(database, server, more, why):
    with pytest.raises(PerturbedError, match=why):
        run(database, server, **more)
    assert server.asked == []
    assert not imports(database)


@pytest.mark.parametrize(
    "category", ["cs.LG", "hep-ex", "cond-mat.mtrl-sci", "q-bio.NC", "astro-ph.GA", "physics.optics"]
)
def test_categories_that_arxiv_has(category):
    assert harvest._CATEGORY.fullmatch(category)


# Killed

CHILD = """
import os, signal, sys
from pathlib import Path
from perturbed.feed import store
from perturbed.feed.database import Database
from perturbed.feed.importers import harvest
from perturbed.feed.importers.http import HOSTS, Client, Endpoint

path, port, now, deadly = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
upsert, told = store.upsert, 0
def counted(*args):
    global told
    told += 1
    if told == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return upsert(*args)
store.upsert = counted
hosts = {name: Endpoint("http", "127.0.0.1", port, may_be_private=True) for name in HOSTS}
database = Database(path)
client = Client(database, hosts=hosts, clock=lambda: now, sleep=lambda seconds: None)
harvest.update(database, days=3, categories=["cs.LG"], sources=["hub", "arxiv", "oai"], client=client, now=now)
"""


def child(path, server, deadly=0):
    command = [sys.executable, "-c", CHILD, str(path), str(server.port), str(recorded.NOW), str(deadly)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def ended(process):
    _, errors = process.communicate(timeout=SECONDS)
    return process.returncode, errors


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = tmp_path_factory.mktemp("unbroken") / "feed.sqlite"
    with recorded.RecordedServer().running() as server:
        assert ended(child(path, server)) == (0, "")
        asked = list(server.asked)
    return papers(Database(path)), asked


def resumed(path, server):
    """Forget the kept answers, so that only the harvest's own state says where it was, and let it go on."""
    database = Database(path)
    with database.write() as connection:
        connection.execute("DELETE FROM fetched")
    server.asked.clear()
    assert ended(child(path, server)) == (0, "")
    return papers(database)


@pytest.mark.parametrize("request_number", [2, 5, 9, 14])
def test_killed_between_two_pages_it_goes_on_with_the_same_result(tmp_path, unbroken, request_number):
    path = tmp_path / "feed.sqlite"
    with recorded.RecordedServer().running() as server:
        process = child(path, server)

        def kill(number):
            if number == request_number:
                os.kill(process.pid, signal.SIGKILL)
                process.wait(SECONDS)

        server.before = kill
        assert ended(process)[0] == -signal.SIGKILL
        server.before = None
        (cut,) = imports(Database(path))
        assert (cut["ended"], cut["report"]) == (None, None)
        assert resumed(path, server) == unbroken[0]
        # The page under way is asked for again; the pages of that source before it are not.
        before, after = unbroken[1][: request_number - 1], unbroken[1][request_number - 1 :]
        source = after[0][0]
        assert [a for a in server.asked if a[0] == source] == [a for a in after if a[0] == source]
        assert before
    assert states(Database(path)) == {"oai:cs.LG": {"since": "2025-11-17"}}


@pytest.mark.parametrize("paper", [1, 31, 63, 79, 150])
def test_killed_inside_a_page_it_has_all_of_a_page_or_nothing_and_goes_on(tmp_path, unbroken, paper):
    path = tmp_path / "feed.sqlite"
    with recorded.RecordedServer().running() as server:
        code, _ = ended(child(path, server, deadly=paper))
        assert code == -signal.SIGKILL
        there = len(papers(Database(path)))
        assert there == min((paper - 1) // 20 * 20, 60)
        assert resumed(path, server) == unbroken[0]


def test_killed_again_and_again_it_still_ends(tmp_path, unbroken):
    path = tmp_path / "feed.sqlite"
    with recorded.RecordedServer().running() as server:
        for deadly in (25, 22, 29):
            assert ended(child(path, server, deadly))[0] == -signal.SIGKILL
        assert resumed(path, server) == unbroken[0]


def test_an_import_that_was_killed_is_imported_again_without_harm(tmp_path):
    path = tmp_path / "feed.sqlite"
    items = [{"id": f"2511.{i:05d}", "title": f"Kettle {i}"} for i in range(1201)]
    file = saved(tmp_path, json.dumps(items))
    command = (
        CHILD[: CHILD.index("hosts =")]
        + "harvest.import_file(Database(path), Path(sys.argv[5]), saved_on=None, now=now)"
    )
    arguments = [sys.executable, "-c", command, str(path), "0", "1.0", "700", str(file)]
    assert subprocess.run(arguments, timeout=SECONDS).returncode == -signal.SIGKILL
    database = Database(path)
    assert len(papers(database)) == 500
    report = import_file(database, file, saved_on=None, now=2.0)
    assert (report.new, report.same) == (701, 500)


@pytest.mark.skipif(not Path("/work/shared/seed/daily-papers-page.txt").exists(), reason="no given page here")
def test_the_given_page_into_the_database(database):
    report = import_file(database, Path("/work/shared/seed/daily-papers-page.txt"), saved_on=SAVED, now=recorded.NOW)
    assert report.new == 87
    rows = papers(database)
    assert sum(p["author_count"] is not None and p["published"] is not None for p in rows) == 85
    assert sum(p["author_count"] is None and p["published"] is None for p in rows) == 2
    assert all(p["listed"] == SAVED.isoformat() for p in rows)
    assert timedelta(0) <= SAVED - max(date.fromisoformat(p["published"]) for p in rows if p["published"])


def test_what_no_paper_can_be_is_left_out_of_files_and_harvests(database, tmp_path):
    items = [{"paper": {"id": f"2511.0000{i}", "title": title}} for i, title in enumerate(("Small", "L" * 5000, "Far"))]
    items[2]["paper"]["submittedOnDailyAt"] = "9999-12-31T00:00:00.000Z"  # it would be the newest day for good
    (tmp_path / "x.json").write_text(json.dumps(items))
    report = import_file(database, tmp_path / "x.json", saved_on=None, now=NOW)
    assert (report.new, [(u.line, u.unit) for u in report.unread]) == (1, [(2, "paper"), (3, "paper")])
    assert [found["unit"] for found in report.as_json()["unread"]] == ["paper", "paper"]
    tally = harvest._Tally("x", NOW)
    harvest._Harvest(database, None, tally, None)._take("hub", hub.read(json.dumps(items)), "today", None)
    assert (tally.done, [u.unit for u in tally.unread]) == (1, ["paper", "paper"])


@pytest.mark.parametrize("saved_on", [date(2025, 11, 22), date(1800, 1, 1)])
def test_a_page_was_saved_on_a_day_that_has_been(database, tmp_path, saved_on):
    with pytest.raises(harvest.ImportFileError, match="still to come, or older than any page"):
        import_file(database, saved(tmp_path, PAGE), saved_on=saved_on, now=NOW)
    assert papers(database) == []
