"""Take the README's picture of the feed: the front page of an empty machine, in Chromium."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "images" / "feed.png"


def main() -> None:
    """Serve an empty home on a free port, photograph `/`, and keep 128 colours of it."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "perturbed", "serve", "--port", "0"]
        environment = {**os.environ, "PERTURBED_HOME": home}
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = re.search(r"http://[^/]+/", server.stdout.readline())
            assert address is not None
            PICTURE.parent.mkdir(exist_ok=True)
            Image.open(io.BytesIO(photograph(address[0]))).convert("RGB").quantize(128).save(PICTURE, optimize=True)
        finally:
            server.terminate()
            server.wait(30)


def photograph(address: str) -> bytes:
    """A page as a PNG of 1200 x 1000 pixels."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme="light")
        page.goto(address, wait_until="networkidle")
        picture = page.screenshot()
        browser.close()
    return picture


if __name__ == "__main__":
    main()
