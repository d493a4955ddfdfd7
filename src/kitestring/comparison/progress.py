"""What a person sees while jobs run: one bar for the whole, one line for each job at work."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """On a terminal bars that go away when done; elsewhere a line for each finished job."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console, transient=True, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._jobs: dict[str, TaskID] = {}
        self._done = 0

    def __enter__(self) -> Progress:
        self._bars.start()
        self._whole = self._bars.add_task("comparison", total=None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def total(self, jobs: int) -> None:
        self._bars.update(self._whole, total=jobs)
        self._jobs_total = jobs

    def said(self, job: str, what: str, share: float) -> None:
        """`share` of a job that is done; below 0: the job is finished."""
        if share < 0:
            self._done += 1
            self._bars.update(self._whole, completed=self._done)
            if job in self._jobs:
                self._bars.remove_task(self._jobs.pop(job))
            if not self._console.is_terminal:
                self._console.print(f"done: {what} ({self._done} jobs)", highlight=False)
            return
        if job not in self._jobs:
            self._jobs[job] = self._bars.add_task(f"  {what}", total=100)
        self._bars.update(self._jobs[job], completed=int(100 * share))
