"""Worker processes that take a comparison's jobs: one thread each, and none outlives the parent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

from kitestring.collaborate.about import Budget
from kitestring.comparison.board import Board
from kitestring.comparison.forks import context
from kitestring.comparison.jobs import Bench, Job, work
from kitestring.comparison.methods import Method
from kitestring.comparison.order import Order
from kitestring.devices.fit.compute import thread_per_process
from kitestring.errors import KitestringError, RunError, TaskError


class Listener(Protocol):
    """Who is told how far the work is."""

    def total(self, jobs: int) -> None: ...
    def said(self, job: str, what: str, share: float) -> None:
        """`share` of a job that is done; below 0: the job is finished."""


class Workers:
    """Processes that get ready while the comparison is still being prepared."""

    def __init__(self, order: Order, count: int) -> None:
        started = context()
        self.heard: Any = started.Queue()
        self.pool = ProcessPoolExecutor(
            count, started, initializer=_prepare, initargs=(order, self.heard)
        )
        self._starts = threading.Thread(target=self._start, args=(count,))
        self._starts.start()

    def _start(self, count: int) -> None:
        for _ in range(count):
            self.pool.submit(_ready)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._starts.join()
        for process in list((self.pool._processes or {}).values()):
            process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.heard.close()

    def work_off(self, board: Board, shared: Budget, listener: Listener | None) -> None:
        running: dict[Future[dict[str, Any]], Job] = {}
        if listener:
            listener.total(board.total())
        try:
            while True:
                for job in board.ready():
                    running[self.pool.submit(_do, job, shared)] = job
                if not running:
                    return
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                _pass_on(self.heard, listener)
                for future in finished:
                    job = running.pop(future)
                    board.done(job, future.result())
                    if listener:
                        listener.said(job.path.stem, job.label, -1.0)
        except BrokenProcessPool:
            raise RunError(
                "a worker process died, perhaps for want of memory", str(board.folder.parent),
                "Go on with --resume, with fewer --workers",
            ) from None  # fmt: skip
        finally:
            for future in running:
                future.cancel()


def _pass_on(heard: Any, listener: Listener | None) -> None:
    while True:
        try:
            news = heard.get_nowait()
        except queue.Empty:
            return
        if listener:
            listener.said(*news)


# In a worker

_bench: Bench
_methods: Mapping[str, Method]
_heard: Any


def _ready() -> None:
    """Nothing to do yet: asked so that a worker is started."""


def _prepare(order: Order, heard: Any) -> None:
    global _bench, _methods, _heard
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    thread_per_process()
    _bench, _methods, _heard = order.bench(order.load()), order.methods, heard
    gc.freeze()  # what is there stays: the collector of cycles need not walk all of torch again


def _leave_with_parent() -> None:
    """A worker whose comparison was killed must not go on alone. It hears of that at once; a server
    of forks, which is what `os.getppid` names, lives for as long as its workers do."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(job: Job, shared: Budget) -> dict[str, Any]:
    collaboration = _methods[job.method].trials(shared)[job.trial]
    last = 0.0

    def progress(done: float) -> None:
        nonlocal last
        if done == 1 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            _heard.put((job.path.stem, job.label, done))

    try:
        return work(_bench, job, collaboration, progress)
    except KitestringError:
        raise
    except Exception as problem:
        log = job.path.parent.parent / "errors.log"
        with log.open("a") as file:
            file.write(f"{job.label}\n{traceback.format_exc()}\n")
        line = (str(problem).strip().splitlines() or [type(problem).__name__])[0][:200]
        raise TaskError(f"{type(problem).__name__}: {line}", job.label, f"See {log}") from None
