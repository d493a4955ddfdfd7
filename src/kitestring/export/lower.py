"""From traced operations to nodes of an ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kitestring.core import Array
from kitestring.export.builder import Builder, Value
from kitestring.export.elementwise import ELEMENTWISE
from kitestring.export.forms import FORMS
from kitestring.export.integers import INTEGERS
from kitestring.export.lookups import LOOKUPS
from kitestring.export.operation import Lowered, Operation, Unsupported, dtype_of
from kitestring.export.places import PLACES
from kitestring.export.pools import POOLS
from kitestring.export.products import PRODUCTS
from kitestring.export.sizes import Size
from kitestring.export.sums import SUMS
from kitestring.export.tracing import DRAWS, Call, Output, Ref, Traced, refs

OPERATIONS: Mapping[str, Any] = {
    **ELEMENTWISE, **FORMS, **PLACES, **SUMS, **PRODUCTS, **POOLS, **LOOKUPS,
    **INTEGERS,
}  # fmt: skip


def lower(b: Builder, traced: Traced, inputs: Sequence[Value]) -> tuple[list[Value], list[Value]]:
    """The graph's outputs from its inputs, and the values that hold what was drawn, in order.

    Raises `Unsupported` for an operation without a counterpart."""
    return _Lowering(b, traced, inputs).run()


class _Lowering:
    def __init__(self, b: Builder, traced: Traced, inputs: Sequence[Value]) -> None:
        self.b, self.traced = b, traced
        self.inputs = inputs
        self.folded: dict[int, tuple[Tensor, ...]] = {}
        self.known: dict[int, Sequence[Lowered]] = {}
        self.draws: list[Value] = []

    def run(self) -> tuple[list[Value], list[Value]]:
        for at, tensor in self.traced.constants.items():
            self.folded[at] = (tensor,)
        for at, call in self.traced.calls.items():
            if call.name.startswith("input:"):
                self.known[at] = (self.inputs[int(call.name.removeprefix("input:"))],)
            elif call.name == DRAWS:
                self.known[at] = (self._drawn(call),)
            elif not self._fold(at, call):
                self.known[at] = self._lowered(call)
        found = [self._value(ref) for ref in self.traced.outputs]
        return found, self.draws

    def _drawn(self, call: Call) -> Value:
        """Drawn outside; unused ones count too, since others come after them."""
        name, out = f"draw:{len(self.draws)}", call.out
        self.draws.append(self.b.input(name, np.float32, out.shape))
        return self.b.cast(self.draws[-1], dtype_of(out.dtype))

    def _fold(self, at: int, call: Call) -> bool:
        """What depends on no input is computed now."""
        if _sized(call.args) or _sized(call.kwargs) or any(_sized(o.shape) for o in call.outs):
            return False
        if not all(ref.at in self.folded for ref in refs([call.args, call.kwargs])):
            return False
        if torch.Tag.nondeterministic_seeded in call.target.tags:
            raise Unsupported(call.name)
        found = call.target(*self._tensors(call.args), **self._tensors(call.kwargs))
        self.folded[at] = (found,) if isinstance(found, Tensor) else tuple(found)
        return True

    def _tensors(self, argument: Any) -> Any:
        return _mapped(argument, lambda ref: self.folded[ref.at][ref.which])

    def _lowered(self, call: Call) -> Sequence[Lowered]:
        how = OPERATIONS.get(call.name)
        if how is None:
            raise Unsupported(call.name)
        op = Operation(self.b, call, self._output(call.args[0] if call.args else None))
        args, kwargs = (_mapped(a, self._value) for a in (call.args, call.kwargs))
        try:
            found = how(op, *args, **{k: v for k, v in kwargs.items() if k not in _PLACE})
            made = found if isinstance(found, tuple) else (found,)
            for value, out in zip(made, call.outs, strict=False):
                if value is not None:
                    assert value.shape == out.shape, (call.name, value, out)
                    assert value.dtype == dtype_of(out.dtype), (call.name, value, out)
        except (TypeError, AssertionError):
            # An argument, or a combination of them, that the lowering does not know.
            raise Unsupported(f"{call.name} with these arguments") from None
        return made

    def _output(self, argument: Any) -> Output | None:
        made = isinstance(argument, Ref) and argument.at in self.traced.calls
        return self.traced.calls[argument.at].outs[argument.which] if made else None

    def _value(self, ref: Ref) -> Any:
        if ref.at in self.folded:
            return self.b.constant(_array(self.folded[ref.at][ref.which]))
        return self.known[ref.at][ref.which]


_PLACE = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "generator")
"""Where and how torch keeps a tensor."""


def _array(tensor: Tensor) -> Array:
    dtype_of(tensor.dtype)
    return tensor.detach().contiguous().numpy()


def _sized(argument: Any) -> bool:
    if isinstance(argument, Mapping):
        argument = list(argument.values())
    if isinstance(argument, list | tuple):
        return any(_sized(part) for part in argument)
    return isinstance(argument, Size)


def _mapped(argument: Any, what: Any) -> Any:
    if isinstance(argument, Ref):
        return what(argument)
    if isinstance(argument, Mapping):
        return {k: _mapped(v, what) for k, v in argument.items()}
    if isinstance(argument, list | tuple):
        return type(argument)(_mapped(part, what) for part in argument)
    return argument
