"""Compiled training and evaluation of stacked devices: numpy arrays in, numpy arrays out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeVar

import numpy as np

from kitestring.core import Array, Fit, Recipe, Rows, Touched, Tree
from kitestring.devices.fit.check_native import batch, shared
from kitestring.devices.fit.compiled import evaluate, train
from kitestring.devices.fit.compiled.build import uncollected
from kitestring.devices.fit.compiled.layout import Kind
from kitestring.devices.fit.compiled.tensors import Columns
from kitestring.devices.fit.compiled.views import SIZES, Buffer, Refused
from kitestring.devices.fit.programs import Program
from kitestring.devices.fit.stopwatch import Stopwatch
from kitestring.errors import TaskError

T = TypeVar("T")
_NUMPY = {
    "f32": np.dtype(np.float32), "i64": np.dtype(np.int64), "i32": np.dtype(np.int32),
    "u8": np.dtype(np.uint8), "bool": np.dtype(np.bool_),
}  # fmt: skip
_SHORT = {dtype: short for short, dtype in _NUMPY.items()}


class Code:
    """What has been compiled of some programs, or why it was refused. `watch` sees how long."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._made: dict[Any, Any] = {}
        self._lock = threading.RLock()

    def _get(self, key: Any, make: Callable[[], T]) -> T:
        with self._lock:
            if key not in self._made:
                try:
                    with self._watch, uncollected():
                        self._made[key] = make()
                except Refused as why:
                    self._made[key] = why
            found = self._made[key]
        if isinstance(found, Refused):
            raise found
        return found  # type: ignore[no-any-return]

    def fit(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], recipe: Recipe, *,
        centre: Tree | None = None, linear: Tree | None = None, seeds: Array,
    ) -> Fit:  # fmt: skip
        """As `sequential.fit`. Raises `Refused`."""
        n = np.ascontiguousarray(next(iter(rows.values())).n, np.int64)
        most = int(n.max(initial=1))
        if centre is not None and not set(program.chosen(recipe.train)) <= centre.keys():
            raise Refused("a centre for only some of the weights")
        once = shared(weights) and any(
            prod(weights[k].shape[1:]) >= train.LARGE for k in program.chosen(recipe.train)
        )  # it matters for large tables only
        kind = Kind(
            batch(n, recipe.batch), _columns(rows), frozenset(program.chosen(recipe.train)),
            recipe.optimiser, recipe.momentum > 0, recipe.decay > 0, recipe.clip is not None,
            recipe.mu > 0, linear is not None, once,
        )  # fmt: skip
        made = self._get((program, kind), lambda: train.trainer(program, kind))
        layout, memory = made.layout, made.native.memory()
        settings = (recipe.lr, -recipe.lr, recipe.momentum, recipe.decay, recipe.mu,
                    recipe.clip or 0.0)  # fmt: skip
        _at(memory, layout.hyper)[:] = settings
        losses = np.zeros(len(n), np.float32)
        order = np.empty(2 * most + 256, np.int64)
        keys = np.ascontiguousarray(seeds, np.uint64)
        call = _Call()
        call.numbers(len(n), recipe.epochs, int(recipe.shuffle))
        call.arrays(memory, n, keys, losses, order)
        call.columns(rows, kind.columns)
        names = [name for name in layout.trained if name not in layout.tables]
        out, tables = Tree(weights), {}
        for name in layout.tables:
            tables[name] = _Touches(weights[name], n, rows)
            call.arrays(*tables[name].arrays)
        for name in names:
            out[name] = np.empty((len(n), *weights[name].shape[1:]), np.float32)
            call.weight(weights[name])
            call.arrays(out[name])
        for name in layout.held:
            call.weight(weights[name])
        extra = [weights if centre is None else {**weights, **centre}] if kind.mu else []
        if linear is not None:
            zero = {k: np.zeros((1, *weights[k].shape[1:]), np.float32) for k in names}
            extra.append({**zero, **linear})
        for tree in extra:
            for name in names:
                call.weight(tree[name])
        made.native(call.given)
        _in_range(program, memory, made.wrong)
        out.update({name: touches.array() for name, touches in tables.items()})
        return Fit(out, losses, -(-n // recipe.batch) * recipe.epochs)

    def predict(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], block: int
    ) -> dict[str, Array]:
        """Outputs [D, L, ...], zero where there is no row. Raises `Refused`.

        `block` rows at a time; where all devices have the same weights their rows are those of
        one."""
        n = np.asarray(next(iter(rows.values())).n)
        if len(n) == 1 or not n.any() or not shared(weights):
            return self._evaluate(program, weights, rows, block, False, ())[0]
        real = next(iter(rows.values())).mask()
        one = Tree({k: a[:1] for k, a in weights.items()})
        every = {k: _end_to_end(r, n) for k, r in rows.items()}
        found, _ = self._evaluate(program, one, every, block, False, ())
        out = {k: np.zeros((*real.shape, *v.shape[2:]), v.dtype) for k, v in found.items()}
        for k, v in found.items():
            out[k][real] = v[0]
        return out

    def backward(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows],
        cotangent: Mapping[str, Rows] | None, row_weights: Rows, block: int,
    ) -> tuple[Array, dict[str, Array], dict[str, Array]]:  # fmt: skip
        """As `sequential.backward`. Raises `Refused`."""
        every = dict(rows)
        if cotangent is None:
            every["share"] = row_weights
        else:
            every.update({f"by:{k}": r for k, r in cotangent.items()})
        found, sums = self._evaluate(program, weights, every, block, True, tuple(cotangent or ()))
        d_weights = {k[2:]: v for k, v in sums.items() if k.startswith("w:")}
        return sums["loss"], d_weights, {k[2:]: v for k, v in found.items()}

    def _evaluate(
        self, program: Program, weights: Tree, rows: Mapping[str, Rows], block: int, slopes: bool,
        cotangents: tuple[str, ...],
    ) -> tuple[dict[str, Array], dict[str, Array]]:  # fmt: skip
        n = np.ascontiguousarray(next(iter(rows.values())).n, np.int64)
        wide = next(iter(rows.values())).shape[1]
        kind = evaluate.Kind(block, _columns(rows), slopes, cotangents)
        made = self._get((program, kind), lambda: evaluate.evaluator(program, kind))
        found = {name: np.zeros((len(n), wide, *shape), _NUMPY[t]) for name, shape, t in made.rows}
        sums = {name: np.zeros((len(n), *shape), _NUMPY[t]) for name, shape, t in made.sums}
        call = _Call()
        call.numbers(len(n))
        memory = made.native.memory()
        call.arrays(memory, n)
        call.numbers(wide)
        call.columns(rows, kind.columns)
        for name in made.weights:
            call.weight(weights[name])
        call.arrays(*found.values(), *sums.values())
        made.native(call.given)
        _in_range(program, memory, made.wrong)
        return found, sums


def _end_to_end(rows: Rows, n: Array) -> Rows:
    """All devices' rows as one's."""
    flat, start = rows.flat
    ends = np.cumsum(n)
    if not np.array_equal(start[n > 0], (start[0] + ends - n)[n > 0]):
        flat = flat[np.repeat(start - ends + n, n) + np.arange(ends[-1])]
        start = np.zeros(1, np.int64)
    return Rows.lying(flat, start[:1], ends[-1:])


def _columns(rows: Mapping[str, Rows]) -> Columns:
    out = []
    for name, r in sorted(rows.items()):
        shape, dtype = r.row
        if dtype not in _SHORT:
            raise Refused(f"column {name!r} of type {dtype.name}")
        out.append((name, tuple(shape), _SHORT[dtype]))
    return tuple(out)


def _at(memory: Array, buffer: Buffer) -> Array:
    size = SIZES[buffer.dtype] * buffer.size
    return memory[buffer.at : buffer.at + size].view(_NUMPY[buffer.dtype])


def _in_range(program: Program, memory: Array, wrong: Buffer) -> None:
    flag = _at(memory, wrong)
    if flag[0]:
        flag[0] = 0
        raise TaskError(
            f"program {program.name!r} was given a number beyond its table's rows or its classes",
            mend="Look at the columns of whole numbers: they count from 0",
        )


class _Touches:
    """Room for the rows of a shared table that each device touches: no more than it has tokens."""

    def __init__(self, weight: Array, n: Array, rows: Mapping[str, Rows]) -> None:
        tokens = 0
        for r in rows.values():
            shape, dtype = r.row
            tokens += prod(shape) if dtype.kind in "iu" else 0
        self._base = np.ascontiguousarray(weight[0], np.float32)
        most = np.minimum(n * tokens, len(self._base))
        self._first = np.concatenate([[0], np.cumsum(most)]).astype(np.int64)
        self._count = np.zeros(len(n), np.int64)
        self._ids = np.empty(self._first[-1], np.int64)
        self._rows = np.empty((self._first[-1], *self._base.shape[1:]), np.float32)
        self._weight = weight
        self.arrays = (self._base, self._first, self._count, self._ids, self._rows)

    def array(self) -> Touched:
        span = np.arange(len(self._ids)) - np.repeat(self._first[:-1], np.diff(self._first))
        owner = np.repeat(np.arange(len(self._count)), np.diff(self._first))
        real = span < self._count[owner]
        return Touched(self._weight, owner[real], self._ids[real], self._rows[real])


class _Call:
    """The numbers that a native function is given, and the arrays that they point to."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self._keep: list[Any] = []

    def numbers(self, *values: int) -> None:
        self.given += values

    def arrays(self, *values: Array) -> None:
        self._keep += values
        self.given += [a.ctypes.data for a in values]

    def columns(self, rows: Mapping[str, Rows], columns: Columns) -> None:
        for name, _, _ in columns:
            flat, start = rows[name].flat
            self.arrays(np.ascontiguousarray(flat), np.ascontiguousarray(start, np.int64))

    def weight(self, stacked: Array) -> None:
        """[D, ...]: where it is, and how far the next device's lies."""
        if len(stacked) == 1 or stacked.strides[0] == 0:
            self.arrays(np.ascontiguousarray(stacked[0], np.float32))
            self.numbers(0)
        else:
            plain = np.ascontiguousarray(stacked, np.float32)
            self.arrays(plain)
            self.numbers(plain[0].size)
