"""A server on loopback that stands for arXiv and the hub: their answers in recorded shapes, with invented papers.

Which of the four it plays is told by the ``Host`` header. `Faults` are played once each, in order, before the answers.
"""

import json
import re
import ssl
import threading
import time
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from perturbed.feed.importers.http import HOSTS, Endpoint

TODAY = date(2025, 11, 17)
NOW = datetime(2025, 11, 17, 12, tzinfo=UTC).timestamp()
WORDS = "kettle steam drift gauze lantern orbit pebble quiver ripple sonnet tundra velvet walnut yonder".split()  # noqa: SIM905


def invented(number, per_day):
    """The paper of a number: its identifier, title, abstract, authors and day (the newest have the highest numbers)."""
    pick = [WORDS[(number * 7 + i * i + i) % len(WORDS)] for i in range(12)]
    return {
        "id": f"2511.{number:05d}",
        "title": f"{' '.join(pick[:4]).title()} {number}",
        "abstract": f"We study {' '.join(pick)} & <more>. Number {number} tells.",
        "authors": [f"Ada {pick[5].title()}", f"Bo {pick[6].title()}"],
        "day": TODAY - timedelta(days=number // per_day),
    }


class RecordedServer:
    """The stand-in; `asked` holds (host, path) of every request, `faults` what comes before an answer."""

    def __init__(self, *, count=60, per_day=20, page=8, address="127.0.0.1", port=0, tls=None):
        self.papers = [invented(i, per_day) for i in range(count)]
        self.page = page  # at most so many entries in one answer
        self.asked = []
        self.faults = []
        self.sent = 0  # bytes of the body that is under way
        self.before = None  # called with the number of requests so far, before each answer
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                server.answer(self)

        self._http = ThreadingHTTPServer((address, port), Handler)
        self._http.daemon_threads = True
        self._http.handle_error = lambda *args: None  # a client that hangs up is what some tests want
        if tls is not None:
            self._http.socket = tls.wrap_socket(self._http.socket, server_side=True)
        self.scheme = "https" if tls is not None else "http"
        self.port = self._http.server_address[1]
        self.hosts = {name: Endpoint(self.scheme, address, self.port, may_be_private=True) for name in HOSTS}

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join(60)

    def answer(self, handler):
        host = handler.headers["Host"]
        self.asked.append((host, handler.path))
        if self.before is not None:
            self.before(len(self.asked))
        if self.faults and self.faults[0] is not None:
            return self.faults.pop(0)(self, handler)
        if self.faults:
            self.faults.pop(0)
        self.send(handler, self.body(host, handler.path))

    def send(self, handler, body, status=200, headers=()):
        data = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        for name, value in [("Content-Length", str(len(data))), *headers]:
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    def body(self, host, path):
        parts = urlsplit(path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        play = {
            ("huggingface.co", "/api/daily_papers"): self.hub,
            ("export.arxiv.org", "/api/query"): self.atom,
            ("oaipmh.arxiv.org", "/oai"): self.oai,
        }
        if host == "rss.arxiv.org":
            return self.rss()
        return play[host, parts.path](query)

    def hub(self, query):
        day, size = query["date"], min(int(query["limit"]), 100)
        start = int(query["p"]) * size
        items = [p for p in self.papers if p["day"].isoformat() == day][start : start + size]
        return json.dumps(
            [
                {
                    "paper": {
                        "id": p["id"],
                        "title": p["title"],
                        "summary": p["abstract"],
                        "authors": [
                            {"_id": str(i), "name": name, "hidden": False} for i, name in enumerate(p["authors"])
                        ],
                        "publishedAt": f"{p['day'] - timedelta(days=3)}T10:00:00.000Z",
                        "submittedOnDailyAt": f"{day}T01:00:00.000Z",
                        "upvotes": int(p["id"][-2:]),
                    },
                    "title": p["title"],
                    "publishedAt": f"{p['day'] - timedelta(days=1)}T10:00:00.000Z",
                    "numComments": 1,
                }
                for p in items
            ]
        )

    def atom(self, query):
        span = re.search(r"submittedDate:\[(\d{8})\d{4} TO (\d{8})", query["search_query"])
        first, last = (datetime.strptime(day, "%Y%m%d").date() for day in span.groups())
        found = sorted((p for p in self.papers if first <= p["day"] <= last), key=lambda p: (p["day"], p["id"]))
        start = int(query["start"])
        size = min(int(query["max_results"]), self.page)
        return self.feed("".join(map(entry, found[start : start + size])), len(found), start)

    def feed(self, entries, total, start):
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom">'
            '<opensearch:totalResults xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/">'
            f'{total}</opensearch:totalResults><opensearch:startIndex xmlns:opensearch="http://a9.com/-/spec/'
            f'opensearch/1.1/">{start}</opensearch:startIndex>\n{entries}</feed>'
        )

    def oai(self, query):
        token = query.get("resumptionToken")
        since, start = token.split("|") if token else (query["from"], 0)
        found = [p for p in self.papers if p["day"].isoformat() >= since]
        end = int(start) + self.page
        more = f'<resumptionToken cursor="{start}">{since}|{end}</resumptionToken>' if end < len(found) else ""
        if not found:
            return oai_answer('<error code="noRecordsMatch">none</error>')
        return oai_answer(f"<ListRecords>{''.join(map(record, found[int(start) : end]))}{more}</ListRecords>")

    def rss(self):
        items = "".join(
            f"<item><title>{p['title']}</title><guid>oai:arXiv.org:{p['id']}v1</guid><description>arXiv:{p['id']}v1 "
            f"Announce Type: new \nAbstract: {escaped(p['abstract'])}</description><category>cs.LG</category>"
            f"<pubDate>{stamp(TODAY)}</pubDate></item>"
            for p in self.papers[: self.page]
        )
        return f'<rss version="2.0"><channel>{items}</channel></rss>'


def escaped(text):
    return text.replace("&", "&amp;").replace("<", "&lt;")


def stamp(day):
    return format_datetime(datetime(day.year, day.month, day.day, tzinfo=UTC))


def entry(p):
    people = "".join(f"<author><name>{name}</name></author>" for name in p["authors"])
    return (
        f"<entry><id>http://arxiv.org/abs/{p['id']}v1</id><published>{p['day']}T09:00:00Z</published>"
        f"<updated>{p['day']}T09:00:00Z</updated><title>{p['title']}</title><summary>{escaped(p['abstract'])}</summary>"
        f'{people}<category term="cs.LG"/></entry>\n'
    )


def record(p):
    return (
        f"<record><header><identifier>oai:arXiv.org:{p['id']}</identifier><datestamp>{p['day']}</datestamp></header>"
        f'<metadata><arXivRaw xmlns="http://arxiv.org/OAI/arXivRaw/"><id>{p["id"]}</id><version version="v1"><date>'
        f"{stamp(p['day'])}</date></version><title>{p['title']}</title><authors>{', '.join(p['authors'])}</authors>"
        f"<categories>cs.LG</categories><abstract>{escaped(p['abstract'])}</abstract></arXivRaw></metadata></record>"
    )


def oai_answer(inner):
    return f'<?xml version="1.0"?><OAI-PMH xmlns="http://www.openarchives.org/OAI/2.0/">{inner}</OAI-PMH>'


# Faults: what goes wrong once


def status(code, **headers):
    named = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda server, handler: server.send(handler, "busy", code, named)


def says(body, **headers):
    return lambda server, handler: server.send(handler, body, 200, list(headers.items()))


def redirect(where, code=302):
    return lambda server, handler: server.send(handler, "", code, [("Location", where)])


def empty_page(server, handler):
    server.send(handler, server.feed("", 60, 0))


def truncated(server, handler):
    whole = server.body(handler.headers["Host"], handler.path)
    server.send(handler, whole[: len(whole) * 2 // 3])


def broken_off(server, handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"<feed")
    handler.close_connection = True


def error_entry(server, handler):
    inner = (
        "<entry><id>http://arxiv.org/api/errors#incorrect_id_format</id><title>Error</title>"
        "<summary>incorrect id format</summary></entry>"
    )
    server.send(handler, server.feed(inner, 1, 0))


def endless(server, handler):
    """A body of 42 MB without a length, as fast as it is taken."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(640):
            handler.wfile.write(b"x" * 65_536)
            server.sent += 65_536
    except OSError:
        pass
    handler.close_connection = True


def trickle(server, handler):
    """A body that comes a byte at a time, each in good time."""
    handler.send_response(200)
    handler.end_headers()
    _drip(handler)


def trickling_headers(server, handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    _drip(handler)


def _drip(handler):
    try:
        for _ in range(600):
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True


def tls_context(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
