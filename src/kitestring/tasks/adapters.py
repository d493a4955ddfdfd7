"""Low-rank adapters: a large layer stays as it is, and a small correction beside it is trained.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen: "LoRA: Low-Rank Adaptation of Large Language
Models", ICLR 2022, arXiv 2106.09685, section 4.1. Beside a layer of quantised weights: Dettmers,
Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv
2305.14314, equation 5.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kitestring.compress.quantise.layers import DynamicLinear, StaticLinear, WeightOnlyLinear
from kitestring.errors import TaskError

_READ = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""They read the weights of their linear layers themselves: an adapter there would do nothing."""


_Quantised: TypeAlias = WeightOnlyLinear | DynamicLinear | StaticLinear
_Linear: TypeAlias = nn.Linear | _Quantised


class LowRank(nn.Module):
    """W x + b + (alpha / r) B A x, with A `down` [r, in] and B `up` [out, r].

    A is drawn, B is zero at first, and W and b are frozen under their own names: messages that
    carry what is trained carry `*.down` and `*.up` alone."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias: nn.Parameter | None = None
        if base.bias is not None:
            self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        out, inside = base.weight.shape
        self.down = nn.Parameter(base.weight.new_empty(rank, inside))
        self.up = nn.Parameter(base.weight.new_zeros(out, rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))  # as nn.Linear draws its own weight

    def forward(self, x: Tensor) -> Tensor:
        beside = F.linear(F.linear(x, self.down), self.up)
        return F.linear(x, self.weight, self.bias) + beside * self.scale

    def extra_repr(self) -> str:
        out, inside = self.weight.shape
        return f"{inside}, {out}, rank={len(self.down)}, scale={self.scale:g}"

    def whole(self) -> nn.Linear:
        """One layer that computes the same: W + (alpha / r) B A."""
        out, inside = self.weight.shape
        found = nn.Linear(inside, out, self.bias is not None)
        found.weight = nn.Parameter(self.weight + self.scale * self.up @ self.down)
        if self.bias is not None:
            found.bias = nn.Parameter(self.bias.detach().clone())
        return found


class LowRankQuantised(nn.Module):
    """The same beside a quantised layer, which stays under the name `base`."""

    def __init__(self, base: _Quantised, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=base.scale.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=base.scale.device))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        beside = F.linear(F.linear(x, self.down), self.up)
        return cast(Tensor, self.base(x)) + beside * self.scale

    def extra_repr(self) -> str:
        return f"rank={len(self.down)}, scale={self.scale:g}"

    def whole(self) -> nn.Linear:
        """One layer of float weights: what the codes stand for, and the adapter."""
        weight, bias = self.base.weight, self.base.bias
        found = nn.Linear(weight.shape[1], len(weight), bias is not None)
        found.weight = nn.Parameter(weight + self.scale * self.up @ self.down)
        if bias is not None:
            found.bias = nn.Parameter(bias.clone())
        return found


def low_rank(
    module: nn.Module, rank: int, targets: Sequence[str] = ("*",), alpha: float | None = None
) -> nn.Module:
    """A copy of `module` in which only adapters are trained: of rank `rank`, beside each linear
    layer whose dotted name matches one of `targets` ("*.q_proj", "layers.3.*"), quantised or not.
    `alpha` scales what they add by alpha / rank; it is `rank` if None.

    Raises `TaskError` for a rank below 1, and where no linear layer can be adapted. Layers inside
    of nn.MultiheadAttention and torch's transformer layers cannot: those read weights directly. Nor
    can subclasses of nn.Linear and layers with hooks, which compute in their own way."""
    if rank < 1:
        raise TaskError(f"rank is {rank}", "low_rank", "Give a whole number from 1")
    found = copy.deepcopy(module).requires_grad_(False)
    if _plain(found):
        return _beside(found, rank, alpha)
    there = list(linears(found))
    chosen = [
        (name, layer) for name, layer in there
        if any(fnmatchcase(name, target) for target in targets)
    ]  # fmt: skip
    if not chosen:
        known = ", ".join(name for name, _ in there) or "none"
        what = f"no linear layer matches {', '.join(map(repr, targets))}"
        raise TaskError(what, "low_rank", f"Layers that can be adapted: {known}")
    made: dict[_Linear, nn.Module] = {}  # a layer in two places has one adapter
    for name, layer in chosen:
        if layer not in made:
            made[layer] = _beside(layer, rank, alpha)
        _put(found, name, made[layer])
    return found


def merged(module: nn.Module) -> nn.Module:
    """A copy of `module` whose adapters are part of their layers: the same outputs, the names of
    the base. Nothing in it is frozen on account of adapters; what was not adapted stays frozen.
    Layers that were quantised have float weights again, and round no activations."""
    found = copy.deepcopy(module)
    if isinstance(found, LowRank | LowRankQuantised):
        return found.whole()
    places = [
        (name, layer) for name, layer in found.named_modules(remove_duplicate=False)
        if isinstance(layer, LowRank | LowRankQuantised)
    ]  # fmt: skip
    wholes = {layer: layer.whole() for _, layer in places}
    for name, layer in places:
        _put(found, name, wholes[layer])
    return found


def _beside(layer: _Linear, rank: int, alpha: float | None) -> nn.Module:
    alpha = rank if alpha is None else alpha
    kind = LowRank if isinstance(layer, nn.Linear) else LowRankQuantised
    return kind(layer, rank, alpha)  # type: ignore[arg-type]


def _plain(layer: nn.Module) -> TypeGuard[_Linear]:
    kinds = (nn.Linear, WeightOnlyLinear, DynamicLinear, StaticLinear)
    return type(layer) in kinds and not (layer._forward_hooks or layer._forward_pre_hooks)


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, _Linear]]:
    """What of a module `low_rank` can adapt, by dotted name, in the module's order; the module
    itself under no name."""
    if isinstance(module, _READ):
        return
    if _plain(module):
        yield prefix.rstrip("."), module
        return
    for name, child in module._modules.items():  # a child that is there twice, twice
        if child is not None:
            yield from linears(child, f"{prefix}{name}.")


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, layer)
