"""The digest: what it tells, to whom, and that nobody gets anything twice, whatever is killed when."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
from datetime import date, timedelta
from email import message_from_bytes, policy
from email.utils import parsedate_to_datetime

import lxml.html
import pytest
from mail_parts import BASE, DAY, HOUR, NOW, Catcher, add, dump, html_of, link_of, subscribed, text_of
from waiting import SECONDS

from perturbed.errors import PerturbedError
from perturbed.evidence.report import KINDS
from perturbed.feed import catalogue, digest, store, subscriptions, verdicts
from perturbed.feed.database import Database
from perturbed.feed.digest import digests, issue_of, preview, send
from perturbed.feed.mail import MailError
from perturbed.feed.papers import Paper
from perturbed.feed.subscriptions import Wants

ANN, BO, CY = "ann@example.org", "bo@example.org", "cy@example.org"
NEXT, AFTER = DAY + timedelta(days=1), DAY + timedelta(days=2)
A_DAY = 24 * HOUR


def titles(database, address=ANN, every="day", day=DAY):
    found = [one for one in digests(database, every, day) if one.address == address]
    return [entry.title for one in found for entry in one.papers]


def judged(database, paper, verdict, record):
    with database.write() as connection:
        connection.execute(
            "INSERT INTO finding (paper, record, verdict, at) VALUES (?, ?, ?, ?)", (paper, record, verdict, NOW)
        )
        connection.execute("UPDATE paper SET verdict = ?, changed = ? WHERE id = ?", (verdict, NOW, paper))


def deliver(database, catcher, day=DAY, now=NOW, every="day"):
    return send(database, every, day, now, to=catcher.server, base=BASE)


# --- what is told ------------------------------------------------------------------------------------------------


def test_the_issue_of_a_day():
    assert issue_of("day", DAY) == ("2025-11-17", DAY, DAY)
    assert issue_of("week", date(2025, 11, 20)) == ("2025-W47", DAY, date(2025, 11, 23))
    assert issue_of("week", date(2027, 1, 2)) == ("2026-W53", date(2026, 12, 28), date(2027, 1, 3))


def test_papers_of_the_day_to_who_wants_them(database):
    add(database, 1, title="Pruning by magnitude", abstract="Weights are removed.")
    add(database, 2, title="Another day", day=NEXT)
    add(database, 3, title="Masks", abstract="We speak of pruning in passing.")
    subscribed(database, ANN)
    subscribed(database, BO, query="pruning")
    subscribed(database, CY, query="diffusion")
    subscribed(database, "weekly@example.org", every="week")
    subscriptions.ask(database, "pending@example.org", Wants(), "day", NOW)
    found = {one.address: [entry.title for entry in one.papers] for one in digests(database, "day", DAY)}
    assert found == {ANN: ["Pruning by magnitude", "Masks"], BO: ["Pruning by magnitude", "Masks"]}
    assert titles(database, "weekly@example.org", "week") == ["Another day", "Pruning by magnitude", "Masks"]


def test_topics_are_searches(database):
    add(database, 1, title="Pruning networks", published=date(2025, 11, 1))
    add(database, 2, title="Pruning trees", published=date(2024, 1, 1))
    for number, (query, expected) in enumerate(
        [
            ("prune", ["Pruning networks", "Pruning trees"]),
            ('"pruning networks"', ["Pruning networks"]),
            ("pruning -trees", ["Pruning networks"]),
            ("-trees", ["Pruning networks"]),
            ("prun* year:2024", ["Pruning trees"]),
            ("pruning 2024", ["Pruning trees"]),
            ("verdict:none networks", ["Pruning networks"]),
            ("verdict:any", []),
            ("pruning nonsense", []),
            ('"x OR title:(', []),
        ]
    ):
        subscribed(database, f"n{number}@example.org", query=query)
        assert titles(database, f"n{number}@example.org") == expected, query


def test_sites_narrow_papers_and_evidence(database):
    subscribed(database, ANN, sites=("optim",))
    subscribed(database, BO, sites=("weights", "optim"))
    for number, site in enumerate(("weights", "optim", "data")):
        paper = add(database, number, title=site)
        with database.write() as connection:
            connection.execute("INSERT INTO acts_on VALUES (?, ?)", (paper, site))
        judged(database, paper, "null", f"r{number}")
    found = {one.address: one for one in digests(database, "day", DAY)}
    assert [entry.title for entry in found[ANN].papers] == ["optim"]
    assert [news.entry.title for news in found[ANN].news] == ["optim"]
    assert [news.entry.title for news in found[BO].news] == ["optim", "weights"]


def test_papers_or_evidence_alone(database):
    subscribed(database, ANN, evidence=False)
    subscribed(database, BO, papers=False)
    judged(database, add(database, 1), "null", "r1")
    found = {one.address: (len(one.papers), len(one.news)) for one in digests(database, "day", DAY)}
    assert found == {ANN: (1, 0), BO: (0, 1)}


def test_nothing_to_tell_is_no_mail(database):
    subscribed(database, ANN, query="diffusion")
    add(database, 1)
    with Catcher()() as catcher:
        assert deliver(database, catcher).lines() == ["digest 2025-11-17: 0 sent"]
    assert catcher.sessions == 0


def test_evidence_since_the_last_digest_with_what_was_before(database):
    paper = add(database, 1)
    judged(database, paper, "screening", "r0")
    subscribed(database, ANN, papers=False)
    assert digests(database, "day", DAY) == []  # it was there before
    judged(database, paper, "null", "r1")
    with Catcher()() as catcher:
        deliver(database, catcher)
        assert digests(database, "day", NEXT) == []
        judged(database, paper, "supported", "r2")
        deliver(database, catcher, NEXT, NOW + A_DAY)
    first, second = map(text_of, catcher.messages)
    assert "[null; was: screening] Paper 1" in first
    assert "[supported; was: null] Paper 1" in second


def test_real_evidence_is_told_in_words_and_numbers(database):
    subscribed(database, ANN, papers=False)
    catalogue.seed(database, NOW)
    verdicts.sync(database, NOW)
    (one,) = digests(database, "day", DAY)
    assert len(one.news) >= 5
    message = digest.message_of(one, subscriptions.new_token(), Catcher_sender(), NOW, BASE)
    told, shown = (
        " ".join(text_of(message).split()),
        " ".join(lxml.html.fromstring(html_of(message)).text_content().split()),
    )
    for news in one.news:
        assert news.sentence == verdicts.summary_of(news.entry.slug).sentence
        assert news.verdict == news.entry.verdict
        for place in (told, shown):
            assert news.sentence in place
            assert news.entry.title in place
    assert re.search(r"95 % interval", told)


def Catcher_sender():
    catcher = Catcher()
    catcher.port = 1
    return catcher.server.sender


# --- late, moved and united papers ------------------------------------------------------------------------------


def test_what_comes_after_its_day_stands_in_the_next(database):
    add(database, 1)
    subscribed(database, ANN)
    with Catcher()() as catcher:
        deliver(database, catcher)
        add(database, 2, title="Late")
        add(database, 3, title="Undated", day=None)
        add(database, 4, title="Long ago", day=DAY - timedelta(days=20))
        add(database, 5, title="Of the day", day=NEXT)
        assert titles(database, day=NEXT) == ["Of the day", "Late", "Undated"]
        deliver(database, catcher, NEXT, NOW + A_DAY)
    assert titles(database, day=AFTER) == []


def test_a_day_without_a_digest_is_made_up_for(database):
    subscribed(database, ANN)
    add(database, 1)
    add(database, 2, day=NEXT)
    assert titles(database, day=NEXT) == ["Paper 2", "Paper 1"]


def test_a_new_subscriber_gets_no_backlog(database):
    add(database, 1, title="Yesterday's", day=DAY - timedelta(days=1))
    add(database, 2)
    subscribed(database, ANN)
    assert titles(database) == ["Paper 2"]


def test_what_came_late_is_told_to_those_who_were_there(database):
    subscribed(database, ANN)
    add(database, 1, title="Late", day=DAY - timedelta(days=1))
    subscribed(database, BO)
    add(database, 2, title="Today's")
    assert (titles(database, ANN), titles(database, BO)) == (["Today's", "Late"], ["Today's"])


def test_a_paper_that_is_listed_anew_is_not_told_twice(database):
    add(database, 1, source="arxiv", day=None, published=DAY)
    subscribed(database, ANN)
    with Catcher()() as catcher:
        deliver(database, catcher)
    add(database, 1, day=NEXT, now=NOW + HOUR)
    assert store.find(database.read(), "2511.00001").day == NEXT
    assert titles(database, day=NEXT) == []


def test_a_paper_told_by_its_title_is_not_told_again_by_its_identifier(database):
    subscribed(database, ANN)
    add(database, 1, arxiv=None, source="page")
    with Catcher()() as catcher:
        deliver(database, catcher)
    add(database, 1, day=NEXT, now=NOW + HOUR)
    assert store.find(database.read(), "2511.00001").key == "2511.00001"
    assert titles(database, day=NEXT) == []


def test_two_rows_found_to_be_one_paper_are_not_told_again(database):
    subscribed(database, ANN)
    add(database, 9, title="Old name", day=NEXT)
    add(database, 1, arxiv=None, title="New name", source="page")
    with Catcher()() as catcher:
        deliver(database, catcher)
    with database.write() as connection:
        united = store.upsert(connection, Paper(title="New name", arxiv="2511.00009", source="arxiv"), NOW + HOUR)
    assert united.kind == "merged"
    assert titles(database, day=NEXT) == []


def test_a_row_that_went_makes_no_room_for_an_old_one(database):
    add(database, 9, title="Old name", day=NEXT)
    add(database, 1, arxiv=None, title="New name", source="page")
    subscribed(database, ANN)
    with database.write() as connection:
        store.upsert(connection, Paper(title="New name", arxiv="2511.00009", source="arxiv"), NOW)
    add(database, 10, title="Late")
    assert titles(database, day=NEXT) == ["New name", "Late"]


def test_the_heading_names_the_day_or_the_days(database):
    add(database, 1)
    subscribed(database, ANN)
    subscribed(database, BO, every="week")
    found = [digest.heading(one) for every in ("day", "week") for one in digests(database, every, DAY)]
    assert found == ["Monday, 17 November 2025", "17 November to 23 November 2025"]


# --- the message -------------------------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script> & “signs” ünïcode"


@pytest.fixture
def received(database):
    subscribed(database, ANN)
    paper = add(
        database, 1, title=NASTY, abstract="Words " * 200, authors=("A B", "C D", "E <b>F</b>", "G H"), published=DAY
    )
    add(database, 2, title="A title that is rather long " * 8, author_count=2)
    judged(database, paper, "contradicted", "r1")
    long = f"https://{'papers.' * 8}example.org"
    with Catcher()() as catcher:
        report = send(database, "day", DAY, NOW, to=catcher.server, base=long)
    assert report.sent == [ANN]
    (message,), ((_, raw),) = catcher.messages, catcher.envelopes
    return long, message, raw


def test_text_and_html_tell_the_same(received):
    base, message, _ = received
    told, page = text_of(message), lxml.html.fromstring(html_of(message))
    shown = " ".join(page.text_content().split())
    plain = " ".join(told.split())
    people = ("A B, C D, E <b>F</b> and 1 more", "2 authors")
    verdict = ("contradicted", KINDS["contradicted"].meaning)
    for words in (NASTY, "Words Words …", *people, "17 November 2025", *verdict):
        assert words in plain
        assert words in shown
    links = {a.get("href") for a in page.iter("a")}
    assert {line for line in told.split() if line.startswith("http")} <= links | {f"{base}/subscribe"}
    assert f"{base}/papers/2511.00001" in links
    assert all(link.startswith(f"{base}/") for link in links)


def test_what_others_wrote_runs_in_its_own_direction(received):
    page = lxml.html.fromstring(html_of(received[1]))
    titles = [part for part in page.iter("h3") if part.text_content() == NASTY]
    assert len(titles) == 2  # among the papers, and with its verdict
    assert all(part.get("dir") == "auto" for part in (*titles, *page.xpath("//p[starts-with(., 'Words')]")))


def test_nothing_in_the_html_is_fetched_or_run(received):
    _, message, _ = received
    page = lxml.html.fromstring(html_of(message))
    assert not list(page.iter("script", "img", "link", "style", "iframe", "object"))
    assert "url(" not in html_of(message)
    assert "&lt;script&gt;" in html_of(message)
    assert not list(page.iter("b"))


def test_headers_as_the_standards_want_them(received):
    base, message, raw = received
    token = link_of(message, "unsubscribe")
    header = (
        f"List-Unsubscribe: <{base}/unsubscribe/one-click/{token}>, <mailto:papers@example.org?subject=unsubscribe>"
    )
    assert len(header) > 78
    assert f"\r\n{header}\r\n".encode() in raw
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert message["List-Id"] == "perturbed papers <papers.example.org>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Subject"] == "perturbed 2025-11-17: 2 papers, 1 new verdict"
    assert parsedate_to_datetime(message["Date"]).timestamp() == NOW
    assert raw.isascii()
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    assert f"{base}/unsubscribe/{token}" in text_of(message).splitlines()[-1]  # whole, in one line


def test_the_name_of_a_message_is_that_of_subscriber_and_issue(database):
    subscribed(database, ANN)
    subscribed(database, BO)
    add(database, 1)
    one, other = digests(database, "day", DAY)
    again, _ = digests(database, "day", DAY)
    assert one.name == again.name != other.name
    add(database, 2, day=NEXT)
    assert digests(database, "day", NEXT)[0].name != one.name


def test_each_mail_has_a_link_of_its_own_that_works(database):
    subscribed(database, ANN)
    add(database, 1)
    add(database, 2, day=NEXT)
    with Catcher()() as catcher:
        deliver(database, catcher)
        deliver(database, catcher, NEXT, NOW + A_DAY)
    first, second = (link_of(message, "unsubscribe") for message in catcher.messages)
    assert first != second
    assert subscriptions.unsubscribe(database, first)
    add(database, 3, day=AFTER)
    assert digests(database, "day", AFTER) == []


def test_a_large_day_is_told_in_part_and_says_so(database):
    subscribed(database, ANN)
    for number in range(digest.SHOWN + 3):
        add(database, number)
    (one,) = digests(database, "day", DAY)
    assert len(one.papers) == digest.SHOWN + 3
    message = digest.message_of(one, subscriptions.new_token(), Catcher_sender(), NOW, BASE)
    assert f"And 3 more: {BASE}/day/2025-11-17" in text_of(message)
    assert "And 3 more" in html_of(message)
    assert len(message.as_bytes()) < 100_000


# --- once --------------------------------------------------------------------------------------------------------


def test_sent_once_and_marked(database):
    subscribed(database, ANN)
    add(database, 1)
    with Catcher()() as catcher:
        assert deliver(database, catcher).sent == [ANN]
        assert deliver(database, catcher).lines() == ["digest 2025-11-17: 0 sent"]
    assert catcher.to == [ANN]
    row = database.read().execute("SELECT state, issue, at FROM delivery").fetchone()
    assert tuple(row) == ("sent", "2025-11-17", NOW)


def test_who_ends_between_making_and_sending_gets_none(database):
    subscribed(database, ANN)
    add(database, 1)
    (one,) = digests(database, "day", DAY)
    with database.write() as connection:
        connection.execute("UPDATE subscriber SET state = 'unsubscribed'")
    assert not digest._claim(database, one, subscriptions.new_token(), NOW)


def test_two_runs_at_once_send_once(database, tmp_path):
    for number in range(6):
        subscribed(database, f"n{number}@example.org")
    add(database, 1)
    reports = []

    def run():
        own = Database(database.path)
        reports.append(deliver(own, catcher))
        own.close()

    with Catcher()() as catcher:
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
    assert sorted(catcher.to) == [f"n{number}@example.org" for number in range(6)]
    assert sum(len(report.sent) for report in reports) == 6


@pytest.mark.parametrize(
    ("rcpt", "data", "kind", "state", "delivery"),
    [
        ("550 5.1.1 unknown", None, "bounced", "suppressed", "refused"),
        ("452 4.2.2 try later", None, "later", "confirmed", None),
        ("550 5.7.1 no relaying for you", None, "later", "confirmed", None),
        (None, "554 looks like spam", "refused", "confirmed", "refused"),
        (None, "451 try later", "later", "confirmed", None),
    ],
)
def test_what_a_server_refuses(database, rcpt, data, kind, state, delivery):
    subscribed(database, ANN)
    subscribed(database, BO)
    add(database, 1)
    with Catcher(refuse_rcpt={ANN: rcpt} if rcpt else {}, refuse_data={ANN: data} if data else {})() as catcher:
        report = deliver(database, catcher)
    assert report.sent == [BO]  # one refusal holds nobody else up
    ((address, why),) = getattr(report, kind)
    assert address == ANN
    assert (rcpt or data).split()[-1] in why
    assert any(ANN in line for line in report.lines())
    row = database.read().execute("SELECT id, state FROM subscriber WHERE address = ?", (ANN,)).fetchone()
    assert row["state"] == state
    refused = [(one.address, one.since, one.words) for one in subscriptions.suppressed(database.read())]
    assert refused == ([(ANN, NOW, why)] if state == "suppressed" else [])
    kept = database.read().execute("SELECT state FROM delivery WHERE subscriber = ?", (row["id"],)).fetchone()
    assert (kept and kept["state"]) == delivery
    with Catcher()() as catcher:
        deliver(database, catcher)
    assert catcher.to == ([ANN] if kind == "later" else [])


def test_an_unreachable_server_claims_nothing(database):
    subscribed(database, ANN)
    add(database, 1)
    before = dump(database)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        catcher = Catcher()
        catcher.port = taken.getsockname()[1]
        with pytest.raises(MailError, match="cannot be used"):
            deliver(database, catcher)
    assert dump(database) == before


def test_a_server_that_goes_away_at_the_last_byte_leaves_it_uncertain(database):
    subscribed(database, ANN)
    subscribed(database, BO)
    add(database, 1)

    class Gone(Catcher):
        async def handle_DATA(self, server, session, envelope):
            if envelope.rcpt_tos == [ANN] and ANN not in self.to:
                self.envelopes.append((ANN, envelope.content))
                server.transport.abort()
                return "250 never heard"
            return await super().handle_DATA(server, session, envelope)

    with Gone()() as catcher:
        report = deliver(database, catcher)
        assert [address for address, _ in report.uncertain] == [ANN]
        assert report.sent == [BO]  # over a new connection
        assert [address for address, _ in deliver(database, catcher).uncertain] == [ANN]
    assert sorted(catcher.to) == [ANN, BO]


def test_a_server_that_does_not_come_back_gets_the_rest_next_time(database):
    for address in (ANN, BO, CY):
        subscribed(database, address)
    add(database, 1)

    class Leaving(Catcher):
        async def handle_DATA(self, server, session, envelope):
            self.listener.close()
            server.transport.abort()
            return "250 never heard"

    with Leaving()() as catcher:
        report = deliver(database, catcher)
    assert ([one for one, _ in report.uncertain], report.sent) == ([ANN], [])
    assert [one for one, _ in report.later] == [BO, CY]
    assert all("cannot be used" in why for _, why in report.later)
    with Catcher()() as catcher:
        assert deliver(database, catcher).sent == [BO, CY]


RUN = """
import sys
from email.headerregistry import Address
from pathlib import Path
from datetime import date
from perturbed.feed.database import Database
from perturbed.feed.digest import send
from perturbed.feed.mail import Server
server = Server(host="127.0.0.1", port=int(sys.argv[2]), sender=Address("Papers", addr_spec="papers@example.org"))
send(Database(Path(sys.argv[1])), "day", date(2025, 11, 17), float(sys.argv[3]), to=server, base=sys.argv[4])
"""


@pytest.mark.parametrize("moment", ["before the message", "after the message"])
def test_killed_in_the_middle_nobody_gets_two_and_nobody_is_forgotten(database, moment):
    addresses = [f"n{number}@example.org" for number in range(4)]
    for address in addresses:
        subscribed(database, address)
    add(database, 1)
    there, go_on = threading.Event(), threading.Event()

    class Slow(Catcher):
        async def wait(self, address):
            import asyncio

            if address == addresses[1] and not go_on.is_set():
                there.set()
                await asyncio.to_thread(go_on.wait, SECONDS)

        async def handle_RCPT(self, server, session, envelope, address, options):
            if moment == "before the message":
                await self.wait(address)
            return await super().handle_RCPT(server, session, envelope, address, options)

        async def handle_DATA(self, server, session, envelope):
            answer = await super().handle_DATA(server, session, envelope)
            if moment == "after the message":
                await self.wait(envelope.rcpt_tos[0])
            return answer

    with Slow()() as catcher:
        child = subprocess.Popen([sys.executable, "-c", RUN, database.path, str(catcher.port), str(NOW), BASE])
        try:
            assert there.wait(SECONDS)
            child.send_signal(signal.SIGKILL)
        finally:
            child.kill()
            child.wait(SECONDS)
            go_on.set()
        report = deliver(database, catcher, now=NOW + 60)
        again = deliver(database, catcher, now=NOW + 120)
        next_day = deliver(database, catcher, NEXT, NOW + A_DAY)
    # The one that was claimed is not sent again, and every later run says so, with what to know of it.
    assert report.sent == addresses[2:]
    for told in (report, again, next_day):
        ((address, why),) = told.uncertain
        assert address == addresses[1]
        assert "2025-11-17" in why
        assert f"{addresses[1]}: uncertain, not sent again" in "\n".join(told.lines())
    expected = [addresses[0], *addresses[2:], *([addresses[1]] if moment == "after the message" else [])]
    assert sorted(catcher.to) == sorted(expected)


# --- previews ----------------------------------------------------------------------------------------------------


def test_a_preview_touches_nothing(database, tmp_path, monkeypatch):
    monkeypatch.delenv("PERTURBED_SMTP", raising=False)
    monkeypatch.delenv("PERTURBED_MAIL_FROM", raising=False)
    subscribed(database, ANN)
    subscribed(database, "a/b'@example.org", query="Paper")
    add(database, 1)
    before = dump(database)
    files = preview(database, "day", DAY, NOW, base="http://127.0.0.1:8000", folder=tmp_path / "out" / "mail")
    assert [file.name for file in files] == ["2025-11-17-1-ann@example.org.eml", "2025-11-17-2-a_b_@example.org.eml"]
    assert dump(database) == before
    for file in files:
        assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
        message = message_from_bytes(file.read_bytes(), policy=policy.default)
        assert "http://127.0.0.1:8000/papers/2511.00001" in text_of(message)
        assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert not subscriptions.unsubscribe(database, link_of(message, "unsubscribe"))


def test_what_is_claimed_or_sent_is_in_no_preview(database, tmp_path):
    for address in (ANN, BO, CY):
        subscribed(database, address)
    add(database, 1)
    one, two, _ = digests(database, "day", DAY)
    for made in (one, two):
        assert digest._claim(database, made, subscriptions.new_token(), NOW)
    digest._settle(database, two, "", "sent", "", NOW)
    add(database, 2)  # which the next issue tells them of
    (file,) = preview(database, "day", DAY, NOW, base=BASE, folder=tmp_path)
    assert CY in file.name


def test_a_folder_that_cannot_be_written_is_named(database, tmp_path):
    subscribed(database, ANN)
    add(database, 1)
    (tmp_path / "taken").write_text("x")
    with pytest.raises(PerturbedError, match="taken"):
        preview(database, "day", DAY, NOW, base=BASE, folder=tmp_path / "taken")
