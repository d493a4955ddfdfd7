"""The numbers that layers keep beside their parameters: how many features, groups, heads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from kitestring.compress.prune.coupled.groups import Group

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""What stays along an axis."""

_HEADS = ("heads", "num_heads", "n_heads", "n_head", "num_attention_heads", "all_head_size",
          "split_size")  # fmt: skip
_SHARED = ("shared", "num_key_value_heads", "num_kv_heads", "n_kv_heads")
_EACH = ("num_key_value_groups",)  # heads of queries that share one of keys and values


def fit_layer(layer: nn.Module, weight: Sequence[Mask], made: Sequence[Mask]) -> None:
    """After its parameters became smaller. `weight`: what stayed along that parameter's axes;
    `made`: along those of a norm's results."""
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _ConvNd) and weight:
        out, into = layer.weight.shape[:2]
        if layer.transposed:
            layer.in_channels, layer.out_channels = out, into * layer.groups
        else:
            layer.groups = _groups(layer.groups, weight[0])
            layer.in_channels, layer.out_channels = into * layer.groups, out
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = layer.weight.shape[1]
    elif "nf" in vars(layer) and len(weight) == 2:  # transformers.pytorch_utils.Conv1D: [in, out]
        for name, mask in zip(("nx", "nf"), weight, strict=True):
            setattr(layer, name, int(mask.sum()))
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = layer.weight.numel()
    elif made:
        _fit_norm(layer, made)


def _fit_norm(layer: nn.Module, made: Sequence[Mask]) -> None:
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        last = made[-len(layer.normalized_shape) :]
        layer.normalized_shape = tuple(int(mask.sum()) for mask in last)
        return
    channels = made[1]
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = _groups(layer.num_groups, channels)
        layer.num_channels = int(channels.sum())
    elif isinstance(layer, _NormBase):
        layer.num_features = int(channels.sum())


def _groups(groups: int, mask: Mask) -> int:
    """How many there are after whole ones went."""
    rows = mask.reshape(groups, -1)
    whole = bool((rows.all(1) | ~rows.any(1)).all())
    return int(rows.any(1).sum()) if whole else groups


def fit_heads(model: nn.Module, group: Group, kept: int) -> None:
    """In the module that the group's layers are in. Its sizes are then in proportion."""
    for parent, layers in Counter(name.rpartition(".")[0] for name in group.layers).items():
        module = model.get_submodule(parent)
        for name in (*_HEADS, *(_SHARED if layers > 1 else _EACH)):
            before = getattr(module, name, None)
            if type(before) is int and before * kept % group.size == 0:
                setattr(module, name, before * kept // group.size)


def fit_config(model: nn.Module, groups: Sequence[Group], kept: Mapping[str, int]) -> None:
    """In settings that the model keeps with it, where all layers are still alike."""
    for config in configs(model):
        found: dict[str, set[float]] = {}
        for group in groups:
            for name in _settings(group):
                before = getattr(config, name, None)
                if type(before) is int and (group.kind == "heads" or before == group.size):
                    found.setdefault(name, set()).add(before * kept[group.name] / group.size)
        new = {name: int(min(values)) for name, values in found.items() if len(values) == 1}
        set_config(model, config, {k: v for k, v in new.items() if v != getattr(config, k)})


def _settings(group: Group) -> tuple[str, ...]:
    if group.kind == "heads":
        shared = ("num_key_value_heads",) if len(group.layers) > 1 else ()
        return ("num_attention_heads", *shared)
    return {"neurons": ("intermediate_size",), "width": ("hidden_size",)}.get(group.kind, ())


def configs(model: nn.Module) -> list[Any]:
    """The settings that its layers keep as `config`, each once."""
    found = [vars(m)["config"] for m in model.modules() if vars(m).get("config") is not None]
    return list({id(config): config for config in found}.values())


def set_config(model: nn.Module, config: Any, changes: Mapping[str, Any]) -> None:
    """In all layers that keep it, which may be one that cannot be changed itself."""
    if not changes:
        return
    if not getattr(getattr(config, "__dataclass_params__", None), "frozen", False):
        for name, value in changes.items():
            setattr(config, name, value)
        return
    changed = replace(config, **changes)
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = changed
