"""Messages as bytes: a record for each leaf, one after the other; nothing else crosses.

A record is  kind u8 | dtype u8 | dimensions u8 | name length u8 | name | sizes u32... | values,
little-endian, C order. The kind's high bit marks `Rows`, of which only the real rows are packed.
The size follows from names, dtypes and shapes, so traffic can be billed without packing.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np

from kitestring.core import KINDS, Kind, Message, Rows, Tree
from kitestring.errors import BadBytes

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
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


def unpack(blob: bytes) -> Message:
    """The inverse of `pack`, for one device (leading axis 1). Raises `BadBytes`."""
    message, at = Message(), 0
    try:
        while at < len(blob):
            code, dtype, dimensions, length = struct.unpack_from("<BBBB", blob, at)
            at += 4
            name = blob[at : at + length].decode()
            at += length
            shape = struct.unpack_from(f"<{dimensions}I", blob, at)
            at += 4 * dimensions
            count = math.prod(shape)
            array = np.frombuffer(blob, DTYPES[dtype], count, at).reshape(shape).copy()
            at += array.nbytes
            leaf = Rows(array[None], np.array([len(array)])) if code & _RAGGED else array[None]
            leaves = getattr(message, KINDS[code & ~_RAGGED])
            if name in leaves:
                raise ValueError(f"{name!r} comes twice")
            leaves[name] = leaf
    except (struct.error, IndexError, ValueError, TypeError, OverflowError) as problem:
        raise BadBytes(f"not a packed message at byte {at} of {len(blob)}: {problem}") from None
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


def unpack_tree(blob: bytes) -> Tree:
    return unpack(blob).parameters
