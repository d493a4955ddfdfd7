"""Messages as bytes: what goes in comes out, as long as it is billed, and damage is always told."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitestring.core import KINDS, Message, Rows, Tree
from kitestring.errors import BadBytes
from kitestring.exchange import wire

NAMES = st.text(min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def messages(draw: Any, devices: int | None = None) -> Message:
    """Any compartment, dtype and shape, ragged or not, and nothing at all."""
    d = devices or draw(st.integers(1, 3))
    dice = np.random.default_rng(draw(st.integers(0, 2**32)))
    message = Message()
    for kind in KINDS:
        for name in draw(st.lists(NAMES, unique=True, max_size=2)):
            dtype = draw(st.sampled_from(wire.DTYPES))
            ragged, shape = draw(st.booleans()), draw(SHAPES)
            n = np.array(draw(st.lists(st.integers(0, 4), min_size=d, max_size=d)))
            whole = (d, *((int(n.max()),) if ragged else ()), *shape)
            values = (dice.normal(0, 99, whole)).astype(dtype)
            getattr(message, kind)[name] = Rows(values, n) if ragged else values
    return message


def device(leaf: Any, d: int) -> Any:
    return leaf.values[d, : leaf.n[d]] if isinstance(leaf, Rows) else leaf[d]


def count(message: Message) -> int:
    for _, _, leaf in message.leaves():
        return len(leaf.n) if isinstance(leaf, Rows) else len(leaf)
    return 1


def assert_equal(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()


@given(messages())
def test_what_goes_in_comes_out(message: Message) -> None:
    for d in range(count(message)):
        back = wire.unpack(wire.pack(message, d))
        assert [(k, n) for k, n, _ in back.leaves()] == [(k, n) for k, n, _ in message.leaves()]
        for (_, _, one), (_, _, other) in zip(message.leaves(), back.leaves(), strict=True):
            assert isinstance(one, Rows) == isinstance(other, Rows)
            assert_equal(device(one, d), device(other, 0))


@given(messages())
def test_the_bill_is_the_length(message: Message) -> None:
    sizes = wire.sizes(message)
    for d in range(count(message)):
        assert sum(int(s[d]) for s in sizes.values()) == len(wire.pack(message, d))
        for kind, name, leaf in message.leaves():
            alone = Message()
            getattr(alone, kind)[name] = leaf
            assert int(sizes[kind, name][d]) == len(wire.pack(alone, d))


@given(messages(devices=3))
def test_stacked_again_as_before(message: Message) -> None:
    again = wire.stack([wire.unpack(wire.pack(message, d)) for d in range(3)])
    for (_, _, one), (_, _, other) in zip(message.leaves(), again.leaves(), strict=True):
        for d in range(3):
            assert_equal(device(one, d), device(other, d))


def test_nothing_is_nothing() -> None:
    assert wire.pack(Message(), 0) == b""
    assert wire.sizes(Message()) == {}
    assert list(wire.unpack(b"").leaves()) == []


def test_a_record_by_hand() -> None:
    """scalars is compartment 3, float32 dtype 0; 0.5 in float32 is 0x3f000000."""
    message = Message(scalars=Tree(n=np.array([0.5], np.float32)))
    assert wire.pack(message, 0) == bytes([3, 0, 0, 1]) + b"n" + bytes([0, 0, 0, 0x3F])
    ragged = Message(data=Tree(y=Rows(np.array([[7, 8, 9]], np.uint8), np.array([2]))))
    assert wire.pack(ragged, 0) == bytes([0x80, 5, 1, 1]) + b"y" + bytes([2, 0, 0, 0, 7, 8])


def test_big_endian_values_are_sent_little_endian() -> None:
    message = Message(scalars=Tree(n=np.array([0.5], ">f4")))
    assert wire.unpack(wire.pack(message, 0)).scalars["n"].tolist() == [0.5]


def test_what_is_unpacked_can_be_written_to() -> None:
    """As in the simulator, where nothing is packed."""
    wire.unpack(wire.pack(Message(scalars=Tree(n=np.ones(1))), 0)).scalars["n"][0] = 2


@settings(max_examples=400)
@given(messages(devices=1), st.data())
def test_damage_is_bad_bytes_or_another_message(message: Message, data: Any) -> None:
    """A cut, some bytes overwritten, some put in: never another exception."""
    blob = bytearray(wire.pack(message, 0))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(blob)))
        how = data.draw(st.sampled_from(["cut", "write", "insert"]))
        new = data.draw(st.binary(min_size=1, max_size=5))
        if how == "cut":
            del blob[at:]
        elif how == "write":
            blob[at : at + len(new)] = new
        else:
            blob[at:at] = new
    with suppress(BadBytes):
        wire.unpack(bytes(blob))


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_noise_is_bad_bytes_or_a_message(blob: bytes) -> None:
    with suppress(BadBytes):
        wire.unpack(blob)


def head(kind: int, dtype: int, *sizes: int, name: bytes = b"w") -> bytes:
    return (
        struct.pack("<BBBB", kind, dtype, len(sizes), len(name))
        + name
        + struct.pack(f"<{len(sizes)}I", *sizes)
    )


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(b"\x00", id="half a head"),
        pytest.param(head(0, 0, 3) + bytes(11), id="a value too short"),
        pytest.param(head(9, 5, 1) + bytes(1), id="no such compartment"),
        pytest.param(head(0, 99, 1) + bytes(1), id="no such dtype"),
        pytest.param(head(0x80, 5) + bytes(1), id="ragged without rows"),
        pytest.param(head(0, 5, 2**31, 2**31, 2), id="a size beyond 2**63"),
        pytest.param(head(0, 5, 2**32 - 1, 2**32 - 1, 2**32 - 1), id="a size beyond 2**64"),
        pytest.param(head(0, 5, *[1] * 200) + bytes(1), id="200 dimensions"),
        pytest.param(head(0, 5, 1, name=b"\xff") + bytes(1), id="a name that is not text"),
        pytest.param((head(0, 5, 1) + bytes(1)) * 2, id="the same leaf twice"),
    ],
)
def test_known_damage(blob: bytes) -> None:
    with pytest.raises(BadBytes, match="not a packed message"):
        wire.unpack(blob)


@given(messages(), st.data())
def test_all_at_once_as_one_by_one(message: Message, data: Any) -> None:
    """Ragged or not, alike or not: the bytes are those of `pack_tree`, and come back stacked."""
    tree, devices = message.parameters, count(message)
    which = np.array(data.draw(st.lists(st.integers(0, devices - 1), max_size=4)), np.int64)
    packed = wire.pack_trees(tree, which)
    assert packed == [wire.pack_tree(tree, int(d)) for d in which]
    if packed:
        back = wire.unpack_trees(packed)
        assert list(back) == list(tree)
        for name, leaf in back.items():
            for i, d in enumerate(which):
                assert_equal(device(leaf, i), device(tree[name], int(d)))
