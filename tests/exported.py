"""Programs exported and run in ONNX Runtime, held against torch computing one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

import tiny
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime.compute import OrtCompute
from kitestring.devices.runtime.graph import Graph
from kitestring.export.graphs import backward_graph, predict_graph, step_graph
from modules import keys

CLOSE = 1e-5
"""Of a leaf's largest value; float32. Two libraries sum in different orders."""
N = (5, 1, 0, 8)
"""Rows of the devices: with batches of 3, ragged ones and a single row."""
PLAIN = Recipe(0.05, epochs=1, batch=3)
Make = Callable[[np.random.Generator, int], Any]


@dataclass(frozen=True)
class Case:
    """A program with rows [D, L, ...] and weights [D, ...]."""

    program: Program
    weights: Tree
    rows: Mapping[str, Rows]

    @property
    def devices(self) -> int:
        return len(next(iter(self.rows.values())).n)


class Beside(nn.Module):
    """Layers of the column x, each by itself: one output for each."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = enumerate(self.layers)
        return {f"{i} {_about(layer)}": layer(batch["x"]) for i, layer in named}


def _about(layer: nn.Module) -> str:
    inner = layer[-1] if isinstance(layer, nn.Sequential) else layer
    return repr(getattr(inner, "inner", inner)).splitlines()[0][:60]


def curved(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """A loss whose slope is different for each number of each output."""
    total = torch.zeros(())
    for out in outputs.values():
        flat = out.flatten(1)
        total = total + ((flat - torch.linspace(-1, 1, flat.shape[1])) ** 2).mean(1)
    return total


def numbers(*row: int) -> Make:
    return lambda rng, n: rng.normal(0, 1, (n, *row)).astype(np.float32)


def tokens(below: int, *row: int) -> Make:
    return lambda rng, n: rng.integers(0, below, (n, *row))


def case(
    module: nn.Module, columns: Mapping[str, Make], loss: Any = curved, n: Sequence[int] = N,
    **more: Any,
) -> Case:  # fmt: skip
    """Different weights and rows for each device; the padding is rubbish."""
    program = Program("p", module, loss, **more)
    rng = np.random.default_rng(7)
    weights = Tree()
    for k, a in program.initial().items():
        spread = rng.normal(0, 0.1, (len(n), *a.shape))
        positive = k.endswith("var")
        weights[k] = (a + (np.abs(spread) if positive else spread)).astype(a.dtype)
    rows = tiny.stacked({k: [make(rng, m) for m in n] for k, make in columns.items()})
    return Case(program, weights, rows)


def checked(graph: Graph) -> onnx.ModelProto:
    """Standard operators alone, and found good by ONNX's own checker."""
    model = onnx.load_from_string(graph.model)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain for o in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} <= {""}
    return model


def runtime(program: Program, *graphs: Graph) -> OrtCompute:
    for graph in graphs:
        checked(graph)
    models = {str(i): g.model for i, g in enumerate(graphs)}
    return OrtCompute(models, {program.name: program.initial()})


def torch_of(c: Case) -> TorchCompute:
    return TorchCompute({c.program.name: c.program}, "sequential")


def near(found: Any, wanted: Any, close: float = CLOSE) -> None:
    """Leaf by leaf, so that a failure names the leaf."""
    if not isinstance(wanted, Mapping):
        found, wanted = {"": found}, {"": wanted}
    assert found.keys() == wanted.keys()
    far = {k: tiny.apart(found[k], wanted[k]) for k in wanted}
    bad = {k: d for k, d in far.items() if not d < close}
    assert not bad, bad


def predicts(c: Case, close: float = CLOSE) -> None:
    ort, name = runtime(c.program, predict_graph(c.program, c.rows)), c.program.name
    found = ort.predict(name, c.weights, c.rows)
    near(found, torch_of(c).predict(name, c.weights, c.rows), close)


def fits(c: Case, recipe: Recipe = PLAIN, close: float = CLOSE, **terms: Tree) -> Tree:
    """The weights after it."""
    names = {k: tuple(tree) for k, tree in terms.items()}
    ort = runtime(c.program, step_graph(c.program, c.rows, recipe, **names))
    found, wanted = (
        compute.fit(c.program.name, c.weights, c.rows, recipe, key=keys(c.devices), **terms)
        for compute in (ort, torch_of(c))
    )
    assert list(found.steps) == list(wanted.steps)
    near(found.parameters, wanted.parameters, close)
    near(found.loss, wanted.loss, close)
    return found.parameters


def slopes(c: Case, by: Sequence[str] = (), row_weights: Any = None, close: float = CLOSE) -> None:
    """Gradients of the loss; or of the outputs `by`, whose own are drawn."""
    name = c.program.name
    ort = runtime(c.program, backward_graph(c.program, c.rows, by))
    cotangent = None
    if by:
        out, rng = torch_of(c).predict(name, c.weights, c.rows), np.random.default_rng(3)
        cotangent = {
            k: Rows(rng.normal(0, 1, out[k].values.shape).astype(np.float32), out[k].n) for k in by
        }
    found, wanted = (
        compute.backward(name, c.weights, c.rows, cotangent=cotangent, row_weights=row_weights)
        for compute in (ort, torch_of(c))
    )
    for one, other in zip(found, wanted, strict=True):
        near(one, other, close)
