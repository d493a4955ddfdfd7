"""Programs: what a task's modules compute, by name, as functions of named weights and columns."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kitestring.core import Array, Rows, Tree
from kitestring.devices.fit.dropout import Sources
from kitestring.errors import TaskError

Batch = Mapping[str, Tensor]
Precision = Literal["float32", "bfloat16"]
CPU = torch.device("cpu")


def _layer_of_lstm(x: Any, inputs: Any, states: Any, *_: Any, **__: Any) -> int:
    """Operations, by the shapes [time, batch, in], [4 hidden, in] and [4 hidden, hidden]."""
    return int(2 * x[0] * x[1] * (prod(inputs) + prod(states)))


def _matrix_by_vector(matrix: Any, vector: Any, *rest: Any, **how: Any) -> int:
    return int(2 * prod(matrix))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Shapes [batch, heads, length, size] of queries, keys and values: two products."""
    return int(2 * prod(q[:3]) * k[2] * (q[3] + v[3]))


# What torch's counter leaves out. A layer of an LSTM is one operation on the CPU.
_COUNTED = {
    torch.ops.aten.mkldnn_rnn_layer: _layer_of_lstm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mv: _matrix_by_vector,
    torch.ops.aten.addmv: lambda bias, *given, **how: _matrix_by_vector(*given, **how),
    torch.ops.aten.dot: _matrix_by_vector,
}


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts what runs in it, without slopes. Attention goes the long way, since torch's counter
    does not see its fused one."""
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTED)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@dataclass(frozen=True)
class Program:
    """`module` maps columns [n, ...] to named outputs [n, ...]; `loss` maps those to [n].

    `after(outputs, columns)` reworks what is predicted: a confidence, the last position, a loss.
    Copies of the module compute on the torch `device`; the module itself stays where it is.
    `precision` is that of its products in training."""

    name: str
    module: nn.Module
    loss: Callable[[Batch, Batch], Tensor] | None = None
    after: Callable[[Batch, Batch], dict[str, Tensor]] | None = None
    device: torch.device = CPU
    precision: Precision = "float32"
    _flops: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False, repr=False)
    _draws: list[Sources] = field(default_factory=list, compare=False, repr=False)
    _own: threading.local = field(default_factory=threading.local, compare=False, repr=False)

    def on(self, device: torch.device, precision: Precision) -> Program:
        """The same program on that device, trained with such products."""
        if (device, precision) == (self.device, self.precision):
            return self
        # Nothing noted here is shared: it may be of the other device.
        fresh: dict[str, Any] = {"_flops": {}, "_draws": [], "_own": threading.local()}
        return replace(self, device=device, precision=precision, **fresh)

    def put(self, array: Array) -> Tensor:
        """On the device; the array's own memory where that is the CPU, if it can be."""
        return tensor(array).to(self.device)

    @property
    def training(self) -> nn.Module:
        """The calling thread's own copy, for weights to be loaded into."""
        if not hasattr(self._own, "training"):
            self._own.training = copy.deepcopy(self.module).to(self.device).train()
        return self._own.training  # type: ignore[no-any-return]

    @property
    def evaluating(self) -> nn.Module:
        """The same, as it predicts."""
        if not hasattr(self._own, "evaluating"):
            self._own.evaluating = copy.deepcopy(self.module).to(self.device).eval()
        return self._own.evaluating  # type: ignore[no-any-return]

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names that gradients change; frozen weights and statistics are carried along."""
        return frozenset(name for name, p in self.module.named_parameters() if p.requires_grad)

    @cached_property
    def _order(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.module.named_parameters() if name in self.trained)

    def chosen(self, prefixes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `trained` that a recipe's `train` names, in the module's order."""
        return tuple(name for name in self._order if name.startswith(tuple(prefixes)))

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the weights and statistics: floats, and the codes of quantised weights."""
        state = self.module.state_dict()
        return frozenset(name for name, v in state.items() if carried(v))

    def check(self, weights: Tree) -> None:
        """All must be given: what is left out would be another device's, computed before."""
        if weights.keys() != self.names:
            odd = sorted(weights.keys() ^ self.names)
            what = "does not take" if odd[0] in weights else "is not given"
            raise TaskError(f"program {self.name!r} {what} the weight {odd[0]!r}")

    def initial(self) -> Tree:
        """Weights and statistics, without a device axis."""
        state = self.module.state_dict()
        return Tree({k: v.detach().numpy().copy() for k, v in state.items() if carried(v)})

    def resembles(self, other: Program) -> bool:
        """The same computation but for its weights, as far as can be seen: a
        module that keeps tensors of its own beside them resembles none."""
        mine, theirs = self.module.state_dict(), other.module.state_dict()
        return (
            repr(self.module) == repr(other.module)
            and mine.keys() == theirs.keys()
            and all(
                v.shape == theirs[k].shape
                and v.dtype == theirs[k].dtype
                and (carried(v) or bool((v == theirs[k]).all()))
                for k, v in mine.items()
            )
            and self.trained == other.trained
            and not any(
                isinstance(v, Tensor | np.ndarray)
                for m in self.module.modules()
                for v in vars(m).values()
            )
        )

    def predict(self, outputs: Batch, batch: Batch) -> dict[str, Tensor]:
        return self.after(outputs, batch) if self.after else dict(outputs)

    def flops(self, columns: Mapping[str, Rows]) -> float:
        """Operations of one forward pass over one row (products and convolutions, 2 per MAC)."""
        rows = {k: r.row for k, r in sorted(columns.items())}
        key = tuple((k, shape, np.dtype(dtype)) for k, (shape, dtype) in rows.items())
        if key not in self._flops:
            row = {k: self.put(np.zeros((1, *shape), dtype)) for k, (shape, dtype) in rows.items()}
            with counting() as counter:
                self.evaluating(row)
            self._flops[key] = float(counter.get_total_flops())
        return self._flops[key]

    def draws(self, trial: Callable[[], Sources]) -> Sources:
        """What a pass in training draws: what `trial` finds, which is called once."""
        if not self._draws:
            self._draws.append(trial())
        return self._draws[0]


def carried(v: Tensor) -> bool:
    """Whether it is a weight or a statistic: numbers of 8 bits are the codes of quantised weights,
    wider ones count something."""
    return v.is_floating_point() or v.dtype in (torch.int8, torch.uint8)


class _Untracked:
    """In place of torch's tracker of modules, which hooks those of every thread."""

    parents = ("Global",)

    def __enter__(self) -> None: ...
    def __exit__(self, *problem: object) -> None: ...


def tensor(array: Array) -> Tensor:
    """Without a copy, except of what is not laid out plainly or may not be written to."""
    plain = array.flags.c_contiguous and array.flags.writeable
    return torch.from_numpy(array if plain else np.array(array))


def array(tensor: Tensor) -> Array:
    """Back from whatever device; without a copy where that is the CPU."""
    return tensor.cpu().numpy()


def size_in_bytes(weights: Tree) -> int:
    return sum(int(a.nbytes) for a in weights.values())
