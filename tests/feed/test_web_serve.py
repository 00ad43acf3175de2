"""The server as a process: quick to begin, clean at its end, plain when it cannot begin."""

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from waiting import SECONDS


@contextmanager
def serving(tmp_path, *more):
    """`perturbed serve` on a free port; the process, its address and the owner's."""
    command = [
        sys.executable,
        "-m",
        "perturbed",
        "serve",
        "--port",
        "0",
        "--database",
        str(tmp_path / "f.sqlite"),
        *more,
    ]
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=tmp_path)
    try:
        line = process.stdout.readline()
        found = re.search(r"(http://[^/]+)/owner\?token=\S+", line)
        assert found, line + (tmp_path / "err").read_text()
        yield process, found[1], found[0]
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        process.stdout.close()


def read(address):
    with urllib.request.urlopen(address, timeout=SECONDS) as answer:
        return answer.read().decode()


def test_the_first_page_comes_soon_and_shows_verdicts(tmp_path):
    """Two seconds on a machine that has nothing else to do: processor time says it, whatever else runs here.

    On a slower machine it is as many times what the web framework alone takes to be there.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import fastapi, jinja2, uvicorn"], check=True, timeout=SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    framework = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    began = time.monotonic()
    with serving(tmp_path) as (process, address, _):
        text = read(f"{address}/")
        took = time.monotonic() - began
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        spent = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        assert "87 papers" in text
        assert "v-supported" in text
        head = urllib.request.Request(f"{address}/map", method="HEAD")
        with urllib.request.urlopen(head, timeout=SECONDS) as answer:
            assert (answer.status, answer.read()) == (200, b"")
        assert spent < max(2.0, 5 * framework), f"{spent:.2f} s of processor time, {took:.2f} s in all"


def test_an_interrupt_ends_it_cleanly(tmp_path):
    with serving(tmp_path) as (process, address, _):
        read(f"{address}/")
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) in (0, 130)
    assert "Traceback" not in (tmp_path / "err").read_text()


def test_the_owners_token_opens_the_session_and_is_in_no_log(tmp_path):
    with serving(tmp_path) as (process, address, owner):
        token = owner.partition("token=")[2]
        assert len(token) >= 43  # 256 bits
        jar = urllib.request.HTTPCookieProcessor()
        opener = urllib.request.build_opener(jar)
        assert "Settings and import" in opener.open(owner, timeout=SECONDS).read().decode()
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}/owner?token=wrong-guess", timeout=SECONDS)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/nowhere?token={token}", timeout=SECONDS)
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
        said = process.stdout.read() + (tmp_path / "err").read_text()
    assert token not in said
    assert "wrong-guess" not in said


def test_each_start_has_a_token_of_its_own(tmp_path):
    with serving(tmp_path) as (_, _, first), serving(tmp_path) as (_, _, second):
        assert first.partition("token=")[2] != second.partition("token=")[2]


def test_two_servers_on_one_file_behave(tmp_path):
    with serving(tmp_path) as (_, first, owner), serving(tmp_path) as (_, second, _):
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        text = opener.open(owner, timeout=SECONDS).read().decode()
        page = re.search(r'href="(/papers/[^"]+)"', text)[1]
        token = re.search(r'name="csrf" value="(\w+)"', text)[1]
        request = urllib.request.Request(
            f"{first}{page}/vote", f"csrf={token}".encode(), {"Sec-Fetch-Site": "same-origin"}
        )
        opener.open(request, timeout=SECONDS)
        assert "▲ 1" in read(f"{second}{page}")
        assert "▲ 1" in read(f"{first}{page}")


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _run(tmp_path, "--port", str(port))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"perturbed: error: 127.0.0.1:{port}: another program listens there")
    assert "--port" in line


def test_a_host_that_is_none_is_named_with_the_remedy(tmp_path):
    done = _run(tmp_path, "--host", "nowhere.invalid", "--public-url", "https://papers.example.org", "--port", "0")
    assert done.returncode == 2
    assert "choose another with --host" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_host_for_others_is_refused_with_the_reason(tmp_path, host):
    done = _run(tmp_path, "--host", host)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "--public-url https://" in line


def test_a_file_that_is_no_database_is_one_line(tmp_path):
    (tmp_path / "f.sqlite").write_bytes(b"not a database at all" * 500)
    done = _run(tmp_path, "--port", "0")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "not a usable feed database" in line


def _run(tmp_path, *more):
    command = [sys.executable, "-m", "perturbed", "serve", "--database", str(tmp_path / "f.sqlite"), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path, check=False)


def test_the_server_keeps_its_environment_to_itself(tmp_path):
    code = """
        import ctypes, os, signal, sys
        from pathlib import Path
        from perturbed.feed.web.serve import serve
        from perturbed.feed.web.settings import Settings
        def announced(_):
            print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
            os.kill(os.getpid(), signal.SIGINT)
        serve(Settings(database=Path(sys.argv[1]), port=0, owner_token="x"), announce=announced)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "f.sqlite")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=tmp_path, check=False)
    assert done.stdout == "0\n", done.stderr
