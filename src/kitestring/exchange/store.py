"""What must survive a crash, in one SQLite file: per-device trees and the snapshot of a run.

Everything between two commits lands together or not at all, so a run killed at any moment is found
as it stood after a whole exchange. Values are packed trees and JSON: nothing is executed on load.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from kitestring.core import Tree
from kitestring.errors import RunError
from kitestring.exchange.wire import pack_tree, stack_trees, unpack_tree

S = TypeVar("S")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS trees (shelf TEXT, device INTEGER, tree BLOB,
    PRIMARY KEY (shelf, device)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshot (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
"""


class Store:
    """`path` None keeps everything in memory."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(path or ":memory:", isolation_level=None, timeout=10)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def _trouble(self, problem: sqlite3.Error) -> RunError:
        mend = "Free some space and run again with --resume" if "full" in str(problem) else ""
        return RunError(f"cannot keep the run: {problem}", str(self.path or "memory"), mend)

    def _do(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN")
            self._db.executemany(sql, rows)
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def _find(self, sql: str, *values: Any) -> list[Any]:
        try:
            return [row[0] for row in self._db.execute(sql, values)]
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def get(self, shelf: str, device: int) -> Tree | None:
        sql = "SELECT tree FROM trees WHERE shelf = ? AND device = ?"
        found = self._find(sql, shelf, int(device))
        return unpack_tree(found[0]) if found else None

    def put(self, shelf: str, ids: Sequence[int], tree: Tree, which: Iterable[int]) -> None:
        """Keep the slices `which` of a stacked tree, slice d under ids[d]."""
        rows = [(shelf, int(ids[d]), pack_tree(tree, d)) for d in which]
        self._do("INSERT OR REPLACE INTO trees VALUES (?, ?, ?)", rows)

    def ids(self, shelf: str) -> list[int]:
        return self._find("SELECT device FROM trees WHERE shelf = ? ORDER BY device", shelf)

    def save(self, name: str, value: bytes) -> None:
        self._do("INSERT OR REPLACE INTO snapshot VALUES (?, ?)", [(name, value)])

    def load(self, name: str) -> bytes | None:
        found = self._find("SELECT value FROM snapshot WHERE name = ?", name)
        return found[0] if found else None

    def commit(self) -> None:
        try:
            if self._db.in_transaction:
                self._db.execute("COMMIT")
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def close(self) -> None:
        self.rollback()
        self._db.close()


class Table:
    """What the cloud keeps for each device: device id -> tree, on the store's disk."""

    def __init__(self, store: Store, shelf: str = "cloud") -> None:
        self._store, self._shelf = store, shelf

    def get(self, ids: Sequence[int]) -> Tree:
        """What was kept for `ids`, stacked. Raises KeyError where nothing was."""
        found = [self._store.get(self._shelf, device) for device in ids]
        if None in found:
            raise KeyError(ids[found.index(None)])
        return stack_trees([tree for tree in found if tree is not None])

    def put(self, ids: Sequence[int], tree: Tree) -> None:
        """Keep slice d of a stacked tree under ids[d]."""
        self._store.put(self._shelf, ids, tree, range(len(ids)))

    def ids(self) -> list[int]:
        return self._store.ids(self._shelf)


def save_state(store: Store, state: Any) -> None:
    """A collaboration's state: a flat dataclass of trees and plain values."""
    plain: dict[str, Any] = {}
    for f in dataclasses.fields(state):
        value = getattr(state, f.name)
        if isinstance(value, Tree):
            store.save(f"state.{f.name}", pack_tree(Tree({k: a[None] for k, a in value.items()})))
        else:
            plain[f.name] = value
    store.save("state", json.dumps(plain).encode())


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
