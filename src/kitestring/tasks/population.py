"""A task's users as an engine sees them: the device users' rows, and the pool's rows as one."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kitestring.core import Rows
from kitestring.errors import DataError
from kitestring.tasks.task import Array
from kitestring.tasks.users import SPLITS, Columns, Split, Users

_MOST = 256 * 2**20  # bytes of rows that are kept


class Arena:
    """Rows of devices one after the other: a flat array for each column, which doubles when it is
    full. What was handed out stays where it was, so threads may read while one adds."""

    def __init__(self) -> None:
        self.bytes = 0
        self._place: dict[int, int] = {}  # device -> the how manieth it is here
        self._start, self._n = np.zeros(64, np.int64), np.zeros(64, np.int64)
        self._flat: dict[str, Array] = {}
        self._used = 0  # rows

    def __contains__(self, device: int) -> bool:
        return device in self._place

    def add(self, device: int, columns: Columns) -> None:
        counts = {len(values) for values in columns.values()}
        if len(counts) != 1 or (self._flat and columns.keys() != self._flat.keys()):
            found = ", ".join(f"{name} [{len(values)}]" for name, values in columns.items())
            mend = "Give all users the same columns, as long as one another"
            raise DataError(f"columns {found or 'none'}", f"device {device}", mend)
        (n,) = counts
        here, end = len(self._place), self._used + n
        if here == len(self._n):
            self._start, self._n = _grown(self._start, here), _grown(self._n, here)
        for name, values in columns.items():
            known = self._flat.get(name)
            if known is None:
                known = self._flat[name] = np.empty((max(1, n), *values.shape[1:]), values.dtype)
            if end > len(known):
                known = self._flat[name] = _grown(known, self._used, end)
            known[self._used : end] = values
            self.bytes += known[self._used : end].nbytes
        self._start[here], self._n[here], self._used = self._used, n, end
        self._place[device] = here  # last: now it may be read

    def rows(self, devices: Sequence[int]) -> dict[str, Rows]:
        """Raises KeyError where one is not here. Nothing is copied."""
        place = self._place
        here = np.array([place[device] for device in devices], np.int64)
        start, n = self._start[here], self._n[here]
        return {name: Rows.lying(flat, start, n) for name, flat in self._flat.items()}

    def of(self, device: int) -> Columns:
        rows = self.rows([device])
        return {name: r.flat[0][r.flat[1][0] :][: r.n[0]] for name, r in rows.items()}


def _grown(array: Array, used: int, least: int = 0) -> Array:
    """At least twice as long."""
    longer = np.empty((max(2 * len(array), least), *array.shape[1:]), array.dtype)
    longer[:used] = array[:used]
    return longer


class DeviceUsers:
    """The device users 0 .. size - 1; rows that were asked for are kept, up to a bound. Then all
    are let go: who asks at random has no use for the oldest or the newest."""

    def __init__(self, users: Users, most: int = _MOST) -> None:
        self.users, self.size = users, len(users.devices)
        self._most, self._lock = most, threading.Lock()
        self._arenas = {split: Arena() for split in SPLITS}

    def names(self) -> list[str]:
        return [self.users.names[i] for i in self.users.devices]

    def rows(self, ids: Any, split: Split) -> dict[str, Rows]:
        devices = np.asarray(ids).tolist()
        try:
            return self._arenas[split].rows(devices)
        except KeyError:
            with self._lock:  # also because somebody's `load` may not be made for threads
                return self._loaded(devices, split).rows(devices)

    def _loaded(self, devices: Sequence[int], split: Split) -> Arena:
        """An arena with all of them: the one that is there, or a fresh one where it is full."""
        arena = self._arenas[split]
        new = {d: self._load(d, split) for d in dict.fromkeys(devices) if d not in arena}
        more = sum(values.nbytes for columns in new.values() for values in columns.values())
        kept = sum(a.bytes for a in self._arenas.values())
        if kept and kept + more > self._most:
            new = {d: new[d] if d in new else arena.of(d) for d in devices}
            self._arenas = {name: Arena() for name in SPLITS}
            arena = self._arenas[split]
        for device, columns in new.items():
            arena.add(device, columns)
        return arena

    def _load(self, device: int, split: Split) -> Columns:
        found: Mapping[str, Any] = self.users.load(self.users.devices[device])[split]
        return {name: np.asarray(values) for name, values in found.items()}


def pool_rows(users: Users) -> dict[str, Rows] | None:
    """All rows of the pool users, [1, L, ...]; None without any."""
    if not users.pool:
        return None
    parts = [rows[split] for rows in map(users.load, users.pool) for split in SPLITS]
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    first = np.zeros(1, np.int64)
    return {name: Rows.lying(flat, first, np.array([len(flat)])) for name, flat in whole.items()}
