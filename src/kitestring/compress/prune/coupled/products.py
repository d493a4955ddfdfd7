"""Products that sum over an axis: matrices, convolutions, and rows of an embedding."""

from __future__ import annotations

import numpy as np

from kitestring.compress.prune.coupled.atoms import Block, Ids, Label, lumped
from kitestring.compress.prune.coupled.call import Call, Rule
from kitestring.compress.prune.coupled.meet import Part, meet

_ROWS, _SUM, _COLUMNS, _BATCH = range(4)


def _mm(call: Call) -> Label:
    """[rows, sum] by [sum, columns]."""
    left, right = call.label("mat1" if "mat1" in call.given else "self"), call.label("mat2")
    return _matrices(call, (left, (_ROWS, _SUM)), (right, (_SUM, _COLUMNS)), (_ROWS, _COLUMNS))


def _bmm(call: Call) -> Label:
    names = ("batch1", "batch2") if "batch1" in call.given else ("self", "mat2")
    left, right = (call.label(k) for k in names)
    out = (_BATCH, _ROWS, _COLUMNS)
    return _matrices(call, (left, (_BATCH, _ROWS, _SUM)), (right, (_BATCH, _SUM, _COLUMNS)), out)


def _mv(call: Call) -> Label:
    left, right = call.label("mat" if "mat" in call.given else "self"), call.label("vec")
    return _matrices(call, (left, (_ROWS, _SUM)), (right, (_SUM,)), (_ROWS,))


def _with_bias(rule: Rule) -> Rule:
    def both(call: Call) -> Label:
        found = rule(call)
        assert isinstance(found, Label)
        return call.together([found, call.label("self")])

    return both


def _matrices(call: Call, left: Part, right: Part, out: tuple[int, ...]) -> Label:
    sizes = [1] * 4
    for label, at in (left, right):
        for axis, size in zip(at, label.shape, strict=True):
            sizes[axis] = size
    owned = [label.own for label, _ in (left, right)]
    for label, at in (left, right):
        for axis, place in enumerate(at):
            if label.own and place != _BATCH:
                call.notes.role("into" if place == _SUM else "out", label.over(axis))
    blocks = []
    for block in meet(call.atoms, sizes, [left, right]):
        if block.axes == (_SUM,):
            # Without a weight to scale it, what a removed position adds could not be told.
            if owned[0] == owned[1]:
                call.atoms.fix(block.ids)
            continue
        block = lumped(call.atoms, block, {_SUM}) if _SUM in block.axes else block
        if _BATCH in block.axes and not any(owned):
            call.notes.mark("heads", block.ids)
        blocks.append(Block(tuple(out.index(axis) for axis in block.axes), block.ids))
    return Label(call.shape, tuple(blocks))


def _convolution(call: Call) -> Label | None:
    """[n, in, ...] by [out, in / groups, ...], or [in, out / groups, ...] where transposed."""
    atoms, groups = call.atoms, int(call.given["groups"])
    x, weight = call.label("input"), call.label("weight")
    transposed = bool(call.given["transposed"])
    if (transposed and groups > 1) or len(x.shape) != len(call.shape):
        return None
    channels = _channels(call, x)
    into, out = (weight.over(axis) for axis in ((0, 1) if transposed else (1, 0)))
    for axis in range(2, len(weight.shape)):
        if block := weight.over(axis):
            atoms.fix(block.ids)
    ins = channels.ids if channels else np.zeros(x.shape[1], np.int64)
    outs = out.ids if out else np.zeros(call.shape[1], np.int64)
    each = into.ids if into else np.zeros(weight.shape[1], np.int64)
    _grouped(call, ins, each, outs, groups)
    if weight.own:
        call.notes.role("into", into)
        call.notes.role("out", out)
    found = Label(call.shape, (Block((1,), outs),))
    parts: list[Part] = [(found, range(len(call.shape)))]
    parts += [(bias, (1,)) for bias in call.maybe("bias")]
    return Label(call.shape, meet(atoms, call.shape, parts))


def _grouped(call: Call, ins: Ids, each: Ids, outs: Ids, groups: int) -> None:
    """Either whole groups can go, or the same of each."""
    atoms = call.atoms
    if groups == 1:
        atoms.join(ins, each)
        return
    ins, outs = ins.reshape(groups, -1), outs.reshape(groups, -1)
    if call.notes.by_whole(groups >= ins.shape[1]):
        row = ins[:, :1]
        atoms.join(ins, row)
        atoms.join(outs, row)
        atoms.fix(each)
        return
    atoms.join(ins, each)
    atoms.join(outs, outs[:1])


def _channels(call: Call, x: Label) -> Block | None:
    """The block of axis 1 alone; what lies along others is held."""
    found = None
    for block in x.blocks:
        if 1 not in block.axes:
            call.atoms.fix(block.ids)
            continue
        others = set(block.axes) - {1}
        found = lumped(call.atoms, block, others) if others else block
    return found


def _embedding(call: Call) -> Label:
    weight, axes = call.label("weight"), len(call.shape)
    rows, width = weight.over(0), weight.over(1)
    if rows is not None:
        call.atoms.fix(rows.ids)
    for block in call.label("indices").blocks:
        call.atoms.fix(block.ids)
    if width is None:
        return Label(call.shape)
    call.notes.mark("embedded", width.ids)
    if weight.own:
        call.notes.role("out", width)
    return Label(call.shape, (Block((axes - 1,), width.ids),))


PRODUCTS: dict[str, Rule] = {
    "mm": _mm,
    "addmm": _with_bias(_mm),
    "bmm": _bmm,
    "baddbmm": _with_bias(_bmm),
    "mv": _mv,
    "addmv": _with_bias(_mv),
    "convolution": _convolution,
    "embedding": _embedding,
}
