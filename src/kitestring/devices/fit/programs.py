"""Programs: what a task's modules compute, by name, as functions of named weights and columns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kitestring.core import Array, Tree
from kitestring.errors import TaskError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Program:
    """`module` maps columns [n, ...] to named outputs [n, ...]; `loss` maps those to [n].

    `after(outputs, columns)` reworks what is predicted: a confidence, the last position, a loss."""

    name: str
    module: nn.Module
    loss: Callable[[Batch, Batch], Tensor] | None = None
    after: Callable[[Batch, Batch], dict[str, Tensor]] | None = None
    _flops: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def training(self) -> nn.Module:
        return copy.deepcopy(self.module).train()

    @cached_property
    def evaluating(self) -> nn.Module:
        return copy.deepcopy(self.module).eval()

    @cached_property
    def trained(self) -> frozenset[str]:
        """Names that gradients change; frozen weights and statistics are carried along."""
        return frozenset(name for name, p in self.module.named_parameters() if p.requires_grad)

    @cached_property
    def names(self) -> frozenset[str]:
        """Of the floating-point weights and statistics."""
        state = self.module.state_dict()
        return frozenset(name for name, v in state.items() if v.is_floating_point())

    def check(self, weights: Tree) -> None:
        """All must be given: what is left out would be another device's, computed before."""
        if weights.keys() != self.names:
            odd = sorted(weights.keys() ^ self.names)
            what = "does not take" if odd[0] in weights else "is not given"
            raise TaskError(f"program {self.name!r} {what} the weight {odd[0]!r}")

    def initial(self) -> Tree:
        """Floating-point weights and statistics, without a device axis."""
        state = self.module.state_dict()
        return Tree(
            {k: v.detach().numpy().copy() for k, v in state.items() if v.is_floating_point()}
        )

    def predict(self, outputs: Batch, batch: Batch) -> dict[str, Tensor]:
        return self.after(outputs, batch) if self.after else dict(outputs)

    def flops(self, columns: Mapping[str, np.ndarray]) -> float:
        """Operations of one forward pass over one row (products and convolutions, 2 per MAC)."""
        key = tuple((k, v.shape[2:], v.dtype.name) for k, v in sorted(columns.items()))
        if key not in self._flops:
            row = {k: torch.zeros((1, *v.shape[2:]), dtype=_torch(v)) for k, v in columns.items()}
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                self.evaluating(row)
            self._flops[key] = float(counter.get_total_flops())
        return self._flops[key]


def tensor(array: Array) -> Tensor:
    """Without a copy, except of what is not laid out plainly or may not be written to."""
    plain = array.flags.c_contiguous and array.flags.writeable
    return torch.from_numpy(array if plain else np.array(array))


def _torch(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


def size_in_bytes(weights: Tree) -> int:
    return sum(int(a.nbytes) for a in weights.values())
