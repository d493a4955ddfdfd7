"""Recording: device code is run once on examples, and what it does with arrays becomes a plan.

The device half of a collaboration takes no branch on values, so the same steps serve every device.
They are seen through numpy's own protocols (NEP 13 and NEP 18): an `Example` stands for an array,
holds what that array would be for several devices with different numbers of rows, and notes each
function that it is given to. A size that is not the same for all of them is a value like others;
what would need a value while recording (an `if`, `int()`, `np.arange`) is refused by name.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from kitestring.core import Array, Devices, Fit, Recipe, Rows, Tree
from kitestring.errors import TaskError
from kitestring.package.plan import OPERATIONS, Plan, Step, given, numbers

_MOST = 65536  # numbers in a constant: what is larger belongs into a message
_OWN_SHAPES = ("initial", "fit", "backward")  # weights are as large as they are
_RENAMED = {"amax": "max", "amin": "min"}


@dataclass(frozen=True)
class Call:
    """A primitive that a plan calls, with examples of the columns and cotangents it was given."""

    primitive: str
    program: str
    columns: Mapping[str, Rows] = field(default_factory=dict)
    recipe: Recipe | None = None
    centre: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    cotangents: Mapping[str, Rows] = field(default_factory=dict)


class Recorder:
    """Notes the steps of one plan; all examples go through it together."""

    def __init__(self, name: str, devices: Sequence[Devices]) -> None:
        self.name, self.devices = name, devices
        self.steps: list[Step] = []
        self.calls: list[Call] = []
        self._made = 0

    def refuse(self, what: str, mend: str) -> TaskError:
        """The error, with the line of device code that it happened in."""
        ours = (__file__, np.__file__.rsplit("/", 1)[0])
        frames = [f for f in traceback.extract_stack() if not f.filename.startswith(ours)]
        at = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
        return TaskError(f"{what} ({at})", f"recording {self.name}", mend)

    def input(self, arrays: Sequence[Array]) -> Example:
        self._made += 1
        return Example(self, self._made - 1, arrays)

    def inputs(self, things: Sequence[Any]) -> Any:
        """Examples of the form of `things`: trees, rows and arrays, one for each device."""
        first = things[0]
        if isinstance(first, Rows):
            return Rows(self.input([t.values for t in things]), self.input([t.n for t in things]))
        if isinstance(first, Mapping):
            if any(t.keys() != first.keys() for t in things):
                names = sorted({k for t in things for k in t.keys() ^ first.keys()})
                mend = "Give every device the same leaves for the same verb"
                raise self.refuse(f"devices differ in {', '.join(names)}", mend)
            return Tree({k: self.inputs([t[k] for t in things]) for k in first})
        return self.input([np.asarray(t) for t in things])

    def given(self, thing: Any) -> Any:
        try:
            found = given(thing, lambda t: t.number if isinstance(t, Example) else None)
        except TypeError as problem:
            raise self.refuse(str(problem), "Use arrays, trees and rows") from None
        if isinstance(found, Mapping) and len(found.get("array", ())) > _MOST:
            raise self.refuse(f"a constant of {len(found['array'])} numbers", "Send it as a leaf")
        return found

    def step(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], results: Any) -> Any:
        """Note a step, of which `results` are what each example's device got."""
        out = self.inputs(results)
        if op == "fullest" or (op not in _OWN_SHAPES and _loose([*args, *kwargs.values()])):
            _loosen(out)
        noted = tuple(self.given(a) for a in args)
        named = {k: self.given(a) for k, a in kwargs.items()}
        self.steps.append(Step(op, noted, named, self.given(out)))
        return out

    def apply(self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """An operation on arrays."""
        f, results = OPERATIONS[op], []
        for i in range(len(self.devices)):
            with np.errstate(all="ignore"):
                results.append(f(*_of(args, i), **_of(kwargs, i)))
        return self.step(op, args, kwargs, results)

    def plan(self, inputs: Any, outputs: Any) -> Plan:
        """The steps that `outputs` need."""
        wanted, kept = set(numbers(self.given(outputs))), []
        for step in reversed(self.steps):
            if wanted.intersection(numbers(step.out)):
                wanted.update(numbers([*step.args, step.kwargs]))
                kept.append(step)
        needed = _needed(self.given(inputs), wanted)
        return Plan(self.name, needed, tuple(reversed(kept)), self.given(outputs))


def _needed(form: Any, wanted: set[int]) -> Any:
    """The form of the inputs without the leaves that nothing uses."""
    if "dict" not in form:
        return form
    parts = {k: part for k, part in form["dict"].items() if wanted.intersection(numbers(part))}
    return {"dict": {k: _needed(part, wanted) for k, part in parts.items()}}


def _examples(thing: Any) -> Iterator[Example]:
    if isinstance(thing, Example):
        yield thing
    elif isinstance(thing, Rows):
        yield from _examples([thing.values, thing.n])
    elif isinstance(thing, Mapping):
        yield from _examples(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for part in thing:
            yield from _examples(part)


def _loose(things: Any) -> bool:
    return any(e.loose for e in _examples(things))


def _loosen(things: Any) -> None:
    for e in _examples(things):
        e.loose = True


def _of(thing: Any, i: int) -> Any:
    """The i-th device's."""
    if isinstance(thing, Example):
        return thing.arrays[i]
    if isinstance(thing, Rows):
        return Rows(_of(thing.values, i), _of(thing.n, i))
    if isinstance(thing, Mapping):
        return Tree({k: _of(v, i) for k, v in thing.items()})
    if isinstance(thing, list | tuple):
        return type(thing)(_of(part, i) for part in thing)
    if isinstance(thing, slice):
        return slice(*(_of(p, i) for p in (thing.start, thing.stop, thing.step)))
    return thing


def _method(name: str) -> Any:
    def call(self: Example, *args: Any, **kwargs: Any) -> Any:
        return self._of.apply(name, (self, *args), kwargs)

    return call


def _no(what: str, mend: str) -> Any:
    def refuse(self: Example, *_: Any, **__: Any) -> Any:
        raise self._of.refuse(what, mend)

    return refuse


_VALUE = "device code needs a value that a plan cannot know: it has no branches and no loops"
_INSTEAD = "Use np.where, np.minimum, masks or np.ones_like instead"


class Example(NDArrayOperatorsMixin):
    """Stands for an array: what it would be for each example's device.

    `loose`: how large it is follows from values somewhere, so that examples which agree in a size
    prove nothing."""

    loose = False

    def __init__(self, of: Recorder, number: int, arrays: Sequence[Array]) -> None:
        self._of, self.number = of, number
        self.arrays = [np.asarray(a) for a in arrays]
        first = self.arrays[0]
        if any(a.dtype != first.dtype or a.ndim != first.ndim for a in self.arrays):
            raise of.refuse("devices differ in a dtype or in dimensions", "Make them the same")
        self.dtype, self.ndim = first.dtype, first.ndim

    @property
    def shape(self) -> tuple[Any, ...]:
        """Numbers, and values where devices differ."""
        return tuple(self._size(axis) for axis in range(self.ndim))

    def _size(self, axis: int) -> Any:
        sizes = [a.shape[axis] for a in self.arrays]
        if len(set(sizes)) == 1 and not (self.loose and axis):
            return int(sizes[0])
        return self._of.step("size", (self, axis), {}, [np.array(s) for s in sizes])

    @property
    def T(self) -> Any:
        return self._of.apply("transpose", (self,), {})

    def __len__(self) -> int:
        size = self.shape[0]
        if isinstance(size, Example):
            raise self._of.refuse(_VALUE, _INSTEAD)
        return int(size)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        if any(e.dtype == bool for e in _examples(index)):
            raise self._of.refuse("device code picks by a mask", "Use np.where, or Rows.keep")
        results = [a[_of(index, i)] for i, a in enumerate(self.arrays)]
        return self._of.step("index", (self, index), {}, results)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._of.refuse("device code assigns to a part of an array", "Use np.where")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **how: Any) -> Any:
        name = ufunc.__name__
        if method != "__call__" or how or name not in OPERATIONS:
            called = name if method == "__call__" and not how else f"{name}.{method} {how or ''}"
            raise self._of.refuse(f"no plan has {called.strip()}", self._known())
        return self._of.apply(name, inputs, {})

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        name = _RENAMED.get(func.__name__, func.__name__)
        if name not in OPERATIONS or kwargs.get("out") is not None:
            raise self._of.refuse(f"no plan has np.{func.__name__}", self._known())
        return self._of.apply(name, args, kwargs)

    def __record__(self, f: Callable[..., Any], args: Sequence[Any]) -> Any:
        return self._of.apply(f.__name__, args, {})

    def _known(self) -> str:
        return f"Known: {', '.join(OPERATIONS)}"

    def astype(self, dtype: Any, copy: bool = True) -> Any:
        if self.dtype == dtype:
            return self
        return self._of.apply("astype", (self, np.dtype(dtype).name), {})

    def copy(self) -> Example:
        return self

    def reshape(self, *shape: Any) -> Any:
        whole = shape[0] if len(shape) == 1 and isinstance(shape[0], list | tuple) else shape
        return self._of.apply("reshape", (self, tuple(whole)), {})

    def transpose(self, *axes: int) -> Any:
        whole = axes[0] if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes
        return self._of.apply("transpose", (self, tuple(whole) or None), {})

    all, any, sum, mean, prod = map(_method, ("all", "any", "sum", "mean", "prod"))
    min, max, std, var = map(_method, ("min", "max", "std", "var"))
    argmin, argmax, argsort = map(_method, ("argmin", "argmax", "argsort"))
    cumsum, clip, ravel, repeat = map(_method, ("cumsum", "clip", "ravel", "repeat"))
    squeeze, swapaxes, take = map(_method, ("squeeze", "swapaxes", "take"))
    __bool__ = __int__ = __float__ = __index__ = __array__ = item = tolist = _no(_VALUE, _INSTEAD)


class Recording:
    """`core.Devices` for device code that is being recorded."""

    def __init__(self, recorder: Recorder, data: Mapping[str, Rows], private: Tree) -> None:
        self._of, self.data, self.private = recorder, data, private

    def _each(
        self, op: str, args: Sequence[Any], kwargs: Mapping[str, Any], form: Callable[[Any], Any]
    ) -> Any:
        devices = enumerate(self._of.devices)
        found = [getattr(d, op)(*_of(args, i), **_of(kwargs, i)) for i, d in devices]
        noted = {k: asdict(a) if isinstance(a, Recipe) else a for k, a in kwargs.items()}
        return self._of.step(op, args, noted, [form(f) for f in found])

    def uniform(self, tag: str, n: int) -> Array:
        return self._each("uniform", (tag, n), {}, np.asarray)

    def initial(self, program: str) -> Tree:
        self._of.calls.append(Call("initial", program))
        return self._each("initial", (program,), {}, dict)  # type: ignore[no-any-return]

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree:
        self._of.calls.append(Call("predict", program, _of(inputs, 0)))
        return self._each("predict", (program, weights, dict(inputs)), {}, dict)  # type: ignore[no-any-return]

    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        tag: str = "fit",
    ) -> Fit:
        terms = tuple(centre or ()), tuple(linear or ())
        self._of.calls.append(Call("fit", program, _of(rows, 0), recipe, *terms))
        named = {"recipe": recipe, "centre": centre, "linear": linear, "tag": tag}
        found = self._each("fit", (program, weights, dict(rows)), named, _whole)
        return Fit(found["parameters"], found["loss"], found["steps"])

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        call = Call("backward", program, _of(rows, 0), cotangents=_of(cotangent or {}, 0))
        self._of.calls.append(call)
        named = {"cotangent": cotangent, "row_weights": row_weights}
        form: Callable[[Any], Any] = lambda f: dict(zip(("loss", "w", "x"), f, strict=True))  # noqa: E731
        found = self._each("backward", (program, weights, dict(rows)), named, form)
        return found["loss"], found["w"], found["x"]


def _whole(fit: Fit) -> dict[str, Any]:
    parameters = Tree({k: np.asarray(a) for k, a in fit.parameters.items()})
    return {"parameters": parameters, "loss": fit.loss, "steps": fit.steps}


def record(
    name: str,
    code: Callable[[Any, Devices], Any],
    devices: Sequence[Devices],
    given: Sequence[Mapping[str, Any]],
) -> tuple[Plan, list[Call]]:
    """The plan of `code(given, devices)`, and the primitives that it calls.

    `devices` are examples: sessions of one device each, with different numbers of rows; `given`
    what each of them is given. Raises `TaskError` for code that no plan can hold."""
    recorder = Recorder(name, devices)
    whole = [
        {**g, "own": Tree(d.data), "private": d.private}
        for g, d in zip(given, devices, strict=True)
    ]
    inputs = recorder.inputs(whole)
    here = Recording(recorder, inputs["own"], inputs["private"])
    outputs = code({k: inputs[k] for k in given[0]}, here)
    return recorder.plan(inputs, outputs), recorder.calls
