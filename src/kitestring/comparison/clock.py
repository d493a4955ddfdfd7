"""Where a job's time goes: a clock, and what it is handed to.

The parts are the primitives by program ("fit small", "predict large") and those named below. What
is in none of them is the engine's and the collaboration's own work.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from kitestring.devices.fit.compute import TorchCompute
from kitestring.exchange.store import Store
from kitestring.tasks.population import DeviceUsers

MODELS = "models"  # made, and their operations counted
COMPILING = "compiling"  # tracing, making native code, and every trial of a way to compute
ROWS = "rows"
SCORES = "scores"
STATE = "state"  # packed and kept, or found again
REST = "rest"
_VERBS = ("fit", "predict", "backward")


class Clock:
    """At every moment one part runs, so all parts together are the time since it was made. A part
    inside of another stops that one.

    Not for several threads: a job has one, since its engine has one worker."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._part, self._since = REST, time.perf_counter()

    def _turn(self, part: str) -> None:
        now = time.perf_counter()
        self._spent[self._part] += now - self._since
        self._part, self._since = part, now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self._part
        self._turn(name)
        try:
            yield
        finally:
            self._turn(before)

    def move(self, seconds: float, to: str) -> None:
        """Seconds of the part that runs belong to another."""
        self._spent[self._part] -= seconds
        self._spent[to] += seconds

    def spent(self) -> dict[str, float]:
        """Seconds by part, up to now."""
        self._turn(self._part)
        return dict(self._spent)

    def compute(self, compute: TorchCompute) -> TorchCompute:
        return cast(TorchCompute, _Compute(compute, self))

    def population(self, population: DeviceUsers) -> DeviceUsers:
        return cast(DeviceUsers, _Whole(population, self, ROWS))

    def store(self, store: Store) -> Store:
        return cast(Store, _Whole(store, self, STATE))


class _Whole:
    """All that `inner` does is one part."""

    def __init__(self, inner: Any, clock: Clock, part: str) -> None:
        self._inner, self._clock, self._part = inner, clock, part

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return _timed(found, self._clock, self._part) if callable(found) else found


def _timed(call: Callable[..., Any], clock: Clock, part: str) -> Callable[..., Any]:
    def timed(*what: Any, **how: Any) -> Any:
        with clock.part(part):
            return call(*what, **how)

    return timed


class _Compute:
    """A part for each primitive and program, less what was spent to make it ready."""

    def __init__(self, inner: TorchCompute, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name == "flops":
            return _timed(found, self._clock, MODELS)
        if name not in _VERBS:
            return found

        def timed(program: str, *what: Any, **how: Any) -> Any:
            before = self._inner.preparing.seconds
            with self._clock.part(f"{name} {program}"):
                try:
                    return found(program, *what, **how)
                finally:
                    self._clock.move(self._inner.preparing.seconds - before, COMPILING)

        return timed
