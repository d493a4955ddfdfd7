"""A model's run on an example, with what each of its operations joins.

Operations are seen where PyTorch dispatches them, when its modules and functions have come down to
a few hundred: a model may be written in any way. What is unknown there holds all that it is given,
so nothing is removed that is not understood.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from kitestring.compress.prune.coupled.atoms import Atoms, Block, Ids, Label
from kitestring.compress.prune.coupled.call import Call, Mark, Notes, Role
from kitestring.compress.prune.coupled.rules import RULES, pointwise
from kitestring.errors import TaskError

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
Place: TypeAlias = tuple[str, int]
"""A parameter or buffer by its dotted name, and one of its axes."""


@dataclass(frozen=True)
class Trace:
    """`along` has the atoms of each axis of each parameter and buffer. Along the axes in `into`
    products sum, along those in `out` is what they make, in the order of the run. `marked` are
    atoms of heads of attention ("heads"), of embeddings ("embedded"), and those of which the others
    are normalised otherwise when one goes ("normed"). `norms` has the atoms along the axes of what
    norms give, by the layer's name; `whole` is as in `Notes`."""

    atoms: Atoms
    along: Mapping[str, tuple[Ids, ...]]
    into: tuple[Place, ...]
    out: tuple[Place, ...]
    marked: Mapping[Mark, Ids]
    norms: Mapping[str, tuple[Ids, ...]]
    queries: bool
    whole: tuple[bool, ...]

    def ids(self, place: Place) -> Ids:
        """What stands for the atoms there."""
        return self.atoms.find(self.along[place[0]][place[1]])


def trace(
    model: nn.Module, example: Any, queries: bool = False, like: Trace | None = None
) -> Trace:
    """`model` is in evaluation. With `queries`, queries that share keys and values go without them,
    as many of each. `like` is that of a larger model, which this one is to be held against. Raises
    `TaskError` where the model fails on the example, or gives something not made of tensors."""
    with torch.no_grad():
        answer(model, example)
    named = dict(tensors(model))
    sizes = [size for t in named.values() for size in t.shape]
    places = [(name, axis) for name, t in named.items() for axis in range(t.ndim)]
    atoms = Atoms()
    each = np.split(atoms.fresh(sum(sizes)), np.cumsum(sizes)[:-1]) if sizes else []
    by_place = dict(zip(places, each, strict=True))
    along = {k: tuple(by_place[k, axis] for axis in range(t.ndim)) for k, t in named.items()}
    seen = _Recorder(atoms, queries, like.whole if like else ())
    for name, t in named.items():
        blocks = tuple(Block((axis,), ids) for axis, ids in enumerate(along[name]))
        seen.know(t, Label(tuple(t.shape), blocks, own=True))
    slow = sdpa_kernel(SDPBackend.MATH)
    with _watched(model, seen) as norms, torch.no_grad(), slow, _slow_attention(), seen:
        out = model(*(example if isinstance(example, tuple) else (example,)))
    for tensor in leaves(out):
        for block in seen.label(tensor).blocks:
            atoms.fix(block.ids)
    starts = np.cumsum([1, *sizes])

    def owners(role: Role) -> tuple[Place, ...]:
        found = np.searchsorted(starts, seen.notes.roles[role], side="right") - 1
        return tuple(dict.fromkeys(places[i] for i in found if i < len(places)))

    marked = {k: np.concatenate([np.zeros(1, np.int64), *v]) for k, v in seen.notes.marks.items()}
    into, out, whole = owners("into"), owners("out"), tuple(seen.notes.whole)
    return Trace(atoms, along, into, out, marked, norms, queries, whole)


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, each once, by the first of its names."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def answer(model: nn.Module, example: Any) -> Any:
    """Of a tensor or a mapping, or of several in a tuple."""
    args = example if isinstance(example, tuple) else (example,)
    try:
        return model(*args)
    except Exception as problem:  # anything can be wrong with somebody's model
        said = (str(problem).strip().splitlines() or [""])[0][:120]
        what = f"the model fails on the example: {type(problem).__name__}: {said}"
        raise TaskError(what, mend="Give an input as it takes it, several in a tuple") from problem


def leaves(found: Any) -> Iterator[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, Mapping):
        for part in found.values():
            yield from leaves(part)
    elif isinstance(found, list | tuple):
        for part in found:
            yield from leaves(part)
    elif is_dataclass(found):
        for field in fields(found):
            yield from leaves(getattr(found, field.name))
    elif not (found is None or isinstance(found, str | int | float)):
        what = f"the model returns {type(found).__name__}"
        raise TaskError(what, mend="Return tensors, or lists, tuples or mappings of them")


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, atoms: Atoms, queries: bool, whole: tuple[bool, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.notes = Notes(asked=whole)
        self._atoms, self._queries = atoms, queries
        self._labels: dict[int, Label] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the number of one of these

    def know(self, tensor: Tensor, label: Label) -> None:
        self._labels[id(tensor)] = label
        self._alive.append(tensor)

    def label(self, tensor: Tensor) -> Label:
        return self._labels.get(id(tensor)) or Label(tuple(tensor.shape))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments}
        given.update(zip(given, args, strict=False))
        given.update(kwargs or {})
        touched = [t for t in _tensors(given.values()) if self.label(t).blocks]
        if touched:
            outs = tuple(_tensors([found]))
            name = schema.name.partition("::")[2]
            pure = name.removesuffix("_") if name.endswith("_") else name
            rule = RULES.get(pure)
            if rule is None and torch.Tag.pointwise in func.tags:
                rule = pointwise
            call = Call(
                self._atoms, self.notes, self._queries, pure, given, outs, self.label
            )  # fmt: skip
            labels = rule(call) if rule and outs else None
            if labels is None:
                for tensor in touched:
                    for block in self.label(tensor).blocks:
                        self._atoms.fix(block.ids)
                labels = []
            each = labels if isinstance(labels, list) else [labels] * len(outs)
            for tensor, label in zip(outs, each, strict=False):
                if tuple(tensor.shape) == label.shape:
                    self.know(tensor, label)
        return found


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def _watched(model: nn.Module, seen: _Recorder) -> Iterator[dict[str, tuple[Ids, ...]]]:
    """Fills in what norms give: without parameters, nothing else says what they are of."""
    found: dict[str, tuple[Ids, ...]] = {}

    def look(name: str, result: Tensor) -> None:
        label = seen.label(result)
        found[name] = tuple(
            block.ids if (block := label.over(axis)) and len(block.axes) == 1
            else np.zeros(size, np.int64)
            for axis, size in enumerate(label.shape)
        )  # fmt: skip

    hooks = [
        layer.register_forward_hook(lambda _, __, result, name=name: look(name, result))
        for name, layer in model.named_modules() if isinstance(layer, _NORMS)
    ]  # fmt: skip
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _slow_attention() -> Iterator[None]:
    """Without the one operation that PyTorch makes of a whole layer of attention."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
