"""What a task gets wrong, told in one line each before anything is computed.

All users are walked once (of very many only some), one at a time; the models see a few rows of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitestring import units
from kitestring.compress.distil.objective import LOSSES
from kitestring.devices.fit.programs import Program, size_in_bytes
from kitestring.devices.profiles import Profile
from kitestring.errors import DataError, KitestringError, TaskError
from kitestring.tasks.programs import programs, split
from kitestring.tasks.task import Array, Metric, Recorded, Task
from kitestring.tasks.users import SPLITS, Columns, Split

_FEW = 8  # rows on which models, losses and metrics are tried
_MANY, _SOME = 10_000, 1_000  # users: of more than so many, so few are looked at
_REPLAYED = ("x", "y", "device", "confidence")


def validate(task: Task | Recorded) -> list[str]:
    """Refuse a task that cannot run, or would run and mean nothing; notes on the rest."""
    _check_who(task)
    outputs = _try_models(task) if isinstance(task, Task) else 0
    if isinstance(task, Recorded):
        _check_recorded(task)
    seen = _Seen(outputs)
    for user, pooled in _everybody(task):
        _check_user(task, user, pooled, seen)
    _check_classes(task, seen)
    return _notes(task, seen)


def fits(task: Task | Recorded, made: Mapping[str, Program], profile: Profile) -> None:
    """Refuse a small model that a device cannot train: weights and gradients, with Adam its two
    averages as well. What a batch takes beside them is not counted."""
    if isinstance(task, Recorded):
        return
    weights = size_in_bytes(made["small"].initial())
    adam = task.plan.optimiser == "adam"
    need = weights * (4 if adam else 2)
    if need > profile.memory:
        parts = "weights, gradients and Adam's averages" if adam else "weights and gradients"
        raise TaskError(
            f"the small model needs {units.size(need)} of {parts} ({need // weights} times "
            f"{units.size(weights)}), profile {profile.name} has {units.size(profile.memory)}",
            f"task {task.name}",
            "Make the small model smaller, or choose a profile with more memory",
        )


@dataclass
class _Seen:
    """What the walk has found so far."""

    outputs: int  # classes that the models tell apart; 0: not classes
    first: dict[str, tuple[tuple[int, ...], Any, str]] = field(default_factory=dict)
    trained: set[int] = field(default_factory=set)
    ignored: int = 0  # held-out truths below 0
    tests: list[int] = field(default_factory=list)  # rows of each device


def _everybody(task: Task | Recorded) -> Iterator[tuple[int, bool]]:
    yield from ((i, False) for i in _some(task.users.devices))
    yield from ((i, True) for i in _some(task.users.pool))


def _some(users: Sequence[int]) -> Sequence[int]:
    """All of them, or of very many a sample that reaches from the first to the last."""
    if len(users) <= _MANY:
        return users
    return [users[i] for i in np.linspace(0, len(users) - 1, _SOME).astype(int).tolist()]


def _looked_at_all(task: Task | Recorded) -> bool:
    return max(len(task.users.devices), len(task.users.pool)) <= _MANY


def _name(task: Task | Recorded, user: int) -> str:
    return f"user {task.users.names[user]!r}"


def _check_who(task: Task | Recorded) -> None:
    users, where = task.users, f"task {task.name}"
    if not len(users.devices):
        raise DataError("no device users", where, "Bring more users, or a smaller pool")
    known = range(len(users.names))
    strange = [i for i in (*_ends(users.devices), *_ends(users.pool)) if i not in known]
    if strange:
        what = f"user number {strange[0]} of {len(users.names)} users"
        raise DataError(what, where, "pool and devices are indices into names")
    twice = _twice(users.devices, users.pool)
    if twice:
        what = f"{twice} users twice in pool and devices"
        raise DataError(what, where, "Put each into one of them: their rows would leak")


def _ends(users: Sequence[int]) -> Sequence[int]:
    """Between the ends of a range there is nothing else."""
    return [*users[:1], *users[-1:]] if isinstance(users, range) else users


def _twice(one: Sequence[int], other: Sequence[int]) -> int:
    """How many are in both, or in one of them again; a range is not walked, unless both are."""
    if len(one) < len(other) or not isinstance(one, range):
        one, other = other, one
    if not isinstance(one, range):
        return len(one) + len(other) - len({*one, *other})
    once = other if isinstance(other, range) else set(other)
    return sum(i in one for i in once) + len(other) - len(once)


# One user's rows


def _loaded(task: Task | Recorded, user: int) -> Mapping[Split, Columns]:
    where = _name(task, user)
    try:
        rows = task.users.load(user)
    except KitestringError:
        raise
    except Exception as problem:
        what = f"load() failed with {type(problem).__name__}: {_line(problem)}"
        raise DataError(what, where, "Mend the users' load(), or this user's file") from problem
    wanted = ("x", "y") if isinstance(task, Task) else _REPLAYED
    for part in SPLITS:
        if part not in rows:
            raise DataError(f"no {part} rows", where, f"load() gives {', '.join(SPLITS)}")
        for column in wanted:
            if column not in rows[part]:
                has = ", ".join(rows[part]) or "nothing"
                mend = f"Columns: {', '.join(wanted)}"
                raise DataError(f"no column {column!r} (but {has})", f"{where}, {part}", mend)
        for column, values in rows[part].items():
            if not isinstance(values, np.ndarray) or not values.ndim:
                what = f"not an array but {type(values).__name__}"
                raise DataError(what, f"{where}, {part}, column {column!r}", "Use np.asarray")
            if values.dtype.kind not in "fiub":
                what = f"holds {values.dtype}, not numbers"
                raise DataError(what, f"{where}, {part}, column {column!r}", "Encode it as numbers")
    return rows


def _check_user(task: Task | Recorded, user: int, pooled: bool, seen: _Seen) -> None:
    rows, name = _loaded(task, user), _name(task, user)
    counts = {part: len(rows[part]["y"]) for part in SPLITS}
    for part in SPLITS:
        spared = pooled or (part == "train" and isinstance(task, Recorded))
        if not counts[part] and not spared:
            mend = "Leave the user out, or cut the rows anew"
            raise DataError(f"no rows in {part}", name, mend)
        _check_columns(rows[part], seen, name, f"{name}, {part}")
        if isinstance(task, Recorded):
            _check_replay(task, rows[part], f"{name}, {part}")
        else:
            _check_truths(task, rows[part]["y"], f"{name}, {part}, column 'y'", seen)
            if task.loss == "cross_entropy" and (pooled or part == "train"):
                seen.trained |= set(np.unique(rows[part]["y"]).tolist())
            elif task.loss == "cross_entropy":
                seen.ignored += int((_asked(task, rows[part]["y"]) < 0).sum())
    if not sum(counts.values()):
        raise DataError("no rows", name, "Leave the user out")
    if not pooled:
        seen.tests.append(counts["test"])


def _check_columns(columns: Columns, seen: _Seen, name: str, where: str) -> None:
    if seen.first and columns.keys() != seen.first.keys():
        odd = sorted(columns.keys() ^ seen.first.keys())
        what = f"not everybody has the columns {', '.join(odd)}"
        raise DataError(what, where, "Give all users and splits the same columns")
    for column, values in columns.items():
        if len(values) != len(columns["y"]):
            what = f"{column} has {len(values)} rows and y has {len(columns['y'])}"
            raise DataError(what, where, "Give one y per row of x")
        at = f"{where}, column {column!r}"
        shape, dtype, other = seen.first.setdefault(column, (values.shape[1:], values.dtype, name))
        if values.shape[1:] != shape:
            what = f"rows of shape {values.shape[1:]}, those of {other} have {shape}"
            raise DataError(what, at, "Pad or crop them to one shape")
        if values.dtype != dtype:
            what = f"{values.dtype}, and {dtype} for {other}"
            raise DataError(what, at, f"Convert it with .astype(np.{dtype})")
        if values.dtype.kind == "f":
            bad = int((~np.isfinite(values)).sum())
            if bad:
                mend = "Fill them in, or leave the rows out"
                raise DataError(f"{bad} values are NaN or infinite", at, mend)


def _check_truths(task: Task, y: Array, at: str, seen: _Seen) -> None:
    if task.loss == "cross_entropy" and y.size:
        if y.dtype != np.int64:
            mend = "Number the classes 0, 1, 2, ... and convert with .astype(np.int64)"
            raise DataError(f"{y.dtype}, and cross_entropy needs int64", at, mend)
        if y.max() >= seen.outputs:
            what = f"class {y.max()}, and the models tell 0 to {seen.outputs - 1} apart"
            mend = "Number the classes from 0, or give the models more outputs"
            raise DataError(what, at, mend)
    if task.loss == "binary" and not np.isin(y, (0, 1)).all():
        odd = y[~np.isin(y, (0, 1))][0]
        raise DataError(f"holds {odd}, and binary needs 0 or 1", at, "Use 1 for yes and 0 for no")


def _check_classes(task: Task | Recorded, seen: _Seen) -> None:
    if not isinstance(task, Task) or task.loss != "cross_entropy" or task.asks != "row":
        return  # of long sequences' vocabularies, some tokens may well be in no row
    if not _looked_at_all(task):
        return
    never = [c for c in range(seen.outputs) if c not in seen.trained]
    if never:
        listed = ", ".join(map(str, never[:5])) + (", ..." if len(never) > 5 else "")
        what = f"nobody has training rows of class {listed}, of the models' {seen.outputs}"
        mend = "Number the classes from 0 without gaps, take more users, or fewer outputs"
        raise DataError(what, f"task {task.name}, column 'y'", mend)


# Models, losses and metrics, on a few rows


def _try_models(task: Task) -> int:
    """Run everything once on one user's rows; the number of classes, 0 without classes."""
    user = task.users.devices[0]
    rows, name = _loaded(task, user)["train"], _name(task, user)
    _check_columns(rows, _Seen(0), name, f"{name}, train")
    if not len(rows["y"]):
        raise DataError("no rows in train", name, "Leave the user out, or cut the rows anew")
    # Twice, so that it is more than one row, and a mean over rows shows.
    some = {c: np.concatenate([rows[c][:_FEW]] * 2) for c in ("x", "y")}
    made = programs(task, 0, some["x"])
    x, y = torch.from_numpy(some["x"]), torch.from_numpy(some["y"])
    out = {which: _output(made[which], x) for which in ("small", "large")}
    _check_halves(task, x)
    for which in out:
        _check_output(task, which, out[which], y)
    if "server" in made:
        h = _output(made["front"], x, "h")
        try:
            out["server's"] = made["server"].evaluating({"h": h})["out"].detach()
        except (RuntimeError, ValueError, TypeError, IndexError) as problem:
            what = f"the server fails on features {_shape(h)}: {_line(problem)}"
            raise TaskError(what, f"task {task.name}", "Let it begin where front ends") from None
    for which, found in out.items():
        if found.shape != out["small"].shape:
            raise TaskError(
                f"the {which} output is {_shape(found)} and the small {_shape(out['small'])}",
                f"task {task.name}",
                "Let all models give the same: they answer the same requests",
            )
    _check_loss(task, out["small"], y)
    answer = out["small"][:, -1] if task.asks == "last" else out["small"]
    for metric in (task.metric, *task.others):
        _check_metric(task, metric, answer.numpy(), _asked(task, y.numpy()))
    return int(out["small"].shape[-1]) if task.loss == "cross_entropy" else 0


def _output(program: Program, x: Tensor, name: str = "out") -> Tensor:
    with torch.no_grad():
        found: Tensor = program.evaluating({"x": x})[name]
    return found


def _check_halves(task: Task, x: Tensor) -> None:
    """Collaborations compute back(front(x)): that must be what the model itself computes."""
    whole = task.small().eval()
    front, back = split(whole)
    if front is None:
        return
    try:
        with torch.no_grad():
            same = torch.allclose(whole(x), back(front(x)), rtol=1e-3, atol=1e-4)
    except (RuntimeError, ValueError, TypeError, IndexError):
        same = False
    if not same:
        what = "the small model is not back(front(x))"
        mend = "Do everything in these two children, or name them otherwise"
        raise TaskError(what, f"task {task.name}", mend)


def _check_output(task: Task, which: str, out: Tensor, y: Tensor) -> None:
    where = f"task {task.name}"
    what = f"the {which} model gives {_shape(out)} for y {_shape(y)}"
    if task.asks == "last" and out.ndim < (3 if task.loss == "cross_entropy" else 2):
        raise TaskError(
            f'asks="last", but the {which} model gives {_shape(out)}', where,
            "Give an output for each position, [n, length, ...]",
        )  # fmt: skip
    if not isinstance(task.loss, str):
        return
    if task.loss == "cross_entropy":
        if out.ndim > 1 and out.shape[:-1] == y.shape:
            return
        squeeze = y.shape == (*out.shape[:-1], 1)
        mend = "Squeeze y to [n]" if squeeze else "Give logits [n, classes] for y [n]"
        raise TaskError(f"{what}, cross_entropy needs one logit per class", where, mend)
    if out.shape == y.shape and (task.loss == "squared" or out.ndim == 1):
        return
    mend = "Give one output for each y, of the same shape"
    if out.shape == (*y.shape, 1):
        mend = "Squeeze the output: end the model with nn.Flatten(0)"
    elif y.shape == (*out.shape, 1):
        mend = "Squeeze y to [n]: y[:, 0]"
    raise TaskError(f"{what}, {task.loss} needs one for one", where, mend)


def _check_loss(task: Task, out: Tensor, y: Tensor) -> None:
    loss = LOSSES[task.loss] if isinstance(task.loss, str) else task.loss
    where = f"task {task.name}"
    if task.loss == "cross_entropy" and (y.dtype != torch.int64 or int(y.max()) >= out.shape[-1]):
        return  # said of the user who has it, in the walk
    try:
        each = loss(out, y)
    except Exception as problem:  # whatever somebody's own function raises
        what = f"the loss fails on outputs {_shape(out)} and y {_shape(y)}: {_line(problem)}"
        raise TaskError(what, where, "It takes (outputs, y) and returns one loss per row") from None
    if not isinstance(each, Tensor) or each.shape != (len(y),) or not each.is_floating_point():
        got = f"{_shape(each)} {each.dtype}" if isinstance(each, Tensor) else type(each).__name__
        mend = 'Return one loss per row, [n]: reduction="none", then a mean over all but rows'
        raise TaskError(f"the loss gives {got} for {len(y)} rows", where, mend)


def _check_metric(task: Task | Recorded, metric: Metric, answer: Array, truth: Array) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so few rows a mean may be undefined
            float(metric.score(answer, truth))
    except Exception as problem:
        what = f"metric {metric.name} fails on answers {_shape(answer)} and y {_shape(truth)}"
        mend = "It takes (answers, y) of one user and returns a number"
        raise TaskError(f"{what}: {_line(problem)}", f"task {task.name}", mend) from None


def _asked(task: Task | Recorded, y: Array) -> Array:
    return y[:, -1] if isinstance(task, Task) and task.asks == "last" and y.ndim > 1 else y


def _shape(array: Tensor | Array) -> str:
    return f"[{', '.join(['n', *map(str, array.shape[1:])])}]" if array.ndim else "one value"


def _line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0][:160] if lines else type(problem).__name__


# Recorded answers


def _check_recorded(task: Recorded) -> None:
    where = f"task {task.name}"
    if not np.isfinite(task.cloud).all():
        raise DataError("NaN or infinity in the cloud's answers", where, "Leave those samples out")
    if task.cost is not None:
        if task.cost.shape != task.cloud.shape[:1]:
            what = f"{len(task.cost)} costs of {len(task.cloud)} answers of the cloud"
            raise DataError(what, where, "Give one cost per sample, or none at all")
        if not (np.isfinite(task.cost).all() and (task.cost >= 0).all()):
            raise DataError("costs below 0 or not finite", where, "Give dollars")
    user = task.users.devices[0]
    rows = _loaded(task, user)["test"]
    for metric in (task.metric, *task.others):
        if len(rows["y"]):
            _check_metric(task, metric, rows["device"][:_FEW], rows["y"][:_FEW])


def _check_replay(task: Recorded, rows: Columns, where: str) -> None:
    x, device, sure = rows["x"], rows["device"], rows["confidence"]
    if x.dtype != np.int64 or x.ndim != 1:
        what = f"{x.dtype} {_shape(x)}, not sample numbers"
        raise DataError(what, f"{where}, column 'x'", "Give int64 [n]")
    if len(x) and not 0 <= x.min() <= x.max() < len(task.cloud):
        odd = x.min() if x.min() < 0 else x.max()
        what = f"sample {odd}, and the cloud has answers to 0 to {len(task.cloud) - 1}"
        raise DataError(what, f"{where}, column 'x'", "Number the samples as cloud does")
    if device.shape[1:] != task.cloud.shape[1:]:
        what = f"answers of shape {device.shape[1:]}, the cloud's have {task.cloud.shape[1:]}"
        raise DataError(what, f"{where}, column 'device'", "Record both in one form")
    if device.dtype != task.cloud.dtype:
        what = f"{device.dtype}, and {task.cloud.dtype} for the cloud"
        raise DataError(what, f"{where}, column 'device'", "Record both in one form")
    if sure.ndim != 1 or sure.dtype.kind != "f":
        what = f"{sure.dtype} {_shape(sure)}"
        raise DataError(what, f"{where}, column 'confidence'", "Give float32 [n]")
    if len(sure) and not 0 <= sure.min() <= sure.max() <= 1:
        odd = sure.min() if sure.min() < 0 else sure.max()
        mend = "Rescale it to [0, 1], for instance by rank"
        what = f"a confidence of {odd:g} is not in [0, 1]"
        raise DataError(what, f"{where}, column 'confidence'", mend)


def _notes(task: Task | Recorded, seen: _Seen) -> list[str]:
    notes: Sequence[str] = getattr(task.users, "notes", ())
    found = [note for note in notes if note not in task.notes]
    if isinstance(task, Task) and not task.users.pool:
        found.append("No pool: the cloud has no rows, and what needs them is left out.")
    if seen.ignored:
        found.append(f"{seen.ignored} held-out truths are below 0 and are never answered right.")
    if len(seen.tests) < 10:
        found.append(f"Only {len(seen.tests)} device users: figures per user say little.")
    if not _looked_at_all(task):
        found.append(f"Of so many users only {_SOME:,} were looked at, from the first to the last.")
    if np.median(seen.tests) < 5:
        found.append(
            "Half of the users or more have fewer than 5 test rows: their scores are coarse."
        )
    return found
