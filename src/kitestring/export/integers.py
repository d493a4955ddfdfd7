"""Quantised layers (`kitestring.compress.quantise.ops`) as nodes of ONNX.

All of them compute each row by itself, whatever others are in the batch: DynamicQuantizeLinear,
which finds one range for all rows, is not used. What was chosen, by time and memory in ONNX Runtime
1.28 on one thread (x86-64 with VNNI):

weights of 8 bits   DequantizeLinear and a float product. Of weights that are built in, the first is
                    done once, when the graph is loaded (`runtime.session`): a quarter of the bytes
                    to fetch, and the speed and memory of float. MatMulNBits with float inputs is
                    ten times slower and more: it has kernels for that with 4 bits only.
weights of 4 bits   MatMulNBits of com.microsoft with float inputs, where weights are built in: an
                    eighth of the memory, and faster than float where weights are too large for a
                    cache. Where they are not built in (a training step), codes are taken apart by
                    shifts: as fast as it is then, and the backward pass has use for the result.
both dynamic        a QuantizeLinear with a scale for each row, then MatMulInteger.
both static         QuantizeLinear, then MatMulInteger or QLinearConv. The latter rounds its outputs
                    as well: ConvInteger, which does not, is slower than float. ONNX Runtime joins
                    those that follow one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kitestring.compress.quantise.arithmetic import EACH, SMALLEST
from kitestring.compress.quantise.layers import BLOCKS
from kitestring.export.builder import MICROSOFT, Builder, Value
from kitestring.export.operation import Lower, Operation, fixed
from kitestring.export.sizes import Dim, times

_FLOAT = np.dtype(np.float32)


def _dequantise(
    op: Operation, codes: Value, scale: Value, zero: Value | None, bits: int, block: int, width: int
) -> Value:
    return _weight(op.b, codes, scale, zero, bits, block, width)


def _weight(
    b: Builder, codes: Value, scale: Value, zero: Value | None, bits: int, block: int, width: int
) -> Value:
    """[out, width] of codes [out, blocks, bytes]; `out` may be a number of rows."""
    out, blocks, length = codes.shape
    groups = _times(out, blocks)
    if zero is None:
        middle = b.exact(np.array([2 ** (bits - 1)], np.uint8))
        origin = b.op("Expand", [middle, b.sizes((groups,))], (groups,), np.uint8)
    else:
        zeros = b.slice(_halves(b, zero) if bits == 4 else zero, 1, 0, blocks, blocks)
        origin = b.reshape(zeros, (groups,))
    values = _halves(b, codes) if bits == 4 else b.real(codes)
    length = values.shape[-1]
    given = [b.reshape(values, (groups, length)), b.reshape(b.real(scale), (groups,)), origin]
    found = b.op("DequantizeLinear", given, (groups, length), _FLOAT, axis=0)
    found = b.slice(found, 1, 0, block, block)
    whole = _times(blocks, block)
    return b.slice(b.reshape(found, (out, whole)), 1, 0, width, width)


def _halves(b: Builder, packed: Value) -> Value:
    """uint8 [..., n] -> [..., 2 n], the lower four bits first."""
    packed, four = b.real(packed), b.exact(np.array(4, np.uint8))

    def shift(x: Value, way: str) -> Value:
        return b.op("BitShift", [x, four], x.shape, np.uint8, direction=way)

    parts = [shift(shift(packed, "LEFT"), "RIGHT"), shift(packed, "RIGHT")]
    last = packed.rank
    both = b.concat([b.unsqueeze(part, last) for part in parts], last)
    return b.reshape(both, (*packed.shape[:-1], _times(packed.shape[-1], 2)))


def _weight_only_linear(
    op: Operation, x: Value, codes: Value, scale: Value, zero: Value | None, bias: Value | None,
    bits: int, block: int, width: int,
) -> Value:  # fmt: skip
    b, rows = op.b, _rows(op, x)
    out, blocks = fixed(codes.shape[0], op), fixed(codes.shape[1], op)
    if not (bits == 4 and block in BLOCKS and b.built_in):
        turned = b.transpose(_weight(b, codes, scale, zero, bits, block, width), (1, 0))
        found = b.matmul(rows, turned) if bias is None else b.gemm(rows, turned, b.real(bias))
        return b.reshape(found, op.shape)
    given = [rows, b.real(codes), b.real(b.reshape(b.real(scale), (out * blocks,)))]
    if zero is not None:
        given.append(b.real(b.reshape(b.real(zero), (_times(*zero.shape),))))
    found = b.op(
        "MatMulNBits", given, (rows.shape[0], out), _FLOAT, domain=MICROSOFT,
        K=width, N=out, bits=bits, block_size=block, accuracy_level=1,
    )  # fmt: skip
    return b.reshape(_added(b, found, bias), op.shape)


def _weight_only_embedding(
    op: Operation, ids: Value, codes: Value, scale: Value, zero: Value | None,
    bits: int, block: int, width: int,
) -> Value:  # fmt: skip
    b = op.b
    flat = b.reshape(b.real(ids), (_times(*ids.shape),))

    def gathered(table: Value) -> Value:
        shape = (*flat.shape, *table.shape[1:])
        return b.op("Gather", [b.real(table), flat], shape, table.dtype, axis=0)

    parts = [None if t is None else gathered(t) for t in (codes, scale, zero)]
    assert parts[0] is not None
    assert parts[1] is not None
    found = _weight(b, parts[0], parts[1], parts[2], bits, block, width)
    return b.reshape(found, op.shape)


def _dynamic_linear(
    op: Operation, x: Value, codes: Value, scale: Value, bias: Value | None
) -> Value:
    b, rows = op.b, _rows(op, x)
    n = rows.shape[0]
    largest = b.reduce("ReduceMax", b.each("Abs", rows), [1], keep=True)
    step = b.each("Div", largest, b.number(EACH, _FLOAT))
    step = b.each("Max", step, b.number(SMALLEST, _FLOAT))
    middle = b.exact(np.array(128, np.uint8))
    zeros = b.op("Expand", [middle, b.sizes((n,))], (n,), np.uint8)
    whole = b.op(
        "QuantizeLinear", [rows, b.reshape(step, (n,)), zeros], rows.shape, np.uint8, axis=0
    )
    sums = _summed(op, whole, codes, middle)
    found = b.each("Mul", b.each("Mul", sums, step), b.real(scale))
    return b.reshape(_added(b, found, bias), op.shape)


def _static_linear(
    op: Operation, x: Value, codes: Value, scale: Value, bias: Value | None, x_scale: Value,
    x_zero: Value,
) -> Value:  # fmt: skip
    b, rows = op.b, _rows(op, x)
    whole = b.op("QuantizeLinear", [rows, x_scale, x_zero], rows.shape, np.uint8)
    found = b.each("Mul", _summed(op, whole, codes, x_zero), b.each("Mul", x_scale, b.real(scale)))
    return b.reshape(_added(b, found, bias), op.shape)


def _static_conv2d(
    op: Operation, x: Value, codes: Value, scale: Value, bias: Value | None, x_scale: Value,
    x_zero: Value, y_scale: Value, y_zero: Value, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Value:  # fmt: skip
    b = op.b
    b.rounds = True
    images = (_times(*x.shape[:-3]), *x.shape[-3:])
    made = (images[0], *op.shape[-3:])
    given = [b.reshape(b.real(_real(op, x)), images), x_scale, x_zero]
    scale = b.real(scale)
    inputs = [
        b.op("QuantizeLinear", given, images, np.uint8), x_scale, x_zero,
        b.real(codes), scale, b.exact(np.array(0, np.int8)), y_scale, y_zero,
    ]  # fmt: skip
    if bias is not None:
        whole = b.each("Round", b.each("Div", b.real(bias), b.each("Mul", x_scale, scale)))
        inputs.append(b.cast(whole, np.int32))
    found = b.op(
        "QLinearConv", inputs, made, np.uint8, strides=list(stride), group=groups,
        pads=[*padding, *padding], dilations=list(dilation),
        kernel_shape=[fixed(d, op) for d in codes.shape[2:]],
    )  # fmt: skip
    out = b.op("DequantizeLinear", [found, y_scale, y_zero], made, _FLOAT)
    return b.reshape(out, op.shape)


def _summed(op: Operation, whole: Value, codes: Value, zero: Value) -> Value:
    """The products of codes, as float32."""
    b = op.b
    b.rounds = True
    shape = (whole.shape[0], codes.shape[1])
    sums = b.op("MatMulInteger", [whole, b.real(codes), zero], shape, np.int32)
    return b.cast(sums, _FLOAT)


def _rows(op: Operation, x: Value) -> Value:
    """[n, in]: whatever comes before the last axis is rows."""
    return op.b.reshape(op.b.real(_real(op, x)), (_times(*x.shape[:-1]), x.shape[-1]))


def _real(op: Operation, x: Value) -> Value:
    if x.dtype != _FLOAT:
        raise op.unsupported(f"of {x.dtype}")
    return x


def _added(b: Builder, x: Value, bias: Value | None) -> Value:
    return x if bias is None else b.each("Add", x, b.real(bias))


def _times(*dims: Dim) -> Dim:
    found = times(dims)
    assert found is not None, "a number of rows times another"
    return found


INTEGERS: Mapping[str, Lower] = {
    "kitestring.dequantise": _dequantise,
    "kitestring.weight_only_linear": _weight_only_linear,
    "kitestring.weight_only_embedding": _weight_only_embedding,
    "kitestring.dynamic_linear": _dynamic_linear,
    "kitestring.static_linear": _static_linear,
    "kitestring.static_conv2d": _static_conv2d,
}
