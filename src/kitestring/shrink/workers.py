"""Jobs of a search in worker processes: one thread each, and none outlives the search."""

from __future__ import annotations

import gc
import multiprocessing
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import torch

from kitestring.comparison.forks import context
from kitestring.comparison.order import Order
from kitestring.errors import KitestringError, RunError, TaskError
from kitestring.shrink.bench import Bench, Job


class Listener(Protocol):
    """Who is told how far the work is."""

    def total(self, steps: int) -> None: ...
    def said(self, job: str, what: str, share: float) -> None:
        """`share` of a step that is done; below 0: it is finished."""


Done = Callable[[Job, dict[str, Any]], None]


def work_off(
    bench: Bench, jobs: Iterable[Job], done: Done, listener: Listener | None, workers: int
) -> None:
    """Each job once those of them that it needs are done. One worker is this process itself."""
    left = list(jobs)

    def ready(busy: Iterable[Job]) -> list[Job]:
        waiting = {*left, *busy}
        return [job for job in left if not any(b in waiting for b in job.after)]

    if workers == 1:
        _one_by_one(bench, left, ready, done, listener)
        return
    with _Workers(bench, min(workers, len(left) or 1)) as hands:
        running: dict[Future[dict[str, Any]], Job] = {}
        try:
            while left or running:
                for job in ready(running.values()):
                    left.remove(job)
                    running[hands.pool.submit(_do, job)] = job
                finished, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                hands.pass_on(listener)
                for future in finished:
                    job = running.pop(future)
                    done(job, future.result())
                    if listener:
                        listener.said(job.name, job.title, -1.0)
        except BrokenProcessPool:
            mend = "Go on with --resume, with fewer --workers"
            what = "a worker process died, perhaps for want of memory"
            raise RunError(what, str(bench.folder), mend) from None
        finally:
            for future in running:
                future.cancel()


def _one_by_one(
    bench: Bench, left: list[Job], ready: Callable[[Iterable[Job]], list[Job]], done: Done,
    listener: Listener | None,
) -> None:  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while left:
            job = ready([])[0]
            heard = _share(job, listener.said) if listener else lambda share: None
            found = _told(bench, job, heard)
            left.remove(job)
            done(job, found)
            if listener:
                listener.said(job.name, job.title, -1.0)
    finally:
        torch.set_num_threads(threads)


def _share(job: Job, said: Callable[[str, str, float], None]) -> Callable[[float], None]:
    """Told how far a job is, this tells it on, a few times a second."""
    last = 0.0

    def heard(share: float) -> None:
        nonlocal last
        if share == 1 or time.monotonic() - last > 0.2:
            last = time.monotonic()
            said(job.name, job.title, share)

    return heard


def _told(bench: Bench, job: Job, heard: Callable[[float], None]) -> dict[str, Any]:
    """What goes wrong is told in one line, the rest is in a file."""
    try:
        return bench.do(job, heard)
    except KitestringError:
        raise
    except Exception as problem:
        log = bench.folder / "errors.log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{job.title}\n{traceback.format_exc()}\n")
        line = (str(problem).strip().splitlines() or [""])[0][:200]
        raise TaskError(f"{type(problem).__name__}: {line}", job.title, f"See {log}") from None


class _Workers:
    def __init__(self, bench: Bench, count: int) -> None:
        started = context()
        self.heard: Any = started.Queue()
        given = bench.order, bench.folder, self.heard
        self.pool = ProcessPoolExecutor(count, started, initializer=_prepare, initargs=given)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list((self.pool._processes or {}).values()):
            process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.heard.close()

    def pass_on(self, listener: Listener | None) -> None:
        while True:
            try:
                news = self.heard.get_nowait()
            except queue.Empty:
                return
            if listener:
                listener.said(*news)


# In a worker

_bench: Bench
_heard: Any


def _prepare(order: Order, folder: Path, heard: Any) -> None:
    global _bench, _heard
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _bench, _heard = Bench(order, folder), heard
    gc.freeze()


def _leave_with_parent() -> None:
    """A worker whose search was killed must not go on alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(job: Job) -> dict[str, Any]:
    return _told(_bench, job, _share(job, lambda *news: _heard.put(news)))
