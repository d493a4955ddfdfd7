"""Factors for the channels of a tensor, put into the weights of the module that gives it.

Whether that changes anything else is tried out: multiplying by powers of two rounds nothing, so if
the module that gives the tensor is divided by such factors, and the layers that take it are
multiplied by them, all that the model computes must be equal to the bit. It is where nothing else
takes the tensor, and where ReLUs, products, pools or the weighted sums of attention lie between. It
is not where a residual takes the tensor too, or a GELU lies between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from kitestring.compress.calibrate import call, watched
from kitestring.errors import TaskError

TRIED = 4  # modules, from the nearest one back


@torch.no_grad()
def givers(
    model: nn.Module, layers: Mapping[str, nn.Linear], groups: Sequence[Sequence[str]], batch: Any
) -> list[nn.Module | None]:
    """For each group of layers that are fed the same tensor, the module whose output's channels may
    be scaled instead; None where none is found. The model is left as it was.

    Such a module is one of `layers`, or has a `weight` [in], and maybe a `bias` [in], alone, as
    norms have. `batch` is an input of the model."""
    could = {n: m for n, m in model.named_modules() if n in layers or _norm(m)}
    order: list[str] = []
    with watched(model, could, lambda name, _: order.append(name)):
        call(model, batch)
    seen: list[Tensor] = []
    with watched(model, layers, lambda _, x: seen.append(x.clone())):
        seen += _tensors(call(model, batch))
    found: list[nn.Module | None] = []
    for names in groups:
        weight = layers[names[0]].weight
        reached = [i for i, name in enumerate(order) if name in names]
        earlier = dict.fromkeys(reversed(order[: reached[0]] if reached else []))
        near = [could[n] for n in earlier if len(next(could[n].parameters())) == weight.shape[1]]
        draw = torch.Generator().manual_seed(0)
        # So large and so small that whatever has a bound, as ReLU6 has, is driven out of it.
        powers = torch.randint(10, 21, weight.shape[1:], generator=draw)
        signs = torch.randint(0, 2, weight.shape[1:], generator=draw) * 2 - 1
        by = (2.0 ** (powers * signs)).to(weight)
        fits = (
            m for m in near[:TRIED]
            if all(_equal(model, layers, names, m, f, batch, seen) for f in (by, 1 / by))
        )  # fmt: skip
        found.append(next(fits, None))
    return found


@torch.no_grad()
def fold(module: nn.Module, factor: Tensor) -> None:
    """Divide the channels of what a module gives by `factor` [channels]."""
    for p in module.parameters():
        p.div_(factor.to(p).reshape(-1, *[1] * (p.ndim - 1)))


class _Differs(BaseException):
    """Something is not as it was: the rest of the model need not run."""


def _equal(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    names: Sequence[str],
    module: nn.Module,
    by: Tensor,
    batch: Any,
    wanted: Sequence[Tensor],
) -> bool:
    """Whether layers' inputs, call after call, and the outputs are `wanted` when `module` gives
    1 / `by` of what it gave, but for the inputs of the layers `names`, to be 1 / `by` of it."""
    left = iter(wanted)
    takers = [layers[name].weight for name in names]
    changed = [*module.parameters(), *takers]
    kept = [p.clone() for p in changed]
    fold(module, by)
    for weight in takers:
        weight.mul_(by)

    def hear(name: str, x: Tensor) -> None:
        before = next(left, None)
        if before is None or not torch.equal(before, x * by if name in names else x):
            raise _Differs

    same = False
    with suppress(_Differs, TaskError), watched(model, layers, hear):
        for x in _tensors(call(model, batch)):
            hear("", x)
        same = next(left, None) is None
    for p, value in zip(changed, kept, strict=True):
        p.copy_(value)
    return same


def _norm(module: nn.Module) -> bool:
    shapes = [p.shape for p in module.parameters()]
    own = module._parameters.keys() <= {"weight", "bias"} and not list(module.children())
    return own and len(shapes) in (1, 2) and all(len(s) == 1 and s == shapes[0] for s in shapes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
