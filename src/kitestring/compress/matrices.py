"""The layers of a module whose weights are matrices, found by dotted name and put back changed.

nn.Linear, nn.Embedding and nn.Conv2d without groups, whose weights [out, in * kh * kw] meet one
patch after the other. Left alone are subclasses, and layers with hooks or reparametrised weights,
which compute in their own way (torch's nn.MultiheadAttention is none of them: it reads weights
directly).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn

from kitestring.errors import SettingError, TaskError

Layer: TypeAlias = nn.Linear | nn.Conv2d
Kind = TypeVar("Kind", bound=nn.Module)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode: the given module stays as it is. `TaskError` where torch cannot
    copy it, as where weights are computed of others before each call."""
    try:
        return copy.deepcopy(model).eval()
    except RuntimeError as problem:
        what = f"it cannot be copied: {str(problem).strip().partition('.')[0][:120]}"
        mend = "Make its weights plain: torch.nn.utils.prune.remove, remove_weight_norm"
        raise TaskError(what, _named(model), mend) from problem


def matrices(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, Layer]:
    """The linear layers, and the convolutions without groups; as `found`."""
    return found(model, skip, nn.Linear, nn.Conv2d)


def linears(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Linear]:
    """The linear layers; as `found`."""
    return found(model, skip, nn.Linear)


def found(
    model: nn.Module, skip: Sequence[str], *kinds: type[Kind], in_groups: bool = False
) -> dict[str, Kind]:
    """The layers of these kinds by dotted name, but for those named in `skip` by any of their
    names, or inside of what is. Convolutions in groups are among them only if asked for.

    Raises `SettingError` for a name in `skip` that no module has, and `TaskError` where nothing is
    left, where a weight is empty or not finite, and where one is shared with another module:
    changing it for the one changes it for the other."""
    skip = (skip,) if isinstance(skip, str) else skip
    every = dict(model.named_modules(remove_duplicate=False))
    for name in skip:
        if name not in every:
            what = f"no module is called {name!r}"
            raise SettingError(what, "skip", "Give dotted names as named_modules() does")
    left = {
        layer
        for name, layer in every.items()
        if any(name == s or name.startswith(f"{s}.") for s in skip)
    }
    layers: dict[str, Kind] = {}
    for name, layer in model.named_modules():
        fits = in_groups or getattr(layer, "groups", 1) == 1
        if layer not in left and type(layer) in kinds and fits and plain(layer):
            layers[name] = cast(Kind, layer)
    if not layers:
        raise TaskError("no layer to change", _named(model), "Skip less")
    _fine(model, layers)
    return layers


def matrix(layer: Layer | nn.Embedding) -> Tensor:
    """A copy of its weights, float64 [out, in]; a convolution's in order channel, row, column."""
    return layer.weight.detach().double().flatten(1)


@torch.no_grad()
def fill(layer: Layer, weight: Tensor) -> None:
    """Write weights [out, in] into the layer, in its own shape and type."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))


def replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """`model` with other modules under these names, and wherever else the same modules are.

    Changes the module that it is given, and returns another only where the root is replaced."""
    if "" in new:
        return new[""]
    instead = {model.get_submodule(name): module for name, module in new.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in instead:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, instead[module])
    return model


def plain(layer: nn.Module) -> bool:
    """Whether it computes with its own weights alone, without hooks or reparametrisation."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return False
    return "weight" in layer._parameters


def _fine(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    owners: dict[Hashable, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.numel():
                owners.setdefault(_memory(parameter), []).append(name)
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight)
        if not weight.numel() or not weight.isfinite().all():
            what = "its weights have NaN or infinity" if weight.numel() else "it has no weight"
            raise TaskError(what, name or _named(model), "Train the model anew, or skip the layer")
        others = [other for other in owners[_memory(weight)] if other != name]
        if others:
            what = f"its weights are those of {', '.join(others)} too"
            raise TaskError(what, name, "Skip it, or untie them")


def _memory(t: Tensor) -> Hashable:
    """Equal for tensors that are the same numbers at the same place."""
    return t.device, t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride()


def _named(model: nn.Module) -> str:
    return type(model).__name__
