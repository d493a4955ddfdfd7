"""Operations that write into a tensor that there is, as `h.relu_()` and `nn.ReLU(inplace=True)` do.

Each half of a model is what its results are computed from. That holds only where nothing reads a
tensor after something else wrote into it: a write of which nobody takes the result would be lost,
and what shares memory within the model does not once it has crossed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor, fx, nn

from kitestring.partition.nodes import called, free, leaves, of_shape


class InPlace(Exception):
    """What is written to is read again in another way."""


def settle(traced: fx.GraphModule, rows: Tensor) -> dict[fx.Node, Set[fx.Node]]:
    """Who writes, and the nodes that may share the memory written to.

    Later uses of a tensor that was written to become uses of what the write gave, where both are
    one tensor: `h.relu_(); f(h)` is then `f(h.relu_())`. Raises `InPlace` where that is not all,
    as where a view is written to and the whole is used."""
    with torch.inference_mode(mode=False), torch.no_grad():
        watch = _Watch(traced)
        watch.run(rows.clone())
    out: dict[fx.Node, Set[fx.Node]] = {}
    if not watch.writes:
        return out
    place = {node: i for i, node in enumerate(traced.graph.nodes)}
    memory = _memory(traced, watch.env)
    for writer, targets in watch.writes.items():
        into = set().union(*(memory[node] for node in targets))
        behind = _behind(writer)
        sharing = [n for n in place if n not in behind and memory[n] & into]

        def late(user: fx.Node, after: int = place[writer]) -> bool:
            return place[user] > after

        for node in sharing:
            if _one(watch.env[node], watch.env[writer]):
                node.replace_all_uses_with(writer, late)
        # The model's own tensors last from call to call, so that there is no later and earlier.
        own = any(node.op == "get_attr" for node in sharing)
        users = {user for node in sharing for user in node.users} - {writer}
        read = [user for user in users if (own or late(user)) and not of_shape(user)]
        if read or (own and writer.users):
            what = "the model's own tensor" if own else "a tensor that is used again"
            raise InPlace(f"{_where(writer)} writes into {what}")
        out[writer] = frozenset(sharing)
    traced.recompile()
    return out


class _Watch(fx.Interpreter):
    """Keeps all values, and which of those that it was given each node wrote into."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.writes: dict[fx.Node, list[fx.Node]] = {}

    def run_node(self, n: fx.Node) -> Any:
        given = [(i, t) for i in n.all_input_nodes for t in _tensors(self.env[i])]
        before = [t._version for _, t in given]  # torch counts the writes into each tensor
        found = super().run_node(n)
        wrote = [i for (i, t), v in zip(given, before, strict=True) if t._version > v]
        # A dropout writes only in training.
        if n.op == "call_module" and getattr(self.fetch_attr(str(n.target)), "inplace", False):
            wrote += n.all_input_nodes[:1]
        if wrote:
            self.writes[n] = wrote
        return found


def _tensors(value: Any) -> list[Tensor]:
    return [part for part in leaves(value) if isinstance(part, Tensor)]


def _memory(traced: fx.GraphModule, values: Mapping[fx.Node, Any]) -> dict[fx.Node, set[int]]:
    """Where each node's tensors are. A `reshape` that copied here may be a view elsewhere, so it is
    where its input is too."""
    out: dict[fx.Node, set[int]] = {}
    for node in traced.graph.nodes:
        found = {t.untyped_storage().data_ptr() for t in _tensors(values[node])} - {0}
        if free(node) or (
            node.op == "call_module"
            and isinstance(traced.get_submodule(str(node.target)), nn.Flatten | nn.Unflatten)
        ):
            found.update(*(out[given] for given in node.all_input_nodes))
        out[node] = found
    return out


def _behind(node: fx.Node) -> set[fx.Node]:
    """It and what is computed from it."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += one.users
    return found


def _one(a: Any, b: Any) -> bool:
    """Both are the same numbers in the same place."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    same = a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
    return same and a.shape == b.shape and a.stride() == b.stride()


def _where(node: fx.Node) -> str:
    """As people would look for it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next((path for path, _ in reversed(stack.values())), "")
    return f"{called(node)} in {path}" if path and node.op != "call_module" else called(node)
