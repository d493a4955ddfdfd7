"""A task's users as an engine sees them: stacked rows of device users, and the pool's rows as
one.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np

from kitestring.core import Rows
from kitestring.tasks.users import SPLITS, Split, Users

_CACHE = 256 * 2**20  # bytes of stacked rows that are kept


def stack_rows(parts: list[dict[str, Any]]) -> dict[str, Rows]:
    """Columns [n, ...] of several users as `Rows` [D, L, ...], padded with zeros."""
    out = {}
    for name in parts[0]:
        n = np.array([len(p[name]) for p in parts])
        first = np.asarray(parts[0][name])
        values = np.zeros((len(parts), max(1, int(n.max())), *first.shape[1:]), first.dtype)
        for d, part in enumerate(parts):
            values[d, : n[d]] = part[name]
        out[name] = Rows(values, n)
    return out


class DeviceUsers:
    """The device users 0 .. size - 1; what was stacked last is kept, within bounds."""

    def __init__(self, users: Users) -> None:
        self.users, self.size = users, len(users.devices)
        self._kept: OrderedDict[tuple[Any, ...], dict[str, Rows]] = OrderedDict()
        self._bytes = 0

    def names(self) -> list[str]:
        return [self.users.names[i] for i in self.users.devices]

    def rows(self, ids: Any, split: Split) -> dict[str, Rows]:
        key = (split, *(int(i) for i in ids))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        loaded = [dict(self.users.load(self.users.devices[int(i)])[split]) for i in ids]
        rows = stack_rows(loaded)
        self._kept[key] = rows
        self._bytes += sum(r.values.nbytes for r in rows.values())
        while self._bytes > _CACHE and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self._bytes -= sum(r.values.nbytes for r in old.values())
        return rows


def pool_rows(users: Users) -> dict[str, Rows] | None:
    """All rows of the pool users, [1, L, ...]; None without any."""
    if not users.pool:
        return None
    parts = [rows[split] for rows in map(users.load, users.pool) for split in SPLITS]
    whole = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    return stack_rows([whole])
