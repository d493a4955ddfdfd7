"""What is normalised, averaged or compared along an axis."""

from __future__ import annotations

from kitestring.compress.prune.coupled.atoms import Block, Label, lumped
from kitestring.compress.prune.coupled.call import Call, Rule
from kitestring.compress.prune.coupled.meet import meet

_LAYERS = ("native_layer_norm", "_fused_rms_norm")
_AVERAGES = ("mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm")
"""Without some of the numbers they are what they would be of the others: a norm's statistics."""


def within(call: Call, label: Label, axes: set[int]) -> tuple[Block, ...]:
    """Blocks of what mixes all positions along `axes`, still there: what can be removed is all of
    them at once, or, of an average over one block's axes, single ones at another average."""
    blocks = []
    for block in label.blocks:
        inside = set(block.axes) & axes
        if inside == set(block.axes):
            if call.name not in (*_AVERAGES, *_LAYERS):
                call.atoms.fix(block.ids)
            call.notes.mark("normed", block.ids)
        elif inside:
            block = lumped(call.atoms, block, inside)
        blocks.append(block)
    return tuple(blocks)


def _reduced(call: Call) -> Label:
    x = call.label("self")
    of = len(x.shape)
    axes = call.axes("dim", of) if "dim" in call.given else set(range(of))
    blocks = [b for b in within(call, x, axes) if not set(b.axes) & axes]
    kept = len(call.shape) == of
    places = [axis for axis in range(of) if kept or axis not in axes]
    return Label(
        call.shape, tuple(Block(tuple(places.index(a) for a in b.axes), b.ids) for b in blocks)
    )


def _along(call: Call) -> Label:
    """Softmax, running sums: the shape stays, positions along the axis are mixed."""
    x = call.label("self")
    return Label(x.shape, within(call, x, {call.axis("dim", len(x.shape))}))


def _layer_norm(call: Call) -> Label:
    x = call.label("input")
    last = len(call.given["normalized_shape"])
    axes = range(len(x.shape) - last, len(x.shape))
    found = Label(x.shape, within(call, x, set(axes)))
    parts = [(found, range(len(x.shape))), *((w, axes) for w in call.maybe("weight", "bias"))]
    return Label(x.shape, meet(call.atoms, x.shape, parts))


def _batch_norm(call: Call) -> Label:
    x = call.label("input")
    each = call.maybe("weight", "bias", "running_mean", "running_var")
    rest = set(range(len(x.shape))) - {1}
    found = Label(x.shape, _whole_channels(call, x, rest))
    parts = [(found, range(len(x.shape))), *((w, (1,)) for w in each)]
    return Label(x.shape, meet(call.atoms, x.shape, parts))


def _group_norm(call: Call) -> Label:
    """What is normalised together goes together."""
    x, groups = call.label("input"), int(call.given["group"])
    found = Label(x.shape, _whole_channels(call, x, set(range(len(x.shape))) - {1}))
    parts = [(found, range(len(x.shape))), *((w, (1,)) for w in call.maybe("weight", "bias"))]
    blocks = meet(call.atoms, x.shape, parts)
    for block in blocks:
        if 1 in block.axes:
            rows = block.ids.reshape(groups, -1)
            call.atoms.join(rows, rows[:, :1])
    return Label(x.shape, blocks)


def _whole_channels(call: Call, x: Label, rest: set[int]) -> tuple[Block, ...]:
    """Blocks of axis 1 alone."""
    blocks = []
    for block in x.blocks:
        if 1 not in block.axes:
            call.atoms.fix(block.ids)
            continue
        blocks.append(lumped(call.atoms, block, rest) if set(block.axes) & rest else block)
    return tuple(blocks)


def _trailing(call: Call) -> Label | None:
    """Pools and the like, which mix positions along the last axes: their name says how many."""
    x = call.label("self")
    last = next((int(c) for c in call.name if c in "123"), 2)
    axes = set(range(len(x.shape) - last, len(x.shape)))
    blocks = [b for b in within(call, x, axes) if not set(b.axes) & axes]
    return Label(call.shape, tuple(blocks))


_REDUCE = (*_AVERAGES, "sum", "amax", "amin", "max", "min", "prod", "logsumexp", "any", "all",
           "argmax", "argmin")  # fmt: skip
_ALONG = ("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")
_LAST = (
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "avg_pool1d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact2d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
    "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d",
    "mkldnn_max_pool2d", "tril", "triu",
)  # fmt: skip

NORMS: dict[str, Rule] = {
    **dict.fromkeys(_REDUCE, _reduced),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_LAST, _trailing),
    **dict.fromkeys(_LAYERS, _layer_norm),
    "native_batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
}
