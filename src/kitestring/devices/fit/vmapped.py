"""All devices of a chunk at once: `torch.func.vmap` over per-device weights and rows.

Devices are sorted by their number of steps, and step t computes only the prefix that still has
one: no masked-out work, and the same numbers as one after the other within float error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from kitestring.core import Array, Fit, Recipe, Rows, Tree
from kitestring.devices.fit.programs import CPU, Program, array
from kitestring.devices.schedule import Schedule

_BETAS, _EPS = (0.9, 0.999), 1e-8  # torch.optim.Adam's defaults
_CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s

Leaves = dict[str, Tensor]


def _tensors(program: Program, arrays: Mapping[str, Array]) -> Leaves:
    return {k: program.put(a) for k, a in arrays.items()}


def fit(
    program: Program,
    weights: Tree,
    rows: Mapping[str, Rows],
    plan: Schedule,
    recipe: Recipe,
    *,
    centre: Tree | None = None,
    linear: Tree | None = None,
    seeds: Array,
) -> Fit:
    """`seeds` are not needed: a module with its own randomness is computed sequentially."""
    module, row_loss = program.training, program.loss
    assert row_loss is not None

    def loss(train: Leaves, held: Leaves, shared: Leaves, batch: Leaves, w: Tensor) -> Tensor:
        out = functional_call(module, {**train, **held, **shared}, (batch,))
        return (row_loss(out, batch) * w).sum()

    gradient = vmap(grad_and_value(loss), in_dims=(0, 0, None, 0, 0))
    order = np.argsort(-plan.steps, stable=True)
    steps, index = plan.steps[order], plan.index[order]
    share = plan.real[order] / np.maximum(1, plan.real[order].sum(-1, keepdims=True))
    share = program.put(share.astype(np.float32))
    batches = _batches(program, rows, order, index)

    train = {k: program.put(weights[k][order]) for k in program.chosen(recipe.train)}
    others = {k: a for k, a in weights.items() if k not in train}
    shared = {k: program.put(a[0]) for k, a in others.items() if a.strides[0] == 0}
    held = {k: program.put(a[order]) for k, a in others.items() if k not in shared}
    towards = weights if centre is None else centre
    pulls = _sorted(program, towards, train, order) if recipe.mu else {}
    shifts = _sorted(program, linear or {}, train, order)
    memory = _memory(train, recipe)
    losses, last = torch.zeros(len(steps), device=program.device), 0
    for t in range(int(steps.max(initial=0))):
        k = int((steps > t).sum())
        if k != last:
            now, at_rest, *state = (_first(leaves, k) for leaves in (train, held, *memory))
            pull, shift, last = _first(pulls, k), _first(shifts, k), k
        slopes, value = gradient(now, at_rest, shared, batches(k, t), share[:k, t])
        losses[:k] += value
        for name, centred in pull.items():
            slopes[name] = slopes[name].add(now[name] - centred, alpha=recipe.mu)
        for name, more in shift.items():
            slopes[name] = slopes[name] + more
        _descend(now, [slopes[name] for name in now], state, recipe, t + 1)
    back = np.argsort(order)
    done = {k: array(train[k])[back] if k in train else a for k, a in weights.items()}
    mean = array(losses)[back] / np.maximum(1, plan.steps).astype(np.float32)
    return Fit(Tree(done), mean, plan.steps)


def _batches(
    program: Program, rows: Mapping[str, Rows], order: Array, index: Array
) -> Callable[[int, int], Leaves]:
    """The batches of step t for the first k devices, as (k, t) asks for them."""
    lying = {name: r.flat for name, r in rows.items()}
    if program.device == CPU:
        columns = {name: (flat, start[order, None]) for name, (flat, start) in lying.items()}
        return lambda k, t: {
            name: torch.from_numpy(flat.take(start[:k] + index[:k, t], 0))
            for name, (flat, start) in columns.items()
        }
    # Elsewhere the devices' own rows are moved once, side by side, and batches taken there.
    n = next(iter(rows.values())).n
    at = program.put((np.cumsum(n) - n)[order, None, None] + index)
    moved = {
        name: program.put(np.concatenate([flat[s : s + m] for s, m in zip(start, n, strict=True)]))
        for name, (flat, start) in lying.items()
    }
    return lambda k, t: {name: flat[at[:k, t]] for name, flat in moved.items()}


def _sorted(program: Program, tree: Mapping[str, Array], train: Leaves, order: Array) -> Leaves:
    """Those leaves of a tree that belong to trained weights; [1, ...] where all have the same."""
    return {
        k: program.put(a[:1] if a.strides[0] == 0 else a[order]).to(train[k].dtype)
        for k, a in tree.items()
        if k in train
    }


def _first(leaves: Leaves, count: int) -> Leaves:
    return {k: v[:count] for k, v in leaves.items()}


def _memory(train: Leaves, recipe: Recipe) -> list[Leaves]:
    """What the optimiser remembers: Adam's two moments, or the momentum."""
    count = 2 if recipe.optimiser == "adam" else int(recipe.momentum > 0)
    return [{k: torch.zeros_like(v) for k, v in train.items()} for _ in range(count)]


def _descend(
    now: Leaves, slopes: list[Tensor], memory: Sequence[Leaves], recipe: Recipe, count: int
) -> None:
    """Step number `count` (from 1) of every device, as torch's clip_grad_norm_ and optimisers."""
    weights, kept = list(now.values()), [list(leaves.values()) for leaves in memory]
    if recipe.clip is not None:
        sizes = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in slopes]
        whole = torch.linalg.vector_norm(torch.stack(sizes), dim=0)
        cut = (recipe.clip / (whole + _CLIP_EPS)).clamp(max=1)
        slopes = [g * cut.view(-1, *[1] * (g.ndim - 1)) for g in slopes]
    if recipe.decay:
        slopes = list(torch._foreach_add(slopes, weights, alpha=recipe.decay))
    if recipe.optimiser == "sgd":
        if recipe.momentum:
            torch._foreach_mul_(kept[0], recipe.momentum)
            torch._foreach_add_(kept[0], slopes)
            slopes = kept[0]
        torch._foreach_add_(weights, slopes, alpha=-recipe.lr)
        return
    torch._foreach_lerp_(kept[0], slopes, 1 - _BETAS[0])
    torch._foreach_mul_(kept[1], _BETAS[1])
    torch._foreach_addcmul_(kept[1], slopes, slopes, 1 - _BETAS[1])
    roots = torch._foreach_sqrt(kept[1])
    torch._foreach_div_(roots, (1 - _BETAS[1] ** count) ** 0.5)
    torch._foreach_add_(roots, _EPS)
    torch._foreach_addcdiv_(weights, kept[0], roots, -recipe.lr / (1 - _BETAS[0] ** count))


def predict(program: Program, weights: Tree, inputs: Mapping[str, Array]) -> dict[str, Array]:
    def one(w: Leaves, batch: Leaves) -> Leaves:
        return program.predict(functional_call(program.evaluating, w, (batch,)), batch)

    with torch.no_grad():
        out = vmap(one)(_tensors(program, weights), _tensors(program, inputs))
    return {k: array(v) for k, v in out.items()}


def backward(
    program: Program,
    weights: Tree,
    columns: Mapping[str, Array],
    cotangent: Mapping[str, Array] | None,
    row_weights: Array,
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
    """Loss [D], d weights [D, ...] and d columns [D, L, ...] of the weighted sum over rows."""
    everything = _tensors(program, columns)
    floats = {k: v for k, v in everything.items() if v.is_floating_point()}
    others = {k: v for k, v in everything.items() if k not in floats}
    values = _tensors(program, weights)
    train = {k: v for k, v in values.items() if k in program.trained}
    held = {k: v for k, v in values.items() if k not in program.trained}

    def total(w: Leaves, f: Leaves, rest: tuple[Leaves, ...]) -> Tensor:
        fixed, other, cot, share = rest[0], rest[1], rest[2], rest[3]["w"]
        batch = {**other, **f}
        out = functional_call(program.evaluating, {**w, **fixed}, (batch,))
        if cotangent is not None:
            return torch.stack([(out[k] * c).sum() for k, c in cot.items()]).sum()
        assert program.loss is not None
        return (program.loss(out, batch) * share).sum()

    cotangents = _tensors(program, cotangent or {})
    rest = (held, others, cotangents, {"w": program.put(row_weights)})
    grads, loss = vmap(grad_and_value(total, argnums=(0, 1)))(train, floats, rest)
    d_weights, d_columns = ({k: array(v) for k, v in g.items()} for g in grads)
    return array(loss), d_weights, d_columns
