"""What a lowering is handed: the builder, and what torch said of the operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from kitestring.export.builder import Builder, Value
from kitestring.export.sizes import Dim, Shape, Size
from kitestring.export.tracing import Call, Output

Lowered: TypeAlias = Value | None
Number: TypeAlias = float | Size
Operand: TypeAlias = Value | Number
Lower: TypeAlias = Callable[..., Value | tuple[Lowered, ...]]

_DTYPES = {
    torch.float32: np.float32, torch.float64: np.float64, torch.float16: np.float16,
    torch.int64: np.int64, torch.int32: np.int32, torch.int16: np.int16, torch.int8: np.int8,
    torch.uint8: np.uint8, torch.bool: np.bool_,
}  # fmt: skip
_TORCH = {np.dtype(n): t for t, n in _DTYPES.items()}
COMPUTED = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64), np.dtype(np.int32))
"""What ONNX Runtime does arithmetic in."""


class Unsupported(Exception):
    """An operation without a counterpart; `kind` is torch's name for it."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def dtype_of(dtype: torch.dtype) -> Any:
    if dtype not in _DTYPES:
        raise Unsupported(str(dtype).removeprefix("torch."))
    return np.dtype(_DTYPES[dtype])


@dataclass(frozen=True)
class Operation:
    """`source`: what torch said of the first argument."""

    b: Builder
    call: Call
    source: Output | None = None

    @property
    def out(self) -> Output:
        return self.call.out

    @property
    def shape(self) -> Shape:
        return self.call.out.shape

    @property
    def dtype(self) -> Any:
        return dtype_of(self.call.out.dtype)

    def value(self, x: Operand, dtype: Any) -> Value:
        return self.b.cast(x, dtype) if isinstance(x, Value) else self.b.number(x, dtype)

    def common(self, *xs: Operand) -> Any:
        """The dtype in which torch would combine them."""
        found: Any = None
        for x in xs:
            one = torch.empty((1,) * bool(x.shape), dtype=_TORCH[x.dtype]) if isinstance(x, Value) \
                else 1 if isinstance(x, Size) else x  # fmt: skip
            if found is None:
                found = one
            else:
                found = torch.empty(
                    (1,) * max(getattr(found, "ndim", 0), getattr(one, "ndim", 0)),
                    dtype=torch.result_type(found, one),
                )
        return dtype_of(found.dtype)

    def unsupported(self, more: str = "") -> Unsupported:
        return Unsupported(f"{self.call.name}{f' {more}' if more else ''}")


def axis_of(axis: int, rank: int) -> int:
    return axis % max(1, rank)


def axes_of(axes: int | Sequence[int] | None, rank: int) -> list[int]:
    """All of them where none is named."""
    if axes is None or (not isinstance(axes, int) and not axes):
        return list(range(rank))
    return sorted(axis_of(a, rank) for a in ([axes] if isinstance(axes, int) else axes))


def fixed(dim: Dim, op: Operation) -> int:
    """A size that must not grow with the rows."""
    if isinstance(dim, Size):
        raise op.unsupported("across rows")
    return dim
