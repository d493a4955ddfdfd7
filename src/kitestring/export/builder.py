"""Building an ONNX graph: each method adds what it needs and gives the value that it makes.

What is only broadcast is not written out: a value knows what it is kept as beside its shape. Nodes
that were there already are used again, turned matrices are turned back, and what no output needs is
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from kitestring.core import Array
from kitestring.export.sizes import Dim, Shape, Size, broadcast, times

OPSET, IR = 18, 8
"""ONNX 1.13 of December 2022; ONNX Runtime reads it from 1.14 on."""
LEAST_RUNTIME = "1.14"
MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators; a graph that uses none does not name it."""
LEAST_OF_MICROSOFT = "1.17"
"""The ONNX Runtime that has those which are used here, MatMulNBits with an accuracy level."""
_FEW = 1024  # numbers that are written out rather than broadcast by a node
_ENDS = 2**31 - 1  # beyond every size, and in 32 bits too


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: `shape` is what it stands for, `held` what it is kept as."""

    name: str
    dtype: Any
    shape: Shape
    held: Shape

    @property
    def rank(self) -> int:
        return len(self.shape)


def _plain(name: str, dtype: Any, shape: Shape) -> Value:
    return Value(name, np.dtype(dtype), shape, shape)


class Builder:
    """`built_in`: weights will be constants wherever that matters. `rounds`: somewhere in the graph
    activations are rounded."""

    def __init__(self, built_in: bool = False) -> None:
        self.built_in, self.rounds = built_in, False
        self.inputs: dict[str, Value] = {}
        self._constants: dict[str, Array] = {}
        self._nodes: list[NodeProto] = []
        self._known: dict[Any, tuple[str, ...]] = {}
        self._turned: dict[str, tuple[Value, tuple[int, ...]]] = {}
        self._reshaped: dict[str, Value] = {}
        self._summed: dict[str, tuple[str, Value, list[int]]] = {}
        self._rows: Value | None = None

    # What goes in

    def input(self, name: str, dtype: Any, shape: Shape) -> Value:
        if name not in self.inputs:
            self.inputs[name] = _plain(name, dtype, shape)
        return self.inputs[name]

    def constant(self, array: Array) -> Value:
        """Kept as one number where all are the same."""
        if array.size > 1 and (array == array.flat[0]).all():
            return replace(self.exact(np.array(array.flat[0])), shape=tuple(array.shape))
        return self.exact(array)

    def exact(self, array: Array) -> Value:
        key = ("constant", array.dtype.str, array.shape, array.tobytes())
        if key not in self._known:
            name = f"c{len(self._constants)}"
            self._constants[name] = np.array(array)
            self._known[key] = (name,)
        return _plain(self._known[key][0], array.dtype, tuple(array.shape))

    def number(self, value: float | Size, dtype: Any) -> Value:
        """A scalar."""
        if isinstance(value, Size):
            return self.cast(self.reshape(self.extent(value), ()), dtype)
        return self.exact(np.array(value).astype(dtype))

    def rows_of(self, column: Value) -> None:
        """The rows of a batch are those of `column`."""
        if self._rows is None:
            self._rows = self.op("Shape", [column], (1,), np.int64, start=0, end=1)

    def extent(self, dim: Dim) -> Value:
        """A size as int64 [1]."""
        if not isinstance(dim, Size):
            return self._whole(dim)
        assert self._rows is not None
        found = self._rows
        if dim.each != 1:
            found = self.op("Mul", [found, self._whole(dim.each)], (1,), np.int64)
        if dim.more:
            found = self.op("Add", [found, self._whole(dim.more)], (1,), np.int64)
        return found

    def sizes(self, dims: Sequence[Dim]) -> Value:
        """As int64 [k]."""
        if not any(isinstance(d, Size) for d in dims):
            return self.exact(np.array(dims, np.int64))
        parts = [self.extent(d) for d in dims]
        if len(parts) == 1:
            return parts[0]
        return self.op("Concat", parts, (len(parts),), np.int64, axis=0)

    # Nodes

    def ops(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        outs: Sequence[tuple[Shape, Any]],
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """Inputs as they are kept; outputs of these shapes and dtypes."""
        names = [v.name if v is not None else "" for v in inputs]
        while names and not names[-1]:  # some versions of ONNX Runtime crash on an empty last one
            names.pop()
        key = (kind, *names, repr(sorted(attributes.items())), len(outs))
        if key not in self._known:
            made = tuple(f"t{len(self._nodes)}" + "abc"[i] * (i > 0) for i in range(len(outs)))
            self._nodes.append(helper.make_node(kind, names, made, **attributes))
            self._known[key] = made
        found = self._known[key]
        return tuple(_plain(n, d, s) for n, (s, d) in zip(found, outs, strict=True))

    def op(
        self, kind: str, inputs: Sequence[Value | None], shape: Shape, dtype: Any, **attributes: Any
    ) -> Value:
        return self.ops(kind, inputs, [(shape, dtype)], **attributes)[0]

    def real(self, x: Value) -> Value:
        """Kept as what it stands for."""
        if x.held == x.shape:
            return x
        size = times(x.shape)
        if x.name in self._constants and isinstance(size, int) and size <= _FEW:
            return self.exact(np.broadcast_to(self._constants[x.name], x.shape))  # type: ignore[arg-type]
        return self.op("Expand", [x, self.sizes(x.shape)], x.shape, x.dtype)

    def each(self, kind: str, *xs: Value, dtype: Any = None, **attributes: Any) -> Value:
        """Element by element; of the first one's dtype unless told otherwise."""
        if kind in ("Mul", "Div") and self._is_one(xs[1]):
            return replace(xs[0], shape=broadcast(*(x.shape for x in xs)))
        if kind == "Mul" and self._is_one(xs[0]):
            return self.each(kind, *xs[::-1])
        held = broadcast(*(x.held for x in xs))
        dtype = xs[0].dtype if dtype is None else dtype
        shape, flat = broadcast(*(x.shape for x in xs)), self._flat(held)
        if flat is None or {x.held for x in xs} != {held, ()}:
            return replace(self.op(kind, list(xs), held, dtype, **attributes), shape=shape)
        few = [self._reshape(replace(x, shape=held), flat) if x.held == held else x for x in xs]
        found = self.op(kind, few, flat, dtype, **attributes)
        return replace(self._reshape(found, held), shape=shape)

    def _flat(self, held: Shape) -> Shape | None:
        """Large arrays that end in axes of 1, as kernels of 1 x 1 do, are slow to combine with a
        number in ONNX Runtime: without those axes they are not."""
        size = times(held)
        if not held or held[-1] != 1 or not isinstance(size, int) or size <= _FEW:
            return None
        return (size,)

    def _is_one(self, x: Value) -> bool:
        found = self._constants.get(x.name)
        return found is not None and found.size == 1 and bool(found.reshape(()) == 1)

    def cast(self, x: Value, dtype: Any) -> Value:
        dtype = np.dtype(dtype)
        if x.dtype == dtype:
            return x
        to = helper.np_dtype_to_tensor_dtype(dtype)
        return self.each("Cast", x, dtype=dtype, to=to)

    def where(self, condition: Value, x: Value, y: Value) -> Value:
        return self.each("Where", condition, x, y, dtype=x.dtype)

    # Forms

    def reshape(self, x: Value, shape: Shape) -> Value:
        if x.shape == shape:
            return x
        if all(d == 1 for d in x.held):
            return replace(self._reshape(replace(x, shape=x.held), ()), shape=shape)
        return self._reshape(self.real(x), shape)

    def _reshape(self, x: Value, shape: Shape) -> Value:
        x = self._reshaped.get(x.name, x)
        if x.shape == shape:
            return x
        if x.name in self._summed:  # axes that were kept for nothing
            kind, source, axes = self._summed[x.name]
            if shape == tuple(d for i, d in enumerate(source.shape) if i not in axes):
                return self.reduce(kind, source, axes, False)
        known = [d for d in shape if not isinstance(d, Size)]
        if len(shape) - len(known) == 1 and 0 not in known:
            to = self.exact(np.array([-1 if isinstance(d, Size) else d for d in shape], np.int64))
        else:
            to = self.sizes(shape)
        found = self.op("Reshape", [x, to], shape, x.dtype)
        self._reshaped[found.name] = x
        return found

    def expand(self, x: Value, shape: Shape) -> Value:
        return x if x.shape == shape else replace(x, shape=shape)

    def unsqueeze(self, x: Value, axis: int) -> Value:
        """`axis` counts in the result."""
        shape = (*x.shape[:axis], 1, *x.shape[axis:])
        inside = axis - (x.rank - len(x.held))
        if inside <= 0:
            return replace(x, shape=shape)
        held = (*x.held[:inside], 1, *x.held[inside:])
        return replace(self._reshape(replace(x, shape=x.held), held), shape=shape)

    def transpose(self, x: Value, order: Sequence[int]) -> Value:
        """Axis i of the result is axis `order`[i] of `x`."""
        order = tuple(order)
        shape = tuple(x.shape[i] for i in order)
        if all(d == 1 for d in x.held):
            return replace(self.reshape(x, ()), shape=shape)
        x = self.real(x)
        if x.name in self._turned:
            x, before = self._turned[x.name]
            order = tuple(before[i] for i in order)
        if order == tuple(range(len(order))):
            return x
        found = self.op("Transpose", [x], shape, x.dtype, perm=order)
        self._turned[found.name] = x, order
        return found

    def flipped(self, x: Value) -> Value | None:
        """The matrix of which this one is the transpose, if it is known."""
        found = self._turned.get(x.name)
        return found[0] if found and found[1] == (1, 0) else None

    def slice(self, x: Value, axis: int, start: Dim, end: Dim, size: Dim, step: int = 1) -> Value:
        """`size` is how many there are from `start` to `end`."""
        if size == x.shape[axis] and step == 1:
            return x
        shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
        ends = self.extent(end) if isinstance(end, Size) else self._whole(min(end, _ENDS))
        inputs = [self.real(x), self.extent(start), ends, self._whole(axis), self._whole(step)]
        return self.op("Slice", inputs, shape, x.dtype)

    def reversed(self, x: Value, axes: Sequence[int]) -> Value:
        k = len(axes)
        back, end = self.exact(np.full(k, -1)), self.exact(np.full(k, -_ENDS))
        given = [self.real(x), back, end, self.sizes(axes), back]
        return self.op("Slice", given, x.shape, x.dtype)

    def _whole(self, value: int) -> Value:
        return self.exact(np.array([value], np.int64))

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        if len(parts) == 1:
            return parts[0]
        dims = [p.shape[axis] for p in parts]
        total = Size(
            sum(d.each for d in dims if isinstance(d, Size)),
            sum(d.more if isinstance(d, Size) else d for d in dims),
        )
        shape = list(parts[0].shape)
        shape[axis] = total if total.each else total.more
        reals = [self.real(p) for p in parts]
        return self.op("Concat", reals, tuple(shape), parts[0].dtype, axis=axis)

    def pad(self, x: Value, before: Sequence[int], after: Sequence[int], value: float = 0) -> Value:
        """Less than nothing cuts off."""
        if not any(before) and not any(after):
            return x
        shape = tuple(_grown(d, b + a) for d, b, a in zip(x.shape, before, after, strict=True))
        widths = self.sizes([*before, *after])
        return self.op("Pad", [self.real(x), widths, self.number(value, x.dtype)],
                       shape, x.dtype)  # fmt: skip

    # Sums and products

    def reduce(self, kind: str, x: Value, axes: Sequence[int], keep: bool) -> Value:
        """ReduceSum and the like."""
        if not axes:
            return x
        shape = tuple(1 if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes)
        x, over = self.real(x), sorted(axes)
        found = self.op(kind, [x, self.sizes(over)], shape, x.dtype, keepdims=int(keep))
        if keep:
            self._summed[found.name] = kind, x, over
        return found

    def matmul(self, x: Value, y: Value) -> Value:
        x, y = self.real(x), self.real(y)
        shape = (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        if x.rank == 2 and y.rank == 2:
            return self._gemm(x, y, shape)
        return self.op("MatMul", [x, y], shape, x.dtype)

    def gemm(self, x: Value, y: Value, bias: Value) -> Value:
        """x y + bias, of matrices."""
        return self._gemm(self.real(x), self.real(y), (x.shape[0], y.shape[1]), bias)

    def _gemm(self, x: Value, y: Value, shape: Shape, bias: Value | None = None) -> Value:
        """Transposes that are only made for it are taken in."""
        turned = [self.flipped(v) for v in (x, y)]
        if bias is None and turned == [None, None]:
            return self.op("MatMul", [x, y], shape, x.dtype)
        inputs: list[Value | None] = [t or v for t, v in zip(turned, (x, y), strict=True)]
        flags = {k: 1 for k, t in zip(("transA", "transB"), turned, strict=True) if t}
        return self.op("Gemm", inputs + [bias] * (bias is not None), shape, x.dtype, **flags)

    # What comes out

    def needed(self, outputs: Mapping[str, Value]) -> set[str]:
        """The names of all that these outputs depend on, inputs too."""
        found = {self.real(v).name for v in outputs.values()}
        for node in reversed(self._nodes):
            if not found.isdisjoint(node.output):
                found.update(node.input)
        return found

    def model(self, outputs: Mapping[str, Value], metadata: Mapping[str, str]) -> ModelProto:
        """The inputs and the nodes that are needed, and outputs of these names."""
        reals = {name: self.real(v) for name, v in outputs.items()}
        needed = self.needed(outputs)
        passed, renamed = [], dict[str, str]()
        for name, v in reals.items():
            if v.name in self.inputs or v.name in self._constants or v.name in renamed:
                passed.append(helper.make_node("Identity", [v.name], [name]))
            else:
                renamed[v.name] = name
        kept = [node for node in self._nodes if not needed.isdisjoint(node.output)]
        nodes = [_renamed(node, renamed) for node in (*kept, *passed)]
        given = [_info(v.name, v) for v in self.inputs.values() if v.name in needed]
        made = [_info(name, v) for name, v in reals.items()]
        tensors = [numpy_helper.from_array(a, n) for n, a in self._constants.items() if n in needed]
        graph = helper.make_graph(nodes, "kitestring", given, made, tensors)
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == MICROSOFT for node in nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        model: ModelProto = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR, producer_name="kitestring"
        )
        helper.set_model_props(model, dict(metadata))
        return model


def _grown(dim: Dim, by: int) -> Dim:
    return replace(dim, more=dim.more + by) if isinstance(dim, Size) else dim + by


def _renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    if not any(n in names for n in (*node.input, *node.output)):
        return node
    found = NodeProto()
    found.CopyFrom(node)
    for part in (found.input, found.output):
        part[:] = [names.get(n, n) for n in part]
    return found


def _info(name: str, v: Value) -> Any:
    dims = [str(d) if isinstance(d, Size) else d for d in v.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(v.dtype), dims)
