"""What a task's rows look like, and rows drawn to look so: nobody's own leave in a package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitestring import dice
from kitestring.core import Array, Rows
from kitestring.tasks.task import Recorded, Task


@dataclass(frozen=True)
class Column:
    """One row's dtype and shape, and between what its values lie."""

    dtype: str
    row: tuple[int, ...]
    low: float
    high: float

    def draw(self, n: int, key: Any) -> Array:
        """`n` rows, uniform between the bounds, from the dice of `key` [1]."""
        share = dice.uniform(key, max(1, n * int(np.prod(self.row))))[0]
        share = share[: n * int(np.prod(self.row))].reshape(n, *self.row)
        if np.issubdtype(self.dtype, np.floating):
            return (self.low + share * (self.high - self.low)).astype(self.dtype)
        whole = self.low + np.floor(share.astype(np.float64) * (self.high - self.low + 1))
        return np.minimum(whole, self.high).astype(self.dtype)


def schema(task: Task | Recorded) -> dict[str, Column]:
    """Of the rows that a task's users have, seen on a few of them."""
    users = task.users
    some = [*users.pool[:8], *users.devices[:2]]
    parts = [columns for i in some for columns in users.load(i).values()]
    found = {}
    for name in parts[0]:
        whole = [np.asarray(p[name]) for p in parts if len(p[name])]
        low = min(float(np.nanmin(a)) for a in whole)
        high = max(float(np.nanmax(a)) for a in whole)
        found[name] = Column(str(whole[0].dtype), whole[0].shape[1:], low, high)
    return found


def draw(columns: Mapping[str, Column], n: int, device: int, what: str) -> dict[str, Rows]:
    """Rows of one made-up device, [1, n, ...]."""
    made = {}
    for name, column in columns.items():
        key = dice.keys(0, np.array([device]), 0, f"{what}.{name}")
        made[name] = Rows(column.draw(n, key)[None], np.array([n]))
    return made
