"""One device after the other with plain `nn.Module` and `torch.optim`: the reference, for any
module. Several threads may call it at once: each loads weights into modules of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.core import Array, Fit, Recipe, Rows, Tree
from kitestring.devices.fit.dropout import Draws, Sources, tried
from kitestring.devices.fit.programs import Batch, Program, array, carried
from kitestring.devices.schedule import Schedule

_GENERATOR = threading.Lock()  # torch has one for all threads: who draws from it is alone


def _unstacked(program: Program, stacked: Array) -> tuple[Tensor, ...]:
    """Each device's leaf; what is broadcast is one tensor over and over."""
    if stacked.strides[0] == 0:
        return (program.put(stacked[0]),) * len(stacked)
    return program.put(stacked).unbind()


def _copy(into: list[Tensor], leaves: list[Tensor]) -> None:
    if into:
        with torch.no_grad():
            torch._foreach_copy_(into, leaves)


class _Stack:
    """Weights of D devices: puts one device's into a module, and takes the trained ones out."""

    def __init__(
        self, program: Program, module: nn.Module, weights: Tree, still: Sequence[Tensor] = ()
    ) -> None:
        """Those parameters of the module that stand `still` are given back as they came, and so is
        what is no float."""
        self._state = module.state_dict(keep_vars=True)
        fixed = {id(p) for p in still}
        fixed |= {id(v) for v in self._state.values() if not v.is_floating_point()}
        self._weights = weights
        self._given = {k: _unstacked(program, a) for k, a in weights.items()}
        self._moving = [k for k in weights if id(self._state[k]) not in fixed]
        self._ends = {k: program.put(np.empty_like(weights[k], order="C")) for k in self._moving}
        self._out = [leaf.unbind() for leaf in self._ends.values()]
        # What is the same for all and stays so is loaded once.
        self._each = [k for k in weights if k in self._moving or weights[k].strides[0] != 0]
        self.load(0, list(weights))

    def load(self, d: int, names: Sequence[str] | None = None) -> None:
        names = self._each if names is None else names
        _copy([self._state[k] for k in names], [self._given[k][d] for k in names])

    def take(self, d: int, trained: bool) -> None:
        """The module's weights as device d's; as they were given if not `trained`."""
        ends = [self._state[k] if trained else self._given[k][d] for k in self._moving]
        _copy([leaf[d] for leaf in self._out], ends)

    def tree(self) -> Tree:
        return Tree({**self._weights, **{k: array(a) for k, a in self._ends.items()}})


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
    """`seeds` [D] make a module's own randomness a function of device and exchange: dropout by
    `dice.drawn`, all else by torch's generator."""
    module, chosen = program.training, program.chosen(recipe.train)
    named = dict(module.named_parameters())
    for name, p in named.items():
        p.requires_grad_(name in chosen)
    train: list[Tensor] = [named[name] for name in chosen]
    stack = _Stack(program, module, weights, [p for p in named.values() if not p.requires_grad])
    towards = weights if centre is None else centre
    pulls = _by_place(program, chosen, train, towards) if recipe.mu else {}
    shifts = _by_place(program, chosen, train, linear or {})
    optimiser = _optimiser(train, recipe)
    norms, losses = _norms(module), torch.zeros(len(plan.steps), device=program.device)
    drawn = _drawn(program, rows, plan, recipe)
    with _GENERATOR if drawn.generator else nullcontext():
        for d, total in enumerate(losses.unbind()):
            if plan.steps[d]:
                stack.load(d)
                _recount(program)
                if drawn.generator:
                    # Of every kind of device.
                    torch.manual_seed(int(seeds[d] >> np.uint64(1)))
                own = Draws(seeds[d : d + 1], int(plan.steps[d]))
                if optimiser is not None:
                    optimiser.state.clear()
                pull = {i: leaves[d] for i, leaves in pulls.items()}
                shift = {i: leaves[d] for i, leaves in shifts.items()}
                for step, batch in enumerate(_batches(program, rows, plan, recipe, d)):
                    with own.serving(step) if drawn.dice else nullcontext():
                        loss = _loss(program, module, norms, batch)
                    _descend(loss, train, recipe, optimiser, pull, shift)
                    total.add_(loss.detach())
            stack.take(d, trained=plan.steps[d] > 0)
    mean = array(losses) / np.maximum(1, plan.steps).astype(np.float32)
    return Fit(stack.tree(), mean, plan.steps)


def _by_place(
    program: Program, chosen: Sequence[str], train: Sequence[Tensor], tree: Mapping[str, Array]
) -> dict[int, tuple[Tensor, ...]]:
    """The devices' leaves of a tree, by the place that their weight has in `train`."""
    return {
        i: tuple(leaf.to(p.dtype) for leaf in _unstacked(program, tree[name]))
        for i, (name, p) in enumerate(zip(chosen, train, strict=True))
        if name in tree
    }


def _optimiser(train: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer | None:
    """None for plain descent, which is one line and needs nothing remembered."""
    if recipe.optimiser == "adam":
        return torch.optim.Adam(train, recipe.lr, weight_decay=recipe.decay)
    if recipe.momentum or recipe.decay or recipe.clip is not None:
        return torch.optim.SGD(
            train, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.decay
        )
    return None


def _recount(program: Program) -> None:
    """What is counted in training, such as batches seen, is no weight, and starts anew."""
    for count, first in zip(program.training.buffers(), program.module.buffers(), strict=True):
        if not carried(count):
            count.copy_(first)


def _batches(
    program: Program, rows: Mapping[str, Rows], plan: Schedule, recipe: Recipe, d: int
) -> Iterator[dict[str, Tensor]]:
    """The minibatches of device d: slices of its rows where those are not shuffled."""
    lying, steps = {name: r.flat for name, r in rows.items()}, int(plan.steps[d])
    n = next(iter(rows.values())).n[d]
    own = {name: flat[start[d] : start[d] + n] for name, (flat, start) in lying.items()}
    if recipe.shuffle:
        for index, count in zip(plan.index[d, :steps], plan.real[d, :steps].sum(-1), strict=True):
            yield {k: program.put(v.take(index[:count], 0)) for k, v in own.items()}
        return
    columns = {k: program.put(v) for k, v in own.items()}
    for _ in range(recipe.epochs):
        for at in range(0, n, recipe.batch):
            yield {k: v[at : at + recipe.batch] for k, v in columns.items()}


def _norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _outputs(program: Program, module: nn.Module, batch: Mapping[str, Tensor]) -> Batch:
    """Always wide: in bfloat16 a loss, sums of logarithms, would lose more than products do."""
    if program.precision == "float32":
        return module(batch)  # type: ignore[no-any-return]
    with torch.autocast(program.device.type, torch.bfloat16):
        found = module(batch)
    return {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in found.items()}


def _loss(
    program: Program, module: nn.Module, norms: Sequence[nn.Module], batch: Mapping[str, Tensor]
) -> Tensor:
    assert program.loss is not None
    for norm in norms:  # one row has no statistics: it takes those that there are
        norm.train(len(next(iter(batch.values()))) > 1)
    return program.loss(_outputs(program, module, batch), batch).mean()


def _drawn(program: Program, rows: Mapping[str, Rows], plan: Schedule, recipe: Recipe) -> Sources:
    """What the module draws in training."""

    def trial() -> Sources:
        module = program.training
        first = next(_batches(program, rows, plan, recipe, int(plan.steps.argmax())))
        with _GENERATOR:
            found = tried(lambda: _loss(program, module, _norms(module), first))
        module.zero_grad()
        return found

    return program.draws(trial) if plan.steps.any() else Sources(False, False)


def _descend(
    loss: Tensor,
    train: list[Tensor],
    recipe: Recipe,
    optimiser: torch.optim.Optimizer | None,
    pull: Mapping[int, Tensor],
    shift: Mapping[int, Tensor],
) -> None:
    """One step of the optimiser; the gradient of what is not in the loss is zero."""
    if optimiser is None:
        slopes = list(torch.autograd.grad(loss, train, materialize_grads=True))
    else:
        for p in train:
            p.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in train]
    with torch.no_grad():
        for i, centre in pull.items():
            slopes[i] = slopes[i] + (train[i] - centre) * recipe.mu
        for i, more in shift.items():
            slopes[i] = slopes[i] + more
        if optimiser is None:
            torch._foreach_add_(train, slopes, alpha=-recipe.lr)
            return
    for p, slope in zip(train, slopes, strict=True):
        p.grad = slope
    if recipe.clip is not None:
        nn.utils.clip_grad_norm_(train, recipe.clip)
    optimiser.step()


def predict(program: Program, weights: Tree, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Columns [D, L, ...] -> outputs [D, L, ...]."""
    module = program.evaluating
    stack = _Stack(program, module, weights, list(module.parameters()))
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for d in range(len(next(iter(inputs.values())))):
            stack.load(d)
            batch = {k: program.put(v[d]) for k, v in inputs.items()}
            found.append(program.predict(module(batch), batch))
    return {k: array(torch.stack([out[k] for out in found])) for k in found[0]}


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
    stack = _Stack(program, module, weights, list(module.parameters()))
    losses, d_weights, d_columns = [], [], []
    for d in range(len(row_weights)):
        stack.load(d)
        batch = {k: program.put(v[d]) for k, v in columns.items()}
        wanted = {k: v.requires_grad_() for k, v in batch.items() if v.is_floating_point()}
        named = {k: p for k, p in module.named_parameters() if p.requires_grad}
        out = _outputs(program, module, {**batch, **wanted})
        if cotangent is not None:
            total = sum((out[k] * program.put(c[d])).sum() for k, c in cotangent.items())
        else:
            assert program.loss is not None
            total = (program.loss(out, batch) * program.put(row_weights[d])).sum()
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
        {k: array(torch.stack([g[k] for g in d_weights])) for k in d_weights[0]},
        {k: array(torch.stack([g[k] for g in d_columns])) for k in d_columns[0]},
    )
