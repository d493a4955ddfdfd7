"""Weights built into a graph: what a runtime knows not to change it can fold and lay out once.

A device predicts with the same weights until the cloud sends others. Those weights are inputs of
the exported graph; here they become initialisers of a copy, by the wire format of Protocol Buffers
alone, so that no parser of ONNX is needed on a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kitestring.core import Array
from kitestring.devices.runtime.graph import read_number

# Fields of ONNX's ModelProto, GraphProto, ValueInfoProto and TensorProto; onnx.proto, IR version 8.
_GRAPH, _INITIALISER, _INPUT, _NAME = 7, 5, 11, 1
_DIMS, _TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "bool": 9, "float16": 10,
          "float64": 11}  # fmt: skip
_VARINT, _BYTES = 0, 2


def settled(model: bytes, values: Mapping[str, Array]) -> bytes:
    """The same graph, of which these inputs are initialisers."""
    out = []
    for number, field, content in _fields(model):
        out.append(_bytes(_GRAPH, _with(content, values)) if number == _GRAPH else field)
    return b"".join(out)


def _with(graph: bytes, values: Mapping[str, Array]) -> bytes:
    kept = [
        field
        for number, field, content in _fields(graph)
        if number != _INPUT or _name(content) not in values
    ]
    return b"".join(kept + [_bytes(_INITIALISER, _tensor(k, a)) for k, a in values.items()])


def _name(info: bytes) -> str:
    return next(content.decode() for number, _, content in _fields(info) if number == _NAME)


def _tensor(name: str, a: Array) -> bytes:
    plain = np.ascontiguousarray(a, a.dtype.newbyteorder("<"))
    dims = b"".join(_varint(_DIMS << 3 | _VARINT) + _varint(size) for size in a.shape)
    kind = _varint(_TYPE << 3 | _VARINT) + _varint(_TYPES[a.dtype.name])
    return dims + kind + _bytes(_TENSOR_NAME, name.encode()) + _bytes(_RAW, plain.tobytes())


def _bytes(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """(number, the whole field, what is in it where it has a length) of a message."""
    view, at = memoryview(message), 0
    while at < len(view):
        start = at
        tag, at = read_number(view, at)
        content = b""
        if tag & 7 == _BYTES:
            size, at = read_number(view, at)
            content = bytes(view[at : at + size])
            at += size
        elif tag & 7 == _VARINT:
            _, at = read_number(view, at)
        else:
            at += 8 if tag & 7 == 1 else 4
        yield tag >> 3, bytes(view[start:at]), content
