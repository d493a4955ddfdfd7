"""What a search has found so far, in its folder: killed at any moment, it goes on from there."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kitestring.comparison.compare import write_whole
from kitestring.comparison.order import Order
from kitestring.errors import RunError
from kitestring.exchange.store import Store

SETTINGS, FOUND, FRONT, MODELS = "settings.json", "study.sqlite", "front.json", "models"
_JUDGED = ("profile", "profile_file")  # what changes nothing that was found, as a budget does not


class Study:
    """Figures by name, as JSON: each is on the disk, whole, before `put` returns."""

    def __init__(self, folder: Path) -> None:
        self._store = Store(folder / FOUND)

    def get(self, name: str) -> Any:
        """None where it is not known yet."""
        found = self._store.load(name)
        return None if found is None else json.loads(found)

    def put(self, name: str, value: Any) -> None:
        self._store.save(name, json.dumps(value).encode())
        self._store.commit()

    def once(self, name: str, find: Callable[[], Any]) -> Any:
        """What is known under that name, found first if it is not."""
        known = self.get(name)
        if known is None:
            known = find()
            self.put(name, known)
        return known

    def close(self) -> None:
        self._store.close()


@contextmanager
def claimed(folder: Path, order: Order, resume: bool, fresh: bool) -> Iterator[Callable[[], Study]]:
    """The folder, for one search at a time. What is given clears it, unless the search goes on, and
    opens the study. A search that is not finished is not lost."""
    if resume and settings(folder) is None:
        raise RunError("nothing to resume", str(folder), "Run it without --resume")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(folder / "lock.sqlite", isolation_level=None, timeout=2)
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as problem:
        if problem.sqlite_errorcode != sqlite3.SQLITE_BUSY:
            raise _useless(folder, str(problem)) from None
        mend = "Wait for it, or give another --out"
        raise RunError("another search is running here", str(folder), mend) from None
    except OSError as problem:
        raise _useless(folder, str(problem.strerror)) from None
    opened: list[Study] = []
    try:
        _may(folder, order, resume, fresh)

        def begin() -> Study:
            (folder / FRONT).unlink(missing_ok=True)
            if not resume:
                for name in (FOUND, f"{FOUND}-wal", f"{FOUND}-shm"):
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(folder / MODELS, ignore_errors=True)
            write_whole(folder / SETTINGS, json.dumps(_plain(order), indent=1))
            (folder / MODELS).mkdir(exist_ok=True)
            opened.append(Study(folder))
            return opened[0]

        yield begin
    finally:
        for study in opened:
            study.close()
        lock.close()


def _useless(folder: Path, why: str) -> RunError:
    return RunError(f"cannot be used: {why}", str(folder), "Give another --out")


def _may(folder: Path, order: Order, resume: bool, fresh: bool) -> None:
    """Raises `RunError` where what is there is another search, or would be lost."""
    there = settings(folder)
    if resume:
        wanted = {k: v for k, v in _plain(order).items() if k not in _JUDGED}
        if odd := [k for k, v in wanted.items() if (there or {}).get(k) != v]:
            what = f"the search there differs in {', '.join(odd)}"
            raise RunError(what, str(folder), "Resume with its settings, or give --fresh")
    unfinished = there is not None and not (folder / FRONT).exists()
    if unfinished and not resume and not fresh:
        mend = "Go on with --resume, or start over with --fresh"
        raise RunError("an unfinished search is here", str(folder), mend)


def settings(folder: Path) -> dict[str, Any] | None:
    """Of the search in a folder; None where there is none."""
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _plain(order: Order) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(order)))
    return plain
