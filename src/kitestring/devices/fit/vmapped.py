"""All devices of a chunk at once: `torch.func.vmap` over per-device weights and rows.

Devices are sorted by their number of steps, and step t computes only the prefix that still has
one: no masked-out work, and the same numbers as one after the other within float error.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from kitestring.core import Array, Fit, Rows, Tree
from kitestring.devices.fit.programs import Program, tensor
from kitestring.devices.fit.schedule import Schedule

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {k: tensor(a) for k, a in arrays.items()}


def fit(
    program: Program,
    weights: Tree,
    rows: Mapping[str, Rows],
    plan: Schedule,
    *,
    lr: float,
    optimiser: str,
    seeds: Array,
) -> Fit:
    """`seeds` are not needed: a module with its own randomness is computed sequentially."""
    module, row_loss = program.training, program.loss
    assert row_loss is not None

    def loss(
        train: dict[str, Tensor], held: dict[str, Tensor], batch: dict[str, Tensor], w: Tensor
    ) -> Tensor:
        return (row_loss(functional_call(module, {**train, **held}, (batch,)), batch) * w).sum()

    gradient = vmap(grad_and_value(loss))
    order = np.argsort(-plan.steps, stable=True)
    steps = plan.steps[order]
    values = _tensors({k: a[order] for k, a in weights.items()})
    columns = _tensors({k: r.values[order] for k, r in rows.items()})
    index = torch.from_numpy(plan.index[order])
    share = plan.real[order] / np.maximum(1, plan.real[order].sum(-1, keepdims=True))
    share = torch.from_numpy(share.astype(np.float32))
    losses = torch.zeros(len(steps))
    train = {k: v.clone() for k, v in values.items() if k in program.trained}
    held = {k: v for k, v in values.items() if k not in program.trained}
    first = {k: torch.zeros_like(v) for k, v in train.items()} if optimiser == "adam" else {}
    second = {k: torch.zeros_like(v) for k, v in first.items()}
    for t in range(int(steps.max(initial=0))):
        k = int((steps > t).sum())
        lane = torch.arange(k)[:, None]
        batch = {name: v[lane, index[:k, t]] for name, v in columns.items()}
        now = {name: v[:k] for name, v in train.items()}
        grads, value = gradient(now, {name: v[:k] for name, v in held.items()}, batch, share[:k, t])
        losses[:k] += value
        for name, g in grads.items():
            if optimiser == "sgd":
                now[name].sub_(g, alpha=lr)
            else:
                m, v = first[name][:k], second[name][:k]
                m.lerp_(g, 1 - _BETAS[0])
                v.mul_(_BETAS[1]).addcmul_(g, g, value=1 - _BETAS[1])
                root = (v.sqrt() / (1 - _BETAS[1] ** (t + 1)) ** 0.5).add_(_EPS)
                now[name].addcdiv_(m, root, value=-lr / (1 - _BETAS[0] ** (t + 1)))
    back = np.argsort(order)
    done = {k: train[k].numpy()[back] if k in train else weights[k] for k in weights}
    mean = losses.numpy()[back] / np.maximum(1, plan.steps).astype(np.float32)
    return Fit(Tree(done), mean, plan.steps)


def predict(program: Program, weights: Tree, inputs: Mapping[str, Array]) -> dict[str, Array]:
    def one(w: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return program.predict(functional_call(program.evaluating, w, (batch,)), batch)

    with torch.no_grad():
        out = vmap(one)(_tensors(weights), _tensors(inputs))
    return {k: v.numpy() for k, v in out.items()}


def backward(
    program: Program,
    weights: Tree,
    columns: Mapping[str, Array],
    cotangent: Mapping[str, Array] | None,
    row_weights: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Loss [D], d weights [D, ...] and d columns [D, L, ...] of the weighted sum over rows."""
    everything = _tensors(columns)
    floats = {k: v for k, v in everything.items() if v.is_floating_point()}
    others = {k: v for k, v in everything.items() if k not in floats}
    values = _tensors(weights)
    train = {k: v for k, v in values.items() if k in program.trained}
    held = {k: v for k, v in values.items() if k not in program.trained}

    def total(
        w: dict[str, Tensor], f: dict[str, Tensor], rest: tuple[dict[str, Tensor], ...]
    ) -> Tensor:
        fixed, other, cot, share = rest[0], rest[1], rest[2], rest[3]["w"]
        batch = {**other, **f}
        out = functional_call(program.evaluating, {**w, **fixed}, (batch,))
        if cotangent is not None:
            return torch.stack([(out[k] * c).sum() for k, c in cot.items()]).sum()
        assert program.loss is not None
        return (program.loss(out, batch) * share).sum()

    rest = (held, others, _tensors(cotangent or {}), {"w": torch.from_numpy(row_weights)})
    grads, loss = vmap(grad_and_value(total, argnums=(0, 1)))(train, floats, rest)
    d_weights, d_columns = ({k: v.numpy() for k, v in g.items()} for g in grads)
    return loss.numpy(), d_weights, d_columns
