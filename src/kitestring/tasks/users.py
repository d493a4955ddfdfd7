"""Users and their rows: who is there, who shares data with the cloud, and what each one has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np

from kitestring.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Columns = Mapping[str, np.ndarray[Any, Any]]  # column -> [n, ...]; "x" is asked, "y" is the truth


class Numbered(Sequence[str]):
    """The names of made-up users, "user 1" to "user `count`", none of which is made beforehand."""

    def __init__(self, count: int, label: str = "user") -> None:
        self._numbers, self._label = range(1, count + 1), label

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, user: int) -> str: ...
    @overload
    def __getitem__(self, user: slice) -> list[str]: ...
    def __getitem__(self, user: int | slice) -> str | list[str]:
        if isinstance(user, slice):
            return [f"{self._label} {number}" for number in self._numbers[user]]
        return f"{self._label} {self._numbers[user]}"


@dataclass(frozen=True)
class Users:
    """`load(i)` gives user i's rows by split, made or read when asked for, not before.

    `pool` are the users (indices into `names`) whose rows the cloud has; `devices` are the others.
    A million users need no lists: `names` may be `Numbered`, and the others a `range`."""

    names: Sequence[str]
    load: Callable[[int], Mapping[Split, Columns]]
    pool: Sequence[int]
    devices: Sequence[int]


def deal(count: int, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split `count` users once into pool and device users; a `share` of them goes to the pool."""
    if not 0 <= share < 1:
        raise DataError(f"a pool of {share:g} of the users", mend="Give a share in [0, 1)")
    order = np.random.default_rng([seed, count]).permutation(count)
    size = max(1, round(share * count)) if share else 0
    return sorted(order[:size].tolist()), sorted(order[size:].tolist())


def split_rows(
    columns: Columns, seed: int, shares: tuple[float, float] = (0.6, 0.2)
) -> dict[Split, dict[str, np.ndarray[Any, Any]]]:
    """A user's rows, shuffled once and cut into train, validation and test (the rest).

    Each part gets at least one row; a user with fewer than three rows is refused."""
    n = len(next(iter(columns.values())))
    if n < 3:
        raise DataError(f"{n} rows", mend="A user needs at least 3: train, validation, test")
    order = np.random.default_rng([seed, n]).permutation(n)
    train = min(max(1, round(shares[0] * n)), n - 2)
    check = min(max(1, round(shares[1] * n)), n - train - 1)
    cuts = {
        "train": order[:train],
        "validation": order[train : train + check],
        "test": order[train + check :],
    }
    return {s: {name: a[np.sort(cuts[s])] for name, a in columns.items()} for s in SPLITS}
