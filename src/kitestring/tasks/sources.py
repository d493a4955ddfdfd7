"""Ways to bring data: arrays, one pair per user, a folder with one file per user, one CSV.

Users are dealt into pool and devices once, by `seed`; a user's rows are shuffled and cut into
train, validation and test by `seed` and the user's name: the same when other users come or go.
Floats become float32, integers and booleans int64; bytes (uint8) in x stay bytes, as images do.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kitestring.errors import DataError, SettingError
from kitestring.tasks.sheet import MOST, Sheet, read_sheet
from kitestring.tasks.task import Array
from kitestring.tasks.users import Columns, Split, Users, deal, split_rows

Pair: TypeAlias = tuple[Array, Array]
_LEAST = 3  # rows of a user: train, validation, test


@dataclass(frozen=True)
class Brought(Users):
    """Users, and what is to be known of how they were brought; a task's check repeats the notes."""

    notes: tuple[str, ...] = ()


def users_from_arrays(
    x: Any, y: Any, user: Any, *, pool: float = 0.2, seed: int = 0, min_rows: int | None = None
) -> Brought:
    """One array of each, row by row: x [n, ...], y [n, ...] and whose row it is, `user` [n].

    A user with fewer than 3 rows is an error; with `min_rows`, users with fewer are left out."""
    x, y = _pair((x, y), "the arrays")
    ids = np.asarray(user)
    if ids.shape != (len(y),):
        raise DataError(
            f"user has shape {ids.shape} for {len(y)} rows", "the arrays", "Give one id per row"
        )
    nobody = sum(i is None or i != i for i in ids.tolist())  # NaN is not equal to itself
    if nobody:
        raise DataError(f"{nobody} rows have no user", "the arrays", "Leave them out")
    labels, index = np.unique(ids.astype(str) if ids.dtype == object else ids, return_inverse=True)
    order = np.argsort(index, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(index))[:-1])
    names = [str(label) for label in labels.tolist()]
    kept, notes = _enough(names, [len(own) for own in rows], min_rows)
    take = partial(_of_rows, x, y, [rows[i] for i in kept])
    return _dealt([names[i] for i in kept], take, pool, seed, notes)


def users_from_dict(
    rows: Mapping[Any, tuple[Any, Any]],
    *,
    pool: float = 0.2,
    seed: int = 0,
    min_rows: int | None = None,
) -> Brought:
    """One pair (x, y) per user, under the user's name.

    A user with fewer than 3 rows is an error; with `min_rows`, users with fewer are left out."""
    names = [str(name) for name in rows]
    pairs = [_pair(pair, f"user {str(name)!r}") for name, pair in rows.items()]
    kept, notes = _enough(names, [len(y) for _, y in pairs], min_rows)
    take = [pairs[i] for i in kept].__getitem__
    return _dealt([names[i] for i in kept], take, pool, seed, notes)


def users_from_folder(
    path: str | PathLike[str],
    *,
    target: str = "",
    columns: Sequence[str] | None = None,
    classes: bool = True,
    pool: float = 0.2,
    seed: int = 0,
    min_rows: int | None = None,
) -> Brought:
    """One file per user, named like the user: `.npz` with arrays x and y, or `.csv` with numbers.

    Of a CSV, `target` is the column y (class numbers, or values with `classes=False`) and `columns`
    are those of x: all others by default, the same for all users. Files are read when their user
    is asked for; with `min_rows` each is also read once here, and who has fewer is left out."""
    folder = Path(path)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise DataError(what, str(folder), "Give the folder that holds one file per user")
    files = sorted(f for f in folder.iterdir() if f.suffix in (".npz", ".csv"))
    files = [f for f in files if not f.name.startswith(".")]
    if not files:
        mend = "Put one file per user there: NAME.npz with x and y, or NAME.csv"
        raise DataError("no .npz and no .csv files", str(folder), mend)
    names = [f.stem for f in files]
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"two files of user {name!r}", str(folder), "Keep one of them")
    if not target and any(f.suffix == ".csv" for f in files):
        raise SettingError("no target column named", str(folder), "CSV files need target=NAME")
    read = partial(_read_file, target, columns, classes)
    notes: tuple[str, ...] = ()
    if min_rows is not None:
        kept, notes = _enough(names, [len(read(f)[1]) for f in files], min_rows)
        names, files = [names[i] for i in kept], [files[i] for i in kept]
    return _dealt(names, partial(_of_files, read, files), pool, seed, notes)


def users_from_table(
    path: str | PathLike[str],
    user: str,
    target: str,
    *,
    columns: Sequence[str] | None = None,
    classes: bool = True,
    pool: float = 0.2,
    seed: int = 0,
    min_rows: int | None = None,
) -> Brought:
    """One CSV file of numbers, `user` the column that says whose row it is.

    `target` is the column y (class numbers, or values with `classes=False`) and `columns` are those
    of x: all others by default. For text, categories and missing values see `task_from_csv`."""
    sheet = read_sheet(path)
    place = sheet.column(user)
    if user == target:
        raise SettingError(f"column {user!r} is user and target", str(sheet.path), "Name another")
    x, y = _numbers_of(sheet, target, columns, classes, {user})
    ids = [row[place] for row in sheet.rows]
    for row, name in enumerate(ids):
        if not name:
            raise DataError(f"column {user!r} is empty", sheet.at(row), "Fill it in")
    return users_from_arrays(x, y, ids, pool=pool, seed=seed, min_rows=min_rows)


def _dealt(
    names: Sequence[str],
    take: Callable[[int], Pair],
    pool: float,
    seed: int,
    notes: tuple[str, ...],
) -> Brought:
    pooled, devices = deal(len(names), pool, seed)
    return Brought(names, partial(_load, names, take, seed), pooled, devices, notes)


def _load(
    names: Sequence[str], take: Callable[[int], Pair], seed: int, user: int
) -> Mapping[Split, Columns]:
    x, y = take(user)
    _enough([names[user]], [len(y)], None)
    return split_rows({"x": x, "y": y}, seed=seed << 32 | zlib.crc32(names[user].encode()))


def _of_rows(x: Array, y: Array, rows: Sequence[Array], user: int) -> Pair:
    return x[rows[user]], y[rows[user]]


def _of_files(read: Callable[[Path], Pair], files: Sequence[Path], user: int) -> Pair:
    return read(files[user])


def _enough(
    names: Sequence[str], counts: Sequence[int], min_rows: int | None
) -> tuple[list[int], tuple[str, ...]]:
    """Which users have rows enough, and a note on the others."""
    if min_rows is None:
        for name, count in zip(names, counts, strict=True):
            if count < _LEAST:
                what = f"{count} rows, a user needs {_LEAST} (train, validation, test)"
                mend = f"Drop the user, or leave small users out with min_rows={_LEAST}"
                raise DataError(what, f"user {name!r}", mend)
        min_rows = _LEAST
    if min_rows < _LEAST:
        raise SettingError(f"min_rows is {min_rows}", mend=f"Give {_LEAST} or more")
    kept = [i for i, count in enumerate(counts) if count >= min_rows]
    if not kept:
        raise DataError(f"no user has {min_rows} rows", mend="Bring more rows, or lower min_rows")
    left = len(counts) - len(kept)
    note = f"{left} of {len(counts)} users have fewer than {min_rows} rows and are left out."
    return kept, (note,) if left else ()


def _pair(pair: Any, where: str) -> Pair:
    try:
        x, y = pair
    except (TypeError, ValueError):
        raise DataError("not a pair (x, y)", where, "Give two arrays for each user") from None
    x, y = _column(x, "x", where), _column(y, "y", where)
    if len(x) != len(y):
        raise DataError(f"x has {len(x)} rows and y has {len(y)}", where, "Give one y per row of x")
    return x, y


def _column(values: Any, name: str, where: str) -> Array:
    try:
        array = np.asarray(values)
    except ValueError:
        what = f"{name} is ragged: its rows differ in length"
        raise DataError(what, where, "Pad the rows to one length") from None
    if array.ndim == 0:
        raise DataError(f"{name} is one value", where, "Give an array with one entry per row")
    if array.dtype.kind not in "fiub":
        what = f"{name} holds {array.dtype}, not numbers"
        raise DataError(what, where, "Encode it as numbers; classes as 0, 1, 2, ...")
    if array.dtype == np.uint8 and name == "x":
        return array
    with np.errstate(over="ignore"):  # what becomes infinite is told by the task's check
        return array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)


def _read_file(target: str, columns: Sequence[str] | None, classes: bool, path: Path) -> Pair:
    if path.suffix == ".csv":
        return _numbers_of(read_sheet(path), target, columns, classes, set())
    where = str(path)
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError("one array, not an archive", where, "Write it with np.savez(x=, y=)")
        with file:
            for name in ("x", "y"):
                if name not in file.files:
                    has = ", ".join(file.files) or "nothing"
                    what = f"no array {name!r}, it holds {has}"
                    raise DataError(what, where, "Write it with np.savez(path, x=..., y=...)")
            return _pair((file["x"], file["y"]), where)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as problem:
        said = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        what = f"cannot read the file: {said.splitlines()[0]}"
        raise DataError(what, where, "Write it anew with np.savez, numbers only") from None


def _numbers_of(
    sheet: Sheet, target: str, columns: Sequence[str] | None, classes: bool, others: set[str]
) -> Pair:
    """x float32 [n, columns] and y [n] of a sheet."""
    goal = sheet.column(target)
    names = [c for c in sheet.header if c and c != target and c not in others]
    places = [sheet.column(c) for c in (names if columns is None else columns)]
    if not places:
        raise DataError("no columns for x", str(sheet.path), "Give some beside the target")
    x = np.empty((len(sheet.rows), len(places)), np.float32)
    y = np.empty(len(sheet.rows), np.int64 if classes else np.float32)
    for i, cells in enumerate(sheet.rows):
        for k, place in enumerate(places):
            x[i, k] = _cell(sheet, i, place)
        value = _cell(sheet, i, goal)
        if classes and (value != round(value) or abs(value) > 2**31):
            what = f"column {target!r} is {cells[goal]}, not a class number"
            raise DataError(what, sheet.at(i), "Say classes=False if it is a value to predict")
        y[i] = value
    return x, y


def _cell(sheet: Sheet, row: int, place: int) -> float:
    value = sheet.number(sheet.rows[row][place])
    if value is None or not abs(value) < MOST:
        cell = sheet.rows[row][place] or "empty"
        what = f"column {sheet.header[place]!r} is {cell}, not a number"
        mend = "Name the columns of numbers with columns=, or try task_from_csv"
        raise DataError(what, sheet.at(row), mend)
    return value
