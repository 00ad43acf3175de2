"""A real SMTP server on loopback, for the tests of mail."""

import asyncio

from aiosmtpd.controller import Controller

SECONDS = 120


class MailServer(Controller):
    """On a port that the system chooses; leaves no connection open, also if the client's last word is still to come."""

    def __init__(self, handler, **options):
        super().__init__(handler, hostname="127.0.0.1", port=0, **{"ready_timeout": SECONDS, **options})
        self._sessions = []

    def factory(self):
        made = super().factory()
        self._sessions.append(made)
        return made

    def _trigger_server(self):
        self.port = self.server.sockets[0].getsockname()[1]
        super()._trigger_server()

    def stop(self, no_assert=False):
        asyncio.run_coroutine_threadsafe(self._part(), self.loop).result(SECONDS)
        super().stop(no_assert)

    async def _part(self):
        self.server.close()
        for session in self._sessions:
            if session.transport is not None:
                session.transport.abort()
        async with asyncio.timeout(SECONDS):
            while any(session.transport is not None for session in self._sessions):
                await asyncio.sleep(0.001)
