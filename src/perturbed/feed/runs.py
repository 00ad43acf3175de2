"""Registered studies run on demand: a queue in the database, and a worker that runs one after the other.

However many servers share a database, one study runs at a time: the worker that holds the lock beside the file runs
them all, and the others show how it gets on. A run that a crash cut off is taken up again by the next holder, and the
engine's checkpoint store lets it go on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from perturbed.errors import PerturbedError
from perturbed.feed import knobs, sandbox
from perturbed.feed.database import Database
from perturbed.feed.knobs import Field
from perturbed.feed.sandbox import Child, Limits

__all__ = ["LIMITS", "MOST_ATTEMPTS", "MOST_WAITING", "Field", "Isolation", "Run", "RunError", "Runs", "study_command"]

Scale = Literal["smoke", "laptop"]
State = Literal["queued", "running", "done", "failed", "cancelled"]

MOST_WAITING = 10
MOST_ATTEMPTS = 3
# By its rules a laptop study takes 20 processor minutes, a smoke a quarter of one: slow machines get many times that.
LIMITS: Mapping[str, Limits] = MappingProxyType(
    {"smoke": Limits(cpu_s=900, wall_s=1800), "laptop": Limits(cpu_s=3 * 3600, wall_s=6 * 3600)}
)

_PROGRESS = re.compile(r"\[(\d{1,6})/(\d{1,6})\] (.+)")
_SAID, _ERROR = "perturbed: ", "perturbed: error: "
_BRIEF = "id, slug, scale, settings, state, asked, started, ended, attempts, cancel, done, total, line, error"
_LOOK = 0.3  # seconds between looks into the database while a study runs


class RunError(PerturbedError):
    """A run cannot be queued, or there is none of that number; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A study that was asked for, and what came of it.

    Args:
        id: Its number.
        slug: Of the method.
        scale: ``smoke`` or ``laptop``.
        settings: Fields of the primary arm that were set.
        state: ``queued``, ``running``, ``done`` (with a record, whatever its verdict and gates), ``failed`` or
            ``cancelled``.
        asked: When, in seconds since 1970, as all times here.
        started: When it last began.
        ended: When it ended.
        attempts: How often it began.
        cancel: It is to end, and may not have done so yet.
        done: Runs of the study that have ended.
        total: Of how many; None before the first has.
        line: The last that it said of its progress, such as ``control · seed 3 (0.5 s)``.
        record: What ``perturbed run --json`` printed.
        error: Why it failed.
    """

    id: int
    slug: str
    scale: Scale
    settings: Mapping[str, float]
    state: State
    asked: float
    started: float | None = None
    ended: float | None = None
    attempts: int = 0
    cancel: bool = False
    done: int = 0
    total: int | None = None
    line: str | None = None
    record: Mapping[str, Any] | None = field(default=None, repr=False)
    error: str | None = None


@dataclass(frozen=True)
class Isolation:
    """What holds for every run here: whether it is cut off the network, its limits by scale, and both in words."""

    network_off: bool
    limits: Mapping[str, Limits]
    note: str


def study_command(run: Run) -> list[str]:
    """The command line of a run.

    Raises:
        PerturbedError: The method is gone, or no longer allows the settings.
    """
    arm = knobs.primary(run.slug)
    settings = knobs.checked(run.slug, run.settings)
    chosen = [word for name, value in settings.items() for word in ("--set", f"{arm}.{name}={value!r}")]
    program = [sys.executable, "-P", "-m", "perturbed", "run", run.slug]
    return [*program, "--scale", run.scale, "--json", "--workers", "1", *chosen]


class Runs:
    """The queue of runs in a database, and once started a worker that may run them.

    Args:
        database: The feed's.
        command: What to execute for a run; tests put something quick in its place.
        clock: Seconds since 1970.
        limits: By scale.
        grace: Seconds from an interrupt to the kill.

    Attributes:
        trouble: Why the worker cannot go on at present, such as a full disk; None while it can.
    """

    def __init__(
        self,
        database: Database,
        *,
        command: Callable[[Run], Sequence[str]] = study_command,
        clock: Callable[[], float] = time.time,
        limits: Mapping[str, Limits] = LIMITS,
        grace: float = 20.0,
    ):
        self.trouble: str | None = None
        self._database = database
        self._command = command
        self._clock = clock
        self._limits = limits
        self._grace = grace
        self._stop = threading.Event()
        self._news = threading.Event()
        self._worker: threading.Thread | None = None

    def fields(self, slug: str) -> list[Field]:
        """What may be set of a method's study.

        Raises:
            PerturbedError: No method has that slug.
        """
        return list(knobs.fields(slug))

    def ask(self, slug: str, scale: str, settings: Mapping[str, object]) -> int:
        """Queue a study and return its number, or that of the same study where it already waits or runs.

        Raises:
            PerturbedError: No method has that slug, or its card does not allow the settings.
            RunError: The scale is another, too many wait, or the queue cannot be written.
        """
        if scale not in self._limits:
            raise RunError(f"scale {scale[:40]!r} is not run here: it is one of {', '.join(self._limits)}")
        chosen = json.dumps(knobs.checked(slug, settings), sort_keys=True)
        with _writing(self._database) as connection:
            number = _enqueue(connection, slug, scale, chosen, self._clock())
        self._news.set()
        return number

    def cancel(self, number: int) -> None:
        """End a run that waits or is going, wherever; one that has ended stays as it is.

        Raises:
            RunError: There is no such run, or the queue cannot be written.
        """
        self.get(number)
        with _writing(self._database) as connection:
            connection.execute("UPDATE run SET cancel = 1 WHERE id = ? AND state = 'running'", (number,))
            waiting = "UPDATE run SET cancel = 1, state = 'cancelled', ended = ? WHERE id = ? AND state = 'queued'"
            connection.execute(waiting, (self._clock(), number))

    def get(self, number: int) -> Run:
        """A run with its record.

        Raises:
            RunError: There is none of that number.
        """
        found = None
        if 0 < number < 2**63:
            query = f"SELECT {_BRIEF}, record FROM run WHERE id = ?"
            found = self._database.read().execute(query, (number,)).fetchone()
        if found is None:
            raise RunError(f"there is no run {number}")
        return _run(found)

    def recent(self, limit: int = 20) -> list[Run]:
        """The last asked first, without their records."""
        query = f"SELECT {_BRIEF} FROM run ORDER BY id DESC LIMIT ?"
        return [_run(row) for row in self._database.read().execute(query, (limit,))]

    def isolation(self) -> Isolation:
        """What a run may do here."""
        off = sandbox.network_can_be_cut()
        most = self._limits["laptop"]
        network = (
            "It is cut off from the network."
            if off
            else "This system lets no process be cut off from the network, so it is only told to stay offline."
        )
        note = (
            "One study runs at a time, in a process of its own without the server's environment, with at most "
            f"{most.cpu_s / 3600:g} hours of processor time, {most.memory / 2**30:g} GiB of memory and "
            f"{most.file / 2**30:g} GiB in a file. {network}"
        )
        return Isolation(off, self._limits, note)

    def start(self) -> None:
        """Begin to run what is queued, when it is this worker's turn."""
        if self._worker is None:
            self._stop.clear()
            self._worker = threading.Thread(target=self._work, name="perturbed-runs", daemon=True)
            self._worker.start()

    def stop(self) -> None:
        """End the worker. A study that is going is interrupted and queued again: the next worker goes on with it."""
        if self._worker is not None:
            self._stop.set()
            self._news.set()
            self._worker.join()
            self._worker = None

    def _work(self) -> None:
        sandbox.network_can_be_cut()  # known before a page asks
        try:
            while not self._stop.is_set():
                try:
                    with _turn(self._database.path) as ours:
                        if ours:
                            self._serve()
                except Exception as e:  # whatever it was, later runs need a worker; this one counts as cut off
                    self.trouble = f"runs wait, as their queue cannot be used: {e}"
                self._stop.wait(1.0)
        finally:
            self._database.close()

    def _serve(self) -> None:
        """Run what is queued until told to stop, this worker's turn lasting as long."""
        _recover(self._database, self._clock())
        while not self._stop.is_set():
            self._news.clear()
            run = _claim(self._database, self._clock())
            self.trouble = None
            if run is None:
                self._news.wait(1.0)
            else:
                self._carry_out(run)

    def _carry_out(self, run: Run) -> None:
        folder = self._database.path.with_name(self._database.path.name + ".run")
        try:
            shutil.rmtree(folder, ignore_errors=True)  # a crash may have left it
            folder.mkdir(mode=0o700)
            command = self._command(run)
            with Child(command, folder, self._limits[run.scale], network_off=sandbox.network_can_be_cut()) as child:
                ended = self._watch(run, child)
                self._note(run, child.last_words())
                outcome = _outcome(child, self._limits[run.scale])
                if ended is not None and outcome["state"] != "done":  # it may have come to its end just then
                    outcome = ended
        except (PerturbedError, OSError) as e:
            outcome = {"state": "failed", "error": f"it could not be carried out: {e}"}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._settle(run, outcome)
        if outcome["state"] == "done":
            self._tell()

    def _watch(self, run: Run, child: Child) -> dict[str, Any] | None:
        """Follow a child to its end; what it comes to where that was our doing."""
        limits, begun, looked = self._limits[run.scale], time.monotonic(), 0.0
        ended: dict[str, Any] | None = None
        while child.returncode is None and ended is None:
            self._note(run, child.listen(0.2))
            now = time.monotonic()
            if self._stop.is_set():
                ended = {"state": "queued"}
            elif child.too_loud:
                ended = {"state": "failed", "error": f"it wrote more than {limits.output / 1e6:g} MB"}
            elif now - begun > limits.wall_s:
                said = f"it took longer than {_span(limits.wall_s)}; finished parts are kept, so asking again goes on"
                ended = {"state": "failed", "error": said}
            elif now - looked > _LOOK:
                looked = now
                if self.get(run.id).cancel:
                    ended = {"state": "cancelled"}
        if ended is not None:
            self._note(run, child.stop(self._grace))
        return ended

    def _note(self, run: Run, lines: Iterable[str]) -> None:
        """Write down the last progress among ``lines``."""
        told: tuple[Any, ...] | None = None
        for line in lines:
            if found := _PROGRESS.fullmatch(line):
                told = (int(found[1]), int(found[2]), found[3])
            elif line.startswith(_SAID) and not line.startswith(_ERROR):
                told = (*(told[:2] if told else (None, None)), line.removeprefix(_SAID))
        if told is not None:
            query = "UPDATE run SET done = coalesce(?, done), total = coalesce(?, total), line = ? WHERE id = ?"
            with contextlib.suppress(sqlite3.OperationalError), self._database.write() as connection:
                connection.execute(query, (*told, run.id))

    def _settle(self, run: Run, outcome: Mapping[str, Any]) -> None:
        with self._database.write() as connection:
            if outcome["state"] == "queued":  # our own stop is no failed attempt
                _again(connection, run.id, "attempts - 1", self._clock())
                return
            query = "UPDATE run SET state = ?, ended = ?, record = ?, error = ? WHERE id = ? AND state = 'running'"
            told = (outcome["state"], self._clock(), outcome.get("record"), outcome.get("error"), run.id)
            connection.execute(query, told)

    def _tell(self) -> None:
        """Bring the feed's verdicts up to what the ledgers now hold."""
        from perturbed.feed.verdicts import sync

        with contextlib.suppress(PerturbedError, sqlite3.Error, OSError):  # the next sync says it where it is shown
            sync(self._database, self._clock())


@contextlib.contextmanager
def _writing(database: Database) -> Iterator[sqlite3.Connection]:
    """A transaction of the owner's; that it is not possible is said in words."""
    try:
        with database.write() as connection:
            yield connection
    except sqlite3.OperationalError as e:
        raise RunError(f"the queue of runs cannot be written ({e}); make room on the disk, or try again") from e


def _enqueue(connection: sqlite3.Connection, slug: str, scale: str, settings: str, now: float) -> int:
    same = (
        "SELECT id FROM run WHERE slug = ? AND scale = ? AND settings = ? AND state IN ('queued', 'running') "
        "AND cancel = 0"
    )
    if found := connection.execute(same, (slug, scale, settings)).fetchone():
        return int(found["id"])
    if connection.execute("SELECT count(*) FROM run WHERE state = 'queued'").fetchone()[0] >= MOST_WAITING:
        raise RunError(f"{MOST_WAITING} runs wait already: cancel one, or ask again when one has ended")
    query = "INSERT INTO run (slug, scale, settings, state, asked) VALUES (?, ?, ?, 'queued', ?) RETURNING id"
    return int(connection.execute(query, (slug, scale, settings, now)).fetchone()["id"])


def _claim(database: Database, now: float) -> Run | None:
    """The run that waits longest, now running."""
    if database.read().execute("SELECT 1 FROM run WHERE state = 'queued'").fetchone() is None:
        return None
    query = (
        "UPDATE run SET state = 'running', started = ?, attempts = attempts + 1, done = 0, total = NULL, line = NULL, "
        "error = NULL WHERE id = (SELECT min(id) FROM run WHERE state = 'queued') RETURNING "
    )
    with database.write() as connection:
        row = connection.execute(query + _BRIEF, (now,)).fetchone()
    return None if row is None else _run(row)


def _recover(database: Database, now: float) -> None:
    """Queue again what a worker that is gone left running: whoever holds the lock knows that nobody runs it."""
    with database.write() as connection:
        for row in connection.execute("SELECT id, attempts FROM run WHERE state = 'running'").fetchall():
            if row["attempts"] < MOST_ATTEMPTS:
                _again(connection, row["id"], "attempts", now)
            else:
                why = f"the server ended {row['attempts']} times while it ran; see whether the machine lacks memory"
                query = "UPDATE run SET state = 'failed', ended = ?, error = ? WHERE id = ?"
                connection.execute(query, (now, why, row["id"]))


def _again(connection: sqlite3.Connection, number: int, attempts: str, now: float) -> None:
    """Back to the queue, unless it was cancelled meanwhile."""
    query = (
        f"UPDATE run SET attempts = {attempts}, state = iif(cancel, 'cancelled', 'queued'), "
        "ended = iif(cancel, ?, NULL) WHERE id = ? AND state = 'running'"
    )
    connection.execute(query, (now, number))


def _outcome(child: Child, limits: Limits) -> dict[str, Any]:
    """What the end of a child comes to; exit code 3 says that a gate failed, which the record tells."""
    code = child.returncode or 0
    if child.too_loud:
        return {"state": "failed", "error": f"it wrote more than {limits.output / 1e6:g} MB"}
    if code in (0, 3):
        record = bytes(child.output).decode(errors="replace").strip()
        if _is_record(record):
            return {"state": "done", "record": record}
    return {"state": "failed", "error": _reason(code, bytes(child.tail), limits)}


def _is_record(text: str) -> bool:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return isinstance(json.loads(text, parse_constant=constant), dict)
    except (ValueError, RecursionError):
        return False


def _reason(code: int, tail: bytes, limits: Limits) -> str:
    """Why a child failed: its own line, else how it ended and the last that it wrote."""
    lines = [sandbox.printable(line) for line in tail.splitlines()]
    own = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
    if code == -signal.SIGXCPU:
        return f"it used more than {_span(limits.cpu_s)} of processor time"
    if code == -signal.SIGKILL:
        return "the system killed it, most often for want of memory"
    if own and re.search(r"MemoryError|allocate memory", own[-1]):
        return f"{own[-1]} – a run asked for here may use {limits.memory / 2**30:g} GiB, on the command line any amount"
    if own:
        return own[-1]
    how = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code} and no record"
    return f"{how}\n{chr(10).join(lines)[-3900:]}".strip()


def _span(seconds: float) -> str:
    return f"{seconds / 3600:g} hours" if seconds >= 3600 else f"{seconds:g} seconds"


@contextlib.contextmanager
def _turn(database: Path) -> Iterator[bool]:
    """Whether this is the one worker of a database that runs things, for as long as the block lasts."""
    descriptor = os.open(database.with_name(database.name + ".runs.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _run(row: sqlite3.Row) -> Run:
    told = dict(row)
    record = json.loads(told["record"]) if told.get("record") else None
    return Run(**{**told, "settings": json.loads(told["settings"]), "cancel": bool(told["cancel"]), "record": record})
