"""Between which numbers the inputs and outputs of layers lie, seen on examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import inf, isnan
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from kitestring.compress.calibrate import Batches, call, each, watched
from kitestring.compress.matrices import Layer, found, plain
from kitestring.compress.quantise.layers import padding
from kitestring.errors import SettingError, TaskError

Ends: TypeAlias = tuple[float, float]
FREE = (-inf, inf)
_SOME = 4096  # numbers kept of a tensor, evenly spread, where not all shall lie inside


@dataclass
class Seen:
    """Of one layer: the ends of its inputs and, of a convolution, of its outputs."""

    inputs: _Span
    outputs: _Span

    @property
    def ends(self) -> tuple[Ends, Ends]:
        return self.inputs.ends, self.outputs.ends


@dataclass
class _Span:
    percentile: float
    bounds: Ends = FREE
    low: float = inf
    high: float = -inf
    some: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        if not x.numel():
            return
        flat = x.detach().flatten().float().clamp(*self.bounds)
        low, high = (end.item() for end in flat.aminmax())
        if isnan(low):  # which is neither less nor more than any number
            low, high = -inf, inf
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.percentile < 100:
            self.some.append(flat[:: -(-len(flat) // _SOME)].cpu().double())

    @property
    def ends(self) -> Ends:
        if not self.some:
            return (self.low, self.high) if self.low <= self.high else (0.0, 0.0)
        share = torch.tensor([1 - self.percentile / 100, self.percentile / 100]).double()
        low, high = _quantiles(torch.cat(self.some), share).tolist()
        return low, high


def _quantiles(values: Tensor, shares: Tensor) -> Tensor:
    """As torch.quantile, of any number of values."""
    order, at = values.sort().values, shares * (len(values) - 1)
    below = at.floor().long()
    above = (below + 1).clamp(max=len(values) - 1)
    return order[below] + (at - below) * (order[above] - order[below])


def chosen(model: nn.Module, skip: Sequence[str]) -> dict[str, Layer]:
    """The linear layers and convolutions, those in groups too; errors as `matrices.found`, and for
    padding that a convolution in whole numbers cannot have."""
    layers: dict[str, Layer] = found(model, skip, nn.Linear, nn.Conv2d, in_groups=True)
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d):
            padding(layer)
    return layers


def observed(
    model: nn.Module, batches: Batches, layers: Mapping[str, Layer], percentile: float = 100.0
) -> dict[str, Seen]:
    """What the layers are given and give. All numbers lie inside with a percentile of 100; with
    99.9, say, one in a thousand lies above and one below. Raises `SettingError` and `TaskError`."""
    if not 50 < percentile <= 100:
        what = f"a percentile of {percentile:g}"
        raise SettingError(what, "quantise", "Give more than 50, at most 100: 100 leaves none out")
    bounds = followed(model)
    spans = {
        name: Seen(_Span(percentile), _Span(percentile, bounds.get(name, FREE))) for name in layers
    }

    def given(name: str, x: Tensor) -> None:
        spans[name].inputs.add(x)

    def gives(name: str, _: nn.Module, args: Any, out: Tensor) -> None:
        spans[name].outputs.add(out)

    hooks = [
        layer.register_forward_hook(partial(gives, name))
        for name, layer in layers.items()
        if isinstance(layer, nn.Conv2d)
    ]
    try:
        with watched(model, layers, given):
            for batch in each(batches):
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, seen in spans.items():
        _fine(name, seen.inputs, "inputs")
        if isinstance(layers[name], nn.Conv2d):
            _fine(name, seen.outputs, "outputs")
    return spans


def _fine(name: str, span: _Span, what: str) -> None:
    if span.low > span.high:
        mend = "Give batches that reach it, or skip it"
        raise TaskError("no batch reached the layer", name, mend)
    if not (-inf < span.low and span.high < inf):
        mend = "Look at the batches, and at the layers before it"
        raise TaskError(f"its {what} have NaN or infinity", name, mend)


def followed(model: nn.Module) -> dict[str, Ends]:
    """Convolutions whose output goes into a ReLU, or ReLU6, right behind them in an nn.Sequential:
    between which numbers it matters."""
    known: dict[type[nn.Module], Ends] = {nn.ReLU: (0.0, inf), nn.ReLU6: (0.0, 6.0)}
    return {name: known[type(m)] for name, _, _, m in _behind(model) if type(m) in known}


def without_norms(model: nn.Module) -> nn.Module:
    """`model`, changed: where a BatchNorm2d comes right after a Conv2d in an nn.Sequential, it is
    part of the convolution's weights, and nn.Identity stands in its place."""
    for _, layer, place, norm in _behind(model):
        if type(norm) is nn.BatchNorm2d and norm.track_running_stats:
            _fold(layer, norm)
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Identity())
    return model


def _behind(model: nn.Module) -> list[tuple[str, nn.Conv2d, str, nn.Module]]:
    """Convolutions with what comes right behind them in an nn.Sequential, both by name; but those
    that are used in several places, or compute in a way of their own."""
    everywhere = [m for _, m in model.named_modules(remove_duplicate=False)]
    pairs = []
    for path, part in model.named_modules():
        if type(part) is nn.Sequential:
            inner = [(f"{path}.{n}".lstrip("."), m) for n, m in part._modules.items()]
            real = [(n, m) for n, m in inner if m is not None and type(m) is not nn.Identity]
            for (name, layer), (there, after) in pairwise(real):
                if type(layer) is not nn.Conv2d or not plain(layer):
                    continue
                if everywhere.count(layer) == 1:
                    pairs.append((name, layer, there, after))
    return pairs


@torch.no_grad()
def _fold(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    if layer.bias is not None:
        shift = shift + layer.bias * factor
    trained = layer.weight.requires_grad
    layer.weight = nn.Parameter(layer.weight * factor[:, None, None, None], trained)
    layer.bias = nn.Parameter(shift, trained)
