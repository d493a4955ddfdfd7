"""Replies of several chunks at once: threads that compute ahead, and results in their order."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any, Generic, TypeVar, cast

from kitestring.devices.session import Primitives

T = TypeVar("T")


class _Task(Generic[T]):
    def __init__(self, call: Callable[[], T], pool: ThreadPoolExecutor) -> None:
        self._call = call
        self.future = pool.submit(call)

    def taken_over(self) -> bool:
        """Computed by this thread, unless another has begun."""
        if not self.future.cancel():
            return False
        self.future = Future()
        try:
            self.future.set_result(self._call())
        except Exception as problem:  # told in its turn
            self.future.set_exception(problem)
        return True


def in_order(
    calls: Iterable[Callable[[], T]], pool: ThreadPoolExecutor | None, ahead: int
) -> Generator[T, None, None]:
    """What `calls` return, in their order, computed by the pool's threads and by this one: rather
    than wait it computes what none of them has begun. No more than `ahead` results are there
    beside the one that was given last; `calls` is walked by this thread alone.

    When it ends early, by an error or because no more is asked for, nothing is left running."""
    if pool is None:
        for call in calls:
            yield call()
        return
    rest = iter(calls)
    tasks: deque[_Task[T]] = deque()
    try:
        while True:
            tasks.extend(_Task(call, pool) for call in islice(rest, ahead - len(tasks)))
            if not tasks:
                return
            while not tasks[0].future.done() and any(task.taken_over() for task in tasks):
                pass
            yield tasks.popleft().future.result()
    finally:
        wait([task.future for task in tasks if not task.future.cancel()])


class _OneAtATime:
    """Primitives that wait for one another, whoever calls them."""

    _lock = threading.RLock()  # of all: modules and a library's random state may be shared

    def __init__(self, compute: Primitives) -> None:
        self._compute = compute

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._compute, name)

        def call(*what: Any, **how: Any) -> Any:
            with self._lock:
                return found(*what, **how)

        return call


def guarded(compute: Primitives) -> Primitives:
    """The same primitives, for several threads. Only those that say `concurrent = True` of
    themselves are called by more than one thread at a time."""
    if getattr(compute, "concurrent", False):
        return compute
    return cast(Primitives, _OneAtATime(compute))


def new_pool(workers: int) -> ThreadPoolExecutor | None:
    """The threads beside this one. torch, where it is in use, then splits no work itself: in the
    whole process, since that is how it is told."""
    if workers < 2:
        return None
    if "torch" in sys.modules:
        from kitestring.devices.fit.compute import thread_per_process

        thread_per_process()
    return ThreadPoolExecutor(workers - 1, "kitestring")
