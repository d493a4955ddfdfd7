"""What each operation joins: views, what is computed position by position, and the table of all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from kitestring.compress.prune.coupled.atoms import Block, Label, moved
from kitestring.compress.prune.coupled.call import Call, Rule
from kitestring.compress.prune.coupled.layout import beside, padded, picked, reshaped, taken
from kitestring.compress.prune.coupled.norms import NORMS
from kitestring.compress.prune.coupled.products import PRODUCTS

_MASKS = (torch.bool, torch.uint8)


def pointwise(call: Call) -> Label:
    """At each position by itself, of tensors that are broadcast."""
    return call.together(call.maybe(*call.given))


def _same(call: Call) -> Label:
    return call.label("self")


def _view(call: Call) -> Label | None:
    if "dtype" in call.given:
        return None
    return reshaped(call.atoms, call.label("self"), call.shape, call.queries)


def _permuted(call: Call) -> Label:
    x = call.label("self")
    of = len(x.shape)
    order = list(range(of))
    if call.name == "permute":
        order = [int(a) % of for a in call.given["dims"]]
    elif of > 1:
        one, other = (0, 1) if call.name == "t" else (call.axis("dim0", of), call.axis("dim1", of))
        order[one], order[other] = order[other], order[one]
    return moved(call.atoms, x, {old: new for new, old in enumerate(order)}, call.shape)


def _unsqueezed(call: Call) -> Label:
    x = call.label("self")
    at = call.axis("dim", len(x.shape) + 1)
    return moved(call.atoms, x, {a: a + (a >= at) for a in range(len(x.shape))}, call.shape)


def _squeezed(call: Call) -> Label:
    x = call.label("self")
    asked = call.axes("dim", len(x.shape))
    kept = [a for a, size in enumerate(x.shape) if size > 1 or a not in asked]
    return moved(call.atoms, x, {old: new for new, old in enumerate(kept)}, call.shape)


def _expanded(call: Call) -> Label:
    """Along an axis that repeats one value, any of them can go."""
    x = call.label("self")
    more = len(call.shape) - len(x.shape)
    grown = {
        a for a, size in enumerate(call.shape) if size > 1 and (a < more or x.shape[a - more] == 1)
    }
    blocks = []
    for block in x.blocks:
        axes = tuple(a + more for a in block.axes)
        if grown & set(axes):
            call.atoms.fix(block.ids)
        else:
            blocks.append(replace(block, axes=axes))
    blocks += [Block((a,), call.atoms.fresh(call.shape[a]), True) for a in sorted(grown)]
    return replace(x, shape=call.shape, blocks=tuple(blocks))


def _repeated(call: Call) -> Label:
    """Over and over along each axis."""
    x, repeats = call.label("self"), call.given["repeats"]
    more = len(repeats) - len(x.shape)
    blocks = []
    for block in x.blocks:
        ids = np.tile(block.ids, [int(repeats[a + more]) for a in block.axes])
        blocks.append(Block(tuple(a + more for a in block.axes), ids))
    return Label(call.shape, tuple(blocks))


def _sliced(call: Call) -> Label:
    x = call.label("self")
    axis = call.axis("dim", len(x.shape))
    part = slice(call.given["start"], call.given["end"], call.given["step"])
    return taken(x, axis, range(*part.indices(x.shape[axis])))


def _selected(call: Call) -> Label:
    x = call.label("self")
    axis = call.axis("dim", len(x.shape))
    return picked(call.atoms, x, axis, int(call.given["index"]))


def _unbound(call: Call) -> list[Label]:
    x = call.label("self")
    axis = call.axis("dim", len(x.shape))
    return [picked(call.atoms, x, axis, i) for i in range(x.shape[axis])]


def _split(call: Call) -> list[Label]:
    x = call.label("self")
    axis = call.axis("dim", len(x.shape))
    ends = np.cumsum([out.shape[axis] for out in call.outs])
    return [
        taken(x, axis, range(end - out.shape[axis], end))
        for out, end in zip(call.outs, ends.tolist(), strict=True)
    ]


def _indexed(call: Call) -> Label | None:
    """`x[i, j]` with whole numbers, along axes that are next to each other."""
    x, indices = call.label("self"), call.given["indices"]
    used = [i for i, index in enumerate(indices) if index is not None]
    for i in used:
        for block in call.labels(indices[i]).blocks:
            call.atoms.fix(block.ids)
    if used != list(range(used[0], used[-1] + 1)) or any(indices[i].dtype in _MASKS for i in used):
        return None
    new = len(call.shape) - len(x.shape)
    to = {a: a if a < used[0] else a + new for a in range(len(x.shape)) if a not in used}
    return moved(call.atoms, x, to, call.shape)


def _chosen(call: Call) -> Label:
    x = call.label("self")
    return taken(x, call.axis("dim", len(x.shape)), call.given["index"].tolist())


def _flipped(call: Call) -> Label:
    x = call.label("self")
    for axis in call.axes("dims", len(x.shape)):
        x = taken(x, axis, range(x.shape[axis] - 1, -1, -1))
    return x


def _joined(call: Call) -> Label:
    labels = [call.labels(t) for t in call.given["tensors"] if t.ndim > 1 or t.numel()]
    return beside(call.atoms, labels, call.axis("dim", len(call.shape)))


def _stacked(call: Call) -> Label:
    axis, labels = call.axis("dim", len(call.shape)), []
    for t in call.given["tensors"]:
        to = {a: a + (a >= axis) for a in range(t.ndim)}
        shape = (*t.shape[:axis], 1, *t.shape[axis:])
        labels.append(moved(call.atoms, call.labels(t), to, shape))
    return beside(call.atoms, labels, axis)


def _padded(call: Call) -> Label:
    x, pads = call.label("self"), call.given["pad"]
    for i in range(0, len(pads), 2):
        x = padded(x, len(x.shape) - 1 - i // 2, int(pads[i]), int(pads[i + 1]))
    return x


def _halves(call: Call) -> Label:
    """GLU: the first half by what the second lets through."""
    x = call.label("self")
    axis = call.axis("dim", len(x.shape))
    half = x.shape[axis] // 2
    return call.together([taken(x, axis, range(half)), taken(x, axis, range(half, 2 * half))])


def _shuffled(call: Call) -> Label:
    """`pixel_shuffle`: each channel of the result is made of some that lie next to each other."""
    x, wide = call.label("self"), len(call.shape) - 3
    blocks = []
    for block in x.blocks:
        if block.axes == (wide,):
            rows = block.ids.reshape(call.shape[wide], -1)
            call.atoms.join(rows, rows[:, :1])
            blocks.append(Block((wide,), rows[:, 0]))
        else:
            call.atoms.fix(block.ids)
    return Label(call.shape, tuple(blocks))


_COPIES = ("alias", "clone", "contiguous", "detach", "lift_fresh", "_to_copy")
_VIEWS = ("view", "_unsafe_view", "reshape", "_reshape_alias", "_view_copy")
# Those that PyTorch itself does not say it of.
_POINTWISE = ("hardswish", "log_sigmoid_forward", "rrelu_with_noise", "_prelu_kernel", "copy")

RULES: dict[str, Rule] = {
    **PRODUCTS,
    **NORMS,
    **dict.fromkeys(_COPIES, _same),
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_POINTWISE, pointwise),
    "permute": _permuted, "transpose": _permuted, "t": _permuted,
    "unsqueeze": _unsqueezed, "squeeze": _squeezed, "expand": _expanded, "repeat": _repeated,
    "slice": _sliced, "select": _selected, "unbind": _unbound,
    "split": _split, "split_with_sizes": _split, "flip": _flipped,
    "index": _indexed, "index_select": _chosen,
    "cat": _joined, "stack": _stacked, "constant_pad_nd": _padded,
    "glu": _halves, "pixel_shuffle": _shuffled,
}  # fmt: skip
