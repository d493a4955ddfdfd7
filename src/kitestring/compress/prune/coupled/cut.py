"""A smaller copy of a model, and what it has to compute."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.compress.prune.coupled.atoms import FIXED, Ids
from kitestring.compress.prune.coupled.groups import Group
from kitestring.compress.prune.coupled.sizes import Mask, fit_config, fit_heads, fit_layer
from kitestring.compress.prune.coupled.trace import Trace, answer, leaves, tensors, trace

_CLOSE = 1e-3  # of the largest number: float32, summed in another order, through many layers
Gone = Mapping[str, Ids]
"""The atoms that go, by their group's name."""


def cut(model: nn.Module, found: Trace, groups: Sequence[Group], gone: Gone) -> nn.Module:
    """`model` is the one that was traced, or a copy. Parameters that are one stay one."""
    new = copy.deepcopy(model)
    old = dict(tensors(new))
    names = {id(t): name for name, t in old.items()}
    stays = _staying(found, gone)
    kept = {k: [stays[found.atoms.find(ids)] for ids in v] for k, v in found.along.items()}
    made = {name: _smaller(t, kept[name]) for name, t in old.items()}
    for path, layer in new.named_modules():
        weight = layer._parameters.get("weight")
        masks = kept[names[id(weight)]] if weight is not None else []
        results = [stays[found.atoms.find(ids)] for ids in found.norms.get(path, ())]
        for store in (layer._parameters, layer._buffers):
            for key, t in store.items():
                if t is not None:
                    store[key] = made[names[id(t)]]
        fit_layer(layer, masks, results)
    sizes = {g.name: g.size - len(gone.get(g.name, ())) for g in groups}
    for group in groups:
        if group.kind == "heads" and sizes[group.name] < group.size:
            fit_heads(new, group, sizes[group.name])
    fit_config(new, groups, sizes)
    return new


def _staying(found: Trace, gone: Gone) -> Mask:
    """Of each atom, by the number that stands for it."""
    stays = np.ones(len(found.atoms), bool)
    for ids in gone.values():
        stays[ids] = False
    return stays


def _smaller(t: Tensor, masks: Sequence[Mask]) -> Tensor:
    """A tensor of its own, or itself where it stays whole."""
    if all(mask.all() for mask in masks):
        return t
    new = t.detach()
    for axis, mask in enumerate(masks):
        if not mask.all():
            new = new.index_select(axis, torch.from_numpy(mask.nonzero()[0]).to(t.device))
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new


@torch.no_grad()
def right(
    model: nn.Module, example: Any, found: Trace, groups: Sequence[Group], gone: Gone
) -> bool:
    """Whether the smaller model computes what `model` does where nothing that goes is summed into
    anything; without groups that are not exact, for which what is coupled has to be the same.

    A model's code may rely on a size that is nowhere in its layers, so this is tried, with noise
    in its weights: as they are, some may be zero and prove nothing."""
    wide = {g.name for g in groups if not g.exact and len(gone.get(g.name, ()))}
    plain = {name: ids for name, ids in gone.items() if name not in wide}
    try:
        tried, given = _trial(model, example)
        if any(len(ids) for ids in plain.values()):
            some = cut(tried, found, groups, plain)
            if not _same(answer(silent(tried, found, plain), given), answer(some, given)):
                return False
        if wide:
            whole = cut(tried, found, groups, gone)
            return _coupled_alike(found, groups, gone, trace(whole, given, found.queries, found))
    except Exception:  # anything can go wrong where somebody's code relies on a size
        return False
    return True


def silent(model: nn.Module, found: Trace, gone: Gone) -> nn.Module:
    """A copy in which what goes is multiplied by zero wherever products sum over it."""
    new = copy.deepcopy(model)
    named, stays = dict(tensors(new)), _staying(found, gone)
    with torch.no_grad():
        for place in found.into:
            none = torch.from_numpy((~stays[found.ids(place)]).nonzero()[0])
            t = named[place[0]]
            t.index_fill_(place[1], none.to(t.device), 0)
    return new


def _trial(model: nn.Module, example: Any) -> tuple[nn.Module, Any]:
    """Both with noise where the model stands it, as not where it takes logarithms."""
    noisy = _noisy(model, seed=0)
    for given in (_noisy_input(example, seed=1), example):
        if all(bool(t.isfinite().all()) for t in leaves(answer(noisy, given))):
            return noisy, given
    return model, example


def _noisy(model: nn.Module, seed: int) -> nn.Module:
    new, dice = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in new.parameters():
            if p.is_floating_point() and p.numel():
                scale = 0.1 if p.ndim < 2 else p[0].numel() ** -0.5
                p.add_(scale * torch.randn(p.shape, generator=dice).to(p))
    return new


def _noisy_input(example: Any, seed: int) -> Any:
    dice = torch.Generator().manual_seed(seed)

    def with_noise(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x + torch.randn(x.shape, generator=dice).to(x) if x.is_floating_point() else x
        if isinstance(x, Mapping):
            return {k: with_noise(v) for k, v in x.items()}
        return tuple(with_noise(v) for v in x) if isinstance(x, tuple) else x

    return with_noise(example)


def _same(wanted: Any, got: Any) -> bool:
    """The same numbers, and infinities where there are some."""
    for one, other in zip(leaves(wanted), leaves(got), strict=True):
        if one.shape != other.shape:
            return False
        one, other = one.double(), other.double()
        real = one.isfinite() & other.isfinite()
        if not real.any() or not torch.equal(one[~real], other[~real]):
            return False
        if (one - other)[real].abs().max() > _CLOSE * one[real].abs().max().clamp(min=1e-6):
            return False
    return True


def _coupled_alike(found: Trace, groups: Sequence[Group], gone: Gone, new: Trace) -> bool:
    """Whether what remains of groups that are not exact is joined as in the whole model."""
    stays = _staying(found, gone)
    wide = np.zeros(len(found.atoms), bool)
    for group in groups:
        if not group.exact:
            wide[group.atoms] = True
    before, after = [], []
    for name, along in found.along.items():
        for axis, ids in enumerate(along):
            ids = found.atoms.find(ids)
            left = ids[stays[ids]]
            now = new.ids((name, axis))
            if len(left) != len(now):
                return False
            before.append(left[wide[left]])
            after.append(now[wide[left]])
    one, other = np.concatenate(before), np.concatenate(after)
    pairs = np.unique(np.stack([one, other]), axis=1).shape[1]
    alike = pairs == len(np.unique(one)) == len(np.unique(other))
    return alike and not (other == FIXED).any()
