"""From a module and a loss to the graph of one step: forward and backward, for one device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, functionalize, grad_and_value
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from kitestring.devices.fit.compiled.views import Refused
from kitestring.devices.fit.programs import Program

aten = torch.ops.aten
_TAKEN_APART = [
    aten._log_softmax, aten._log_softmax_backward_data, aten._softmax,
    aten._softmax_backward_data, aten.native_layer_norm, aten.native_layer_norm_backward,
    aten.native_group_norm, aten.native_group_norm_backward, aten.gelu, aten.gelu_backward,
    aten.var_mean, aten.var, aten._fused_rms_norm, aten._fused_rms_norm_backward,
    aten.native_batch_norm, aten.split_with_sizes, aten.split, aten.stack, aten.addmm,
]  # fmt: skip
_UNTRACEABLE = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError)
MOST = 1500  # nodes of a graph that is worth compiling: more come from unrolled recurrences


@cache
def table() -> Mapping[Any, Callable[..., Any]]:
    """How torch's operations are taken apart into those that have kernels."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    kept = (aten.addmm.default,)
    found = {**core_aten_decompositions(), **get_decompositions(_TAKEN_APART)}
    return {op: how for op, how in found.items() if op not in kept}


def step(
    program: Program,
    weights: Mapping[str, Tensor],
    trained: frozenset[str],
    batch: dict[str, Tensor],
) -> tuple[GraphModule, list[str]]:
    """loss and gradients of the mean over rows weighted by `batch["share"]`.

    Placeholders are the weights, then the columns, in sorted order; the outputs are the loss and
    one gradient for each name returned."""
    assert program.loss is not None
    row_loss, module = program.loss, program.training  # copied before it is traced

    def loss(
        train: dict[str, Tensor], held: dict[str, Tensor], rows: dict[str, Tensor], share: Tensor
    ) -> Tensor:
        out = functional_call(module, {**train, **held}, (rows,))
        return (row_loss(out, rows) * share).sum()

    slope = grad_and_value(loss)
    names = sorted(trained)

    def both(w: dict[str, Tensor], rows: dict[str, Tensor]) -> list[Tensor]:
        rows = dict(rows)
        share = rows.pop("share")
        train = {k: v for k, v in w.items() if k in trained}
        held = {k: v for k, v in w.items() if k not in trained}
        gradients, value = slope(train, held, rows, share)
        return [value, *(gradients[k] for k in names)]

    return _graph(program, both, weights, batch), names


def forward(
    program: Program, weights: Mapping[str, Tensor], batch: dict[str, Tensor]
) -> tuple[GraphModule, list[str]]:
    """What `predict` gives for each row."""
    names: list[str] = []
    module = program.evaluating

    def outputs(w: dict[str, Tensor], rows: dict[str, Tensor]) -> list[Tensor]:
        out = program.predict(functional_call(module, w, (rows,)), rows)
        names[:] = list(out)
        return list(out.values())

    return _graph(program, outputs, weights, batch), names


def backward(
    program: Program, weights: Mapping[str, Tensor], batch: dict[str, Tensor], cotangents: list[str]
) -> tuple[GraphModule, list[str]]:
    """Loss, then gradients of the trained weights, then of the float columns: names "w:..." and
    "x:...". With `cotangents` the columns "by:..." hold them, else "share" weighs the rows."""
    trained, module = program.trained, program.evaluating
    names: list[str] = []

    def total(
        train: dict[str, Tensor], floats: dict[str, Tensor], held: dict[str, Tensor],
        others: dict[str, Tensor], given: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        rows = {**others, **floats}
        out = functional_call(module, {**train, **held}, (rows,))
        if cotangents:
            return torch.stack([(out[k] * given[f"by:{k}"]).sum() for k in cotangents]).sum()
        assert program.loss is not None
        return (program.loss(out, rows) * given["share"]).sum()

    slope = grad_and_value(total, argnums=(0, 1))

    def both(w: dict[str, Tensor], columns: dict[str, Tensor]) -> list[Tensor]:
        given = {k: v for k, v in columns.items() if k == "share" or k.startswith("by:")}
        rows = {k: v for k, v in columns.items() if k not in given}
        floats = {k: v for k, v in rows.items() if v.is_floating_point()}
        others = {k: v for k, v in rows.items() if k not in floats}
        train = {k: v for k, v in w.items() if k in trained}
        held = {k: v for k, v in w.items() if k not in trained}
        (d_weights, d_columns), value = slope(train, floats, held, others, given)
        names[:] = ["loss", *(f"w:{k}" for k in d_weights), *(f"x:{k}" for k in d_columns)]
        return [value, *d_weights.values(), *d_columns.values()]

    return _graph(program, both, weights, batch), names


def _graph(
    program: Program,
    f: Callable[..., list[Tensor]],
    weights: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
) -> GraphModule:
    w = {k: weights[k] for k in sorted(weights)}
    columns = {k: batch[k] for k in sorted(batch)}
    if any(isinstance(m, nn.RNNBase) for m in program.module.modules()):
        raise Refused("recurrent layers are unrolled step by step")
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            traced = make_fx(functionalize(f), decomposition_table=dict(table()))(w, columns)
            if not _out_of_place(traced):
                traced = make_fx(functionalize(traced))(w, columns)
    except _UNTRACEABLE as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise Refused(f"it cannot be traced ({lines[0][:80]})") from None
    graph = traced.graph
    graph.eliminate_dead_code()
    if len(graph.nodes) > MOST:
        raise Refused(f"a graph of {len(graph.nodes)} operations")
    return traced


_VIEWS = {"view", "permute", "slice", "select", "expand", "squeeze", "unsqueeze", "as_strided",
          "getitem", "alias", "detach", "t", "transpose"}  # fmt: skip


def _out_of_place(traced: GraphModule) -> bool:
    """Some of torch's own ways to take operations apart write in place: where nothing else looks
    at what is overwritten, the same operation out of place is the same. False: not everywhere."""
    order = {node: at for at, node in enumerate(traced.graph.nodes)}
    for node, at in order.items():
        name = _name(node)
        if not name.endswith("_") or node.op != "call_function":
            continue
        old = node.args[0]
        if not isinstance(old, Node) or old.op != "call_function" or _name(old) in _VIEWS:
            return False
        others = [user for user in old.users if user is not node]
        if any(order[user] > at or _name(user) in _VIEWS for user in others):
            return False
        packet = getattr(aten, name[:-1], None)
        if packet is None:
            return False
        node.target = getattr(packet, str(node.target).rsplit(".", 1)[-1])
    return True


def _name(node: Node) -> str:
    parts = getattr(node.target, "__name__", str(node.target)).split(".")
    return parts[-2] if len(parts) > 1 and parts[0] in ("aten", "prims") else parts[0]
