"""What an engine does with messages of many devices: addresses them, picks some, adds them up."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kitestring.core import KINDS, Array, Ask, Message, Rows, Tree
from kitestring.devices.session import broadcast
from kitestring.errors import TaskError


def addressed(ask: Ask, ids: Array) -> Message:
    """What each of these devices is sent."""
    every = [broadcast(getattr(ask.all, kind), len(ids)) for kind in KINDS]
    if ask.each:
        own = ask.each(ids)
        every = [Tree({**a, **getattr(own, k)}) for a, k in zip(every, KINDS, strict=True)]
    return Message(*every)


def copied(message: Message) -> Message:
    """Of the same leaves, but what one chunk's reply does to its trees the next does not see."""
    return Message(*(Tree(getattr(message, kind)) for kind in KINDS))


def choose(message: Message, which: Array) -> Message:
    """The devices `which`: a mask [D], or positions."""

    def leaf(v: Any) -> Any:
        return v.of(which) if isinstance(v, Rows) else v[which]

    return Message(*(Tree({k: leaf(v) for k, v in getattr(message, c).items()}) for c in KINDS))


def spread(message: Message, who: Array) -> Message:
    """Give the devices that did not call an empty answer, so that all stay stacked."""

    def leaf(v: Any) -> Any:
        values = v.values if isinstance(v, Rows) else v
        wide = np.zeros((len(who), *values.shape[1:]), values.dtype)
        wide[who] = values
        if not isinstance(v, Rows):
            return wide
        n = np.zeros(len(who), np.int64)
        n[who] = v.n
        return Rows(wide, n)

    return Message(*(Tree({k: leaf(v) for k, v in getattr(message, c).items()}) for c in KINDS))


def finite(message: Message, count: int) -> Array:
    """[D]: every real number that the device sent is finite."""
    good = np.ones(count, bool)
    for _, _, leaf in message.leaves():
        values = leaf.values if isinstance(leaf, Rows) else leaf
        if values.dtype.kind == "f":
            kept = 1 + isinstance(leaf, Rows)
            fine = np.isfinite(values).all(axis=tuple(range(kept, values.ndim)))
            good &= (fine | ~leaf.mask()).all(1) if isinstance(leaf, Rows) else fine
    return good


def usable(message: Message, there: Array) -> tuple[Message, Array]:
    """The finite messages of the devices that are `there` [D], and whose they are [D]."""
    good = there & finite(message, len(there))
    return message if good.all() else choose(message, good), good


def total(message: Message, there: Array) -> tuple[Message, Array]:
    """The sum over the finite messages of the devices that are `there` [D], in float64 and with a
    leading axis of 1, and whose they are [D].

    A sum is finite where all of its terms are, or very nearly always: only if it is not are they
    looked at one by one."""
    for kind, name, leaf in message.leaves():
        if isinstance(leaf, Rows):
            raise TaskError(f"{kind}.{name} is ragged: rows cannot be summed over devices")
    with np.errstate(invalid="ignore", over="ignore"):
        whole = _sum(message if there.all() else choose(message, there))
        if all(math.isfinite(np.add.reduce(leaf, None)) for _, _, leaf in whole.leaves()):
            return whole, there
        good = there & finite(message, len(there))
        return _sum(choose(message, good)), good


def _sum(message: Message) -> Message:
    def over_devices(tree: Tree) -> Tree:
        return Tree(
            {k: np.add.reduce(v, 0, dtype=np.float64, keepdims=True) for k, v in tree.items()}
        )

    return Message(*(over_devices(getattr(message, kind)) for kind in KINDS))


def add(total: Message | None, part: Message) -> Message:
    """Into `total`, if there is one."""
    if total is None:
        return part
    for kind, name, leaf in part.leaves():
        mine = getattr(total, kind)
        mine[name] += leaf
    return total
