"""A child process that may do little: bare environment, bounded resources, no network where the system allows that.

The limits are set by this module run as a program between the server and the command
(``python -m perturbed.feed.sandbox … -- COMMAND``), as a server with threads must run nothing between fork and exec.
They hold against accidents and against a defect of what is run, which is our own code with bounded numbers; the child
is the same user and can read what that user can read.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# of linux/sched.h and linux/prctl.h
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_DEATH_SIGNAL, _DUMPABLE, _DROP_CAPABILITY, _NO_NEW_PRIVILEGES, _LAST_CAPABILITY = 1, 4, 24, 38, 63

_CONNECT = "import socket, sys; s = socket.socket(); s.settimeout(5); sys.exit(not s.connect_ex(('127.0.0.1', {port})))"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a child may use.

    Args:
        wall_s: Seconds from its start to its end.
        cpu_s: Seconds of processor time.
        memory: Bytes of memory of its own (data, heap, stacks); a study at laptop scale needs up to 1.1 GB.
        file: Bytes in one file.
        output: Bytes on standard output.
        descriptors: Open at once.
        tasks: Processes and threads; in force only with a user namespace of its own, as they are counted per user.
        nice: Added to its niceness.
    """

    wall_s: float
    cpu_s: int
    memory: int = 8 * 2**30
    file: int = 2**30
    output: int = 20 * 10**6
    descriptors: int = 1024
    tasks: int = 256
    nice: int = 10


@functools.cache
def network_can_be_cut() -> bool:
    """Whether a child can be kept from the network here: tried out once, on a listener that it must not reach."""
    if sys.platform != "linux":
        return False
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            trial = [sys.executable, "-I", "-S", "-c", _CONNECT.format(port=listener.getsockname()[1])]
            limits = Limits(wall_s=20, cpu_s=20)
            ended = subprocess.run(
                wrapped(trial, limits, network_off=True), env=environment(Path("/")), cwd="/",
                stdin=subprocess.DEVNULL, capture_output=True, timeout=limits.wall_s,
            )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0


def keep_to_oneself() -> None:
    """Let no process of the same user read the memory and the first environment of this one (on Linux).

    A child in a user namespace of its own cannot anyway; this is for systems that give it none, and holds for this
    process alone, not for what it starts.
    """
    if sys.platform == "linux":
        _checked(_libc().prctl(_DUMPABLE, 0, 0, 0, 0))


def environment(folder: Path) -> dict[str, str]:
    """All that a child gets to see of an environment; ``folder`` is its home."""
    from perturbed.home import home

    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "LANG": "C.UTF-8",
        "PERTURBED_HOME": str(home()),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def wrapped(command: Sequence[str], limits: Limits, *, network_off: bool) -> list[str]:
    """The command line that runs ``command``, whose first word is a whole path, within ``limits``."""
    return [
        sys.executable, "-P", "-m", "perturbed.feed.sandbox", f"--parent={os.getpid()}", f"--cpu={limits.cpu_s}",
        f"--memory={limits.memory}", f"--file={limits.file}", f"--descriptors={limits.descriptors}",
        f"--tasks={limits.tasks}", f"--nice={limits.nice}", *(["--no-network"] if network_off else []), "--", *command,
    ]  # fmt: skip


class Child:
    """A running command in a session, a process group and a folder of its own.

    It ends with the thread that made it, which must therefore live as long (on Linux). Used as a context, nothing of
    its group is left at the end.

    Args:
        command: What to run, as for `wrapped`.
        folder: Its home and working directory.
        limits: What it may use; those of time and output are for the caller to watch.
        network_off: Keep it from the network, or fail.

    Raises:
        OSError: It cannot be started.
    """

    def __init__(self, command: Sequence[str], folder: Path, limits: Limits, *, network_off: bool):
        self.output = bytearray()
        self.tail = bytearray()
        self._rest = bytearray()
        self._most = limits.output
        self._swept = False
        self._process = subprocess.Popen(
            wrapped(command, limits, network_off=network_off), env=environment(folder), cwd=folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self._pipes = selectors.DefaultSelector()
        for pipe, sink in ((self._process.stdout, self.output), (self._process.stderr, self._rest)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._pipes.register(pipe, selectors.EVENT_READ, sink)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sweep()
        self._process.wait()
        self._pipes.close()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    @property
    def too_loud(self) -> bool:
        """Whether it has written more than it may; what was too much is not kept."""
        return len(self.output) > self._most

    def listen(self, seconds: float) -> list[str]:
        """Wait up to ``seconds`` for it to write, and return the lines of its standard error that have become whole."""
        if not self._pipes.get_map():  # it has closed both; there is only its end to wait for
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        for key, _ in self._pipes.select(seconds if self._pipes.get_map() else 0):
            piece = os.read(key.fd, 1 << 16)
            if not piece:
                self._pipes.unregister(key.fileobj)
            elif key.data is self.output:
                self.output += piece[: max(0, self._most + 1 - len(self.output))]
            else:
                self._rest += piece
                self.tail[:] = (self.tail + piece)[-4000:]
        *whole, last = self._rest.split(b"\n")
        self._rest[:] = last[:4000]
        return [printable(line)[:500] for line in whole]

    def stop(self, grace: float) -> list[str]:
        """Interrupt its group as Ctrl-C does, kill the group after ``grace`` seconds, and return its last lines.

        The engine ends after the step in hand at the first interrupt; a measure that takes long needs a second, which
        comes after a quarter of the grace.
        """
        lines = []
        for patience in (grace / 4, grace * 3 / 4):
            if self.returncode is None:
                self._signal(signal.SIGINT)
            end = time.monotonic() + patience
            while self.returncode is None and time.monotonic() < end:
                lines += self.listen(0.1)
        lines += self.last_words()  # it may have ended between its last line and the look whether it had
        self._process.wait()
        return lines

    def last_words(self, patience: float = 2.0) -> list[str]:
        """What it had written before its end and was not read; what is left of its group is killed first."""
        self._sweep()
        lines, end = [], time.monotonic() + patience  # one that left the group may hold the pipes open
        while self._pipes.get_map() and time.monotonic() < end:
            lines += self.listen(0.1)
        return lines

    def _sweep(self) -> None:
        """Kill what is left of the group: once, as its number may later be another's."""
        if not self._swept:
            self._signal(signal.SIGKILL)
            self._swept = True

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def printable(line: bytes | bytearray) -> str:
    """A line of a child's as one may show it: without control characters."""
    return "".join(c for c in line.decode(errors="replace") if c.isprintable())


def main() -> None:
    """Put this process within limits and become the command."""
    parser = argparse.ArgumentParser(prog="perturbed.feed.sandbox")
    for name in ("parent", "cpu", "memory", "file", "descriptors", "tasks", "nice"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--no-network", action="store_true")
    parser.add_argument("command", nargs="+")
    asked = parser.parse_args()
    try:
        _limit(vars(asked))
        if sys.platform == "linux":
            _confine(asked.parent, asked.tasks, asked.no_network)
        os.umask(0o077)
        _plain_signals()
        os.execv(asked.command[0], asked.command)
    except OSError as e:
        sys.exit(f"perturbed: error: {e.strerror}: the run was not started, as the limits on it could not be set")


def _limit(most: Mapping[str, int]) -> None:
    # The soft limit of CPU time ends the process with a signal that tells why; the hard one comes if that is ignored.
    resource.setrlimit(resource.RLIMIT_CPU, _at_most(resource.RLIMIT_CPU, most["cpu"], most["cpu"] + 10))
    for kind, value in (
        (resource.RLIMIT_DATA, most["memory"]),  # not the address space, of which CUDA reserves far more than it uses
        (resource.RLIMIT_FSIZE, most["file"]),
        (resource.RLIMIT_NOFILE, most["descriptors"]),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, _at_most(kind, value, value))
    os.nice(most["nice"])


def _at_most(kind: int, soft: int, hard: int) -> tuple[int, int]:
    """The wanted limits, or the one already in force where that is lower."""
    given = resource.getrlimit(kind)[1]
    return (soft, hard) if given == resource.RLIM_INFINITY else (min(soft, given), min(hard, given))


def _confine(parent: int, tasks: int, no_network: bool) -> None:
    libc = _libc()
    with contextlib.suppress(OSError):  # when memory runs out the system should take this process, not the server
        Path("/proc/self/oom_score_adj").write_text("1000")
    if no_network:
        _leave_network(libc, tasks)
    for capability in range(_LAST_CAPABILITY + 1):  # so that root's child is not root; refused where there is none
        libc.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(libc.prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:  # it went before it could be bound to
        sys.exit(1)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    return libc


def _leave_network(libc: ctypes.CDLL, tasks: int) -> None:
    """Go to a network without interfaces: as the owner of a user namespace, else by the right of root."""
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_NET) == 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        resource.setrlimit(resource.RLIMIT_NPROC, _at_most(resource.RLIMIT_NPROC, tasks, tasks))
    else:
        _checked(libc.unshare(_NEW_NET))


def _checked(outcome: int) -> None:
    if outcome != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _plain_signals() -> None:
    """Undo what was inherited: a server begun in the background ignores Ctrl-C, and Python itself ignores some."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


if __name__ == "__main__":
    main()
