"""Seconds that were spent inside of a block, wherever it stands."""

from __future__ import annotations

import threading
import time


class Stopwatch:
    """`with watch:` adds to its seconds. A block inside of another counts once; those of several
    threads are summed up."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> None:
        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth == 1:
            self._own.began = time.perf_counter()

    def __exit__(self, *problem: object) -> None:
        self._own.depth -= 1
        if not self._own.depth:
            with self._lock:
                self.seconds += time.perf_counter() - self._own.began
