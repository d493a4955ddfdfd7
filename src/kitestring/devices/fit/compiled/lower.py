"""From a graph of tensor operations to kernels over buffers."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from kitestring.devices.fit.compiled.kernels import Table
from kitestring.devices.fit.compiled.lowering import HEAVY, Lowering, Product, RowsAdded
from kitestring.devices.fit.compiled.operations import OPERATIONS
from kitestring.devices.fit.compiled.tensors import named
from kitestring.devices.fit.compiled.views import Buffer, Expr, Refused, Value, View, leaves, plain

_LONG = 12  # operations in one expression


def lower(
    traced: GraphModule,
    inputs: Sequence[View],
    late: bool = False,
    tables: Mapping[Buffer, Table] | None = None,
) -> tuple[Lowering, list[Any]]:
    """Kernels that compute the graph's outputs from its placeholders, given in their order."""
    graph = traced.graph
    output = next(n for n in graph.nodes if n.op == "output")
    results = list(output.args[0])
    low = Lowering(late=_late(results) if late else frozenset(), tables=dict(tables or {}))
    known: dict[Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "get_attr":
            known[node] = _constant(low, getattr(traced, str(node.target)))
        elif node.op == "call_function":
            known[node] = _node(low, node, known)
    return low, [known[r] if isinstance(r, Node) else r for r in results]


def _constant(low: Lowering, tensor: Tensor) -> View:
    """A tensor that the module holds beside its weights, such as a mask."""
    view = plain(Buffer("constant", named(tensor.dtype), max(1, tensor.numel()), fixed=True),
                 tuple(tensor.shape))  # fmt: skip
    assert view.buffer is not None
    low.constants[view.buffer] = tensor.detach().contiguous().numpy()
    return view


def _late(results: Sequence[Any]) -> frozenset[Node]:
    """Nodes that are only passed on, turned or not, to be an output."""
    found = set()
    for r in results:
        while isinstance(r, Node) and len(r.users) == 1:
            found.add(r)
            if str(r.target) not in ("aten.permute.default", "aten.clone.default"):
                break
            r = r.args[0]
    return frozenset(found)


def _node(low: Lowering, node: Node, known: Mapping[Node, Any]) -> Any:
    name = str(node.target).removesuffix(".default").removeprefix("aten.")
    if node.target is operator.getitem:
        return known[node.args[0]][node.args[1]]  # type: ignore[index]
    args = [_argument(known, a) for a in node.args]
    if name in ("permute", "clone") and isinstance(args[0], Product | RowsAdded):
        if name == "clone":
            return args[0]
        if isinstance(args[0], Product) and list(args[1]) == [1, 0]:
            return args[0].turned()
    args = [low.view(a) if isinstance(a, Product | RowsAdded) else a for a in args]
    args = [low.seen.get(a, a) if isinstance(a, Expr) else a for a in args]
    how = OPERATIONS.get(name) or OPERATIONS.get(name.split(".")[0])
    if how is None:
        raise Refused(f"{name} has no kernel")
    found = how(low, node, *args)
    return _settled(low, node, found) if isinstance(found, Expr) else found


def _argument(known: Mapping[Node, Any], a: Any) -> Any:
    if isinstance(a, Node):
        return known[a]
    if isinstance(a, list | tuple):
        return [_argument(known, x) for x in a]
    return a


def _settled(low: Lowering, node: Node, value: Expr) -> Value:
    """Compute now what several will read, or what grew long; constants never."""
    ops = list(value.ops())
    if not any(v.buffer for v in leaves(value)) and len(ops) <= 2:
        return value
    shared = len(node.users) > 1 and (len(ops) > 1 or ops[0] in HEAVY or ops[0] == "where")
    return low.view(value) if shared or len(ops) > _LONG else value
