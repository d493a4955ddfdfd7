"""Labels of views, and of what is put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kitestring.compress.prune.coupled.atoms import Atoms, Block, Label, tidy
from kitestring.compress.prune.coupled.meet import meet

Pairs = list[tuple[list[int], list[int]]]


def reshaped(atoms: Atoms, label: Label, shape: tuple[int, ...], queries: bool = False) -> Label:
    """Where an axis is made of two that have atoms, those of the outer one remain; with `queries`
    those of one that repeats, as heads of keys and values do that several queries share."""
    if 0 in shape:
        for block in label.blocks:
            atoms.fix(block.ids)
        return replace(label, shape=shape, blocks=())
    pairs = _pairs(label.shape, shape)
    blocks, taken = [], set[int]()
    for block in sorted(label.blocks, key=lambda b: (not (queries and b.repeats), min(b.axes))):
        touched = list(
            dict.fromkeys(
                p for axis in block.axes for p, (old, _) in enumerate(pairs) if axis in old
            )
        )
        new = [axis for p in touched for axis in pairs[p][1]]
        if not new or taken & set(touched):
            atoms.fix(block.ids)
            continue
        taken |= set(touched)
        block = _wide(label, block, [axis for p in touched for axis in pairs[p][0]])
        ids = block.ids.reshape([shape[axis] for axis in new])
        blocks.append(tidy(atoms, replace(block, axes=tuple(new), ids=ids)))
    return replace(label, shape=shape, blocks=tuple(blocks))


def _pairs(old: Sequence[int], new: Sequence[int]) -> Pairs:
    """Axes that become axes, the fewest at a time."""
    out: Pairs = []
    i = j = 0
    while i < len(old) or j < len(new):
        ones = (i < len(old) and old[i] == 1, j < len(new) and new[j] == 1)
        if any(ones):
            out.append(([i] * ones[0], [j] * ones[1]))
            i, j = i + ones[0], j + ones[1]
            continue
        left, right = [i], [j]
        have, want = old[i], new[j]
        while have != want:
            if have < want:
                left.append(left[-1] + 1)
                have *= old[left[-1]]
            else:
                right.append(right[-1] + 1)
                want *= new[right[-1]]
        out.append((left, right))
        i, j = left[-1] + 1, right[-1] + 1
    return out


def _wide(label: Label, block: Block, axes: Sequence[int]) -> Block:
    """The same along more axes, in that order."""
    ids = block.ids[(..., *[None] * (len(axes) - len(block.axes)))]
    have = [*block.axes, *(axis for axis in axes if axis not in block.axes)]
    ids = ids.transpose([have.index(axis) for axis in axes])
    ids = np.broadcast_to(ids, [label.shape[axis] for axis in axes])
    return replace(block, axes=tuple(axes), ids=ids)


def taken(label: Label, axis: int, index: Sequence[int]) -> Label:
    """Those positions of an axis."""
    shape = tuple(len(index) if i == axis else size for i, size in enumerate(label.shape))
    blocks = []
    for block in label.blocks:
        if axis in block.axes:
            ids = block.ids.take(np.asarray(index, np.int64), block.axes.index(axis))
            block = replace(block, ids=ids)
        blocks.append(block)
    return replace(label, shape=shape, blocks=tuple(blocks))


def picked(atoms: Atoms, label: Label, axis: int, index: int) -> Label:
    """One position of an axis, which is then gone."""
    shape = label.shape[:axis] + label.shape[axis + 1 :]
    blocks = []
    for block in label.blocks:
        ids = block.ids
        if axis in block.axes:
            at = block.axes.index(axis)
            ids = ids.take([index], at).squeeze(at)
        left = tuple(a - (a > axis) for a in block.axes if a != axis)
        if left:
            blocks.append(replace(block, axes=left, ids=ids))
        else:
            atoms.fix(ids)
    return replace(label, shape=shape, blocks=tuple(blocks))


def padded(label: Label, axis: int, before: int, after: int) -> Label:
    """With positions beside it that stay; fewer than none cuts off."""
    size = label.shape[axis]
    index = np.arange(max(0, -before), size - max(0, -after))
    wide = (max(0, before), max(0, after))
    blocks = []
    for block in label.blocks:
        if axis in block.axes:
            at = block.axes.index(axis)
            pads = [wide if i == at else (0, 0) for i in range(len(block.axes))]
            block = Block(block.axes, np.pad(block.ids.take(index, at), pads))
        blocks.append(block)
    shape = tuple(len(index) + sum(wide) if i == axis else s for i, s in enumerate(label.shape))
    return Label(shape, tuple(blocks))


def beside(atoms: Atoms, labels: Sequence[Label], axis: int) -> Label:
    """One after the other along an axis."""
    sizes = [label.shape[axis] for label in labels]
    shape = tuple(
        sum(sizes) if i == axis else size for i, size in enumerate(labels[0].shape)
    )  # fmt: skip
    along = [label.over(axis) for label in labels]
    axes = max((b.axes for b in along if b), key=len, default=())
    joined = [_along(atoms, label, axes, axis) for label in labels] if axes else []
    if any(block is None for block in joined):
        for label in labels:
            for block in label.blocks:
                atoms.fix(block.ids)
        return Label(shape)
    # Along the others they are at the same positions.
    rest = [
        replace(label, blocks=tuple(b for b in label.blocks if not set(b.axes) & {axis, *axes}))
        for label in labels
    ]
    others = _across(atoms, rest, axis, axes)
    if not axes:
        return Label(shape, others)
    ids = np.concatenate([b.ids for b in joined if b], axes.index(axis))
    return Label(shape, (*others, tidy(atoms, Block(axes, ids))))


def _along(atoms: Atoms, label: Label, axes: tuple[int, ...], axis: int) -> Block | None:
    """Its atoms along all of `axes`; None where they cannot be told."""
    touching = [b for b in label.blocks if set(b.axes) & set(axes)]
    if not touching and len(axes) == 1:
        return Block(axes, np.zeros(label.shape[axis], np.int64))
    if len(touching) == 1 and set(touching[0].axes) <= set(axes):
        return _wide(label, touching[0], axes)
    return None


def _across(
    atoms: Atoms, labels: Sequence[Label], axis: int, axes: Sequence[int]
) -> tuple[Block, ...]:
    """Blocks of the other axes: as of tensors that meet there."""
    left = [i for i in range(len(labels[0].shape)) if i != axis and i not in axes]
    sizes = [labels[0].shape[i] for i in left]
    parts = [
        (
            Label(
                tuple(sizes),
                tuple(Block(tuple(left.index(a) for a in b.axes), b.ids) for b in label.blocks),
            ),
            range(len(left)),
        )
        for label in labels
    ]
    found = meet(atoms, sizes, parts)
    return tuple(Block(tuple(left[a] for a in b.axes), b.ids) for b in found)
