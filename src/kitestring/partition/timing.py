"""How long each layer of a model takes on this machine, with one thread.

Threads that wait for one another take what else runs on the machine into the times of small layers.
"""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from kitestring.partition.graph import Graph, evaluating

_WARM, _LEAST, _MOST = 5, 10, 200  # passes
_PATIENCE = 3.0  # seconds, once the least are done


@dataclass(frozen=True)
class Times:
    """Medians over the passes, in seconds of one row: of each node, and of the model in one go."""

    nodes: Mapping[fx.Node, float]
    whole: float
    passes: int

    @property
    def layers(self) -> float:
        """All nodes together."""
        return sum(self.nodes.values())


def measure(graph: Graph, module: nn.Module, row: Tensor) -> Times:
    """Time every node of `graph` on `row` [1, ...], in turn with the model that it was traced from.

    A pass runs all nodes in order, then the model; what comes at another time hits both alike."""
    nodes = [n for n in graph.module.graph.nodes if n.op != "output"]
    call = {node: _callable(graph.module, node) for node in nodes}
    each: dict[fx.Node, list[float]] = {node: [] for node in nodes}
    whole: list[float] = []
    with evaluating(module), torch.no_grad(), _one_thread():
        for _ in range(_WARM):
            _pass(nodes, call, row, None)
            module(row)
        started = time.perf_counter()
        while len(whole) < _MOST:
            _pass(nodes, call, row, each)
            before = time.perf_counter()
            module(row)
            now = time.perf_counter()
            whole.append(now - before)
            if len(whole) >= _LEAST and now - started > _PATIENCE:
                break
    spent = {node: statistics.median(found) for node, found in each.items()}
    return Times(spent, statistics.median(whole), len(whole))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pass(
    nodes: list[fx.Node],
    call: Mapping[fx.Node, Callable[..., Any]],
    row: Tensor,
    each: Mapping[fx.Node, list[float]] | None,
) -> None:
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        if node.op == "placeholder":
            values[node] = row
            spent = 0.0
        else:
            f = call[node]
            args = fx.map_arg(node.args, values.__getitem__)
            kwargs = fx.map_arg(node.kwargs, values.__getitem__)
            before = time.perf_counter()
            values[node] = f(*args, **kwargs)
            spent = time.perf_counter() - before
        if each is not None:
            each[node].append(spent)


def _callable(module: fx.GraphModule, node: fx.Node) -> Callable[..., Any]:
    target: Any = node.target
    if node.op == "call_module":
        return operator.attrgetter(target)(module)  # type: ignore[no-any-return]
    if node.op == "call_method":
        return lambda of, *args, **kwargs: getattr(of, target)(*args, **kwargs)
    if node.op == "get_attr":
        found = operator.attrgetter(target)(module)
        return lambda: found
    return target  # type: ignore[no-any-return]
