"""Plans: what a device's half does for one verb, as a list of steps. Data, not code.

A step names one of OPERATIONS or one of PRIMITIVES and says what it is given. What is given are
numbers, texts, lists and dictionaries of them, and JSON objects of one key:

{"$": 7}                                      value number 7, made by an input or a step before
{"rows": [values, n]}                         rows: the two values that make them
{"array": [...], "shape": [...], "dtype": ""} a small constant
{"slice": [start, stop, step]}                inside an index, as {"ellipsis": 0} is
{"dict": {...}}                               a dictionary: a tree, or columns
{"number": "inf"}                             what JSON has no number for

A plan has no branches, no loops and no names but those of the two tables, so a device that
interprets one runs nothing that its maker did not put there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from kitestring.arrays import fullest, real
from kitestring.core import Array, Devices, Fit, Recipe, Rows, Tree
from kitestring.errors import PackageError
from kitestring.package import sound

Given: TypeAlias = Any
"""What JSON can hold, as described above."""

_NUMPY = """
abs absolute add all amax amin any arctan argmax argmin argsort bitwise_and bitwise_or bitwise_xor
broadcast_to ceil clip concatenate cos count_nonzero cumprod cumsum diff divide dot einsum equal exp
expand_dims expm1 flip floor floor_divide fmax fmin full_like greater greater_equal invert isfinite
isinf isnan less less_equal log log1p logical_and logical_not logical_or logical_xor matmul max
maximum mean median min minimum mod moveaxis multiply nan_to_num negative not_equal ones_like outer
partition positive power prod ravel reciprocal remainder repeat reshape rint roll searchsorted sign
sin sort sqrt square squeeze stack std subtract sum swapaxes take take_along_axis tanh tensordot
tile transpose tril triu true_divide var where zeros_like
""".split()  # noqa: SIM905 - a list of 90 words reads worse


def _index(a: Array, index: Any) -> Array:
    return a[index]


def _astype(a: Array, dtype: str) -> Array:
    return a.astype(dtype, copy=False)


def _size(a: Array, axis: int) -> int:
    return int(a.shape[axis])


OPERATIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(np, name) for name in _NUMPY},
    "index": _index, "astype": _astype, "size": _size, "real": real, "fullest": fullest,
}  # fmt: skip
"""Arithmetic on arrays: numpy's functions of these names, and five of our own."""

PRIMITIVES = ("initial", "uniform", "predict", "fit", "backward")
"""What `core.Devices` offers."""

# What Python and numpy raise for arguments that make no sense.
_FAILURES = (
    *(TypeError, ValueError, LookupError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, RecursionError),
)


@dataclass(frozen=True)
class Step:
    """`out`: the numbers of the values that it makes, in the form that its result has."""

    op: str
    args: tuple[Given, ...]
    kwargs: Mapping[str, Given]
    out: Given


@dataclass(frozen=True)
class Plan:
    """`inputs` and `outputs` have the form of what goes in and comes out, with {"$": n} in it."""

    name: str
    inputs: Given
    steps: tuple[Step, ...]
    outputs: Given


def encode(plan: Plan) -> dict[str, Any]:
    """As JSON."""
    steps = [[s.op, list(s.args), dict(s.kwargs), s.out] for s in plan.steps]
    return {"name": plan.name, "inputs": plan.inputs, "steps": steps, "outputs": plan.outputs}


def decode(found: Mapping[str, Any]) -> Plan:
    """From JSON; refuses operations that this version does not know, and what is no plan, before
    any step runs."""
    try:
        steps = tuple(
            Step(op, tuple(args), kwargs, out) for op, args, kwargs, out in found["steps"]
        )
        plan = Plan(str(found["name"]), found["inputs"], steps, found["outputs"])
        for step in steps:
            if step.op not in OPERATIONS and step.op not in PRIMITIVES:
                mend = "It was made for a newer Kitestring: update the device"
                raise PackageError(f"unknown operation {step.op!r}", f"plan {plan.name}", mend)
        sound.check(plan.inputs, found["steps"], plan.outputs)
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        raise PackageError(f"a plan is not one ({problem})", mend="Pack it anew") from None
    return plan


def numbers(given: Given) -> list[int]:
    """Of the values that something given refers to."""
    if isinstance(given, Mapping):
        if "$" in given:
            return [given["$"]]
        return [n for part in given.values() for n in numbers(part)]
    return [n for part in given for n in numbers(part)] if isinstance(given, list) else []


def run(plan: Plan, inputs: Any, devices: Devices) -> Any:
    """What the plan makes of `inputs`, which have the form of `plan.inputs`.

    Raises `PackageError` where they have not, or a step fails."""
    where = f"plan {plan.name}"
    values: dict[int, Any] = {}
    _bind(plan.inputs, inputs, values, where, "input")
    last = {n: at for at, step in enumerate(plan.steps) for n in numbers([*step.args, step.kwargs])}
    kept = set(numbers(plan.outputs))
    for at, step in enumerate(plan.steps):
        try:
            args = [_value(a, values) for a in step.args]
            kwargs = {k: _value(a, values) for k, a in step.kwargs.items()}
            with np.errstate(all="ignore"):
                found = _called(step, args, kwargs, devices)
        except _FAILURES as problem:
            raise PackageError(f"step {at} ({step.op}) fails: {problem}", where) from None
        _bind(step.out, found, values, where, f"result of step {at}")
        for n in numbers([*step.args, step.kwargs]):
            if last[n] == at and n not in kept:
                values.pop(n, None)
    try:
        return _value(plan.outputs, values)
    except _FAILURES as problem:
        raise PackageError(f"its output fails: {problem}", where) from None


def _called(step: Step, args: list[Any], kwargs: dict[str, Any], devices: Devices) -> Any:
    if step.op in OPERATIONS:
        return OPERATIONS[step.op](*args, **kwargs)
    if "recipe" in kwargs:
        recipe = dict(kwargs.pop("recipe"))
        args.append(Recipe(**{**recipe, "train": tuple(recipe["train"])}))
    found = getattr(devices, step.op)(*args, **kwargs)
    if isinstance(found, Fit):
        return {"parameters": found.parameters, "loss": found.loss, "steps": found.steps}
    return dict(zip(("loss", "w", "x"), found, strict=True)) if step.op == "backward" else found


def _value(given: Given, values: Mapping[int, Any]) -> Any:
    """What is meant by something given."""
    if isinstance(given, list):
        return tuple(_value(part, values) for part in given)
    if not isinstance(given, Mapping):
        return given
    ((kind, of),) = [(k, v) for k, v in given.items() if k not in ("shape", "dtype")]
    if kind == "$":
        return values[of]
    if kind == "rows":
        return Rows(*_value(of, values))
    if kind == "array":
        return np.array(_value(of, values), given["dtype"]).reshape(given["shape"])
    if kind == "slice":
        return slice(*_value(of, values))
    if kind == "number":
        return float(of)
    return Tree({k: _value(part, values) for k, part in of.items()}) if kind == "dict" else ...


def given(thing: Any, number: Callable[[Any], int | None] = lambda _: None) -> Given:
    """The JSON for `thing`, the inverse of what a plan's interpreter does; `number` knows values.

    Raises `TypeError` for what has no form."""
    if (n := number(thing)) is not None:
        return {"$": n}
    if isinstance(thing, Rows):
        return {"rows": [given(thing.values, number), given(thing.n, number)]}
    if isinstance(thing, Mapping):
        return {"dict": {k: given(v, number) for k, v in thing.items()}}
    if isinstance(thing, list | tuple):
        return [given(part, number) for part in thing]
    if isinstance(thing, slice):
        return {"slice": [given(p, number) for p in (thing.start, thing.stop, thing.step)]}
    if thing is ...:
        return {"ellipsis": 0}
    if isinstance(thing, np.ndarray | np.generic):
        flat = [given(v) for v in np.asarray(thing).ravel().tolist()]
        return {"array": flat, "shape": list(np.shape(thing)), "dtype": str(thing.dtype)}
    if isinstance(thing, np.dtype | type) and thing not in (bool, int, float):
        return np.dtype(thing).name
    if isinstance(thing, float) and not math.isfinite(thing):
        return {"number": str(thing)}
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if thing in (bool, int, float):
        return np.dtype(thing).name
    raise TypeError(f"{type(thing).__name__} has no place in a plan")


def _bind(form: Given, found: Any, values: dict[int, Any], where: str, what: str) -> None:
    """Note the values of something that has this form."""
    if isinstance(form, list):
        if not isinstance(found, list | tuple) or len(found) != len(form):
            raise PackageError(f"{what} is not {len(form)} things", where)
        for i, (part, one) in enumerate(zip(form, found, strict=True)):
            _bind(part, one, values, where, f"{what}[{i}]")
    elif not isinstance(form, Mapping):
        return
    elif "$" in form:
        values[form["$"]] = found
    elif "rows" in form:
        if not isinstance(found, Rows):
            raise PackageError(f"{what} is not rows", where)
        _bind(form["rows"], [found.values, found.n], values, where, what)
    elif "dict" in form:
        wanted = form["dict"]
        if not isinstance(found, Mapping) or not found.keys() >= wanted.keys():
            there = ", ".join(found) if isinstance(found, Mapping) else type(found).__name__
            lacking = ", ".join(k for k in wanted if k not in there) or "nothing"
            raise PackageError(f"{what} lacks {lacking}: it has {there or 'nothing'}", where)
        for k, part in wanted.items():
            _bind(part, found[k], values, where, f"{what}.{k}")
