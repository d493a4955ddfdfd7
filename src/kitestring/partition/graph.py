"""A model as layers in execution order, and what each of them gives for any number of rows.

`torch.fx` follows the model's code where it can, and keeps its modules whole; `torch.export` does
where that code looks at sizes. Three runs with different numbers of rows then say which values are
rows, which are sizes, and how sizes follow from the number of rows.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from kitestring.errors import TaskError
from kitestring.partition.nodes import called, free, leaves, of_shape
from kitestring.partition.writes import settle

COUNTS = (2, 3, 5)  # rows: a size that is a n + b for all three is so for every n
_CLOSE = 1e-4  # of the largest output: float32, summed in another order

Kind: TypeAlias = Literal["rows", "parts", "value", "fixed", "size"]


@dataclass(frozen=True)
class Shape:
    """Of a tensor: its sizes in each run."""

    sizes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype

    @property
    def axis(self) -> int | None:
        """Which axis is the rows; None where there is not exactly one, or others change too."""
        if len({len(s) for s in self.sizes}) != 1:
            return None
        change = [i for i, s in enumerate(zip(*self.sizes, strict=True)) if len(set(s)) > 1]
        if len(change) != 1:
            return None
        same = all(s[change[0]] == n for s, n in zip(self.sizes, COUNTS, strict=True))
        return change[0] if same else None

    @property
    def row(self) -> tuple[int, ...]:
        """Sizes of one row, without that axis."""
        axis = self.axis
        return tuple(size for i, size in enumerate(self.sizes[0]) if i != axis)


@dataclass(frozen=True)
class Layer:
    name: str
    nodes: tuple[fx.Node, ...]  # one after the other


@dataclass(frozen=True)
class Graph:
    """`kinds`: "rows" are tensors that depend on the input, "parts" tuples of them, "value" other
    things that depend on what is in it; "fixed" and "size" follow from the number of rows alone.
    `seen`: what a node gave in each run, as `Shape` for tensors. `writes`: of each node that writes
    into a tensor that there is, the nodes that may share its memory."""

    module: fx.GraphModule
    how: str  # "torch.fx" or "torch.export"
    input: fx.Node
    output: fx.Node  # what the output node returns
    layers: tuple[Layer, ...]
    kinds: Mapping[fx.Node, Kind]
    seen: Mapping[fx.Node, Any]
    writes: Mapping[fx.Node, Set[fx.Node]]
    rows: Tensor  # a few, to hold the halves against the whole

    def shape(self, node: fx.Node) -> Shape:
        found = self.seen[node]
        assert isinstance(found, Shape)
        return found


def trace(module: nn.Module, rows: Tensor) -> Graph:
    """`rows` [n, ...] are examples of the model's one input. The graph shares the model's modules
    and weights. Raises `TaskError` where the model cannot be followed, gives no single tensor with
    a row for each row, or mixes rows."""
    with evaluating(module), torch.no_grad():
        _answers(module, rows)
        problems = []
        for how, follow in (("torch.fx", _by_fx), ("torch.export", _by_export)):
            try:
                traced = follow(module, rows)
                writes = settle(traced, some(rows, COUNTS[0]))
                _same(module, traced, rows)
                break
            except Exception as problem:  # anything can be wrong with somebody's model
                problems.append(f"{how}: {line(problem)}")
        else:
            raise TaskError(
                f"the model's layers cannot be followed ({'; '.join(problems)})",
                mend="Write its forward without branches on values, x.shape[0] for len(x), and "
                "nothing in place: h = h.relu() for h.relu_(), torch.where or cat for h[:, 0] = 0",
            )
        seen = _seen(traced, rows)
    (given,) = (n for n in traced.graph.nodes if n.op == "placeholder")
    output = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    kinds = _kinds(traced, seen)
    layers = _layers(traced, kinds)
    few = some(rows, COUNTS[1])
    return Graph(traced, how, given, output, layers, kinds, seen, writes, few)


def some(rows: Tensor, count: int) -> Tensor:
    """That many rows, over and over if there are fewer."""
    return rows[torch.arange(count) % len(rows)]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """As it predicts; then as it was."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def line(problem: Exception) -> str:
    """Its first line, and its kind."""
    said = (str(problem).strip().splitlines() or [""])[0][:120]
    return f"{type(problem).__name__}: {said}" if said else type(problem).__name__


def _answers(module: nn.Module, rows: Tensor) -> None:
    """Refuse what has no answer for each row, or another one beside other rows."""
    few, more = (some(rows, n) for n in (COUNTS[0], COUNTS[-1]))
    try:
        one, other = module(few), module(more)
    except Exception as problem:
        shape = "x".join(map(str, rows.shape[1:]))
        raise TaskError(
            f"the model fails on rows of {shape} ({rows.dtype}): {line(problem)}",
            mend="Give the shape of one row, as in --input 3x224x224 or 20:int64",
        ) from None
    if not isinstance(one, Tensor) or one.shape[:1] != few.shape[:1]:
        got = f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise TaskError(
            f"the model gives {got} for {len(few)} rows", mend="Return one tensor, a row for each"
        )
    if not close(one, other[: len(one)]):
        raise TaskError("a row's answer depends on the other rows beside it, or on chance")


def _same(module: nn.Module, traced: fx.GraphModule, rows: Tensor) -> None:
    for count in COUNTS:
        # Each gets rows of its own: what the one writes into them the other must not see.
        if not close(traced(some(rows, count)), module(some(rows, count))):
            raise ValueError("the traced layers give something else than the model")


def close(a: Tensor, b: Tensor) -> bool:
    """Alike but for the order in which float32 is summed."""
    return _apart(a, b) <= _CLOSE


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    far = torch.where(a.isfinite(), (a - b).abs(), 0)
    size = torch.where(b.isfinite(), b.abs(), 0)
    return float(far.amax() / size.amax().clamp(min=1)) if a.numel() else 0.0


class _Tracer(fx.Tracer):
    """Keeps torch's own modules whole, but for those made of others, as a transformer is."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = not list(m.children()) or isinstance(m, nn.MultiheadAttention)
        return whole and super().is_leaf_module(m, module_qualified_name)


def _by_fx(module: nn.Module, rows: Tensor) -> fx.GraphModule:
    return fx.GraphModule(module, _Tracer().trace(module))


def _by_export(module: nn.Module, rows: Tensor) -> fx.GraphModule:
    dynamic = ({0: torch.export.Dim("n")},)
    program = torch.export.export(module, (some(rows, COUNTS[-1]),), dynamic_shapes=dynamic)
    if anew := _writes(program.graph_module):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls what it deprecates itself
            # The same operations, but each gives a tensor of its own.
            program = program.run_decompositions({torch.ops.aten.copy.default: _copy})
    found = program.module()
    assert isinstance(found, fx.GraphModule)
    graph = found.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in reversed(graph.nodes):
        if any(word in str(node.target) for word in ("_guards_fn", "_assert")):
            graph.erase_node(node)
        elif anew and called(node) == "copy_":
            # At the end it writes into the input and the buffers, which no answer depends on.
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
        elif node.op == "output":
            (node.args,) = ((node.args[0][0],),)
    graph.eliminate_dead_code()
    return fx.GraphModule(found, graph)


def _copy(into: Tensor, values: Tensor, non_blocking: bool = False) -> Tensor:
    """What `into.copy_(values)` leaves there: torch's own has no derivative."""
    return values.to(into).expand_as(into)


def _writes(exported: fx.GraphModule) -> bool:
    graphs = [m.graph for m in exported.modules() if isinstance(m, fx.GraphModule)]
    schemas = [getattr(node.target, "_schema", None) for graph in graphs for node in graph.nodes]
    return any(schema.is_mutable for schema in schemas if schema)


class _Recorder(fx.Interpreter):
    """Keeps of each value what `Graph.seen` is made of."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        self.kept[n] = (tuple(found.shape), found.dtype) if isinstance(found, Tensor) else found
        return found


def _seen(traced: fx.GraphModule, rows: Tensor) -> dict[fx.Node, Any]:
    runs = []
    for count in COUNTS:
        recorder = _Recorder(traced)
        recorder.run(some(rows, count))
        runs.append(recorder.kept)
    out: dict[fx.Node, Any] = {}
    for node in runs[0]:
        found = tuple(run[node] for run in runs)
        tensors = [f for f in found if _is_shape(f)]
        out[node] = Shape(tuple(f[0] for f in found), found[0][1]) if tensors else found
    return out


def _is_shape(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], torch.dtype)


def _kinds(traced: fx.GraphModule, seen: Mapping[fx.Node, Any]) -> dict[fx.Node, Kind]:
    out: dict[fx.Node, Kind] = {}
    for node in traced.graph.nodes:
        found = seen[node]
        depends = node.op == "placeholder" or any(
            out[n] in ("rows", "parts", "value") for n in node.all_input_nodes
        )
        tensor = isinstance(found, Shape)
        holds = not tensor and any(isinstance(p, Tensor) for p in leaves(found[0]))
        if depends and not tensor and not holds and of_shape(node):
            depends = False
        if not depends:
            out[node] = "fixed" if tensor or holds else "size"
        else:
            out[node] = "rows" if tensor else "parts" if holds else "value"
    return out


def _layers(traced: fx.GraphModule, kinds: Mapping[fx.Node, Kind]) -> tuple[Layer, ...]:
    """What depends on the input, in its order; a free operation belongs to what is before it."""
    groups: list[tuple[object, str, list[fx.Node]]] = []
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output") or kinds[node] in ("fixed", "size"):
            continue
        key, name = _home(traced, node)
        if groups and (free(node) or (key is not None and key == groups[-1][0])):
            groups[-1][2].append(node)
        else:
            groups.append((key, name, [node]))
    times: dict[str, int] = {}
    out = []
    for _, name, nodes in groups:
        times[name] = times.get(name, 0) + 1
        out.append(Layer(name if times[name] == 1 else f"{name} #{times[name]}", tuple(nodes)))
    return tuple(out)


def _home(traced: fx.GraphModule, node: fx.Node) -> tuple[object, str]:
    """The layer of torch.nn that a node is of, if it is, and what people call it."""
    if node.op == "call_module":
        return None, f"{node.target} {type(operator.attrgetter(str(node.target))(traced)).__name__}"
    stack = node.meta.get("nn_module_stack") or {}
    key, (path, kind) = next(reversed(stack.items())) if stack else (None, ("", ""))
    kind = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    if kind.startswith("torch.nn.modules.") and ".container." not in kind:
        return key, f"{path} {kind.rpartition('.')[2]}"
    return None, f"{path} {called(node)}".strip()
