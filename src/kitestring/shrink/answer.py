"""A module as a file that answers a request: one ONNX graph with its weights inside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import Tensor, nn

from kitestring.core import Array, Rows, Tree
from kitestring.devices.fit.programs import Program
from kitestring.devices.runtime.graph import Graph
from kitestring.devices.runtime.session import CPU, Session
from kitestring.devices.runtime.settled import settled
from kitestring.export.graphs import predict_graph
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task

PROGRAM = "small.answer"
_BLOCK = 512  # rows at a time


class Whole(nn.Module):
    """A model that is not taken apart into a front and a back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


def shipped(task: Task, module: nn.Module) -> Task:
    """The task whose small model is `module`, as it is."""
    return replace(task, small=lambda: Whole(module))


def program(task: Task, module: nn.Module, example: Array) -> Program:
    """What answers a request with `module`. `example`: a row or two of x."""
    return programs(shipped(task, module), 0, example)[PROGRAM]


@dataclass(frozen=True)
class Answer:
    """`graph` takes its weights as inputs, as in a package; `file` has them inside."""

    graph: bytes
    weights: Tree

    @cached_property
    def file(self) -> bytes:
        about = Graph(self.graph).about
        read = about.weights.keys() - about.tied.keys() - set(about.unused)
        return settled(self.graph, {f"w:{k}": np.asarray(self.weights[k]) for k in sorted(read)})

    @property
    def size(self) -> int:
        return len(self.file)


def running(file: bytes) -> Callable[[Array], Array]:
    """Rows [n, ...] -> their answers [n, ...], in ONNX Runtime with one thread."""
    session = Session(Graph(file), 1, CPU)

    def answered(x: Array) -> Array:
        blocks = [x[at : at + _BLOCK] for at in range(0, max(1, len(x)), _BLOCK)]
        return np.concatenate([session.run({"x:x": block})["out:answer"] for block in blocks])

    return answered


def answer(task: Task, module: nn.Module, example: Array) -> Answer:
    """Raises `ExportError` where ONNX has no counterpart for something in the module."""
    found = program(task, module, example)
    columns = {"x": Rows(np.asarray(example)[None], np.array([len(example)]))}
    return Answer(predict_graph(found, columns).model, found.initial())
