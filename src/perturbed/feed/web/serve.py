"""`perturbed serve`: the web application on a socket, until it is interrupted."""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
from collections.abc import Callable
from dataclasses import replace

import uvicorn

from perturbed.errors import PerturbedError
from perturbed.feed import sandbox
from perturbed.feed.web.app import create_app
from perturbed.feed.web.settings import Settings

_GRACE = 1  # second in which answers under way may end once the server is interrupted


def new_token() -> str:
    """A token that opens the owner's session: 256 random bits."""
    return secrets.token_urlsafe(32)


def serve(settings: Settings, *, announce: Callable[[str], None]) -> None:
    """Serve the feed until the process is interrupted.

    Args:
        settings: Of the server; port 0 takes one that is free.
        announce: Called once, as soon as pages are served, with the address that opens the owner's session.

    Raises:
        PerturbedError: The port is taken or not allowed, or the database cannot be used.
    """
    sandbox.keep_to_oneself()  # the mail server's password is in the environment
    with contextlib.closing(_listening(settings)) as listening:
        settings = replace(settings, port=listening.getsockname()[1])
        config = uvicorn.Config(
            create_app(settings),
            access_log=False,  # an address may hold a token
            log_level="warning",
            proxy_headers=False,  # they are read in security.client_address, from trusted proxies alone
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
        )
        server = _Announced(config, lambda: announce(f"{settings.base}/owner?token={settings.owner_token}"))
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again once all is closed
            server.run(sockets=[listening])
        if not server.started:
            raise PerturbedError("the server could not start; what stands above says why")


class _Announced(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]):
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._announce()


def _listening(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left is free
        listening.bind((settings.host.strip("[]"), settings.port))
        listening.listen(128)
    except OSError as e:
        listening.close()
        why = {
            errno.EADDRINUSE: "another program listens there, perhaps another `perturbed serve`",
            errno.EACCES: "this user may not listen there",
        }.get(e.errno or 0, e.strerror or str(e))
        option = "--port" if e.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise PerturbedError(f"{settings.host}:{settings.port}: {why}; choose another with {option}") from e
    return listening
