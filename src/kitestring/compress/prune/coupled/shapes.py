"""What a smaller model's sizes are, in a form that can be stored, and a model made to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from kitestring.compress.prune.coupled.sizes import set_config
from kitestring.errors import SettingError, unknown

Sizes: TypeAlias = dict[str, Any]


def shape_of(model: nn.Module, slimmed: nn.Module) -> dict[str, Sizes]:
    """What is smaller in `slimmed` than in `model`, which it was made of: by layer, the shapes of
    parameters and the sizes that the layer keeps, as {"0": {"weight": [8, 3, 3, 3], "bias": [8],
    "out_channels": 8}}. Plain JSON. Raises `SettingError` where they are not of one architecture.
    """
    layers, after = dict(model.named_modules()), dict(slimmed.named_modules())
    if odd := layers.keys() ^ after.keys():
        what = f"only one of the two models has the layer {sorted(odd)[0]!r}"
        raise SettingError(what, "shape_of", "Give a model and what slim made of it")
    out: dict[str, Sizes] = {}
    said = set()
    for path, layer in layers.items():
        one, other = dict(_sizes(layer)), dict(_sizes(after[path]))
        if one.keys() != other.keys():
            what = f"{sorted(one.keys() ^ other.keys())[0]!r} is in one of the two models alone"
            raise SettingError(what, f"shape_of, layer {path!r}", "Give what slim made of it")
        if id(vars(layer).get("config")) in said:
            other.pop("config", None)  # that of a layer before
        said.add(id(vars(layer).get("config")))
        if changed := {k: _less(one[k], v) for k, v in other.items() if v != one[k]}:
            out[path] = changed
    return out


def reshape(model: nn.Module, shape: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of `model` with the sizes that `shape_of` said, in evaluation. Its weights are the
    first ones of the model's, to be loaded over. Raises `SettingError` for a shape of another
    architecture."""
    new = copy.deepcopy(model).eval()
    layers = dict(new.named_modules())
    made: dict[int, tuple[Tensor, Tensor]] = {}  # by the old one, kept so that no other is like it
    for path, changes in shape.items():
        if path not in layers:
            raise unknown("layer", path, layers)
        layer = layers[path]
        have = dict(_sizes(layer))
        for name, size in changes.items():
            if name not in have or not _fits(have[name], size):
                what = f"{name} of {size!r} does not fit a model with {have.get(name)!r}"
                raise SettingError(what, f"layer {path!r}", "Give the model that was slimmed")
            for store in (layer._parameters, layer._buffers):
                if (t := store.get(name)) is not None:
                    made.setdefault(id(t), (t, _first(t, size)))
                    store[name] = made[id(t)][1]
            if name == "config":
                changed = {k: tuple(v) if isinstance(v, list) else v for k, v in size.items()}
                set_config(new, vars(layer)[name], changed)
            elif name in vars(layer):
                whole = isinstance(getattr(layer, name), tuple)
                setattr(layer, name, tuple(size) if whole else size)
    return new


def _less(before: Any, after: Any) -> Any:
    """What changed, of settings."""
    if isinstance(after, dict):
        return {k: v for k, v in after.items() if v != before[k]}
    return after


def _sizes(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Shapes of its own tensors; whole numbers, and tuples of them, among its attributes and in
    the settings that it keeps."""
    for store in (layer._parameters, layer._buffers):
        yield from ((name, list(t.shape)) for name, t in store.items() if t is not None)
    yield from _numbers(vars(layer))
    if config := vars(layer).get("config"):
        yield "config", dict(_numbers(getattr(config, "__dict__", {})))


def _numbers(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in found.items():
        if name.startswith("_"):
            continue
        if type(value) is int:
            yield name, value
        elif isinstance(value, tuple) and value and all(type(v) is int for v in value):
            yield name, list(value)


def _fits(have: Any, size: Any) -> bool:
    """Of the same form, and nowhere larger."""
    if isinstance(have, dict):
        return isinstance(size, Mapping) and all(
            k in have and _fits(have[k], v) for k, v in size.items()
        )
    if isinstance(have, list):
        return (
            isinstance(size, list | tuple) and len(size) == len(have)
            and all(_fits(h, s) for h, s in zip(have, size, strict=True))
        )  # fmt: skip
    return type(size) is int and (0 < size <= have or size == have)


def _first(t: Tensor, size: Sequence[int]) -> Tensor:
    new = t.detach()[tuple(slice(n) for n in size)].clone()
    return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
