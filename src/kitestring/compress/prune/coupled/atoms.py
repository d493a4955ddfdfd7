"""What can only be removed together: numbers for the positions along the axes of a model's tensors.

Each position along an axis of a parameter is an atom. Operations join atoms: where two tensors are
added, what stands at the same position is of one fate. Joined atoms go or stay together.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

Ids: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
FIXED = 0
"""The atom that has to stay, and all that is joined with it."""


class Atoms:
    """Disjoint sets of the numbers 0, 1, ...; the least of a set stands for it."""

    def __init__(self) -> None:
        self._above: Ids = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self._above)

    def fresh(self, count: int) -> Ids:
        new = np.arange(len(self), len(self) + count, dtype=np.int64)
        self._above = np.concatenate([self._above, new])
        return new

    def find(self, ids: Ids) -> Ids:
        """The numbers that stand for their sets."""
        found: Ids = self._above[ids]
        while True:
            up: Ids = self._above[found]
            if np.array_equal(up, found):
                break
            found = up
        self._above[ids] = found
        return found

    def join(self, a: Ids, b: Ids) -> None:
        """Position by position, broadcast."""
        a, b = np.broadcast_arrays(a, b)
        while True:
            a, b = self.find(a), self.find(b)
            apart = a != b
            if not apart.any():
                return
            a, b = a[apart], b[apart]
            np.minimum.at(self._above, np.maximum(a, b), np.minimum(a, b))

    def fix(self, ids: Ids) -> None:
        self.join(ids, np.full(1, FIXED))


@dataclass(frozen=True)
class Block:
    """Atoms along some axes of a tensor at once: `ids` has those axes, in the order of `axes`. That
    order is the one in which a longer axis was split, the outermost first. `repeats`: the tensor is
    the same all along, as after `expand`."""

    axes: tuple[int, ...]
    ids: Ids
    repeats: bool = False

    def along(self, axes: Collection[int]) -> tuple[int, ...]:
        """Which axes of `ids` those are."""
        return tuple(i for i, axis in enumerate(self.axes) if axis in axes)


@dataclass(frozen=True)
class Label:
    """What is known of a tensor. No two blocks have an axis in common, and along an axis of no
    block nothing can be removed."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...] = ()
    own: bool = False  # a parameter, or a view of one

    def over(self, axis: int) -> Block | None:
        return next((b for b in self.blocks if axis in b.axes), None)


def lumped(atoms: Atoms, block: Block, axes: Collection[int]) -> Block:
    """With all atoms joined that differ along `axes` alone; those are not all axes of the block."""
    along = block.along(axes)
    ids = np.moveaxis(block.ids, along, range(-len(along), 0))
    rest = tuple(axis for axis in block.axes if axis not in axes)
    ids = ids.reshape(*ids.shape[: len(rest)], -1)
    atoms.join(ids, ids[..., :1])
    return Block(rest, ids[..., 0], block.repeats)


def tidy(atoms: Atoms, block: Block) -> Block:
    """Without axes along which nothing changes, the innermost first; one stays."""
    for axis in reversed(block.axes):
        if len(block.axes) == 1:
            break
        at = block.axes.index(axis)
        ids = atoms.find(block.ids)
        if (ids == ids.take([0], at)).all():
            axes = tuple(a for a in block.axes if a != axis)
            block = replace(block, axes=axes, ids=block.ids.take([0], at).squeeze(at))
    return block


def moved(atoms: Atoms, label: Label, to: dict[int, int], shape: tuple[int, ...]) -> Label:
    """With axis a at to[a]; along what is not in `to`, and is gone, all go together."""
    blocks = []
    for block in label.blocks:
        gone = [axis for axis in block.axes if axis not in to]
        if len(gone) == len(block.axes):
            atoms.fix(block.ids)
            continue
        block = lumped(atoms, block, gone) if gone else block
        blocks.append(replace(block, axes=tuple(to[axis] for axis in block.axes)))
    return replace(label, shape=shape, blocks=tuple(blocks))
