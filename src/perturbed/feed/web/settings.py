"""Where the server listens and whom it answers: checked once, before anything is opened."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from perturbed.errors import PerturbedError

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one server runs.

    Args:
        database: The feed's SQLite file.
        host: Address to listen on.
        port: Port to listen on.
        public_url: ``https://name[:port]`` under which visitors come, or None: then only this machine does.
        owner_token: What opens the owner's session; random, and new at each start.
        trusted_proxies: Addresses or networks whose ``X-Forwarded-For`` is believed.

    Raises:
        PerturbedError: The host is not loopback and there is no public URL; the public URL is not https or has more
            than a host and a port; a proxy is no address.
    """

    database: Path
    host: str = "127.0.0.1"
    port: int = 8000
    public_url: str | None = None
    owner_token: str = field(repr=False)
    trusted_proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.public_url is not None:
            object.__setattr__(self, "public_url", _public(self.public_url))
        elif not is_loopback(self.host):
            raise PerturbedError(
                f"--host {self.host} would let others on the network reach a server without encryption, where the "
                "owner's session could be read on the way; put a proxy with https before it and say "
                "--public-url https://…, or stay on 127.0.0.1"
            )
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as e:
                raise PerturbedError(f"--trusted-proxy {proxy}: not an address or network ({e})") from e

    @property
    def hosts(self) -> frozenset[str]:
        """The values of the Host header that are answered: this machine's own names, and the public one."""
        port = "" if self.port == 80 else f":{self.port}"
        own = {f"{name}{port}" for name in (*_LOOPBACK, _bracketed(self.host)) if is_loopback(name)}
        return frozenset(own | ({urlsplit(self.public_url).netloc} if self.public_url else set()))

    @property
    def origins(self) -> frozenset[str]:
        """The values of the Origin header that are this server's."""
        public = urlsplit(self.public_url).netloc if self.public_url else None
        return frozenset(f"{'https' if host == public else 'http'}://{host}" for host in self.hosts)

    @property
    def base(self) -> str:
        """What links begin with that leave the pages (mail, Atom): never taken from a request."""
        return self.public_url or self.local

    @property
    def local(self) -> str:
        """The address on this machine."""
        host = self.host if is_loopback(self.host) else "127.0.0.1"
        return f"http://{_bracketed(host)}:{self.port}"


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def linked(url: str) -> str:
    """What links in mail begin with, checked: the public address, or one of this machine, which may be http.

    Raises:
        PerturbedError: It is neither.
    """
    parts = _split(url)
    return f"http://{parts.netloc}" if parts.scheme == "http" and is_loopback(parts.hostname or "") else _public(url)


def _public(url: str) -> str:
    parts = _split(url)
    if parts.scheme != "https":
        raise PerturbedError(f"--public-url {url}: must be https://…, since the owner's session passes through it")
    return f"https://{parts.netloc.lower().removesuffix(':443')}"  # which browsers leave out of Host and Origin


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.port != 0 and re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:.]+", parts.hostname or "")
    except ValueError:
        known = None
    if not known or parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise PerturbedError(f"--public-url {url}: only https://name or https://name:port, nothing behind it")
    return parts
