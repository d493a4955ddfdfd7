"""One device after the other with plain `nn.Module` and `torch.optim`: the reference, for any
module.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.core import Array, Fit, Rows, Tree
from kitestring.devices.fit.programs import Program, tensor
from kitestring.devices.fit.schedule import Schedule


def load(module: nn.Module, weights: Mapping[str, Array], d: int) -> None:
    state = module.state_dict()
    with torch.no_grad():
        for name, stacked in weights.items():
            state[name].copy_(tensor(stacked[d]))


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
    """`seeds` [D] make a module's own randomness (dropout) a function of device and exchange."""
    assert program.loss is not None
    module = program.training
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    out = {name: np.array(stacked) for name, stacked in weights.items()}
    losses = np.zeros(len(plan.steps), np.float32)
    for d, steps in enumerate(plan.steps):
        load(module, weights, d)
        for count, start in zip(module.buffers(), program.module.buffers(), strict=True):
            if not count.is_floating_point():  # such as the number of batches seen
                count.copy_(start)
        torch.manual_seed(int(seeds[d] >> np.uint64(1)))
        train = [p for p in module.parameters() if p.requires_grad]
        step = torch.optim.SGD(train, lr) if optimiser == "sgd" else torch.optim.Adam(train, lr)
        columns = {k: tensor(r.values[d]) for k, r in rows.items()}
        for t in range(int(steps)):
            index = torch.from_numpy(plan.index[d, t][plan.real[d, t]])
            batch = {k: v[index] for k, v in columns.items()}
            for norm in norms:  # one row has no statistics: it takes those that there are
                norm.train(len(index) > 1)
            step.zero_grad(set_to_none=True)
            loss = program.loss(module(batch), batch).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            step.step()
            losses[d] += loss.item() / steps
        state = module.state_dict()
        for name, stacked in out.items():
            stacked[d] = state[name].numpy()
    return Fit(Tree(out), losses, plan.steps)


def predict(program: Program, weights: Tree, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Columns [D, L, ...] -> outputs [D, L, ...]."""
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for d in range(len(next(iter(inputs.values())))):
            load(program.evaluating, weights, d)
            batch = {k: tensor(v[d]) for k, v in inputs.items()}
            found.append(program.predict(program.evaluating(batch), batch))
    return {k: torch.stack([out[k] for out in found]).numpy() for k in found[0]}


def backward(
    program: Program,
    weights: Tree,
    columns: Mapping[str, Array],
    cotangent: Mapping[str, Array] | None,
    row_weights: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Loss [D], d weights [D, ...] and d columns [D, L, ...] of the weighted sum over rows.

    The gradients of what `predict` computes: no dropout, and rows do not see one another."""
    module = program.evaluating
    losses, d_weights, d_columns = [], [], []
    for d in range(len(row_weights)):
        load(module, weights, d)
        batch = {k: tensor(v[d]) for k, v in columns.items()}
        wanted = {k: v.requires_grad_() for k, v in batch.items() if v.is_floating_point()}
        named = {k: p for k, p in module.named_parameters() if p.requires_grad}
        out = module({**batch, **wanted})
        if cotangent is not None:
            total = sum((out[k] * tensor(c[d])).sum() for k, c in cotangent.items())
        else:
            assert program.loss is not None
            total = (program.loss(out, batch) * torch.from_numpy(row_weights[d])).sum()
        assert isinstance(total, Tensor)
        targets = [*named.values(), *wanted.values()]
        found = torch.autograd.grad(total, targets, allow_unused=True)
        filled = [
            torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)
        ]
        losses.append(float(total.detach()))
        d_weights.append(dict(zip(named, filled, strict=False)))
        d_columns.append(dict(zip(wanted, filled[len(named) :], strict=True)))
    return (
        np.array(losses, np.float32),
        {k: torch.stack([g[k] for g in d_weights]).numpy() for k in d_weights[0]},
        {k: torch.stack([g[k] for g in d_columns]).numpy() for k in d_columns[0]},
    )
