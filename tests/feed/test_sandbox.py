"""What a child may do is asked of the child itself: each test runs one and looks at what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from waiting import SECONDS, until

from perturbed.feed import sandbox
from perturbed.feed.sandbox import Child, Limits

LIMITS = Limits(wall_s=SECONDS, cpu_s=20)
# What the system allows, by another program than ours, so that a defect of ours is not taken for the system's.
CUT = not subprocess.run(["unshare", "-rn", "true"], capture_output=True, timeout=SECONDS).returncode
needs_cut = pytest.mark.skipif(not CUT, reason="this system lets no process be cut off from the network")


def test_it_is_known_whether_the_network_can_be_cut():
    assert sandbox.network_can_be_cut() is CUT


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", textwrap.dedent(code)]


def run(folder: Path, code: str, limits: Limits = LIMITS, network_off: bool = False) -> tuple[int | None, str, str]:
    """Exit code, standard output and the end of standard error of a child that runs Python code."""
    with Child(python(code), folder, limits, network_off=network_off) as child:
        until(lambda: child.listen(0.1) is None or child.returncode is not None)
        child.last_words()
        return child.returncode, child.output.decode(), child.tail.decode()


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_environment_is_bare(tmp_path, monkeypatch):
    monkeypatch.setenv("PERTURBED_SMTP_PASSWORD", "hush")
    monkeypatch.setenv("LD_PRELOAD", "")
    _, out, _ = run(tmp_path, "import os, json; print(json.dumps(dict(os.environ)))")
    found = json.loads(out)
    found.pop("LC_CTYPE", None)  # CPython's own, for the C locale
    assert found == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "LANG": "C.UTF-8",
        "PERTURBED_HOME": os.environ["PERTURBED_HOME"],
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def words_on_standard_input():
    """A standard input of the server's from which there is something to read."""
    before, (out, into) = os.dup(0), os.pipe()
    os.write(into, b"hush")
    os.close(into)
    os.dup2(out, 0)
    yield
    os.dup2(before, 0)
    os.close(before)
    os.close(out)


def test_standard_input_is_at_its_end_and_nothing_of_the_server_is_open(tmp_path, words_on_standard_input):
    secret = tmp_path / "secret"
    secret.write_text("hush")
    kept = os.open(secret, os.O_RDONLY)
    os.set_inheritable(kept, True)
    code = """
        import os, sys
        print(repr(sys.stdin.read()), sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1], os.getcwd())
    """
    try:
        assert run(tmp_path, code)[1].strip() == f"'' [0, 1, 2] {tmp_path}"
    finally:
        os.close(kept)


def test_it_has_a_session_of_its_own_and_default_signals_whatever_the_server_ignores(tmp_path):
    code = """
        import os, signal
        mine = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        print(os.getsid(0) == os.getpgid(0) != int(__import__("sys").argv[-1]))
        print(mine == [signal.default_int_handler, signal.SIG_DFL, signal.SIG_DFL], signal.pthread_sigmask(0, []))
    """
    ignored = [signal.SIGINT, signal.SIGHUP]
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]  # as a server behind `&` or nohup
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        with Child([*python(code), str(os.getsid(0))], tmp_path, LIMITS, network_off=False) as child:
            until(lambda: child.listen(0.1) or child.returncode is not None)
            child.last_words()
            assert child.output.decode().split("\n")[:2] == ["True", "True set()"]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)


def test_memory_is_bounded(tmp_path):
    limits = Limits(wall_s=SECONDS, cpu_s=20, memory=200 * 2**20)
    code = "print('begun', flush=True); print(len(bytearray({} * 2**20)))"
    assert run(tmp_path, code.format(100), limits)[:2] == (0, f"begun\n{100 * 2**20}\n")
    code, out, said = run(tmp_path, code.format(300), limits)
    assert (code, out) == (1, "begun\n")
    assert "MemoryError" in said


def test_a_file_is_bounded(tmp_path):
    limits = Limits(wall_s=SECONDS, cpu_s=20, file=10**6)
    code, out, said = run(
        tmp_path, "f = open('big', 'wb', 0); print(f.write(bytes(900_000))); f.write(bytes(2_000_000))", limits
    )
    assert (code, out) == (0, "900000\n")  # the first call beyond the limit writes what fits
    assert (tmp_path / "big").stat().st_size == 10**6
    code, _, said = run(tmp_path, "open('big', 'wb', 0).write(bytes(10**6)); open('big', 'ab', 0).write(b'x')", limits)
    assert code == 1
    assert "File too large" in said


def test_processor_time_is_bounded(tmp_path):
    code, _, _ = run(tmp_path, "while True: pass", Limits(wall_s=SECONDS, cpu_s=1))
    assert code == -signal.SIGXCPU


def test_descriptors_core_niceness_and_privileges(tmp_path):
    code = """
        import os, resource
        r = resource.getrlimit
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        print(r(resource.RLIMIT_NOFILE), r(resource.RLIMIT_CORE), r(resource.RLIMIT_CPU), os.nice(0))
        print(status["NoNewPrivs"].strip(), int(status["CapEff"], 16), int(status["CapPrm"], 16))
        print(open("/proc/self/oom_score_adj").read().strip(), oct(os.umask(0)))
    """
    lines = run(tmp_path, code, Limits(wall_s=SECONDS, cpu_s=20, descriptors=50, nice=7))[1].splitlines()
    assert lines == [f"(50, 50) (0, 0) (20, 30) {min(os.nice(0) + 7, 19)}", "1 0 0", "1000 0o77"]


def connects(port: int) -> str:
    return f"""
        import socket
        s = socket.socket(); s.settimeout(60)
        print("reached" if s.connect_ex(("127.0.0.1", {port})) == 0 else "unreachable")
    """


@needs_cut
def test_network_is_cut_and_only_if_so_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = connects(listener.getsockname()[1])
        assert run(tmp_path, code, network_off=True)[:2] == (0, "unreachable\n")
        assert run(tmp_path, code, network_off=False)[:2] == (0, "reached\n")


@needs_cut
def test_it_keeps_its_user_and_cannot_read_the_servers_environment(tmp_path):
    code = """
        import os
        print(os.getuid(), os.getgid())
        open("mine", "w").close()
        try:
            print(len(open(f"/proc/{os.getppid()}/environ", "rb").read()) > 0)
        except PermissionError:
            print("refused")
    """
    out = run(tmp_path, code, network_off=True)[1]
    assert out == f"{os.getuid()} {os.getgid()}\nrefused\n"
    assert (tmp_path / "mine").stat().st_uid == os.getuid()


@pytest.fixture
def public_folder():
    """A folder that every user can read, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def readable_python(folder: Path) -> str | None:
    """The system's Python with the package on its path: the one that runs the tests may lie in root's home."""
    made = subprocess.run(
        ["/usr/bin/python3", "-m", "venv", "--without-pip", folder], capture_output=True, timeout=SECONDS
    )
    if made.returncode:
        return None
    packages = next(folder.glob("lib/python3*/site-packages"))
    (packages / "perturbed.pth").write_text(str(Path(sandbox.__file__).parents[2]))
    interpreter = str(folder / "bin" / "python")
    trial = ["setpriv", "--reuid=65534", "--clear-groups", interpreter, "-c", "import perturbed.feed.sandbox"]
    return None if subprocess.run(trial, capture_output=True, timeout=SECONDS, cwd="/").returncode else interpreter


@needs_cut
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_any_user_can_cut_the_network_and_the_number_of_tasks(public_folder):
    """Run as nobody: without root's rights the user namespace is what gives the right to a network of its own."""
    inner = """
        import os, time
        pids = []
        try:
            for _ in range(40):
                pid = os.fork()
                if pid == 0:
                    time.sleep(600)
                    os._exit(0)
                pids.append(pid)
        except BlockingIOError:
            print("refused after", len(pids), os.getuid())
        for pid in pids:
            os.kill(pid, 9)
    """
    code = f"""
        import sys, tempfile
        from pathlib import Path
        from perturbed.feed import sandbox
        assert sandbox.network_can_be_cut()
        limits = sandbox.Limits(wall_s=120, cpu_s=20, tasks=10)
        command = [sys.executable, *{python(inner)[1:]!r}]
        with (tempfile.TemporaryDirectory() as folder,
              sandbox.Child(command, Path(folder), limits, network_off=True) as child):
            while child.returncode is None:
                child.listen(0.1)
            child.last_words()
            print(child.output.decode(), child.tail.decode())
    """
    interpreter = readable_python(public_folder)
    if interpreter is None:
        pytest.skip("there is no Python that nobody may run")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", interpreter, "-c"]
    env = {"PATH": "/usr/bin:/bin", "TMPDIR": "/tmp", "PERTURBED_HOME": "/tmp"}
    code = textwrap.dedent(code)
    done = subprocess.run([*nobody, code], capture_output=True, text=True, timeout=SECONDS, cwd="/", env=env)
    assert done.stdout.strip() == "refused after 9 65534", done.stderr


def test_a_network_that_cannot_be_cut_ends_the_child_before_it_begins(tmp_path):
    """As where user namespaces are forbidden: the child must not run with a network that the page says it lacks."""
    inner = python("print('has run')")
    wrapped = sandbox.wrapped(inner, LIMITS, network_off=True)
    code = f"""
        import ctypes, sys, errno
        from perturbed.feed import sandbox
        real = ctypes.CDLL
        class Refusing:
            def __init__(self, *a, **k): self._libc = real(*a, **k); self.prctl = self._libc.prctl
            def unshare(self, flags): ctypes.set_errno(errno.EPERM); return -1
        sandbox.ctypes.CDLL = Refusing
        sys.argv = ["sandbox", *{wrapped[wrapped.index("perturbed.feed.sandbox") + 1 :]!r}]
        sandbox.main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("perturbed: error: Operation not permitted: the run was not started")


def test_stop_interrupts_first_and_kills_the_whole_group_after_the_grace(tmp_path):
    code = """
        import os, signal, sys, time
        stubborn = os.fork()
        if stubborn == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            time.sleep(600)
        def asked(*_):
            print("perturbed: writing checkpoints", file=sys.stderr, flush=True)
            sys.exit(130)
        signal.signal(signal.SIGINT, asked)
        print(stubborn, flush=True)
        time.sleep(600)
    """
    with Child(python(code), tmp_path, LIMITS, network_off=False) as child:
        until(lambda: child.listen(0.05) or b"\n" in child.output)
        grandchild = int(child.output)
        assert alive(grandchild)
        assert child.stop(SECONDS) == ["perturbed: writing checkpoints"]
        assert child.returncode == 130
        until(lambda: not alive(grandchild))


def test_a_second_interrupt_comes_before_the_kill(tmp_path):
    code = """
        import signal, sys, time
        asked = []
        signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if asked else asked.append(1))
        print("begun", flush=True)
        while True:
            time.sleep(600)
    """
    with Child(python(code), tmp_path, LIMITS, network_off=False) as child:
        until(lambda: child.listen(0.05) or child.output)
        begun = time.monotonic()
        child.stop(8)  # the second after 2 s, the kill after 8
        assert child.returncode == 130
        assert time.monotonic() - begun >= 2


def test_what_does_not_listen_to_an_interrupt_is_killed(tmp_path):
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    with Child(python(code), tmp_path, LIMITS, network_off=False) as child:
        until(lambda: child.listen(0.05) or child.output)
        begun = time.monotonic()
        child.stop(0.5)
        assert child.returncode == -signal.SIGKILL
        assert time.monotonic() - begun >= 0.5


def test_group_that_outlives_its_leader_is_swept_away(tmp_path):
    code = "import os, time; pid = os.fork(); print(pid, flush=True) if pid else time.sleep(600)"
    with Child(python(code), tmp_path, LIMITS, network_off=False) as child:
        until(lambda: child.listen(0.05) or child.returncode is not None)
        child.last_words()
        left = int(child.output)
        until(lambda: not alive(left))


def test_an_exception_leaves_nothing_running(tmp_path):
    child = Child(python("import time; time.sleep(600)"), tmp_path, LIMITS, network_off=False)
    with contextlib.suppress(RuntimeError), child:
        raise RuntimeError
    pid = child._process.pid
    assert not alive(pid)


@pytest.mark.parametrize("network_off", [False, pytest.param(True, marks=needs_cut)])
def test_it_does_not_outlive_a_server_that_is_killed(tmp_path, network_off):
    server = f"""
        import sys, time, threading
        from pathlib import Path
        from perturbed.feed.sandbox import Child, Limits
        code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
        def work():
            child = Child([sys.executable, "-c", code], Path({str(tmp_path)!r}), Limits(wall_s=120, cpu_s=60),
                          network_off={network_off})
            while not child.output:
                child.listen(0.1)
            print(child.output.decode().strip(), flush=True)
            time.sleep(600)
        threading.Thread(target=work).start()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(server)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert alive(child)
    finally:
        process.kill()
        process.communicate()
    until(lambda: not alive(child))


def test_one_whose_server_has_already_gone_does_not_begin(tmp_path):
    wrapped = sandbox.wrapped(python("open('begun', 'w')"), LIMITS, network_off=False)
    wrapped[4] = "--parent=1"
    assert subprocess.run(wrapped, cwd=tmp_path, timeout=SECONDS).returncode == 1
    assert not (tmp_path / "begun").exists()


def test_output_is_bounded_and_the_end_of_the_error_kept(tmp_path):
    code = "import sys; sys.stdout.write('o' * 300_000); sys.stderr.write('e' * 100_000 + 'end'); sys.stdout.flush()"
    with Child(python(code), tmp_path, Limits(wall_s=SECONDS, cpu_s=20, output=100_000), network_off=False) as child:
        until(lambda: child.listen(0.05) or child.returncode is not None)
        child.last_words()
        assert child.too_loud
        assert len(child.output) == 100_001
        assert len(child.tail) == 4000
        assert child.tail.endswith(b"eend")
        assert len(child._rest) <= 4000


def test_lines_come_whole_and_without_control_characters(tmp_path):
    code = """
        import sys, time
        w = sys.stderr.buffer
        w.write(b"one\\ntw"); w.flush(); time.sleep(0.3)
        w.write(b"o \\x1b[31m\\xff<b>\\r\\nthree"); w.flush()
    """
    lines = []
    with Child(python(code), tmp_path, LIMITS, network_off=False) as child:
        until(lambda: lines.extend(child.listen(0.05)) or child.returncode is not None)
        lines += child.last_words()
    assert lines == ["one", "two [31m\ufffd<b>"]


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_a_process_that_keeps_to_itself_is_read_by_no_other_of_its_user():
    """Also one without a user namespace of its own. Root may read everything, so this is tried as another user."""
    code = """
        import os
        from perturbed.feed import sandbox

        def look():
            if os.fork():
                os.wait()
                return
            try:
                print(b"SECRET" in open(f"/proc/{os.getppid()}/environ", "rb").read(), flush=True)
            except PermissionError:
                print("refused", flush=True)
            os._exit(0)

        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            sandbox._libc().prctl(sandbox._DUMPABLE, 1, 0, 0, 0)  # as after a program's start
        look()
        sandbox.keep_to_oneself()
        look()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    env = {**os.environ, "PERTURBED_SMTP": "SECRET"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=True)
    assert done.stdout.split() == ["True", "refused"]
