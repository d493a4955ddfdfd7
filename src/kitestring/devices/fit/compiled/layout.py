"""What a device's memory holds while it trains."""

from __future__ import annotations

from dataclasses import dataclass

from kitestring.devices.fit.compiled.kernels import Table
from kitestring.devices.fit.compiled.tensors import Columns
from kitestring.devices.fit.compiled.views import Buffer, View

HYPER = ("lr", "less", "momentum", "decay", "mu", "clip")  # less is -lr


@dataclass(frozen=True)
class Kind:
    """All that the code of a fit depends on, beside the program."""

    batch: int
    columns: Columns
    trained: frozenset[str]
    optimiser: str
    momentum: bool
    decay: bool
    clip: bool
    mu: bool
    linear: bool
    shared: bool  # all devices start from the same weights

    @property
    def simple(self) -> bool:
        """The gradient may go into the weights as soon as it is computed."""
        return self.optimiser == "sgd" and not (
            self.momentum or self.decay or self.clip or self.mu or self.linear
        )


@dataclass(frozen=True)
class Layout:
    """`views` has all weights; those in `tables` are fetched row by row, the others lie in
    `weights`, the `trained_size` trained floats first, and `extra` lies in the same way."""

    kind: Kind
    weights: Buffer
    views: dict[str, View]
    trained: list[str]
    held: list[str]
    tables: dict[str, Table]
    columns: dict[str, View]
    share: Buffer  # of each row in the mean
    hyper: Buffer
    loss: Buffer
    extra: dict[str, Buffer]
    trained_size: int

    @property
    def buffers(self) -> list[Buffer]:
        views = [
            *self.columns.values(),
            *(v for t in self.tables.values() for v in (t.rows, t.stamps, t.touched, t.state)),
        ]
        whole = [self.weights, self.share, self.hyper, self.loss, *self.extra.values()]
        return [*whole, *(v.buffer for v in views if v.buffer)]
