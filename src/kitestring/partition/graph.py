"""A model as layers in execution order, and what each of them gives for any number of rows.

`torch.fx` follows the model's code where it can, and keeps its modules whole; `torch.export` does
where that code looks at sizes. Three runs with different numbers of rows then say which values are
rows, which are sizes, and how sizes follow from the number of rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

from kitestring.errors import TaskError

COUNTS = (2, 3, 5)  # rows: a size that is a n + b for all three is so for every n
_CLOSE = 1e-4  # of the largest output: float32, summed in another order

# Of tensors, these give what follows from shape and type alone.
_SIZES = {"size", "dim", "ndimension", "numel", "sym_size", "sym_numel", "len"}
_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda"}
# These move nothing: a cut behind one of them is the cut before it.
_FREE = {
    "getitem", "reshape", "view", "view_as", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "flatten", "unflatten", "unbind", "split", "split_with_sizes", "chunk", "contiguous", "expand",
    "expand_as", "slice", "select", "narrow", "movedim", "swapaxes", "detach", "alias",
}  # fmt: skip

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
    `seen`: what a node gave in each run, as `Shape` for tensors."""

    module: fx.GraphModule
    how: str  # "torch.fx" or "torch.export"
    input: fx.Node
    output: fx.Node  # what the output node returns
    layers: tuple[Layer, ...]
    kinds: Mapping[fx.Node, Kind]
    seen: Mapping[fx.Node, Any]

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
                _same(module, traced, rows)
                break
            except Exception as problem:  # anything can be wrong with somebody's model
                problems.append(f"{how}: {_line(problem)}")
        else:
            raise TaskError(
                f"the model's layers cannot be followed ({'; '.join(problems)})",
                mend="Write its forward without branches on values, and x.shape[0] for len(x)",
            )
        seen = _seen(traced, rows)
    (given,) = (n for n in traced.graph.nodes if n.op == "placeholder")
    output = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    kinds = _kinds(traced, seen)
    layers = _layers(traced, kinds)
    return Graph(traced, how, given, output, layers, kinds, seen)


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


def _line(problem: Exception) -> str:
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
            f"the model fails on rows of {shape} ({rows.dtype}): {_line(problem)}",
            mend="Give the shape of one row, as in --input 3x224x224 or 20:int64",
        ) from None
    if not isinstance(one, Tensor) or one.shape[:1] != few.shape[:1]:
        got = f"shape {tuple(one.shape)}" if isinstance(one, Tensor) else type(one).__name__
        raise TaskError(
            f"the model gives {got} for {len(few)} rows", mend="Return one tensor, a row for each"
        )
    if _apart(one, other[: len(one)]) > _CLOSE:
        raise TaskError("a row's answer depends on the other rows beside it, or on chance")


def _same(module: nn.Module, traced: fx.GraphModule, rows: Tensor) -> None:
    for count in COUNTS:
        x = some(rows, count)
        if _apart(traced(x), module(x)) > _CLOSE:
            raise ValueError("the traced layers give something else than the model")


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
    found = program.module()
    assert isinstance(found, fx.GraphModule)
    graph = found.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in reversed(graph.nodes):
        if any(word in str(node.target) for word in ("_guards_fn", "_assert")):
            graph.erase_node(node)
        elif node.op == "output":
            (node.args,) = ((node.args[0][0],),)
    graph.eliminate_dead_code()
    return fx.GraphModule(found, graph)


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


def called(node: fx.Node) -> str:
    """The operation's name, whichever way it was traced: "reshape", "add"."""
    if node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        name = schema.name if schema else getattr(node.target, "__name__", str(node.target))
        return str(name).rpartition("::")[2]
    return str(node.target)


def free(node: fx.Node) -> bool:
    """A view, or as good as one."""
    return node.op in ("call_function", "call_method") and called(node) in _FREE


def _kinds(traced: fx.GraphModule, seen: Mapping[fx.Node, Any]) -> dict[fx.Node, Kind]:
    out: dict[fx.Node, Kind] = {}
    for node in traced.graph.nodes:
        found = seen[node]
        depends = node.op == "placeholder" or any(
            out[n] in ("rows", "parts", "value") for n in node.all_input_nodes
        )
        tensor = isinstance(found, Shape)
        holds = not tensor and any(isinstance(p, Tensor) for p in _leaves(found[0]))
        if depends and not tensor and not holds and _of_shape(node):
            depends = False
        if not depends:
            out[node] = "fixed" if tensor or holds else "size"
        else:
            out[node] = "rows" if tensor else "parts" if holds else "value"
    return out


def _of_shape(node: fx.Node) -> bool:
    name = called(node)
    return name in _SIZES or (name == "getattr" and node.args[1] in _ATTRIBUTES)


def _leaves(found: Any) -> Iterator[Any]:
    if isinstance(found, list | tuple):
        for part in found:
            yield from _leaves(part)
    else:
        yield found


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
