"""What crosses at a cut, and the two modules that it makes of a model."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from kitestring.core import Message, Rows, Tree
from kitestring.errors import SettingError, TaskError
from kitestring.exchange import wire
from kitestring.partition.graph import COUNTS, Graph, close, evaluating, line
from kitestring.partition.nodes import free


@dataclass(frozen=True)
class Cut:
    """Before layer `at`: 0 is all in the cloud, as many as there are layers all on the device.

    `alive` are the tensors that cross; `front` and `back` what each side computes. Where the model
    cannot be cut `why` says so, and nothing else holds."""

    at: int
    name: str
    alive: tuple[fx.Node, ...] = ()
    front: frozenset[fx.Node] = frozenset()
    back: frozenset[fx.Node] = frozenset()
    up: int = 0  # bytes of one row's message, packed
    down: int = 0  # of its answer; nothing where the device has it
    why: str = ""


def cuts(graph: Graph) -> list[Cut]:
    """Every place to cut, from all in the cloud to all on the device."""
    return [_cut(graph, at) for at in range(len(graph.layers) + 1)]


def halves(graph: Graph, cut: Cut | int) -> tuple[nn.Module, nn.Module]:
    """(front, back): `back(front(x))` is the model's answer, for any number of rows.

    What crosses is one tensor with rows in front, as a task's `front` and `back` have it: several
    of one dtype are laid side by side, [n, numbers]. Only where dtypes differ it is a tuple of
    tensors. The halves share the model's modules and weights; both compute what does not depend on
    the input, and neither writes into what it is given. Both are run on a few rows first: what
    gives something else than the model is not handed out. Raises `TaskError` where the model cannot
    be cut."""
    if isinstance(cut, int):
        if not 0 <= cut <= len(graph.layers):
            raise SettingError(f"cut {cut}", mend=f"Give 0 to {len(graph.layers)}")
        cut = _cut(graph, cut)
    if cut.why:
        raise TaskError(f"no cut {cut.name}: {cut.why}")
    front, back = _front(graph, cut), _back(graph, cut) if cut.alive else nn.Identity()
    _hold(graph, cut, front, back)
    return front, back


def _hold(graph: Graph, cut: Cut, front: nn.Module, back: nn.Module) -> None:
    """Refuse halves that give something else than the model."""
    x = graph.rows.to(next(graph.module.parameters(), graph.rows).device)
    with evaluating(graph.module), torch.no_grad():
        try:
            same = close(back(front(x.clone())), graph.module(x.clone()))
            problem = "the halves give something else than the model"
        except Exception as failed:  # anything can be wrong with somebody's model
            same, problem = False, f"the halves fail: {line(failed)}"
    if not same:
        raise TaskError(f"no cut {cut.name}: {problem}", mend="Cut it elsewhere")


def message(graph: Graph, cut: Cut) -> Message:
    """One row's message of zeros, as it crosses at the cut: the input as data, else features."""
    shapes = [_crossing(graph, group) for group in _groups(graph, cut.alive)]
    names = ["h"] if len(shapes) == 1 else [f"h{i}" for i in range(len(shapes))]
    leaves = {
        name: Rows(np.zeros((1, 1, *row), _numpy(dtype)), np.ones(1, np.int64))
        for name, (row, dtype) in zip(names, shapes, strict=True)
    }
    if cut.alive == (graph.input,):
        return Message(data=Tree(x=leaves["h"]))
    return Message(features=Tree(leaves))


def _size(found: Message) -> int:
    return sum(int(size[0]) for size in wire.sizes(found).values())


def _cut(graph: Graph, at: int) -> Cut:
    name = f"after {graph.layers[at - 1].name}" if at else "before the first layer"
    before = {graph.input, *(n for layer in graph.layers[:at] for n in layer.nodes)}
    after = {n for layer in graph.layers[at:] for n in layer.nodes}
    alive = _fewest(graph, [n for n in graph.kinds if n in before and _needed(graph, n, after)])
    if not after:
        return Cut(at, name, (), _reach([graph.output], set()))
    back = _reach([graph.output], {*alive, *_sizes(graph)}) - {*alive, *_sizes(graph)}
    why = _obstacle(graph, alive, back)
    if why:
        return Cut(at, name, why=why)
    found = Cut(at, name, alive, _reach(alive, set()), frozenset(back))
    shape = graph.shape(graph.output)
    answer = Rows(np.zeros((1, 1, *shape.row), _numpy(shape.dtype)), np.ones(1, np.int64))
    down = _size(Message(features=Tree(answer=answer)))
    up = _size(message(graph, found))
    return Cut(at, name, alive, found.front, found.back, up, down)


def _needed(graph: Graph, node: fx.Node, after: set[fx.Node]) -> bool:
    if graph.kinds[node] in ("fixed", "size"):
        return False  # the cloud computes it itself
    return (bool(after) and node is graph.output) or any(user in after for user in node.users)


def _fewest(graph: Graph, alive: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """What must cross for these to be known: a view of what crosses need not, and of several views
    of one tensor, that one crosses where it is smaller."""
    sources = {node: _sources(graph, node) for node in alive}
    found: set[fx.Node] = set()
    for whole in {chain[-1] for chain in sources.values()}:
        views = [node for node in alive if sources[node][-1] is whole]
        own = [v for v in views if not set(views) & set(sources[v][1:])]
        smaller = not _hindrance(graph, whole) and _numbers(graph, [whole]) < _numbers(graph, own)
        found |= {whole} if smaller else set(own)
    return tuple(n for n in graph.kinds if n in found)


def _sources(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The node, what it is a view of, what that is a view of, ..."""
    chain = [node]
    while free(chain[-1]):
        given = [n for n in chain[-1].all_input_nodes if graph.kinds[n] in ("rows", "parts")]
        if len(given) != 1:
            break
        chain.append(given[0])
    return chain


def _numbers(graph: Graph, nodes: Iterable[fx.Node]) -> float:
    """Bytes of a row's values; of what cannot cross, no number is too large."""
    return sum(
        math.inf
        if _hindrance(graph, node)
        else math.prod(graph.shape(node).row) * graph.shape(node).dtype.itemsize
        for node in nodes
    )


def _sizes(graph: Graph) -> Iterable[fx.Node]:
    return (n for n, kind in graph.kinds.items() if kind == "size")


def _reach(nodes: Iterable[fx.Node], stop: set[fx.Node]) -> frozenset[fx.Node]:
    """They and what they are computed from, up to those to stop at."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in stop else node.all_input_nodes
    return frozenset(found)


def _obstacle(graph: Graph, alive: Iterable[fx.Node], back: Iterable[fx.Node]) -> str:
    for node in alive:
        if why := _hindrance(graph, node):
            return f"{node.name}, which is needed behind it, {why}"
    for node in back:
        for given in node.all_input_nodes:
            if graph.kinds[given] == "size" and _formula(graph.seen[given]) is _NONE:
                return f"{given.name}, a size, is no multiple of the rows"
    return ""


def _hindrance(graph: Graph, node: fx.Node) -> str:
    """Why a value cannot cross; nothing where it can."""
    if graph.kinds[node] != "rows":
        return "is several tensors" if graph.kinds[node] == "parts" else "is no tensor"
    shape = graph.shape(node)
    if shape.axis is None:
        return "has no axis of rows alone"
    return "" if _numpy(shape.dtype) else f"is {shape.dtype}, which cannot cross"


def _numpy(dtype: torch.dtype) -> Any:
    """The dtype on the wire; None of one that cannot cross."""
    name = str(dtype).removeprefix("torch.")
    return np.dtype(name) if name in wire.DTYPES else None


# --- sizes: numbers that follow from how many rows there are


@dataclass(frozen=True)
class _Linear:
    """a n + b"""

    a: int
    b: int


_NONE = object()


def _formula(found: Sequence[Any]) -> Any:
    """What the three runs gave as one thing with `_Linear` in it; _NONE where it is none."""
    one, two, three = found
    if isinstance(one, list | tuple):
        parts = [_formula(p) for p in zip(one, two, three, strict=False)]
        broken = len({len(one), len(two), len(three)}) > 1 or any(p is _NONE for p in parts)
        return _NONE if broken else tuple(parts)
    if one == two == three:
        return one
    if not all(isinstance(f, int) for f in found):
        return _NONE
    a = (two - one) // (COUNTS[1] - COUNTS[0])
    b = one - a * COUNTS[0]
    return (
        _Linear(a, b) if all(a * n + b == f for n, f in zip(COUNTS, found, strict=True)) else _NONE
    )


def _varies(formula: Any) -> bool:
    if isinstance(formula, tuple):
        return any(_varies(part) for part in formula)
    return isinstance(formula, _Linear)


def _written(graph: fx.Graph, formula: Any, rows: fx.Node | None) -> Any:
    if isinstance(formula, tuple):
        return tuple(_written(graph, part, rows) for part in formula)
    if not isinstance(formula, _Linear):
        return formula
    many = graph.call_function(operator.mul, (rows, formula.a)) if formula.a != 1 else rows
    return graph.call_function(operator.add, (many, formula.b)) if formula.b else many


# --- the two modules


def _groups(graph: Graph, alive: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """By dtype: each crosses as one tensor."""
    out: dict[torch.dtype, list[fx.Node]] = {}
    for node in alive:
        out.setdefault(graph.shape(node).dtype, []).append(node)
    return list(out.values())


def _crossing(graph: Graph, group: Sequence[fx.Node]) -> tuple[tuple[int, ...], torch.dtype]:
    """A row's shape, and the dtype."""
    shapes = [graph.shape(node) for node in group]
    if len(shapes) == 1:
        return shapes[0].row, shapes[0].dtype
    return (sum(math.prod(s.row) for s in shapes),), shapes[0].dtype


def _copied(new: fx.Graph, graph: Graph, nodes: Iterable[fx.Node], env: dict[fx.Node, Any]) -> None:
    """In the order in which they are computed."""
    wanted = set(nodes)
    for node in graph.module.graph.nodes:
        if node in wanted and node not in env:
            env[node] = new.node_copy(node, env.__getitem__)


def _front(graph: Graph, cut: Cut) -> fx.GraphModule:
    new = fx.Graph()
    given = new.node_copy(graph.input)
    written = graph.input in _touched(graph, cut.front)
    env: dict[fx.Node, Any] = {graph.input: _anew(new, given) if written else given}
    _copied(new, graph, cut.front, env)
    groups = _groups(graph, cut.alive)
    out = [_packed(new, graph, group, env) for group in groups] or [env[graph.output]]
    new.output(out[0] if len(out) == 1 else tuple(out))
    return fx.GraphModule(graph.module, new, "Front")


def _touched(graph: Graph, side: Iterable[fx.Node]) -> set[fx.Node]:
    """What operations of that side write into."""
    return {node for writer in side for node in graph.writes.get(writer, ())}


def _anew(new: fx.Graph, node: fx.Node) -> fx.Node:
    return new.call_method("clone", (node,), {"memory_format": torch.contiguous_format})


def _packed(
    new: fx.Graph, graph: Graph, group: Sequence[fx.Node], env: Mapping[fx.Node, Any]
) -> fx.Node:
    parts = []
    for node in group:
        axis, part = graph.shape(node).axis, env[node]
        part = new.call_function(torch.movedim, (part, axis, 0)) if axis else part
        if len(group) > 1:
            few = len(graph.shape(node).row)
            shape = (part, 1) if few == 0 else (part, 1, -1)
            part = new.call_function(torch.unsqueeze if few == 0 else torch.flatten, shape)
        parts.append(part)
    return parts[0] if len(parts) == 1 else new.call_function(torch.cat, (parts, 1))


def _back(graph: Graph, cut: Cut) -> fx.GraphModule:
    new = fx.Graph()
    groups = _groups(graph, cut.alive)
    given = new.placeholder("h")
    leaves = [given] if len(groups) == 1 else [
        new.call_function(operator.getitem, (given, i)) for i in range(len(groups))
    ]  # fmt: skip
    env: dict[fx.Node, Any] = {}
    for leaf, group in zip(leaves, groups, strict=True):
        _unpacked(new, graph, leaf, group, env)
    for node in _touched(graph, cut.back) & set(cut.alive):
        env[node] = _anew(new, env[node])
    sizes = {n for b in cut.back for n in b.all_input_nodes if graph.kinds[n] == "size"}
    written = {n: _formula(graph.seen[n]) for n in graph.kinds if n in sizes}
    rows = new.call_method("size", (leaves[0], 0)) if _varies(tuple(written.values())) else None
    env |= {node: _written(new, formula, rows) for node, formula in written.items()}
    _copied(new, graph, cut.back, env)
    new.output(env[graph.output])
    return fx.GraphModule(graph.module, new, "Back")


def _unpacked(
    new: fx.Graph, graph: Graph, leaf: fx.Node, group: Sequence[fx.Node], env: dict[fx.Node, Any]
) -> None:
    at = 0
    for node in group:
        shape, part = graph.shape(node), leaf
        if len(group) > 1:
            numbers = math.prod(shape.row)
            part = new.call_function(torch.narrow, (leaf, 1, at, numbers))
            part = (
                new.call_method("unflatten", (part, 1, shape.row))
                if shape.row
                else new.call_function(torch.squeeze, (part, 1))
            )
            at += numbers
        part = new.call_function(torch.movedim, (part, 0, shape.axis)) if shape.axis else part
        # As it was before it crossed, so that a `view` of it is possible.
        env[node] = part if part is leaf else new.call_method("contiguous", (part,))
