"""Live progress of many runs: bars on a terminal, one line a finished run elsewhere."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from perturbed.core.run import Result
from perturbed.evidence.pool import Job


class Bars:
    """A listener that draws one bar for the whole and one for each run in hand.

    Args:
        title: of the whole.
        console: where to draw; standard error if None.
        quiet: draw nothing.
    """

    def __init__(self, title: str, console: Console | None = None, quiet: bool = False):
        self.console = Console(file=io.StringIO()) if quiet else console or Console(stderr=True)
        self.live = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self.console, transient=True, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.title = title
        self.jobs: Sequence[Job] = ()
        self._tasks: dict[int, TaskID] = {}
        self._done = 0
        self._whole = TaskID(0)

    def __enter__(self) -> Bars:
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def listen(self, jobs: Sequence[Job]) -> Bars:
        """Begin to follow ``jobs``."""
        self.jobs, self._done = jobs, 0
        self._whole = self.live.add_task(f"[bold]{self.title}", total=len(jobs))
        return self

    def progress(self, job: int, done: int, of: int) -> None:
        """Move the bar of a run."""
        if job not in self._tasks:
            self._tasks[job] = self.live.add_task(self.jobs[job].label, total=of)
        self.live.update(self._tasks[job], completed=done, total=of)

    def finished(self, job: int, result: Result) -> None:
        """Take the bar of a run away, and say so where there are no bars."""
        self._done += 1
        if job in self._tasks:
            self.live.remove_task(self._tasks.pop(job))
        self.live.update(self._whole, completed=self._done)
        if not self.console.is_terminal:
            outcome = f"diverged: {result.diverged}" if result.diverged else f"{result.cost.wall_s:.1f} s"
            print(
                f"[{self._done}/{len(self.jobs)}] {self.jobs[job].label} ({outcome})",
                file=self.console.file,
                flush=True,
            )
