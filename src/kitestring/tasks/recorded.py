"""A task from recorded answers: a CSV file of what a device's and a cloud's model said.

With it, request collaborations are compared on somebody's own logs, without either model.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np

from kitestring.errors import DataError
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.task import Array, Metric, Recorded
from kitestring.tasks.users import Columns, Split, Users, split_rows

REQUIRED = ("sample", "user", "device", "confidence", "cloud", "truth")
OPTIONAL = ("cost",)
THIRDS = (1 / 3, 1 / 3)  # nothing trains on recorded answers: more rows validate and test

_Lines = Sequence[tuple[int, Mapping[str, str]]]  # (line in the file, column -> cell)


def from_csv(path: str | PathLike[str], metric: Metric = accuracy, name: str = "") -> Recorded:
    """A task from a CSV with columns sample, user, device, confidence, cloud, truth and maybe cost.

    One line is one request; `device` and `cloud` are the two answers, `cost` dollars per cloud
    answer. Answers are numbers (a score, a value), or labels where a truth is not a number, or,
    under accuracy, not 0 or 1; labels become one-hot float32 [n, labels]."""
    path = Path(path)
    lines = _lines(path)
    classes = _classes(lines, metric)
    samples: dict[str, int] = {}
    rows: dict[str, list[int]] = {}
    for number, (line, cells) in enumerate(lines):
        first = samples.setdefault(cells["sample"], line)
        if first != line:
            what = f"sample {cells['sample']!r} is also on line {first}"
            raise DataError(what, f"{path}:{line}", "Give each sample once")
        rows.setdefault(cells["user"], []).append(number)
    for user, own in rows.items():
        if len(own) < 3:
            where = f"{path}:{lines[own[0]][0]}"
            mend = "A user needs at least 3: train, validation, test"
            raise DataError(f"user {user!r} has {len(own)} rows", where, mend)
    if classes is None:
        device, cloud, truth = (_numbers(path, lines, c) for c in ("device", "cloud", "truth"))
    else:
        device, cloud = (_one_hot(lines, c, classes) for c in ("device", "cloud"))
        truth = np.array([classes.index(cells["truth"]) for _, cells in lines])
    columns = {
        "x": np.arange(len(lines)),
        "y": truth,
        "device": device,
        "confidence": _numbers(path, lines, "confidence"),
    }
    own_rows = [np.array(own) for own in rows.values()]
    users = Users(list(rows), partial(_load, columns, own_rows), [], range(len(rows)))
    return Recorded(
        name=name or path.stem,
        users=users,
        cloud=cloud,
        metric=metric,
        cost=_numbers(path, lines, "cost") if "cost" in lines[0][1] else None,
        about=f"Recorded answers of a device's and a cloud's model to {len(lines)} requests of "
        f"{len(rows)} users, from {path.name}.",
        notes=("The answers were recorded: no model is trained or run.",),
    )


def _load(columns: Columns, rows: Sequence[Array], user: int) -> Mapping[Split, Columns]:
    own = rows[user]
    return split_rows({name: a[own] for name, a in columns.items()}, seed=user, shares=THIRDS)


def _lines(path: Path) -> _Lines:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            header = [str(column).strip() for column in reader.fieldnames or ()]
            reader.fieldnames = header
            _check_header(path, header)
            known = [c for c in header if c in REQUIRED + OPTIONAL]
            lines = []
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if None in cells or None in cells.values():
                    raise DataError(f"not {len(header)} cells", where, "Quote cells with commas")
                lines.append((reader.line_num, {c: cells[c].strip() for c in known}))
                for column in known:
                    if not cells[column].strip():
                        raise DataError(f"column {column!r} is empty", where, "Fill it in")
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", str(path)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not a CSV file in UTF-8: {error}", str(path)) from error
    if not lines:
        raise DataError("no rows", str(path), "Below the header, give one line per request")
    return lines


def _check_header(path: Path, header: Sequence[str]) -> None:
    for column in REQUIRED:
        if header.count(column) == 1:
            continue
        unused = [c for c in header if c not in REQUIRED]
        near = difflib.get_close_matches(column, unused, n=1, cutoff=0.5)
        hint = f"Is it {near[0]!r}? Rename it. " if near else ""
        what = f"no column {column!r}" if column not in header else f"two columns {column!r}"
        raise DataError(what, f"{path}:1", f"{hint}Columns: {', '.join(REQUIRED)}, maybe cost")


def _classes(lines: _Lines, metric: Metric) -> list[str] | None:
    """The labels in order, or None where answers are numbers."""
    try:
        truths = {float(cells["truth"]) for _, cells in lines}
    except ValueError:
        pass
    else:
        if metric != accuracy or any(np.isnan(list(truths))) or truths <= {0.0, 1.0}:
            return None
    return sorted({cells[c] for _, cells in lines for c in ("device", "cloud", "truth")})


def _one_hot(lines: _Lines, column: str, classes: Sequence[str]) -> Array:
    code = {label: i for i, label in enumerate(classes)}
    return np.eye(len(classes), dtype=np.float32)[[code[cells[column]] for _, cells in lines]]


def _numbers(path: Path, lines: _Lines, column: str) -> Array:
    values = np.empty(len(lines), np.float32)
    for number, (line, cells) in enumerate(lines):
        try:
            values[number] = float(cells[column])
        except ValueError:
            what = f"column {column!r} is not a number: {cells[column]!r}"
            raise DataError(what, f"{path}:{line}", "Give a number") from None
        if not np.isfinite(values[number]):
            what = f"column {column!r} is {cells[column]}"
            raise DataError(what, f"{path}:{line}", "Leave the row out, or give a finite number")
    return values
