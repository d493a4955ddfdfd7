"""From a model to places to cut it, in operations and bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from kitestring.errors import TaskError
from kitestring.measure.modules import count
from kitestring.partition.choose import Place
from kitestring.partition.graph import Graph, some, trace
from kitestring.partition.halves import Cut, cuts, halves
from kitestring.partition.timing import Times, measure


@dataclass(frozen=True)
class Study:
    """What was found of one model on this machine.

    `places` are the cuts that can be made. Of each, operations are the model's, shared out by the
    time that layers took: a layer that computes little but moves much counts for what it takes."""

    graph: Graph
    times: Times
    operations: float  # products and convolutions of one row
    cuts: Sequence[Cut]
    places: Sequence[Place]

    @property
    def rate(self) -> float:
        """Operations a second that this machine reached."""
        return self.operations / self.times.layers


def study(module: nn.Module, rows: Tensor) -> Study:
    """`rows` [n, ...] are examples of the model's input. Raises `TaskError` (see `trace`)."""
    graph = trace(module, rows)
    found = cuts(graph)
    for at in {0, len(found) // 2, len(found) - 1}:
        if not found[at].why:
            halves(graph, found[at])  # refuses what gives something else than the model
    row = some(rows, 1)
    with torch.no_grad():
        operations = count(module, [row]).flops
    if not operations:
        raise TaskError(
            "no operation of the model can be counted, so its time on a device cannot be told",
            mend="Products and convolutions are counted",
        )
    times = measure(graph, module, row)
    return Study(graph, times, operations, found, places(found, times, operations))


def places(found: Sequence[Cut], times: Times, operations: float) -> list[Place]:
    """Operations of each side: what its nodes took, of all that was taken."""
    share = {node: operations * spent / times.layers for node, spent in times.nodes.items()}

    def of(nodes: Iterable[fx.Node]) -> float:
        return sum(share[node] for node in nodes)

    return [
        Place(cut.at, cut.name, of(cut.front), of(cut.back), cut.up, cut.down)
        for cut in found
        if not cut.why
    ]
