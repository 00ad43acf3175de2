"""The polite client against a server on loopback: pauses, retries, the cache, and every way it could be led astray."""

import shutil
import socket
import subprocess
import time
from email.utils import formatdate

import pytest
import recorded_server as recorded
from waiting import SECONDS

from perturbed.feed.database import Database
from perturbed.feed.importers import atom, http
from perturbed.feed.importers.http import DAY, HOSTS, Client, Endpoint, Refused, Unavailable, is_public
from perturbed.feed.importers.reading import FormatError

URL = "https://export.arxiv.org/api/query?search_query=submittedDate:[202511010000+TO+202511172359]&start={}&max_results=9"
FIRST = URL.format(0)
HUB = "https://huggingface.co/api/daily_papers?date=2025-11-17&p=0&limit=100"


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self):
        self.now = recorded.NOW
        self.slept = []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def server():
    with recorded.RecordedServer().running() as running:
        yield running


@pytest.fixture
def make(database, server, clock):
    def client(**more):
        given = {"hosts": server.hosts, "clock": clock, "sleep": clock.sleep, **more}
        return Client(database, **given)

    return client


def nothing_was_kept(database):
    return database.read().execute("SELECT count(*) FROM fetched").fetchone()[0] == 0


# Politeness


def test_an_answer_is_read(make, server):
    found = make().read(FIRST, atom.read)
    assert len(found.papers) == 8
    assert found.more == "8"
    assert server.asked == [("export.arxiv.org", FIRST.removeprefix("https://export.arxiv.org"))]


def test_three_seconds_between_requests_to_one_host(make, clock):
    client = make()
    client.read(FIRST, atom.read)
    clock.now += 1
    client.read(URL.format(8), atom.read)
    assert clock.slept == [2.0]
    clock.now += 10
    client.read(URL.format(16), atom.read)
    assert clock.slept == [2.0]


def test_the_pause_holds_for_other_processes_and_not_for_other_hosts(make, clock, database, server):
    make().read(FIRST, atom.read)
    other = Client(Database(database.path), hosts=server.hosts, clock=clock, sleep=clock.sleep)
    other.read(HUB, lambda body: atom.Read(()))
    assert clock.slept == []
    other.read(URL.format(8), atom.read)
    assert clock.slept == [3.0]


def test_a_clock_that_was_set_back_does_not_stop_it(make, clock):
    client = make()
    client.read(FIRST, atom.read)
    clock.now -= 10 * DAY
    client.read(URL.format(8), atom.read)
    assert clock.slept == []


def test_an_answer_is_kept_for_a_day_and_then_thrown_away(make, server, clock, database):
    client = make()
    first = client.read(FIRST, atom.read)
    clock.now += DAY - 1
    assert client.read(FIRST, atom.read) == first
    assert len(server.asked) == 1
    clock.now += 2
    assert client.read(URL.format(8), atom.read) != first
    kept = [row["url"] for row in database.read().execute("SELECT url FROM fetched")]
    assert kept == [URL.format(8)]


def test_what_is_older_than_a_day_or_from_the_future_is_asked_for_again(make, server, clock):
    client = make()
    client.read(FIRST, atom.read)
    clock.now += DAY + 1
    client.read(FIRST, atom.read)
    assert len(server.asked) == 2
    clock.now -= 3 * DAY  # the clock was ahead
    client.read(FIRST, atom.read)
    assert len(server.asked) == 3


def test_what_is_kept_is_bounded(make, database, monkeypatch):
    client = make()
    size = []
    monkeypatch.setattr(http, "KEPT_BYTES", 12_000)
    for start in range(0, 48, 8):
        client.read(URL.format(start), atom.read)
        size.append(database.read().execute("SELECT sum(length(body)) FROM fetched").fetchone()[0])
    assert max(size) <= 12_000
    assert min(size) > 0
    newest = database.read().execute("SELECT url FROM fetched ORDER BY at DESC").fetchone()["url"]
    assert newest == URL.format(40)


# Retries


def test_429_waits_as_long_as_it_is_asked_to(make, server, clock):
    server.faults = [recorded.status(429, Retry_After="17")]
    assert len(make().read(FIRST, atom.read).papers) == 8
    assert clock.slept == [17.0]


def test_429_with_a_date(make, server, clock):
    server.faults = [recorded.status(429, Retry_After=formatdate(clock.now + 31, usegmt=True))]
    make().read(FIRST, atom.read)
    assert clock.slept == [31.0]


def test_who_asks_for_an_hour_is_not_waited_for_nor_asked_again(make, server, clock):
    server.faults = [recorded.status(429, Retry_After="3600")]
    with pytest.raises(Unavailable, match="come back in 3600 s"):
        make().read(FIRST, atom.read)
    assert len(server.asked) == 1
    assert clock.slept == []


def test_503_waits_longer_each_time_and_gives_up(make, server, clock, database):
    server.faults = [recorded.status(503)] * 9
    with pytest.raises(Unavailable, match="asked 5 times, at last status 503"):
        make().read(FIRST, atom.read)
    assert len(server.asked) == 5
    assert clock.slept == [5.0, 10.0, 20.0, 40.0]
    assert nothing_was_kept(database)


@pytest.mark.parametrize("fault", [recorded.empty_page, recorded.broken_off], ids=["empty page", "broken off"])
def test_an_empty_page_and_a_broken_connection_are_asked_again(make, server, fault):
    server.faults = [fault, fault]
    assert len(make().read(FIRST, atom.read).papers) == 8
    assert len(server.asked) == 3


def test_an_empty_page_that_stays_empty_is_not_taken_for_the_end(make, server, database):
    server.faults = [recorded.empty_page] * 5
    with pytest.raises(Unavailable, match="empty page although more"):
        make().read(FIRST, atom.read)
    assert nothing_was_kept(database)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (recorded.truncated, r"line \d+, column \d+"),
        (recorded.error_entry, "incorrect id format"),
        (recorded.says('<!DOCTYPE x [<!ENTITY a "b">]><feed/>'), "entities"),
        (recorded.says("<html>maintenance</html>"), "another XML"),
    ],
    ids=["truncated", "error as entry", "bomb", "html"],
)
def test_an_answer_that_cannot_be_read_is_an_error_and_not_kept(make, server, database, fault, why):
    server.faults = [fault]
    client = make()
    with pytest.raises(FormatError, match=why):
        client.read(FIRST, atom.read)
    assert nothing_was_kept(database)
    assert len(client.read(FIRST, atom.read).papers) == 8


def test_another_status_is_an_error(make, server):
    server.faults = [recorded.status(404)]
    with pytest.raises(Unavailable, match="status 404"):
        make().read(FIRST, atom.read)
    assert len(server.asked) == 1


def test_a_host_that_cannot_be_reached(make, clock):
    hosts = {"export.arxiv.org": Endpoint("http", "127.0.0.1", 9, may_be_private=True)}
    with pytest.raises(Unavailable, match="is this machine online"):
        make(hosts=hosts).read(FIRST, atom.read)

    def no_name(host, port):
        raise OSError("no such name")

    with pytest.raises(Unavailable, match="name not found"):
        make(resolve=no_name).read(FIRST, atom.read)


# Where it goes


@pytest.mark.parametrize(
    "url",
    [
        "http://export.arxiv.org/api/query",
        "https://elsewhere.example/",
        "https://export.arxiv.org.elsewhere.example/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://localhost/",
        "https://user@export.arxiv.org/",
        "https://export.arxiv.org@elsewhere.example/",
        "https://export.arxiv.org:8443/",
        "https://export.arxiv.org:x/",
        "https://export.arxiv.org/a b",
        "https://export.arxiv.org/\u00e4",
        "file:///etc/passwd",
        "//export.arxiv.org/",
        "",
    ],
)
def test_other_addresses_are_not_asked(make, server, clock, url):
    with pytest.raises(Refused):
        make().read(url, atom.read)
    assert server.asked == []


def test_only_four_hosts_and_https():
    assert set(HOSTS) == {"export.arxiv.org", "oaipmh.arxiv.org", "rss.arxiv.org", "huggingface.co"}
    assert all(e == Endpoint("https", name, 443) and not e.may_be_private for name, e in HOSTS.items())


def test_a_redirect_to_a_known_host_is_followed(make, server):
    server.faults = [recorded.redirect("/api/query?" + URL.format(8).partition("?")[2])]
    assert make().read(FIRST, atom.read).papers[0].arxiv == "2511.00048"
    server.faults = [recorded.redirect(FIRST, code=308)]
    assert make().read(HUB, atom.read).papers[0].arxiv == "2511.00040"
    assert [host for host, _ in server.asked] == ["export.arxiv.org"] * 2 + ["huggingface.co", "export.arxiv.org"]


@pytest.mark.parametrize(
    "where",
    [
        "http://127.0.0.1:{port}/api/query",
        "https://127.0.0.1:{port}/api/query",
        "http://export.arxiv.org:{port}/",
        "http://169.254.169.254/latest/meta-data/",
        "https://elsewhere.example/",
        "//elsewhere.example/",
        "file:///etc/passwd",
    ],
)
def test_a_redirect_to_anywhere_else_is_refused(make, server, where):
    server.faults = [recorded.redirect(where.format(port=server.port))]
    with pytest.raises(Refused):
        make().read(FIRST, atom.read)
    assert len(server.asked) == 1


def test_redirects_end(make, server):
    server.faults = [recorded.redirect(FIRST)] * 20
    with pytest.raises(Refused, match="led on more than"):
        make().read(FIRST, atom.read)
    assert len(server.asked) == 5
    server.faults = [recorded.status(302)]
    with pytest.raises(Unavailable, match="moved"):
        make().read(FIRST, atom.read)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *(
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "192.0.2.1",
            "198.18.0.1",
            "::1",
            "::",
            "fe80::1",
            "fe80::1%eth0",
        ),
        *(
            "fc00::1",
            "ff02::1",
            "2001:db8::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "fe80::1%eth0",
        ),
        *("2002:7f00:1::", "::127.0.0.1", "nonsense", ""),
    ],
)
def test_private_and_reserved_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "151.101.3.42", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_public_addresses(address):
    assert is_public(address)


def test_a_name_that_leads_to_a_private_address_is_not_asked(make, server):
    hosts = {"export.arxiv.org": Endpoint("http", "export.arxiv.org", server.port)}
    for answer in (["127.0.0.1"], ["1.1.1.1", "127.0.0.1"], ["::ffff:127.0.0.1"]):
        with pytest.raises(Refused, match="no public address"):
            make(hosts=hosts, resolve=lambda host, port, answer=answer: answer).read(FIRST, atom.read)
    with pytest.raises(Refused, match="no public address"):
        make(hosts={"export.arxiv.org": Endpoint("http", "localhost", server.port)}).read(FIRST, atom.read)
    assert server.asked == []


def test_the_address_that_was_looked_at_is_the_one_that_is_asked(make, server, monkeypatch):
    """A name server that first gives a good address and then another one gains nothing."""
    monkeypatch.setattr(http, "is_public", lambda address: address == "127.0.0.1")
    real = socket.getaddrinfo

    def only_numbers(host, *args, **kwargs):
        assert host == "127.0.0.1", "a name was looked up a second time"
        return real(host, *args, **kwargs)

    monkeypatch.setattr("socket.getaddrinfo", only_numbers)
    answers = [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.2"]]
    hosts = {"export.arxiv.org": Endpoint("http", "export.arxiv.org", server.port)}
    with recorded.RecordedServer(address="127.0.0.2", port=server.port).running() as trap:
        client = make(hosts=hosts, resolve=lambda host, port: answers.pop(0))
        assert client.read(FIRST, atom.read).papers
        assert len(server.asked) == 1
        assert len(answers) == 2
        with pytest.raises(Refused):
            client.read(URL.format(8), atom.read)
    assert trap.asked == []


def test_an_address_that_does_not_answer_is_passed_over(make, server):
    assert make(resolve=lambda host, port: ["127.0.0.3", "127.0.0.1"]).read(FIRST, atom.read).papers


def test_proxies_of_the_environment_are_not_used(make, server, monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert make().read(FIRST, atom.read).papers


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate with")
@pytest.mark.parametrize("name", ["export.arxiv.org", "elsewhere.example"])
def test_tls_is_checked_against_the_name_and_not_the_address(tmp_path, monkeypatch, make, name):
    made = tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} -addext subjectAltName=DNS:{name}"
    subprocess.run(
        [*command.split(), "-keyout", made, "-out", tmp_path / "c"], check=True, capture_output=True, timeout=SECONDS
    )
    made.write_text(made.read_text() + (tmp_path / "c").read_text())
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "c"))
    with recorded.RecordedServer(tls=recorded.tls_context(made)).running() as server:
        client = make(hosts=server.hosts)
        if name == "export.arxiv.org":
            assert client.read(FIRST, atom.read).papers
            assert server.asked[0][0] == "export.arxiv.org"
        else:
            with pytest.raises(Unavailable, match="certificate"):
                client.read(FIRST, atom.read)
            assert server.asked == []


# How much and how long


def test_too_large_an_answer_is_cut_off(make, server, database):
    server.faults = [recorded.endless]
    with pytest.raises(Refused, match="more than 200,000 bytes"):
        make(most_bytes=200_000).read(FIRST, atom.read)
    assert server.sent < 20_000_000  # what the buffers of two sockets hold, not the 42 MB that were there
    assert nothing_was_kept(database)


@pytest.mark.parametrize("fault", [recorded.trickle, recorded.trickling_headers], ids=["body", "headers"])
def test_too_slow_an_answer_is_cut_off(make, server, fault):
    server.faults = [fault]
    began = time.monotonic()
    with pytest.raises(Refused, match=r"no whole answer in 0.4 s"):
        make(most_seconds=0.4).read(FIRST, atom.read)
    assert time.monotonic() - began < 20  # the whole answer would take 30


def test_a_packed_answer_is_refused(make, server):
    server.faults = [recorded.says(b"\x1f\x8b", **{"Content-Encoding": "gzip"})]
    with pytest.raises(Refused, match="packed"):
        make().read(FIRST, atom.read)
