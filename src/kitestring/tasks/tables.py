"""A task from one CSV file, without code: which column is the user, and which one to predict.

How columns become numbers:

- What is learned from the rows to prepare them (means, spreads, the values of a text column, the
  target's scale) is learned from the pool users' rows alone: a device's rows tell nobody anything
  before the comparison starts. Without a pool, each user's numbers are standardised by the user's
  own training rows, the values of text columns count as known beforehand, and a numeric target is
  left as it is.
- Numbers are standardised and cut at ±10; a missing one (or a text among numbers) is 0, and one
  more column says that it was missing. Text, and whole numbers of 3 to 10 values, become one
  column per value (the 32 most frequent) and one for all others.
- Dates, names and free text (nearly every row another value) are left out, and so is a column
  without a name. Each choice is said in the task's notes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from kitestring.errors import DataError, SettingError, unknown
from kitestring.tasks.metrics import accuracy, auc, rmse
from kitestring.tasks.sheet import MISSING, MOST, Sheet, read_sheet
from kitestring.tasks.task import Array, LossName, Metric, Plan, Task
from kitestring.tasks.users import SPLITS, Columns, Split, Users, deal, split_rows

if TYPE_CHECKING:
    from torch import nn

LEAST_ROWS, LEAST_USERS = 5, 4
FEW = 20  # distinct whole numbers that a target of classes may have
CODES = 10  # distinct whole numbers that a column of categories may have
VALUES = 32  # of a text column; the rarer ones share a column
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([ T].*)?")
_Parts = Sequence[Mapping[Split, Array]]  # user -> split -> rows of the table


@dataclass(frozen=True)
class Target:
    """y float32 or int64 [rows]; `outputs` 0: one number a row and not one logit per class."""

    loss: LossName
    y: Array
    outputs: int
    metric: Metric
    others: tuple[Metric, ...]
    note: str


def task_from_csv(
    path: str | PathLike[str],
    user: str,
    target: str,
    *,
    pool: float = 0.2,
    loss: LossName | None = None,
) -> Task:
    """Predict column `target` of a CSV file whose column `user` says whose row it is.

    Two distinct targets: "binary"; text, or at most 20 whole numbers: "cross_entropy"; else
    "squared". `loss` overrides that. A user with fewer than 5 rows is left out."""
    if loss is not None and loss not in get_args(LossName):
        raise unknown("loss", str(loss), get_args(LossName))
    sheet = read_sheet(path)
    at_user, at_target = sheet.column(user), sheet.column(target)
    if at_user == at_target:
        raise SettingError(f"column {user!r} is user and target", str(sheet.path), "Name another")
    sheet, own, left = _users(sheet, at_user)
    names, rows = list(own), list(own.values())
    pooled, devices = deal(len(names), pool)
    parts = [split_rows({"row": index}, seed=i) for i, index in enumerate(rows)]
    cuts: _Parts = [{s: part[s]["row"] for s in SPLITS} for part in parts]
    known = np.concatenate([rows[i] for i in pooled]) if pooled else None
    trained = [rows[i] for i in pooled] + [cuts[i]["train"] for i in devices]
    goal = _target(sheet, at_target, np.concatenate(trained), known, loss)
    x, notes = _inputs(sheet, {at_user, at_target}, cuts, known)
    return Task(
        name=sheet.path.stem,
        users=Users(names, partial(_load, x, goal.y, cuts), pooled, devices),
        small=partial(_small, x.shape[1], goal.outputs),
        large=partial(_large, x.shape[1], goal.outputs),
        metric=goal.metric,
        loss=goal.loss,
        others=goal.others,
        plan=Plan(optimiser="adam", lr=(0.001, 0.003, 0.01)),
        about=f"{sheet.path.name}: {len(sheet.rows):,} rows of {len(names):,} users ({user}), "
        f"each user a device. What is {target}?",
        request="one row",
        notes=(goal.note, *left, *notes),
    )


def _users(sheet: Sheet, place: int) -> tuple[Sheet, dict[str, Array], tuple[str, ...]]:
    """The sheet without users of too few rows, each user's rows of it, and a note on the others."""
    for i, cells in enumerate(sheet.rows):
        if not cells[place]:
            raise DataError(f"column {sheet.header[place]!r} is empty", sheet.at(i), "Fill it in")
    counts = Counter(cells[place] for cells in sheet.rows)
    kept = [i for i, cells in enumerate(sheet.rows) if counts[cells[place]] >= LEAST_ROWS]
    found: dict[str, list[int]] = {}
    for i, row in enumerate(kept):
        found.setdefault(sheet.rows[row][place], []).append(i)
    if len(found) < LEAST_USERS:
        what = f"{len(found)} of {len(counts)} users have {LEAST_ROWS} rows or more"
        mend = f"Bring at least {LEAST_USERS} such users, or choose another user column"
        raise DataError(what, f"{sheet.path}, column {sheet.header[place]!r}", mend)
    left = len(counts) - len(found)
    said = f"{left} of {len(counts)} users have fewer than {LEAST_ROWS} rows and are left out."
    rows, lines = [sheet.rows[i] for i in kept], [sheet.lines[i] for i in kept]
    own = {name: np.array(index) for name, index in found.items()}
    return replace(sheet, rows=rows, lines=lines), own, (said,) if left else ()


def _load(x: Array, y: Array, cuts: _Parts, user: int) -> Mapping[Split, Columns]:
    return {split: {"x": x[rows], "y": y[rows]} for split, rows in cuts[user].items()}


# The target


def _target(
    sheet: Sheet, place: int, trained: Array, known: Array | None, loss: LossName | None
) -> Target:
    cells, name = [row[place] for row in sheet.rows], sheet.header[place]
    where = f"{sheet.path}, column {name!r}"
    numbers = _target_numbers(sheet, cells, name)
    distinct = set(cells if numbers is None else numbers)
    if len(distinct) == 1:
        raise DataError(f"only one value: {cells[0]}", where, "Choose another target")
    whole = numbers is not None and all(v == round(v) for v in numbers)
    if loss is None:
        few = numbers is None or (whole and len(distinct) <= FEW)
        loss = "binary" if len(distinct) == 2 else "cross_entropy" if few else "squared"
    if loss == "squared":
        if numbers is None:
            raise DataError("text, not numbers", where, "squared needs numbers: leave loss out")
        return _regression(name, where, np.array(numbers), trained, known)
    if loss == "binary" and len(distinct) != 2:
        mend = "binary needs two: leave loss out"
        raise DataError(f"{len(distinct)} distinct values", where, mend)
    if len(distinct) > max(FEW, len(cells) // 10):
        kind = "values" if numbers is not None else "texts"
        mend = "Choose a target with fewer classes, or with numbers to predict"
        raise DataError(f"{len(distinct)} distinct {kind} in {len(cells)} rows", where, mend)
    return _classes(name, where, cells if numbers is None else numbers, trained, loss)


def _target_numbers(sheet: Sheet, cells: Sequence[str], name: str) -> list[float] | None:
    """The target as numbers; None where it is text."""
    numbers, text = [], []
    for i, cell in enumerate(cells):
        value = sheet.number(cell)
        if not cell or (value is not None and not abs(value) < MOST):
            what = f"column {name!r} is {cell or 'empty'}"
            raise DataError(what, sheet.at(i), "Leave the row out, or fill its target in")
        if value is None:
            text.append(i)
        else:
            numbers.append(value)
    if not text:
        return numbers
    # A number that went astray, or a class whose name happens to be a number?
    odd = all(cells[i].lower() in MISSING for i in text) or len(set(cells)) > FEW
    if odd and len(numbers) > len(text):
        what = f"column {name!r} is {cells[text[0]]!r} among {len(numbers)} numbers"
        raise DataError(what, sheet.at(text[0]), "Leave the row out, or give a number")
    return None


def _classes(
    name: str, where: str, truths: Sequence[str | float], trained: Array, loss: LossName
) -> Target:
    """Classes are those of the training rows: others cannot be learned, and get -1."""
    classes = sorted({truths[i] for i in trained})
    if len(classes) < 2:
        mend = "Bring more rows, or choose another target"
        raise DataError(f"only {classes[0]} in the training rows", where, mend)
    code = {label: i for i, label in enumerate(classes)}
    y = np.array([code.get(label, -1) for label in truths], np.int64)
    said = [f"{label:g}" if isinstance(label, float) else label for label in classes]
    unseen = int((y < 0).sum())
    never = f" {unseen} rows are of others and are never answered right." if unseen else ""
    if loss == "binary":
        note = f"Target {name} is binary: 1 is {said[1]}, 0 is {said[0]}."
        return Target(loss, y, 0, accuracy, (auc,), note)
    note = f"Target {name} is one of {len(said)} classes: {_listed(said)}.{never}"
    return Target(loss, y, len(said), accuracy, (), note)


def _regression(
    name: str, where: str, values: Array, trained: Array, known: Array | None
) -> Target:
    if known is None:
        # Scaling it would take a mean and a spread that only the devices know.
        if np.abs(values[trained]).max() > 10:
            mend = (
                "Without a pool the target is not scaled: bring it to about -1..1, or give a pool"
            )
            raise DataError("values beyond 10", where, mend)
        note = f"Target {name} is a number, left as it is."
        return Target("squared", values.astype(np.float32), 0, rmse, (), note)
    mean, spread = float(values[known].mean()), float(values[known].std()) or 1.0
    y = ((values - mean) / spread).astype(np.float32)
    metric = Metric(rmse.name, partial(_scaled, rmse.score, spread), False, unit="")
    note = (
        f"Target {name} is a number, trained in units of the pool's standard deviation "
        f"({spread:.4g}); the error is in {name}'s own unit."
    )
    return Target("squared", y, 0, metric, (), note)


def _scaled(
    score: Callable[[Array, Array], float], scale: float, answer: Array, truth: Array
) -> float:
    return scale * score(answer, truth)


# The inputs


def _inputs(
    sheet: Sheet, others: set[int], cuts: _Parts, known: Array | None
) -> tuple[Array, tuple[str, ...]]:
    """x float32 [rows, inputs], and notes on how it came about."""
    made: list[Array] = []
    kinds: dict[str, list[str]] = {}
    for place, name in enumerate(sheet.header):
        if place in others:
            continue
        kind, columns = _input(sheet, [row[place] for row in sheet.rows], cuts, known)
        kinds.setdefault(kind if name else "nameless", []).append(name)
        if name:
            made += columns
    if not made:
        what = "no column that can be used to predict"
        raise DataError(what, str(sheet.path), "Give columns of numbers or of categories")
    left = {kind: names for kind, names in kinds.items() if kind in _LEFT_OUT}
    notes = [f"Left out: {_listed(names)} ({_LEFT_OUT[kind]})." for kind, names in left.items()]
    if "category" in kinds:
        notes.append(f"Taken as categories: {_listed(kinds['category'])}.")
    if "number" in kinds:
        notes.append(f"Taken as numbers: {_listed(kinds['number'])}.")
    if known is None:
        notes.append(
            "Without a pool, each user's numbers are standardised by the user's own training rows"
            + (", and the categories count as known beforehand." if "category" in kinds else ".")
        )
    return np.stack(made, axis=1), tuple(notes)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


_Kind = Literal["number", "category", "date", "text", "constant"]
_LEFT_OUT = {
    "date": "dates",
    "text": "nearly every row another text",
    "constant": "one value only",
    "nameless": "a column without a name",
}


def _input(
    sheet: Sheet, cells: Sequence[str], cuts: _Parts, known: Array | None
) -> tuple[_Kind, list[Array]]:
    """What a column is, and its input columns float32 [rows]."""
    # What it is, a schema says before there are rows; only what its numbers are like must not leak.
    full = [cell for cell in cells if cell.lower() not in MISSING]
    distinct = set(full)
    if len(set(cells)) == 1 or not distinct:
        return "constant", []
    if all(_DATE.fullmatch(cell) for cell in distinct):
        return "date", []
    found = {cell: sheet.number(cell) for cell in distinct}
    numbers = {cell: v for cell, v in found.items() if v is not None and abs(v) < MOST}
    if len(numbers) > 0.9 * len(distinct):  # the odd text among numbers counts as missing
        codes = 2 < len(distinct) <= CODES and all(v == round(v) for v in numbers.values())
        if not codes:
            array = np.array([numbers.get(cell, np.nan) for cell in cells])
            return "number", _standardised(array, cuts, known)
    elif len(distinct) > VALUES and 2 * len(distinct) > len(full):
        return "text", []
    return "category", _one_hot(cells, known)


def _standardised(values: Array, cuts: _Parts, known: Array | None) -> list[Array]:
    gone = np.isnan(values)
    out = np.zeros(len(values), np.float32)
    if known is not None:
        out = _by(values[known], values)
    else:
        for cut in cuts:
            own = np.concatenate([cut[split] for split in SPLITS])
            out[own] = _by(values[cut["train"]], values[own])
    out[gone] = 0
    return [out, gone.astype(np.float32)] if gone.any() else [out]


def _by(sample: Array, values: Array) -> Array:
    """`values` in standard deviations of `sample` from its mean."""
    there = sample[~np.isnan(sample)]
    mean, spread = (there.mean(), there.std()) if len(there) else (0.0, 1.0)
    # One value, so no spread: the rounding of its mean is not one either.
    spread = spread if spread > 1e-9 * abs(mean) else 1.0
    return np.clip((values - mean) / spread, -10, 10).astype(np.float32)


def _one_hot(cells: Sequence[str], known: Array | None) -> list[Array]:
    seen = cells if known is None else [cells[i] for i in known]
    # The most frequent first; of equally frequent ones in the alphabet's order.
    ranked = sorted(Counter(seen).items(), key=lambda item: (-item[1], item[0]))
    values = [value for value, _ in ranked[:VALUES]]
    array = np.array(cells)
    columns = [(array == value).astype(np.float32) for value in values]
    return [*columns, (~np.isin(array, values)).astype(np.float32)]


# The models


def _small(inputs: int, outputs: int) -> nn.Module:
    from torch import nn

    model = nn.Sequential()
    model.add_module("front", nn.Sequential(nn.Linear(inputs, 24), nn.ReLU()))
    model.add_module("back", _last(24, outputs))
    return model


def _large(inputs: int, outputs: int) -> nn.Module:
    from torch import nn

    return nn.Sequential(
        nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), _last(256, outputs)
    )


def _last(width: int, outputs: int) -> nn.Module:
    from torch import nn

    if outputs:
        return nn.Linear(width, outputs)
    return nn.Sequential(nn.Linear(width, 1), nn.Flatten(0))
