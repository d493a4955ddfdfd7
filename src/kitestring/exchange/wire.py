"""Messages as bytes: a record for each leaf, one after the other; nothing else crosses.

A record is  kind u8 | dtype u8 | dimensions u8 | name length u8 | name | sizes u32... | values,
little-endian, C order. The kind's high bit marks `Rows`, of which only the real rows are packed.
The size follows from names, dtypes and shapes, so traffic can be billed without packing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from kitestring.core import KINDS, Array, Kind, Message, Rows, Tree
from kitestring.errors import BadBytes

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool", "int8")
_CODES = {np.dtype(name): code for code, name in enumerate(DTYPES)}
_RAGGED = 0x80


def code(dtype: Any) -> int | None:
    """The number of a dtype on the wire; None of one that cannot cross."""
    return _CODES.get(dtype.newbyteorder("=")) if isinstance(dtype, np.dtype) else None


def _one(leaf: Any, d: int) -> Any:
    if isinstance(leaf, Rows):
        return leaf.values[d, : int(leaf.n[d])]
    return leaf[d]


@lru_cache(4096)
def _head(kind: int, name: str, dtype: Any, shape: tuple[int, ...]) -> bytes:
    label, number = name.encode(), _CODES[dtype.newbyteorder("=")]
    head = struct.pack("<BBBB", kind, number, len(shape), len(label))
    return head + label + struct.pack(f"<{len(shape)}I", *shape)


def _record(kind: int, name: str, array: Any) -> tuple[bytes, Any]:
    """Head and body, which `pack` copies once."""
    array = np.asarray(array)
    body = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return _head(kind, name, array.dtype, array.shape), body


def pack(message: Message, d: int) -> bytes:
    """Device d's share of a message. The empty message packs to nothing."""
    records = (
        _record(KINDS.index(kind) | (_RAGGED if isinstance(leaf, Rows) else 0), name, _one(leaf, d))
        for kind, name, leaf in message.leaves()
    )
    return b"".join(part for record in records for part in record)


Lengths: TypeAlias = dict[tuple[Kind, str], Any]


def lengths(message: Message) -> Lengths:
    """Bytes that `pack` makes of each leaf, computed without packing: [D] of `Rows`, and one number
    where devices do not differ."""
    out: Lengths = {}
    for kind, name, leaf in message.leaves():
        if isinstance(leaf, Rows):
            shape, dtype = leaf.row
            body = np.asarray(leaf.n) * (dtype.itemsize * math.prod(shape))
            sizes = len(shape) + 1
        else:
            body = leaf.dtype.itemsize * math.prod(leaf.shape[1:])
            sizes = len(leaf.shape) - 1
        out[kind, name] = body + 4 + len(name.encode()) + 4 * sizes
    return out


def sizes(message: Message) -> Lengths:
    """The same as arrays [D], for one device after the other."""
    known = lengths(message)
    return {
        (kind, name): np.broadcast_to(known[kind, name], len(_devices(leaf)))
        for kind, name, leaf in message.leaves()
    }


def _devices(leaf: Any) -> Any:
    return leaf.n if isinstance(leaf, Rows) else leaf


@dataclass(frozen=True)
class _Found:
    """A record in packed bytes: its values are those from `start` to `end`."""

    code: int
    name: str
    dtype: Any
    shape: tuple[int, ...]
    start: int
    end: int


def _records(blob: bytes) -> list[_Found]:
    found: list[_Found] = []
    at = 0
    try:
        while at < len(blob):
            code, dtype, dimensions, length = struct.unpack_from("<BBBB", blob, at)
            at += 4
            name = blob[at : at + length].decode()
            at += length
            shape = struct.unpack_from(f"<{dimensions}I", blob, at)
            at += 4 * dimensions
            kind = np.dtype(DTYPES[dtype]).newbyteorder("<")
            end = at + kind.itemsize * math.prod(shape)
            if end > len(blob):
                raise ValueError(f"{name!r} ends after the last byte")
            if any((f.code, f.name) == (code, name) for f in found):
                raise ValueError(f"{name!r} comes twice")
            if code & ~_RAGGED >= len(KINDS) or (code & _RAGGED and not shape):
                raise ValueError(f"{name!r} is of no kind")
            found.append(_Found(code, name, kind, shape, at, end))
            at = end
    except (struct.error, IndexError, ValueError) as problem:
        raise BadBytes(f"not a packed message at byte {at} of {len(blob)}: {problem}") from None
    return found


def unpack(blob: bytes) -> Message:
    """The inverse of `pack`, for one device (leading axis 1). Raises `BadBytes`."""
    return _unpacked(_records(blob), np.frombuffer(blob, np.uint8)[None])


def _unpacked(records: Sequence[_Found], rows: Any) -> Message:
    """`rows` [D, bytes] of devices whose records are alike."""
    message, devices = Message(), len(rows)
    for f in records:
        body = np.array(rows[:, f.start : f.end], order="C").view(f.dtype)
        try:
            array = body.reshape(devices, *f.shape).astype(f.dtype.newbyteorder("="), copy=False)
        except ValueError as problem:  # too many dimensions, or too large ones beside a zero
            raise BadBytes(f"not a packed message: {f.name!r}: {problem}") from None
        leaf = Rows(array, np.full(devices, f.shape[0])) if f.code & _RAGGED else array
        getattr(message, KINDS[f.code & ~_RAGGED])[f.name] = leaf
    return message


def stack_leaves(leaves: Sequence[Any]) -> Any:
    """Leaves of one device each -> one leaf of all; `Rows` are padded with zeros."""
    if not isinstance(leaves[0], Rows):
        return leaves[0] if len(leaves) == 1 else np.concatenate(leaves)
    n = np.array([int(rows.n[0]) for rows in leaves])
    first = leaves[0].values
    values = np.zeros((len(leaves), max(1, int(n.max())), *first.shape[2:]), first.dtype)
    for d, rows in enumerate(leaves):
        values[d, : n[d]] = rows.values[0, : n[d]]
    return Rows(values, n)


def stack_trees(trees: Sequence[Tree]) -> Tree:
    return Tree({name: stack_leaves([tree[name] for tree in trees]) for name in trees[0]})


def stack(messages: Sequence[Message]) -> Message:
    """Messages of one device each -> one message of all."""
    return Message(*(stack_trees([getattr(m, kind) for m in messages]) for kind in KINDS))


def pack_tree(tree: Tree, d: int = 0) -> bytes:
    return pack(Message(parameters=tree), d)


def pack_trees(tree: Tree, which: Array) -> list[bytes]:
    """`pack_tree` of the devices `which`. Where they do not differ in shape, all at once."""
    leaves = [leaf for _, _, leaf in Message(parameters=tree).leaves()]
    counts = [leaf.n[which] for leaf in leaves if isinstance(leaf, Rows)]
    if not tree or not len(which) or any((n != n[0]).any() for n in counts):
        return [pack_tree(tree, int(d)) for d in which]
    parts = []
    for name, leaf in tree.items():
        ragged = isinstance(leaf, Rows)
        values = leaf.values[which, : leaf.n[which[0]]] if ragged else np.asarray(leaf)[which]
        head = _head(_RAGGED * ragged + KINDS.index("parameters"), name, values.dtype,
                     values.shape[1:])  # fmt: skip
        body = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
        parts += [np.frombuffer(head, np.uint8), body.reshape(len(which), -1).view(np.uint8)]
    rows = np.empty((len(which), sum(part.shape[-1] for part in parts)), np.uint8)
    np.concatenate([np.broadcast_to(p, (len(which), p.shape[-1])) for p in parts], 1, out=rows)
    return [row.tobytes() for row in rows]


def unpack_tree(blob: bytes) -> Tree:
    return unpack(blob).parameters


def unpack_trees(blobs: Sequence[bytes]) -> Tree:
    """All of them stacked. Raises `BadBytes`."""
    first = _records(blobs[0])
    if all(len(blob) == len(blobs[0]) for blob in blobs):
        rows = np.frombuffer(b"".join(blobs), np.uint8).reshape(len(blobs), -1)
        ends = [0, *(f.end for f in first)]
        heads = [rows[:, end : f.start] for end, f in zip(ends, first, strict=False)]
        if all((head == head[:1]).all() for head in heads):
            return _unpacked(first, rows).parameters
    return stack_trees([unpack_tree(blob) for blob in blobs])
