"""Tensors that meet: position by position, broadcast, and in products that sum over an axis."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from kitestring.compress.prune.coupled.atoms import Atoms, Block, Label, lumped

Part = tuple[Label, Sequence[int]]
"""A tensor, and where its axes are among those of the result."""


def meet(atoms: Atoms, sizes: Sequence[int], parts: Sequence[Part]) -> tuple[Block, ...]:
    """Blocks of what is computed from those tensors at each position of `sizes` by itself."""
    found: list[Block] = []
    pins: list[AbstractSet[int]] = []
    for label, at in parts:
        covered: set[int] = set()
        for block in label.blocks:
            if any(label.shape[axis] < sizes[at[axis]] for axis in block.axes):
                atoms.fix(block.ids)  # one value for many positions
                continue
            there = Block(tuple(at[axis] for axis in block.axes), block.ids)
            covered |= set(there.axes)
            found = _beside(atoms, found, there)
        pins.append({at[i] for i, size in enumerate(label.shape) if size > 1} - covered)
    for pinned in pins:
        held = [_pinned(atoms, block, pinned) for block in found]
        found = [block for block in held if block is not None]
    return tuple(found)


def level(label: Label, sizes: Sequence[int]) -> Part:
    """As broadcasting has it: the last axes are the same."""
    return label, range(len(sizes) - len(label.shape), len(sizes))


def _beside(atoms: Atoms, found: list[Block], block: Block) -> list[Block]:
    """Those and that one, joined where they have axes in common."""
    out = []
    for other in found:
        if not set(other.axes) & set(block.axes):
            out.append(other)
            continue
        both = _joined(atoms, other, block)
        if both is None:
            return [b for b in found if not set(b.axes) & set(block.axes)]
        block = both
    return [*out, block]


def _joined(atoms: Atoms, one: Block, other: Block) -> Block | None:
    """None where what can be removed of the one cannot be of the other."""
    more, less = sorted((one, other), key=lambda block: -len(block.axes))
    if not set(less.axes) <= set(more.axes):
        atoms.fix(one.ids)
        atoms.fix(other.ids)
        return None
    inner = [axis for axis in more.axes if axis not in less.axes]
    if inner and more.axes[0] not in less.axes:
        # As a head's inner positions, which a rotation holds: only whole heads can go.
        atoms.fix(less.ids)
        return lumped(atoms, more, less.axes)
    kept = lumped(atoms, more, inner) if inner else more
    order = [less.axes.index(axis) for axis in kept.axes]
    atoms.join(kept.ids, less.ids.transpose(order))
    return kept


def _pinned(atoms: Atoms, block: Block, pins: AbstractSet[int]) -> Block | None:
    """Where something that cannot become smaller lies along `pins`."""
    if not set(block.axes) & pins:
        return block
    if set(block.axes) <= pins:
        atoms.fix(block.ids)
        return None
    return lumped(atoms, block, set(block.axes) & pins)
