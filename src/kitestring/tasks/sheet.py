"""A CSV file as cells, with the line of each row, so that errors can say where."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from kitestring.errors import DataError, SettingError, unknown

MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""What stands for a missing value, in lower case."""
MOST = float(np.finfo(np.float32).max)
"""What is beyond would become infinite."""


@dataclass(frozen=True)
class Sheet:
    """Cells are text of one line, stripped; row i is on line `lines[i]` of the file."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    decimal_comma: bool  # as usual where cells are separated by semicolons

    def at(self, row: int) -> str:
        return f"{self.path}:{self.lines[row]}"

    def column(self, name: str) -> int:
        """The place of a column; the nearest name is suggested where there is none."""
        if name not in self.header:
            found = unknown("column", name, [c for c in self.header if c])
            raise SettingError(found.what, str(self.path), found.mend)
        return self.header.index(name)

    def number(self, cell: str) -> float | None:
        """None for what is not a number; NaN and infinity are numbers here."""
        if self.decimal_comma and "." not in cell:
            cell = cell.replace(",", ".")
        try:
            return None if "_" in cell else float(cell)  # Python itself reads 1_000
        except ValueError:
            return None


def read_sheet(path: str | PathLike[str]) -> Sheet:
    """Read a CSV file in UTF-8, with a header; separated by commas, semicolons or tabs."""
    path = Path(path)
    text = _text(path)
    try:
        heads = [next(csv.reader(io.StringIO(text, ""), delimiter=d), []) for d in ",;\t"]
        widths = [len(head) for head in heads]
        delimiter = ",;\t"[widths.index(max(widths))]
        reader = csv.reader(io.StringIO(text, ""), delimiter=delimiter, strict=True)
        header = [_line(cell) for cell in next(reader, [])]
        _check_header(path, header)
        rows, lines = [], []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                what = f"{len(cells)} cells, the header has {len(header)}"
                mend = f"Put a cell that holds {delimiter!r} in double quotes"
                raise DataError(what, f"{path}:{reader.line_num}", mend)
            rows.append([_line(cell) for cell in cells])
            lines.append(reader.line_num)
    except csv.Error as problem:
        raise DataError(f"not a CSV file: {problem}", str(path), "Export it as CSV") from None
    if not rows:
        raise DataError("a header, but no rows", str(path), "Give one line per row below it")
    return Sheet(path, header, rows, lines, delimiter == ";")


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as problem:
        what = f"cannot read the file: {problem.strerror}"
        raise DataError(what, str(path), "Check the path") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = raw.count(b"\n", 0, problem.start) + 1
        raise DataError("not UTF-8", f"{path}:{line}", "Save the file as CSV UTF-8") from None
    if not text.strip():
        raise DataError("the file is empty", str(path), "Give a header and one line per row")
    return text


def _line(cell: str) -> str:
    return " ".join(cell.split())


def _check_header(path: Path, header: list[str]) -> None:
    for name in header:
        # Columns without a name are row numbers of an export; nobody can ask for them.
        if name and header.count(name) > 1:
            raise DataError(f"two columns {name!r}", f"{path}:1", "Rename one of them")
