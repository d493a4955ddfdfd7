"""Where a store's bytes lie: in a SQLite file or in memory. Of a transaction all is kept or none.

A transaction begins with the first write after a commit or a rollback, and is seen from inside.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from kitestring.errors import RunError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS trees (shelf TEXT, device INTEGER, tree BLOB,
    PRIMARY KEY (shelf, device)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS snapshot (name TEXT PRIMARY KEY, value BLOB) WITHOUT ROWID;
"""
Packed: TypeAlias = Callable[[], bytes]
"""Bytes that are made when they are needed, of something that does not change."""
_AT_ONCE = 500  # devices in one query: SQLite takes 999 values or more


class Kept(Protocol):
    """Bytes by shelf and device, and by name."""

    def find(self, shelf: str, devices: Sequence[int]) -> dict[int, bytes]: ...
    def put(self, shelf: str, trees: Mapping[int, bytes]) -> None: ...
    def devices(self, shelf: str) -> list[int]: ...
    def save(self, values: Mapping[str, Packed]) -> None: ...
    def load(self, name: str) -> bytes | None: ...
    def commit(self) -> None: ...
    def rollback(self) -> None: ...
    def close(self) -> None: ...


class Memory:
    """What was written since the last commit lies on top of what it left.

    Most of what is saved by name is replaced before anybody loads it, and never packed: but for the
    first time, so that what cannot be packed is told."""

    def __init__(self) -> None:
        self._under: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
        self._over: defaultdict[str, dict[int, bytes]] = defaultdict(dict)
        self._names: dict[str, Packed] = {}
        self._new_names: dict[str, Packed] = {}

    def find(self, shelf: str, devices: Sequence[int]) -> dict[int, bytes]:
        over, under = self._over[shelf], self._under[shelf]
        if not over and not under:
            return {}
        found = {i: over[i] if i in over else under.get(i) for i in devices}
        return {i: tree for i, tree in found.items() if tree is not None}

    def put(self, shelf: str, trees: Mapping[int, bytes]) -> None:
        self._over[shelf].update(trees)

    def devices(self, shelf: str) -> list[int]:
        return sorted(self._over[shelf].keys() | self._under[shelf].keys())

    def save(self, values: Mapping[str, Packed]) -> None:
        for name, packed in values.items():
            if name not in self._names:
                packed()
        self._new_names.update(values)

    def load(self, name: str) -> bytes | None:
        packed = self._new_names.get(name) or self._names.get(name)
        return packed() if packed else None

    def commit(self) -> None:
        for shelf, trees in self._over.items():
            self._under[shelf].update(trees)
        self._names.update(self._new_names)
        self.rollback()

    def rollback(self) -> None:
        self._over.clear()
        self._new_names.clear()

    def close(self) -> None:
        self.rollback()


class Disk:
    """One SQLite file. Its caller sees to it that only one thread at a time is here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._db = sqlite3.connect(
                path, isolation_level=None, timeout=10, check_same_thread=False
            )
            # Trees are kilobytes each and a round writes megabytes: more than SQLite's own pages
            # (4 KiB) and checkpoints (after 4 MB) are made for.
            self._db.execute("PRAGMA page_size=16384")
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA wal_autocheckpoint=2000")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def _trouble(self, problem: sqlite3.Error) -> RunError:
        mend = "Free some space and run again with --resume" if "full" in str(problem) else ""
        return RunError(f"cannot keep the run: {problem}", str(self._path), mend)

    def _read(self, sql: str, values: Sequence[Any]) -> list[Any]:
        try:
            return self._db.execute(sql, values).fetchall()
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def _write(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        try:
            if not self._db.in_transaction:
                self._db.execute("BEGIN")
            self._db.executemany(sql, rows)
        except sqlite3.Error as problem:
            raise self._trouble(problem) from None

    def find(self, shelf: str, devices: Sequence[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        for at in range(0, len(devices), _AT_ONCE):
            some = devices[at : at + _AT_ONCE]
            marks = ",".join("?" * len(some))
            sql = f"SELECT device, tree FROM trees WHERE shelf = ? AND device IN ({marks})"
            found.update(self._read(sql, (shelf, *some)))
        return found

    def put(self, shelf: str, trees: Mapping[int, bytes]) -> None:
        rows = [(shelf, device, tree) for device, tree in trees.items()]
        self._write("INSERT OR REPLACE INTO trees VALUES (?, ?, ?)", rows)

    def devices(self, shelf: str) -> list[int]:
        sql = "SELECT device FROM trees WHERE shelf = ? ORDER BY device"
        return [device for (device,) in self._read(sql, (shelf,))]

    def save(self, values: Mapping[str, Packed]) -> None:
        rows = [(name, packed()) for name, packed in values.items()]
        self._write("INSERT OR REPLACE INTO snapshot VALUES (?, ?)", rows)

    def load(self, name: str) -> bytes | None:
        found = self._read("SELECT value FROM snapshot WHERE name = ?", (name,))
        return found[0][0] if found else None

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
