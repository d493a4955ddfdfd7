"""Groups: what a layer makes, with all that has to become smaller with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from kitestring.compress.prune.coupled.atoms import FIXED, Atoms, Ids
from kitestring.compress.prune.coupled.call import Mark
from kitestring.compress.prune.coupled.trace import Trace

Kind: TypeAlias = Literal["channels", "heads", "neurons", "width"]


@dataclass(frozen=True)
class Group:
    """`size` parts of which any can be removed, but not all. `layers` make them, the first in the
    run is also its name: "channels" of convolutions, "neurons" of linear layers, whole "heads" of
    attention. "width" goes through a norm over it, as what transformers' layers add to does, or
    comes from an embedding; `exact` where it does not go through a norm, so that what is left
    computes what it did. Parts are in the order of the first layer's outputs."""

    name: str
    kind: Kind
    size: int
    layers: tuple[str, ...]
    exact: bool
    atoms: Ids = field(repr=False, compare=False)
    along: tuple[Ids, ...] = field(repr=False, compare=False)  # of each layer: one of them stays


def groups_of(trace: Trace) -> tuple[Group, ...]:
    """In the order of the run. What makes up all of a parameter is from then on fixed."""
    for name, axes in trace.along.items():
        for axis, ids in enumerate(axes):
            if len(ids) and len(np.unique(trace.ids((name, axis)))) == 1:
                trace.atoms.fix(ids[:1])
    links = Atoms()
    links.fresh(len(trace.atoms))
    for place in trace.out:
        if len(free := _free(trace, place)):
            links.join(free, free[:1])
    members: dict[int, list[tuple[str, int]]] = {}
    for place in trace.out:
        if len(free := _free(trace, place)):
            members.setdefault(int(links.find(free[:1])[0]), []).append(place)
    return tuple(
        group for places in members.values() if (group := _group(trace, places)).size > 1
    )  # fmt: skip


def _free(trace: Trace, place: tuple[str, int]) -> Ids:
    """The atoms along it that may go, each once, in its order."""
    ids = trace.ids(place)
    values, first = np.unique(ids[ids != FIXED], return_index=True)
    return values[np.argsort(first)]


def _group(trace: Trace, places: list[tuple[str, int]]) -> Group:
    along = tuple(_free(trace, place) for place in places)
    atoms = np.array(list(dict.fromkeys(np.concatenate(along).tolist())), np.int64)
    layers = tuple(dict.fromkeys(layer_of(name) for name, _ in places))

    def has(mark: Mark) -> bool:
        return bool(np.isin(atoms, trace.atoms.find(trace.marked[mark])).any())

    kind: Kind = "channels" if len(trace.along[places[0][0]]) > 2 else "neurons"
    wide = has("normed") or (has("embedded") and not has("heads"))
    kind = "width" if wide else "heads" if has("heads") else kind
    return Group(layers[0], kind, len(atoms), layers, not has("normed"), atoms, along)


def layer_of(name: str) -> str:
    """Of a parameter's name: a layer's, for its "weight", or the parameter's own."""
    return name.removesuffix(".weight")
