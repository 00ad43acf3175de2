"""A real browser over a real server: Chromium, `perturbed serve`, and an SMTP server that keeps what it gets."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from email import message_from_bytes, policy
from pathlib import Path

import pytest
from mail_server import MailServer
from playwright.sync_api import expect, sync_playwright

SECONDS = 120  # for what waits for the machine: only a defect reaches it
expect.set_options(timeout=SECONDS * 1000)


@pytest.fixture(scope="module")
def browser():
    """A browser, ended with the module: while it runs, no other test of this process can have an event loop."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        why = "no Chromium on this machine: install Debian's chromium package"
        if os.environ.get("PERTURBED_BROWSER") == "required":
            pytest.fail(why)
        pytest.skip(why)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """A browser context that notes whatever a page should not do."""

    def __init__(self, browser, base, **options):
        self.base, self.troubles = base, []
        self.context = browser.new_context(base_url=base, **{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(SECONDS * 1000)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.troubles.append(m.text))
        self.page.on("pageerror", lambda e: self.troubles.append(str(e)))
        self.page.on("request", self._asked)

    def _asked(self, request):
        if not request.url.startswith((self.base, "data:")):
            self.troubles.append(f"asked a third party: {request.url}")

    def drawn(self, image):
        """Wait until an image is there (`wait_for_function` would need the eval that our policy forbids)."""
        image.scroll_into_view_if_needed()
        until = time.monotonic() + SECONDS
        while not image.evaluate("image => image.complete && image.naturalWidth"):
            assert time.monotonic() < until, "the figure did not come"
            time.sleep(0.1)

    def close(self):
        self.context.close()
        assert self.troubles == []


@pytest.fixture
def visit(browser):
    """Opens contexts; each is checked at its end for errors and requests to others."""
    opened = []

    def open_(base, **options):
        opened.append(Visit(browser, base, **options))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()


class Mails:
    """Mail that arrived; ``gone@…`` is refused for good."""

    def __init__(self):
        self.got = []

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("gone@"):
            return f"550 5.1.1 no such user here: {'x' * 200}"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        self.got.append(message_from_bytes(envelope.content, policy=policy.default))
        return "250 OK"

    def text(self, number):
        """The plain text of a mail, once it is there."""
        until = time.monotonic() + SECONDS
        while len(self.got) <= number:
            assert time.monotonic() < until, "no mail came"
            time.sleep(0.1)
        return self.got[number].get_body(("plain",)).get_content()


class Served:
    """A running server, and what belongs to it."""

    def __init__(self, base, owner, database, mails, environment):
        self.base, self.owner, self.database, self.mails, self.environment = base, owner, database, mails, environment

    def command(self, *words):
        """`perturbed …` on the same database and mail server."""
        command = [sys.executable, "-m", "perturbed", *words, "--database", str(self.database)]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def serving(folder: Path):
    """`perturbed serve` in a home of its own, with a mail server on loopback."""
    mails = Mails()
    controller = MailServer(mails, ready_timeout=SECONDS)
    controller.start()
    environment = {
        **os.environ,
        "PERTURBED_HOME": str(folder / "home"),
        "PERTURBED_SMTP": f"smtp://127.0.0.1:{controller.port}",
        "PERTURBED_MAIL_FROM": "Papers <papers@example.org>",
    }
    database = folder / "feed.sqlite"
    command = [sys.executable, "-m", "perturbed", "serve", "--port", "0", "--database", str(database)]
    with open(folder / "stderr", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=environment, cwd=folder)
    try:
        line = process.stdout.readline()
        found = re.search(r"(http://[^/]+)/owner\?token=\S+", line)
        assert found, line + (folder / "stderr").read_text()
        yield Served(found[1], found[0], database, mails, environment)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        controller.stop()
    assert "Traceback" not in (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running
