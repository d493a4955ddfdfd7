"""What the layers of a model are fed: sums over the rows of some batches, in one pass.

A linear layer's error on those rows is || (W' - W) X ||^2 = n / 2 tr((W' - W) H (W' - W)^T), with
H = 2 / n X X^T: what pruning and quantising need of the inputs has the size of H, not of X. Sums
are float64. A convolution is a linear layer on its patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.compress.matrices import Layer
from kitestring.errors import KitestringError, TaskError

Batches: TypeAlias = Iterable[Tensor | tuple[Tensor, ...]]
"""Inputs of a model, one tensor or all its arguments."""

AT_ONCE = 4096  # rows that are widened to float64 at a time


@dataclass(frozen=True, eq=False)
class Inputs:
    """Of one layer with `in` input columns; a convolution's are its patches, in order channel, row,
    column."""

    hessian: Tensor
    """float64 [in, in]: 2 / rows * sum of x x^T."""
    norm: Tensor
    """float64 [in]: the Euclidean norm of a column over all rows."""
    mean: Tensor
    """float64 [in]: mean of |x|."""
    rows: int


@dataclass(frozen=True)
class Fed:
    """Layers that get the very same tensor, and whether each of them is called only once."""

    names: tuple[str, ...]
    once: bool


def inputs_of(model: nn.Module, batches: Batches, names: Iterable[str]) -> dict[str, Inputs]:
    """What the layers of these dotted names (nn.Linear, nn.Conv2d without groups) are fed in eval
    mode, over all calls.

    Raises `TaskError` for other layers, where there is no batch or the model fails on one, where a
    layer is never reached and where its inputs are not finite."""
    return _inputs(model, each(batches), tuple(names))


def in_turn(
    model: nn.Module, batches: Batches, names: Iterable[str]
) -> Iterator[tuple[str, Inputs]]:
    """Layer after layer in the order in which the model comes to them, each with what it is fed by
    the model as it is by then: what was done to earlier layers has its effect on later ones."""
    kept = held(batches)
    for fed in in_order(model, kept, names):
        yield from _inputs(model, kept, fed.names, fed.once).items()


def in_order(model: nn.Module, batches: Batches, names: Iterable[str]) -> list[Fed]:
    """The layers in the order in which they are first reached; errors as `inputs_of`."""
    layers = {name: _layer(model, name) for name in names}
    groups: dict[str, list[str]] = {}  # by their first
    calls = dict.fromkeys(layers, 0)
    given: list[tuple[str, Tensor, int]] = []

    def hear(name: str, x: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:
            return
        for first, other, version in given:
            if other is x and version == _version(x) >= 0:
                groups[first].append(name)
                return
        given.append((name, x, _version(x)))
        groups[name] = [name]

    for batch in held(batches):
        left = {name: layer for name, layer in layers.items() if not calls[name]}
        if not left:
            break
        given.clear()
        with watched(model, left, hear):
            call(model, batch)
    _all_reached(name for name, count in calls.items() if not count)
    return [Fed(tuple(g), all(calls[name] == 1 for name in g)) for g in groups.values()]


def held(batches: Batches) -> Sequence[Tensor | tuple[Tensor, ...]]:
    """The batches in memory, to be gone through again; `TaskError` where there are none."""
    return batches if isinstance(batches, list | tuple) and batches else list(each(batches))


def each(batches: Batches) -> Iterator[Tensor | tuple[Tensor, ...]]:
    """One after the other; `TaskError` where there are none."""
    if isinstance(batches, Tensor):
        raise TaskError("batches are one tensor", "calibration", "Give a list: [x]")
    count = -1
    for count, batch in enumerate(batches):  # noqa: B007
        yield batch
    if count < 0:
        raise TaskError("no batch was given", "calibration", "Give one or more")


class _Reached(BaseException):
    """All that was to be heard was heard: the rest of the model need not run."""


def _inputs(
    model: nn.Module, batches: Batches, names: Sequence[str], once: bool = False
) -> dict[str, Inputs]:
    layers = {name: _layer(model, name) for name in names}
    sums = {name: _Sums() for name in names}
    last: list[tuple[Tensor, int, _Rows]] = []  # layers in a row often get the same tensor
    waiting: set[str] = set()

    def hear(name: str, x: Tensor) -> None:
        layer, version = layers[name], _version(x)
        if isinstance(layer, nn.Conv2d):
            for patches in _patches(layer, x):
                sums[name].add(_Rows(patches))
        else:
            if not (last and last[0][0] is x and last[0][1] == version >= 0):
                last[:] = [(x, version, _Rows(x.reshape(-1, x.shape[-1])))]
            sums[name].add(last[0][2])
        waiting.discard(name)
        if once and not waiting:
            raise _Reached

    with watched(model, layers, hear):
        for batch in batches:
            waiting |= set(names)
            with suppress(_Reached):
                call(model, batch)
            last.clear()
    _all_reached(name for name, found in sums.items() if not found.rows)
    return {name: found.inputs(name) for name, found in sums.items()}


class _Rows:
    """How many rows [n, in] there are, and their sums: of x x^T, and of |x|."""

    def __init__(self, rows: Tensor) -> None:
        self.count = len(rows)
        self.products = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        self.sizes = rows.new_zeros(rows.shape[1], dtype=torch.float64)
        for part in torch.split(rows, AT_ONCE):
            x = part.double()
            self.products.addmm_(x.T, x)
            self.sizes += x.abs().sum(0)


class _Sums:
    """Over calls."""

    def __init__(self) -> None:
        self.rows = 0

    def add(self, more: _Rows) -> None:
        if not more.count:
            return
        if not self.rows:
            self.products, self.sizes = more.products.clone(), more.sizes.clone()
        else:
            self.products += more.products
            self.sizes += more.sizes
        self.rows += more.count

    def inputs(self, name: str) -> Inputs:
        norm = self.products.diagonal().sqrt()
        if not norm.isfinite().all():
            what = "its inputs have NaN or infinity"
            raise TaskError(what, name, "Look at the batches, and at the layers before it")
        return Inputs(self.products * (2 / self.rows), norm, self.sizes / self.rows, self.rows)


def _layer(model: nn.Module, name: str) -> Layer:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise TaskError(f"no layer is called {name!r}", "calibration", "Look at names") from None
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        what = f"it is a {type(layer).__name__}"
        raise TaskError(what, name, "Inputs are known of nn.Linear and nn.Conv2d")
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        what = f"its channels are in {layer.groups} groups, each with inputs of its own"
        raise TaskError(what, name, "Leave it out")
    return layer


def _patches(layer: nn.Conv2d, x: Tensor) -> Iterator[Tensor]:
    """Some images at a time: [images * places, channels * kh * kw]."""
    images = x if x.ndim == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    for part in torch.split(images, 16):
        wide = functional.pad(part, layer._reversed_padding_repeated_twice, mode)
        found = functional.unfold(wide, layer.kernel_size, layer.dilation, 0, layer.stride)
        yield found.transpose(1, 2).flatten(0, 1)


def _version(x: Tensor) -> int:
    """Counts the writes into a tensor; -1 where torch does not count them."""
    return -1 if x.is_inference() else x._version


def call(model: nn.Module, batch: Tensor | tuple[Tensor, ...]) -> Any:
    """What the model gives; `TaskError` where it fails."""
    try:
        return model(*batch) if isinstance(batch, list | tuple) else model(batch)
    except KitestringError:
        raise
    except Exception as problem:  # anything can be wrong with somebody's model
        said = (str(problem).strip().splitlines() or [""])[0][:120]
        what = f"the model fails on a batch: {type(problem).__name__}: {said}"
        raise TaskError(what, "calibration", "Give inputs as it takes them") from problem


def _all_reached(missing: Iterable[str]) -> None:
    if names := sorted(missing):
        what = f"{', '.join(names)} got no row of any batch"
        raise TaskError(what, "calibration", "Skip it, or give batches that reach it")


@contextmanager
def watched(
    model: nn.Module, layers: Mapping[str, nn.Module], hear: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """In eval mode and without gradients, `hear` is told what each layer is called with; the modes
    are put back afterwards."""

    def before(name: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        hear(name, args[0] if args else next(iter(named.values())))

    modes = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(partial(before, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
