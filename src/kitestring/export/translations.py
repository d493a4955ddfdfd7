"""Quantised layers for torch's own ONNX exporter, as `integers` has them for graphs of our own.

Weights of 8 bits are made floats of by ordinary operators: ONNX Runtime, as it comes, does those
once when it loads a file, and a DequantizeLinear in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.export import ExportedProgram

from kitestring.compress.quantise.arithmetic import EACH, SMALLEST
from kitestring.compress.quantise.layers import BLOCKS
from kitestring.compress.quantise.ops import ROUNDING
from kitestring.export.builder import MICROSOFT

_FLOAT, _INT32, _UINT8 = 1, 6, 2  # of TensorProto


def operations(program: ExportedProgram) -> set[str]:
    """The operations of quantised layers in it, as "kitestring.static_linear"."""
    names = {str(node.target).removesuffix(".default") for node in program.graph.nodes}
    return {name for name in names if name.startswith("kitestring.")}


def rounds(program: ExportedProgram) -> bool:
    """Whether activations are rounded in it."""
    return not operations(program).isdisjoint(ROUNDING)


def table() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` takes as `custom_translation_table`."""
    ours = torch.ops.kitestring
    return {
        ours.dequantise.default: _dequantise,
        ours.weight_only_linear.default: _weight_only_linear,
        ours.weight_only_embedding.default: _weight_only_embedding,
        ours.dynamic_linear.default: _dynamic_linear,
        ours.static_linear.default: _static_linear,
        ours.static_conv2d.default: _static_conv2d,
    }


def _op() -> Any:
    from onnxscript import opset18

    return opset18


def _dequantise(codes: Any, scale: Any, zero: Any, bits: int, block: int, width: int) -> Any:
    return _floats(codes, scale, zero, bits, block, width, int(scale.shape[1]))


def _floats(
    codes: Any, scale: Any, zero: Any, bits: int, block: int, width: int, blocks: int
) -> Any:
    """As in `_dequantise`, of values whose shapes the exporter does not know."""
    op = _op()
    values = op.Cast(_halves(codes, 2) if bits == 4 else codes, to=_FLOAT)
    values = op.Slice(values, [0], [block], [2])
    if zero is None:
        origin = float(2 ** (bits - 1))
    else:
        zeros = op.Slice(_halves(zero, 1) if bits == 4 else zero, [0], [blocks], [1])
        origin = op.Unsqueeze(op.Cast(zeros, to=_FLOAT), [2])
    found = op.Mul(op.Sub(values, origin), op.Unsqueeze(scale, [2]))
    return op.Slice(op.Reshape(found, [-1, blocks * block]), [0], [width], [1])


def _halves(packed: Any, last: int) -> Any:
    """The lower four bits of each byte along the axis `last`, then the upper ones."""
    op = _op()
    four = op.CastLike(4, packed)
    lower = op.BitShift(op.BitShift(packed, four, direction="LEFT"), four, direction="RIGHT")
    upper = op.BitShift(packed, four, direction="RIGHT")
    both = op.Concat(
        op.Unsqueeze(lower, [last + 1]), op.Unsqueeze(upper, [last + 1]), axis=last + 1
    )
    return op.Reshape(both, [*[0] * last, -1])


def _weight_only_linear(
    x: Any, codes: Any, scale: Any, zero: Any, bias: Any, bits: int, block: int, width: int
) -> Any:
    op = _op()
    if bits != 4 or block not in BLOCKS:
        weight = _dequantise(codes, scale, zero, bits, block, width)
        return _added(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)
    given = [x, codes, op.Reshape(scale, [-1])]
    given += [] if zero is None else [op.Reshape(zero, [-1])]
    how = {"K": width, "N": int(codes.shape[0]), "bits": bits, "block_size": block}
    return _added(_matmul_n_bits()(*given, **how, accuracy_level=1), bias)


@cache
def _matmul_n_bits() -> Any:
    """ONNX Runtime's operator, which ONNX itself does not know."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    part, many = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    schema = OpSchema(
        "MatMulNBits", MICROSOFT, 1,
        inputs=[part("A", "T"), part("B", "tensor(uint8)"), part("scales", "T"),
                part("zero_points", "tensor(uint8)", param_option=many)],
        outputs=[part("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
                    for name in ("K", "N", "bits", "block_size", "accuracy_level")],
    )  # fmt: skip
    return Op(Opset(MICROSOFT, 1), "MatMulNBits", schema)


def _weight_only_embedding(
    ids: Any, codes: Any, scale: Any, zero: Any, bits: int, block: int, width: int
) -> Any:
    op = _op()
    flat = op.Reshape(ids, [-1])
    parts = (op.Gather(codes, flat, axis=0), op.Gather(scale, flat, axis=0))
    zeros = None if zero is None else op.Gather(zero, flat, axis=0)
    found = _floats(*parts, zeros, bits, block, width, int(scale.shape[1]))
    return op.Reshape(found, op.Concat(op.Shape(ids), op.Constant(value_ints=[width]), axis=0))


def _dynamic_linear(x: Any, codes: Any, scale: Any, bias: Any) -> Any:
    op = _op()
    largest = op.ReduceMax(op.Abs(x), [-1], keepdims=1)
    step = op.Max(op.Div(largest, float(EACH)), SMALLEST)
    middle = op.CastLike(128, op.Cast(step, to=_UINT8))
    steps = op.Cast(op.Add(op.Round(op.Div(x, step)), 128.0), to=_UINT8)
    sums = op.Cast(op.MatMulInteger(steps, codes, middle), to=_FLOAT)
    return _added(op.Mul(op.Mul(sums, step), scale), bias)


def _static_linear(x: Any, codes: Any, scale: Any, bias: Any, x_scale: Any, x_zero: Any) -> Any:
    op = _op()
    steps = op.QuantizeLinear(x, x_scale, x_zero)
    sums = op.Cast(op.MatMulInteger(steps, codes, x_zero), to=_FLOAT)
    return _added(op.Mul(sums, op.Mul(x_scale, scale)), bias)


def _static_conv2d(
    x: Any, codes: Any, scale: Any, bias: Any, x_scale: Any, x_zero: Any, y_scale: Any,
    y_zero: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int,
) -> Any:  # fmt: skip
    op = _op()
    steps = op.QuantizeLinear(x, x_scale, x_zero)
    given = [steps, x_scale, x_zero, codes, scale, op.CastLike(0, codes), y_scale, y_zero]
    if bias is not None:
        given.append(op.Cast(op.Round(op.Div(bias, op.Mul(x_scale, scale))), to=_INT32))
    found = op.QLinearConv(
        *given, strides=list(stride), pads=[*padding, *padding], dilations=list(dilation),
        group=groups, kernel_shape=[int(d) for d in codes.shape[2:]],
    )  # fmt: skip
    return op.DequantizeLinear(found, y_scale, y_zero)


def _added(x: Any, bias: Any) -> Any:
    return x if bias is None else _op().Add(x, bias)
