"""Operations and bytes of one run, from the shapes that each node of a graph really had.

Counted are products, convolutions and recurrent layers, 2 operations for each multiply-add, as
`torch.utils.flop_counter` does; not additions, activations and norms. Bytes moved are those that
every node reads and writes, as if no two were fused: an upper bound on the traffic, whatever the
caches keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Counted:
    """`flops` None: nobody can say. `skipped`: operators that do count but could not be."""

    flops: float | None
    moved: float | None  # bytes
    weights: int | None = None  # bytes
    skipped: tuple[str, ...] = ()


def _conv(w: int) -> Callable[[list[Shape], Shape], int]:
    """`w`: which input holds the weights [out, in / groups, *kernel]."""
    return lambda given, out: 2 * prod(out) * prod(given[w][1:])


def _transposed(given: list[Shape], out: Shape) -> int:
    """Weights [in, out / groups, *kernel]: each input element reaches that many outputs."""
    return 2 * prod(given[0]) * prod(given[1][1:])


def _product(given: list[Shape], out: Shape) -> int:
    return 2 * prod(out) * given[0][-1]


def _gemm(given: list[Shape], out: Shape) -> int:
    """The left matrix may be transposed, so its inner size is what its rows leave."""
    return 2 * prod(out) * (prod(given[0]) // out[0]) if out[0] else 0


def _recurrent(given: list[Shape], out: Shape) -> int:
    """[time, rows, in] with weights [ways, gates x hidden, in] and [.., hidden]."""
    return 2 * prod(given[0][:2]) * (prod(given[1]) + prod(given[2]))


_COUNTED: Mapping[str, Callable[[list[Shape], Shape], int]] = {
    "Conv": _conv(1), "ConvInteger": _conv(1), "QLinearConv": _conv(3),
    "ConvTranspose": _transposed,
    "MatMul": _product, "MatMulInteger": _product, "QLinearMatMul": _product,
    "MatMulNBits": _product, "DynamicQuantizeMatMul": _product,
    "Gemm": _gemm, "QGemm": _gemm,
    "LSTM": _recurrent, "GRU": _recurrent, "RNN": _recurrent,
}  # fmt: skip
_NOT_COUNTED = {
    "Einsum", "DeformConv", "Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention",
}  # fmt: skip
_STAYS = {
    "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant",
    "Loop", "Scan", "If",
}  # fmt: skip
"""Nodes that move nothing themselves: views, and those whose inner nodes are seen by themselves."""

_BYTES = {
    "double": 8, "int64": 8, "uint64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "int4": 0.5, "uint4": 0.5,
}  # fmt: skip


def count(events: Iterable[Mapping[str, Any]]) -> Counted:
    """From the events of ONNX Runtime's own profile of one run, nothing fused or packed."""
    flops, moved, skipped = 0, 0.0, set()
    for event in events:
        if event.get("cat") != "Node" or not str(event.get("name")).endswith("_kernel_time"):
            continue
        what = event["args"]
        given, made = what.get("input_type_shape", []), what.get("output_type_shape", [])
        operator = str(what["op_name"])
        if operator in _COUNTED and made:
            flops += _COUNTED[operator]([_shape(t) for t in given], _shape(made[0]))
        elif operator in _NOT_COUNTED:
            skipped.add(operator)
        if operator not in _STAYS:
            moved += sum(map(_size, [*given, *made]))
    return Counted(float(flops), moved, None, tuple(sorted(skipped)))


def _shape(tensor: Mapping[str, list[int]]) -> Shape:
    return tuple(next(iter(tensor.values()), []))


def _size(tensor: Mapping[str, list[int]]) -> float:
    return sum(_BYTES.get(kind, 4) * prod(shape) for kind, shape in tensor.items())
