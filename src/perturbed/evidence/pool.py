"""Many runs at once: local worker processes or Ray tasks, with live progress, stopping and resuming."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import cloudpickle

from perturbed.core.plan import Plan
from perturbed.core.run import Engine, Progress, Result
from perturbed.core.store import Store
from perturbed.errors import Interrupted, PerturbedError, PlanError

Place = Literal["local", "ray"]


@dataclass(frozen=True)
class Job:
    """One run: an arm's plan with one seed; ``fresh`` leaves the store aside."""

    label: str
    plan: Plan
    seed: int
    fresh: bool = False


class Listener(Protocol):
    """Told how the jobs get on."""

    def progress(self, job: int, done: int, of: int) -> None:
        """Job number ``job`` has taken ``done`` of its ``of`` steps."""

    def finished(self, job: int, result: Result) -> None:
        """Job number ``job`` has ended."""


class Silent:
    """A listener that says nothing."""

    def progress(self, job: int, done: int, of: int) -> None:
        """Nothing."""

    def finished(self, job: int, result: Result) -> None:
        """Nothing."""


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class Pool:
    """Where runs are carried out.

    Args:
        store: folder of the checkpoint store.
        workers: processes at once; 1 runs here. Default: one a core that this process may use.
        on: ``local`` processes or ``ray`` tasks.
        files: plan files of the user, loaded in every worker before its work.
    """

    store: Path
    workers: int | None = None
    on: Place = "local"
    files: tuple[Path, ...] = ()

    def run(self, jobs: Sequence[Job], listener: Listener | None = None) -> list[Result]:
        """Results in the order of ``jobs``.

        Raises:
            Interrupted: Ctrl-C; running jobs have left checkpoints and finished ones their results.
            PerturbedError: a worker was killed from outside.
        """
        listener = listener or Silent()
        Store(self.store)  # an unusable folder is named before any work
        engines = [Engine(job.plan, job.seed, Store(None if job.fresh else self.store)) for job in jobs]
        results = {i: kept for i, engine in enumerate(engines) if (kept := engine.kept()) is not None}
        for i, result in results.items():
            listener.finished(i, result)
        missing = {i: engine for i, engine in enumerate(engines) if i not in results}
        number = min(self.workers or cores(), len(missing))
        if self.on == "local" and number <= 1:
            results |= {i: _here(i, engine, listener) for i, engine in missing.items()}
        else:
            results |= self._elsewhere(missing, number, listener)
        return [results[i] for i in range(len(jobs))]

    def _elsewhere(self, engines: dict[int, Engine], number: int, listener: Listener) -> dict[int, Result]:
        plans = {id(engine.plan): engine.plan for engine in engines.values()}
        packed = {key: self._pack(plan) for key, plan in plans.items()}  # once a plan: it may hold a model
        # keys are worked out here, where the sources of a script's own slots can be read
        tasks = {
            i: Task(self.files, packed[id(e.plan)], e.seed, e.store.root, e.all_keys()) for i, e in engines.items()
        }
        start = _ray if self.on == "ray" else _loky
        with _notes() as notes, start(number) as submit:
            return _collect({i: submit(task, notes, i) for i, task in tasks.items()}, notes, listener)

    def _pack(self, plan: Plan) -> bytes:
        try:
            return bytes(cloudpickle.dumps(plan))
        except (TypeError, AttributeError, pickle.PicklingError) as e:
            raise PerturbedError(f"the plan cannot be sent to a worker ({e}); use --workers 1") from e


@dataclass(frozen=True)
class Task:
    """What a worker needs for one job; files go first, as the plan may be made of what they define."""

    files: tuple[Path, ...]
    plan: bytes
    seed: int
    store: Path | None
    keys: dict[str, str]


def _here(index: int, engine: Engine, listener: Listener) -> Result:
    engine.report = lambda p: listener.progress(index, p.done, p.of_steps)
    result = engine.run()
    listener.finished(index, result)
    return result


def _work(task: Task, notes: str, index: int) -> dict[str, Any]:
    """One job in a worker: progress goes to a small file, a file called ``stop`` asks it to end."""
    for file in task.files:
        load_file(file)
    engine = Engine(cloudpickle.loads(task.plan), task.seed, Store(task.store), keys=task.keys)
    note, stop, parent = Path(notes, str(index)), Path(notes, "stop"), os.getppid()

    def report(progress: Progress) -> None:
        with contextlib.suppress(OSError):  # a progress bar is not worth a run
            note.write_text(f"{progress.done} {progress.of_steps}")
        if stop.exists() or not stop.parent.exists() or os.getppid() != parent:
            engine.interrupt()

    if stop.exists():
        raise Interrupted("stopped before it began; the same command goes on from there")
    if stop.parent.exists():  # not on another machine of a Ray cluster
        engine.report = report
    return engine.run().to_json()


def load_file(path: Path) -> ModuleType:
    """Import a Python file under its stem, once in a process."""
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    found = None if known else importlib.util.find_spec(path.stem)
    if known is not None or (found is not None and found.origin != str(path)):
        raise PlanError(f"{path.name} has the name of another module: rename the file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that it can import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


@contextlib.contextmanager
def _notes() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="perturbed-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Submit = Callable[[Task, str, int], "Future[dict[str, Any]]"]


def _quiet_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent asks workers to stop by a file
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int, patience: float = 10.0) -> None:
    """End this worker a while after a parent that was killed: time for a checkpoint, none for the next run."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(patience)
    os._exit(Interrupted.code)


@contextlib.contextmanager
def _loky(workers: int) -> Iterator[Submit]:
    from loky import ProcessPoolExecutor
    from loky.process_executor import TerminatedWorkerError

    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    executor = ProcessPoolExecutor(workers, timeout=600, initializer=_quiet_worker, initargs=(os.getpid(),), env=one)
    try:
        yield lambda task, notes, index: executor.submit(_work, task, notes, index)
    except TerminatedWorkerError as e:
        raise PerturbedError(
            "a worker was killed, most often for want of memory; finished runs are kept: "
            "run the same command again with fewer --workers"
        ) from e
    finally:
        executor.shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def _ray(workers: int) -> Iterator[Submit]:
    try:
        import ray
    except ImportError as e:
        raise PerturbedError("--on ray needs Ray: pip install 'perturbed[ray]'") from e
    begun = not ray.is_initialized()
    if begun:
        ray.init(
            num_cpus=None if "RAY_ADDRESS" in os.environ else workers, include_dashboard=False, log_to_driver=False
        )
    task = ray.remote(num_cpus=1, max_retries=0)(_work)
    try:
        yield lambda payload, notes, index: task.remote(payload, notes, index).future()
    finally:
        if begun:
            ray.shutdown()


def _collect(futures: Mapping[int, Future[dict[str, Any]]], notes: str, listener: Listener) -> dict[int, Result]:
    results: dict[int, Result] = {}
    try:
        while len(results) < len(futures):
            time.sleep(0.1)
            for i, future in futures.items():
                if i in results:
                    continue
                if future.done():
                    results[i] = Result.from_json(_outcome(future))
                    listener.finished(i, results[i])
                else:
                    _tell(Path(notes, str(i)), i, listener)
    except KeyboardInterrupt:
        _stop(futures, notes)
        raise Interrupted(
            f"stopped with {len(results)} of {len(futures)} runs done; the same command goes on from there"
        ) from None
    return results


def _outcome(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as e:
        own = getattr(e, "cause", None)  # Ray wraps what a task raised, with its traceback in the message
        raise own if isinstance(own, PerturbedError) else e  # noqa: B904


def _stop(futures: Mapping[int, Future[dict[str, Any]]], notes: str, patience: float = 60.0) -> None:
    """Ask workers to write their checkpoints and wait for it; a second Ctrl-C does not wait."""
    Path(notes, "stop").touch()
    for future in futures.values():
        future.cancel()
    print("perturbed: stopping: writing checkpoints …", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):
        end = time.monotonic() + patience
        while time.monotonic() < end and not all(f.done() for f in futures.values()):
            time.sleep(0.1)


def _tell(note: Path, index: int, listener: Listener) -> None:
    with contextlib.suppress(OSError, ValueError):
        done, of = note.read_text().split()
        listener.progress(index, int(done), int(of))
