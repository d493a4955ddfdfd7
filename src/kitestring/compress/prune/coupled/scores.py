"""How much a part of a group is worth; those of the least go first.

By magnitude: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", 2017,
arXiv 1608.08710, section 3.1, with the L2 norm, and over all weights that go together: Ma, Fang,
Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv 2305.11627,
section 3.1. By a first-order expansion of the loss: Molchanov, Mallya, Tyree, Frosio, Kautz,
"Importance Estimation for Neural Network Pruning", 2019, arXiv 1906.10771, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kitestring.compress.prune.coupled.groups import Group
from kitestring.compress.prune.coupled.trace import Place, Trace
from kitestring.errors import TaskError

Loss = Callable[[nn.Module, Any], Tensor]


def by_magnitude(model: nn.Module, found: Trace, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The L2 norm of all matrices and kernels that go with a part. By the group's name, [size]."""
    named = {name: p.detach() for name, p in model.named_parameters() if p.ndim > 1}
    sums = (
        ((name, axis), _along(p.double().square(), axis))
        for name, p in named.items() for axis in range(p.ndim)
    )  # fmt: skip
    total = _by_atom(found, sums).sqrt()
    return {g.name: total[torch.from_numpy(g.atoms)] for g in groups}


def by_taylor(
    model: nn.Module, found: Trace, groups: Sequence[Group], batches: Iterable[Any], loss: Loss
) -> dict[str, Tensor]:
    """The mean over batches of |sum g w|, g the gradient of `loss(model, batch)`, over the weights
    w that a part is multiplied by: to first order, how the loss changes when what the part adds to
    later layers becomes zero. By the group's name, [size]. Gradients are switched on in `model`."""
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    places = [place for place in found.into if place[0] in named]
    names = list(dict.fromkeys(name for name, _ in places))
    for p in named.values():
        p.requires_grad_(True)
    total, count = torch.zeros(len(found.atoms), dtype=torch.float64), 0
    for batch in batches:
        with torch.enable_grad():
            value = loss(model, batch)
            _one_number(value, count)
            slopes = torch.autograd.grad(value, [named[k] for k in names], allow_unused=True)
        given = [(k, g) for k, g in zip(names, slopes, strict=True) if g is not None]
        each = {k: g * named[k].detach() for k, g in given}
        sums = (((k, axis), _along(each[k].double(), axis)) for k, axis in places if k in each)
        total += _by_atom(found, sums).abs()
        count += 1
    if not count:
        raise TaskError("no batches", "taylor", "Give at least one")
    return {g.name: total[torch.from_numpy(g.atoms)] / count for g in groups}


def _one_number(value: Any, batch: int) -> None:
    if not isinstance(value, Tensor) or value.ndim or not bool(value.isfinite()):
        said = repr(value.tolist() if isinstance(value, Tensor) else value)
        what = f"the loss of batch {batch} is {said:.60}"
        raise TaskError(what, "taylor", "Give a loss that is one finite number, as a tensor")
    if not value.requires_grad:
        what = f"the loss of batch {batch} does not depend on the model's weights"
        raise TaskError(what, "taylor", "Compute it of what the model gives, with gradients")


def _along(t: Tensor, axis: int) -> Tensor:
    rest = [i for i in range(t.ndim) if i != axis]
    return (t.sum(rest) if rest else t).cpu()


def _by_atom(found: Trace, sums: Iterable[tuple[Place, Tensor]]) -> Tensor:
    """Of each atom: the sum of what lies at its positions."""
    total = torch.zeros(len(found.atoms), dtype=torch.float64)
    for place, each in sums:
        total.index_add_(0, torch.from_numpy(found.ids(place)), each)
    return total
