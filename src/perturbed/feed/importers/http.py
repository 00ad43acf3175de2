"""A polite client for four hosts and no other: slow, bounded, cached, and never led to a private address.

An address is named by its host in `HOSTS`; what a name resolves to is looked at before the connection is made, and the
connection is made to exactly that, so a second answer of the name server cannot matter. The name itself stays in the
``Host`` header and in TLS. Proxies of the environment are not used: through one, nobody could tell where one arrives.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from perturbed.errors import PerturbedError
from perturbed.feed.database import Database
from perturbed.feed.importers.reading import Read

DAY = 86_400.0
PAUSE = 3.0  # seconds between two requests to one host, as arXiv asks
ATTEMPTS = 5
LONGEST_WAIT = 120.0  # seconds; who asks for more is come back to another time
KEPT_BYTES = 100_000_000  # of answers kept
_HOPS = 5
_MOVED = (301, 302, 303, 307, 308)
_LATER = (429, 500, 502, 503, 504)

Resolve = Callable[[str, int], list[str]]


class Refused(PerturbedError):
    """An address that this client does not go to, or an answer that it does not take."""


class Unavailable(PerturbedError):
    """The source did not answer as it should; the message says how often and what it said."""


@dataclass(frozen=True)
class Endpoint:
    """Where the requests to a name go.

    Args:
        scheme: ``https``; ``http`` only for a stand-in on this machine.
        host: Name or number to connect to.
        port: Its port.
        may_be_private: Whether it may be an address of this machine or network.
    """

    scheme: str
    host: str
    port: int
    may_be_private: bool = False


HOSTS: Mapping[str, Endpoint] = MappingProxyType(
    {
        name: Endpoint("https", name, 443)
        for name in ("export.arxiv.org", "oaipmh.arxiv.org", "rss.arxiv.org", "huggingface.co")
    }
)


def is_public(address: str) -> bool:
    """Whether a numeric address is one of the open Internet, also where a v6 address wraps a v4 one."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    inner: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            inner = [ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)]
        elif ip.ipv4_mapped is not None:
            inner = [ip.ipv4_mapped]
        else:
            inner += [v4 for v4 in (ip.sixtofour, *(ip.teredo or ())) if v4 is not None]
    return all(i.is_global and not i.is_multicast and not i.is_reserved for i in inner)


def resolve(host: str, port: int) -> list[str]:
    """The numeric addresses of a name."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in found))


class Client:
    """Reads answers of the known hosts.

    Args:
        database: Keeps answers for a day, and the time of the next request to each host for all processes.
        hosts: The names that may be asked, and where each is; tests put stand-ins here.
        clock: Seconds since 1970.
        sleep: Waits so many seconds.
        resolve: Numeric addresses of a name.
        most_bytes: Of one answer.
        most_seconds: For one answer, from the connection to the last byte.
    """

    def __init__(
        self,
        database: Database,
        *,
        hosts: Mapping[str, Endpoint] = HOSTS,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        resolve: Resolve = resolve,
        most_bytes: int = 20_000_000,
        most_seconds: float = 20.0,
    ):
        self._database = database
        self._hosts = hosts
        self._clock = clock
        self._sleep = sleep
        self._resolve = resolve
        self._most_bytes = most_bytes
        self._most_seconds = most_seconds

    def read(self, url: str, parse: Callable[[bytes], Read]) -> Read:
        """What is at an address, asked of the source at most once a day.

        A busy source, and a page that is empty though more is announced, are asked again after a pause that grows.

        Args:
            url: ``https`` address on one of the hosts.
            parse: Reads the answer; only an answer that it can read is kept.

        Raises:
            Refused: The address, or one that it leads to, is not among the hosts or not public; the answer is too
                large or too slow.
            Unavailable: The source cannot be reached, refuses, or stays busy.
        """
        kept = self._kept(url)
        if kept is not None:
            return parse(kept)
        why = ""
        for attempt in range(ATTEMPTS):
            wait = min(5.0 * 2**attempt, 60.0)
            try:
                status, headers, body = self._follow(url)
            except (httpcore.ReadError, httpcore.WriteError, httpcore.ProtocolError) as e:
                why = f"the connection broke ({e})"
            else:
                if status == 200:
                    read = parse(body)
                    if read.papers or read.unread or read.skipped or read.more is None:
                        self._keep(url, body)
                        return read
                    why = "an empty page although more is announced"
                elif status in _LATER:
                    why = f"status {status}"
                    wait = self._asked_wait(url, headers, wait)
                else:
                    raise Unavailable(f"{url}: answered with status {status}; nothing was taken")
            if attempt + 1 < ATTEMPTS:
                self._sleep(wait)
        raise Unavailable(f"{url}: asked {ATTEMPTS} times, at last {why}; run it again later, it goes on from here")

    def _asked_wait(self, url: str, headers: Mapping[str, str], otherwise: float) -> float:
        told = headers.get("retry-after", "").strip()
        if told.isascii() and told.isdigit():
            wait = float(told[:9])
        else:
            try:
                wait = parsedate_to_datetime(told).timestamp() - self._clock()
            except (ValueError, OverflowError):
                return otherwise
        if wait > LONGEST_WAIT:
            raise Unavailable(f"{url}: busy, asks to come back in {wait:.0f} s; run the same again then")
        return max(wait, 0.0)

    # One request and where it leads

    def _follow(self, url: str) -> tuple[int, Mapping[str, str], bytes]:
        for _ in range(_HOPS):
            status, headers, body = self._ask(url)
            if status not in _MOVED:
                return status, headers, body
            if "location" not in headers:
                raise Unavailable(f"{url}: moved, but not where to")
            url = urljoin(url, headers["location"])
        raise Refused(f"{url}: led on more than {_HOPS} times")

    def _ask(self, url: str) -> tuple[int, Mapping[str, str], bytes]:
        name, endpoint, path = self._place(url)
        self._wait_turn(name)
        backend = _Backend(endpoint, self._resolve, time.monotonic() + self._most_seconds)
        request = httpcore.URL(scheme=endpoint.scheme, host=name, port=endpoint.port, target=path)
        headers: dict[bytes | str, bytes | str] = {
            "Host": name,
            "User-Agent": "perturbed-feed/0.1 (self-hosted reader of daily papers)",
            "Accept-Encoding": "identity",  # packed answers could unpack to more than the limit allows
            "Connection": "close",
        }
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._most_seconds)
        try:
            with (
                httpcore.ConnectionPool(ssl_context=_tls(endpoint), network_backend=backend) as pool,
                pool.stream("GET", request, headers=headers, extensions={"timeout": limits}) as answer,
            ):
                told = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in answer.headers}
                if told.get("content-encoding", "identity") != "identity":
                    raise Refused(f"{url}: answered packed ({told['content-encoding']}), which was not asked for")
                return answer.status, told, self._body(url, answer.iter_stream())
        except httpcore.TimeoutException as e:
            raise Refused(f"{url}: no whole answer in {self._most_seconds:g} s; nothing was taken") from e
        except httpcore.ConnectError as e:
            raise Unavailable(f"{url}: cannot be reached ({e}); is this machine online?") from e

    def _body(self, url: str, chunks: Iterable[bytes]) -> bytes:
        body = bytearray()
        for chunk in chunks:
            body += chunk
            if len(body) > self._most_bytes:
                raise Refused(f"{url}: more than {self._most_bytes:,} bytes; nothing was taken")
        return bytes(body)

    def _place(self, url: str) -> tuple[str, Endpoint, bytes]:
        """The host of an address, where that is, and the path with its query."""
        parts = urlsplit(url)
        try:
            plain = parts.scheme == "https" and parts.port in (None, 443) and "@" not in parts.netloc
        except ValueError:
            plain = False
        endpoint = self._hosts.get(parts.hostname or "") if plain else None
        if endpoint is None or parts.hostname is None:
            raise Refused(f"{url[:200]}: not asked; only https on {', '.join(sorted(self._hosts))}")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not re.fullmatch(r"[\x21-\x7e]+", path):
            raise Refused(f"{url[:200]!r}: an address with characters that must be escaped")
        return parts.hostname, endpoint, path.encode("ascii")

    # What all processes share

    def _wait_turn(self, name: str) -> None:
        """Take the next free time of a host, in turn with every other process on this database, and wait for it."""
        row = f"polite:{name}"
        with self._database.write() as connection:
            now = self._clock()
            found = connection.execute("SELECT state FROM progress WHERE source = ?", (row,)).fetchone()
            free = float(found["state"]) if found is not None else now
            at = max(now, free) if free < now + 60 * PAUSE else now  # further ahead: the clock was set back
            connection.execute("INSERT OR REPLACE INTO progress VALUES (?, ?)", (row, str(at + PAUSE)))
        if at > now:
            self._sleep(at - now)

    def _kept(self, url: str) -> bytes | None:
        now = self._clock()
        found = self._database.read().execute("SELECT at, body FROM fetched WHERE url = ?", (url,)).fetchone()
        return bytes(found["body"]) if found is not None and now - DAY < found["at"] <= now else None

    def _keep(self, url: str, body: bytes) -> None:
        now = self._clock()
        with self._database.write() as connection:
            connection.execute("INSERT OR REPLACE INTO fetched VALUES (?, ?, ?)", (url, now, body))
            connection.execute("DELETE FROM fetched WHERE at <= ? OR at > ?", (now - DAY, now))
            connection.execute(
                "DELETE FROM fetched WHERE url IN (SELECT url FROM (SELECT url, sum(length(body)) OVER "
                "(ORDER BY at DESC, url) AS bytes FROM fetched) WHERE bytes > ?)",
                (KEPT_BYTES,),
            )


def _tls(endpoint: Endpoint) -> ssl.SSLContext | None:
    return httpcore.default_ssl_context() if endpoint.scheme == "https" else None


class _Backend(httpcore.NetworkBackend):
    """Connects to what a name resolves to, after looking at it, and gives everything one deadline."""

    def __init__(self, endpoint: Endpoint, resolve: Resolve, deadline: float):
        self._endpoint = endpoint
        self._resolve = resolve
        self._deadline = deadline

    def connect_tcp(self, host: str, port: int, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        """Connect to the checked addresses of the endpoint, one after another."""
        try:
            addresses = self._resolve(self._endpoint.host, self._endpoint.port)
        except OSError as e:
            raise httpcore.ConnectError(f"{host}: name not found") from e
        for address in addresses:
            if not (self._endpoint.may_be_private or is_public(address)):
                raise Refused(f"{host}: leads to {address}, which is no public address; not asked")
        problem = httpcore.ConnectError(f"{host}: name has no address")
        for address in addresses:
            try:
                stream = httpcore.SyncBackend().connect_tcp(address, self._endpoint.port, _left(self._deadline))
            except httpcore.ConnectError as e:
                problem = e
            else:
                return _Stream(stream, self._deadline)
        raise problem


class _Stream(httpcore.NetworkStream):
    """A connection on which each operation has only the time that is left: a trickle does not start it anew."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float):
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read in the time left."""
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write in the time left."""
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        """Close it."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Begin TLS in the time left."""
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """What the connection knows of itself."""
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time for this answer is over")
    return left
