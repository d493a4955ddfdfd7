"""A program's weights and columns as views, and as zeros to trace it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from kitestring.devices.fit.compiled.views import Buffer, Refused, View, plain
from kitestring.devices.fit.programs import Program

DTYPES = {
    torch.float32: "f32", torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8",
    torch.bool: "bool",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in DTYPES.items()}

Columns: TypeAlias = tuple[tuple[str, tuple[int, ...], str], ...]
"""Name, shape and dtype of one row; sorted by name."""


def named(dtype: torch.dtype) -> str:
    if dtype not in DTYPES:
        raise Refused(f"numbers of type {str(dtype).removeprefix('torch.')}")
    return DTYPES[dtype]


def weight_shapes(program: Program) -> tuple[dict[str, tuple[int, ...]], dict[str, Tensor]]:
    """Of the weights and statistics, which must be float32."""
    state = {k: v for k, v in program.module.state_dict().items() if k in program.names}
    for value in state.values():
        if not value.is_floating_point():
            raise Refused("quantised weights have no kernel")
        if named(value.dtype) != "f32":
            raise Refused("weights other than float32")
    return {k: tuple(v.shape) for k, v in state.items()}, state


def weight_views(
    shapes: Mapping[str, tuple[int, ...]], names: Sequence[str], buffer: Buffer
) -> dict[str, View]:
    """One after the other in `buffer`."""
    out, at = {}, 0
    for name in names:
        whole = plain(buffer, shapes[name])
        out[name] = View(buffer, whole.shape, whole.strides, at)
        at += prod(shapes[name])
    return out


def column_views(columns: Columns, rows: int) -> dict[str, View]:
    return {
        name: plain(Buffer(name, dtype, rows * prod(shape), fixed=True), (rows, *shape))
        for name, shape, dtype in columns
    }


def sample(columns: Columns, rows: int) -> dict[str, Tensor]:
    """Zeros, which are good class numbers and tokens too."""
    return {name: torch.zeros((rows, *shape), dtype=_TORCH[t]) for name, shape, t in columns}
