"""Looking into a model: what its submodules give while it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kitestring.errors import SettingError, TaskError

HIDDEN = "<hidden>"
"""The tap of the last hidden representation: what goes into the last layer, [n, d] or [n, T, d]."""
MAPS = "<maps>"
"""The tap of the last representation with places: maps [n, C, H, W], or [n, T, d]."""


@dataclass(frozen=True)
class Place:
    module: str  # dotted name
    into: bool = False  # its input, not its output


@dataclass(frozen=True)
class _Call:
    """One call of a submodule, while a model is traced."""

    name: str
    module: nn.Module
    given: Tensor | None
    found: Tensor | None


def look(
    module: nn.Module, places: Mapping[str, Place], x: Tensor, where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output for x and what is at the places. Hooks are gone afterwards, whatever happens."""
    seen: dict[str, Tensor] = {}
    handles = []

    def hook(tap: str, place: Place) -> Any:
        def call(_: nn.Module, args: Any, named: Any, found: Any) -> None:
            tensor = _first((*args, *named.values()) if place.into else found)
            if tensor is not None:
                seen[tap] = tensor

        return call

    try:
        for tap, place in places.items():
            layer = module.get_submodule(place.module)
            handles.append(layer.register_forward_hook(hook(tap, place), with_kwargs=True))
        out = module(x)
    finally:
        for handle in handles:
            handle.remove()
    _one(out, where)
    for tap in places:
        if tap not in seen:
            raise TaskError(f"nothing came out of {tap!r}", where, "Name a submodule that it calls")
    return out, seen


def places(module: nn.Module, taps: Sequence[str], x: Tensor, where: str) -> dict[str, Place]:
    """Where each tap is. `HIDDEN` and `MAPS` are found by one look at what the model does with x.

    Raises `TaskError` for a name that it does not have, and where nothing of the kind is found."""
    found: dict[str, Place] = {}
    names = {name for name, _ in module.named_modules(remove_duplicate=False) if name}
    for tap in taps:
        if tap in (HIDDEN, MAPS):
            continue
        if tap not in names:
            known = ", ".join(sorted(names)[:8]) or "none"
            raise TaskError(f"no submodule {tap!r}", where, f"Known: {known}")
        found[tap] = Place(tap)
    if HIDDEN in taps or MAPS in taps:
        with evaluating(module), torch.no_grad():
            out, calls = _traced(module, x, where)
        if HIDDEN in taps:
            found[HIDDEN] = _hidden(out, calls, where)[0]
        if MAPS in taps:
            found[MAPS] = _maps(out, calls, where)
    return found


def beside(
    student: str | Sequence[str], teacher: str | Sequence[str], where: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Taps of the student and as many of the teacher, one of each or several."""
    a, b = ((t,) if isinstance(t, str) else tuple(t) for t in (student, teacher))
    if not a or len(a) != len(b):
        what = f"{len(a)} taps of the student, {len(b)} of the teacher"
        raise SettingError(what, where, "Give as many of each, one at least")
    return a, b


def _hidden(out: Tensor, calls: Sequence[_Call], where: str) -> tuple[Place, Tensor]:
    """What goes into the last layer with weights. Where that layer gives something of another size
    than the model, the output is computed without a layer (from the embedding, where the two are
    tied): then what comes out of it."""
    for call in reversed(calls):
        if not _weighty(call.module) or call.found is None:
            continue
        into = call.found.numel() == out.numel()
        tensor = call.given if into else call.found
        if tensor is not None and tensor.is_floating_point() and tensor.ndim > 1:
            return Place(call.name, into), tensor
    raise TaskError(
        "its last hidden representation was not found", where, "Name the submodules to look at"
    )


def _maps(out: Tensor, calls: Sequence[_Call], where: str) -> Place:
    place, tensor = _hidden(out, calls, where)
    if _has_places(tensor):
        return place
    first = next(i for i, call in enumerate(calls) if _weighty(call.module))
    for call in reversed(calls[first:]):  # what comes before a layer with weights is the input
        if call.found is not None and _has_places(call.found):
            return Place(call.name)
    raise TaskError(
        "it has no maps [n, C, H, W] and no sequence [n, T, d]", where,
        "Name submodules that give some",
    )  # fmt: skip


def _has_places(a: Tensor) -> bool:
    count = a[0, 0].numel() if a.ndim == 4 else a.shape[1] if a.ndim == 3 else 0
    return a.is_floating_point() and count > 1


def _weighty(module: nn.Module) -> bool:
    """A layer with weights of its own, be they trained or, quantised, kept as buffers."""
    if any(True for _ in module.children()):
        return False
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _traced(module: nn.Module, x: Tensor, where: str) -> tuple[Tensor, list[_Call]]:
    """The output, and every call of a submodule in the order in which they end."""
    calls: list[_Call] = []
    handles = []

    def hook(name: str) -> Any:
        def call(layer: nn.Module, args: Any, named: Any, found: Any) -> None:
            calls.append(_Call(name, layer, _first((*args, *named.values())), _first(found)))

        return call

    try:
        for name, layer in module.named_modules():
            if name:
                handles.append(layer.register_forward_hook(hook(name), with_kwargs=True))
        out = module(x)
    finally:
        for handle in handles:
            handle.remove()
    _one(out, where)
    if not calls:
        what = "it has no submodules to look at"
        raise TaskError(what, where, "Make it of layers, or choose an objective on outputs")
    return out, calls


def _one(out: Any, where: str) -> None:
    if not isinstance(out, Tensor):
        what = f"gives a {type(out).__name__}, not one tensor"
        raise TaskError(what, where, "Wrap it in a module that returns logits")


def _first(found: Any) -> Tensor | None:
    """The first tensor of what a module was given or gives."""
    if isinstance(found, tuple | list):
        return next((a for a in found if isinstance(a, Tensor)), None)
    return found if isinstance(found, Tensor) else None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode inside the block; each submodule's own mode is as it was afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
