"""What must survive a crash, in one SQLite file: per-device trees and the snapshot of a run.

Everything between two commits lands together or not at all, so a run killed at any moment is found
as it stood after a whole exchange. Values are packed trees and JSON: nothing is executed on load.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kitestring.core import Tree
from kitestring.exchange.kept import Disk, Kept, Memory, Packed
from kitestring.exchange.wire import pack_tree, pack_trees, unpack_tree, unpack_trees

S = TypeVar("S")


class Store:
    """`path` None keeps everything in memory. Several threads may use it, one at a time."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._kept: Kept = Memory() if path is None else Disk(path)
        self._lock = threading.Lock()

    def find(self, shelf: str, ids: Sequence[int]) -> list[Tree | None]:
        """One tree for each id, None where nothing was put; no list at all if nowhere."""
        devices = np.asarray(ids).tolist()
        with self._lock:
            found = self._kept.find(shelf, devices)
        return [unpack_tree(found[i]) if i in found else None for i in devices] if found else []

    def stacked(self, shelf: str, ids: Sequence[int]) -> Tree | None:
        """The trees of all `ids`, stacked; None where one was not put."""
        devices = np.asarray(ids).tolist()
        with self._lock:
            found = self._kept.find(shelf, devices)
        if not devices or len(found) < len(set(devices)):
            return None
        return unpack_trees([found[i] for i in devices])

    def get(self, shelf: str, device: int) -> Tree | None:
        return next(iter(self.find(shelf, [device])), None)

    def put(self, shelf: str, ids: Sequence[int], tree: Tree, which: Iterable[int]) -> None:
        """Keep the slices `which` of a stacked tree, slice d under ids[d]."""
        chosen = np.fromiter(which, np.int64)
        names = np.asarray(ids)[chosen].tolist()
        trees = dict(zip(names, pack_trees(tree, chosen), strict=True))
        with self._lock:
            self._kept.put(shelf, trees)

    def ids(self, shelf: str) -> list[int]:
        with self._lock:
            return self._kept.devices(shelf)

    def save(self, name: str, value: bytes) -> None:
        self.save_all({name: lambda: value})

    def save_all(self, values: Mapping[str, Packed]) -> None:
        """In memory they may be packed later, if ever."""
        with self._lock:
            self._kept.save(values)

    def load(self, name: str) -> bytes | None:
        with self._lock:
            return self._kept.load(name)

    def commit(self) -> None:
        with self._lock:
            self._kept.commit()

    def rollback(self) -> None:
        with self._lock:
            self._kept.rollback()

    def close(self) -> None:
        with self._lock:
            self._kept.close()


class Table:
    """What the cloud keeps for each device: device id -> tree, on the store's disk."""

    def __init__(self, store: Store, shelf: str = "cloud") -> None:
        self._store, self._shelf = store, shelf

    def get(self, ids: Sequence[int]) -> Tree:
        """What was kept for `ids`, stacked. Raises KeyError where nothing was."""
        found = self._store.stacked(self._shelf, ids)
        if found is None:
            there = self._store.find(self._shelf, ids) or [None]
            raise KeyError(ids[there.index(None)])
        return found

    def put(self, ids: Sequence[int], tree: Tree) -> None:
        """Keep slice d of a stacked tree under ids[d]."""
        self._store.put(self._shelf, ids, tree, range(len(ids)))

    def ids(self) -> list[int]:
        return self._store.ids(self._shelf)


def save_state(store: Store, state: Any) -> None:
    """A collaboration's state: a flat dataclass of trees and plain values. Its arrays stay as they
    are: a round that is void goes on from them."""
    values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    trees = {name: value for name, value in values.items() if isinstance(value, Tree)}
    plain = {name: value for name, value in values.items() if name not in trees}
    packed = {f"state.{name}": partial(_pack_one, tree) for name, tree in trees.items()}
    store.save_all({**packed, "state": lambda: json.dumps(plain).encode()})


def _pack_one(tree: Tree) -> bytes:
    return pack_tree(Tree({k: a[None] for k, a in tree.items()}))


def load_state(store: Store, kind: type[S]) -> S | None:
    """What `save_state` kept, as a `kind`; None where nothing was."""
    found = store.load("state")
    if found is None:
        return None
    values: dict[str, Any] = json.loads(found)
    for f in dataclasses.fields(kind):  # type: ignore[arg-type]
        blob = store.load(f"state.{f.name}")
        if f.name not in values and blob is not None:
            values[f.name] = Tree({k: a[0].copy() for k, a in unpack_tree(blob).items()})
    return kind(**values)
