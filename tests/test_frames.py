"""Frames: what is none is told in one line, by the device's end and by the cloud's."""

from __future__ import annotations

import io
import json
import struct
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitestring.engines.pipe import Pipe
from kitestring.errors import BadBytes, BadReply, RunError, TaskError
from kitestring.exchange.frames import Header, frame, parse

# Another process that reads a frame's first bytes, answers these, and stays.
ANSWERS = """
import sys
sys.stdin.buffer.read(4)
sys.stdout.buffer.write({!r})
sys.stdout.flush()
sys.stdin.read()
"""
BAD = {
    "not JSON": (b"hello", "its header is not JSON"),
    "not text": (b"\xff\xfe\xff", "its header is not JSON"),
    "deep": (b"[" * 100_000, "its header is not JSON"),
    "a list": (b"[]", "its header is not an object"),
    "no parts": (b'{"op": "open"}', "its parts are not lengths"),
    "a number of parts": (b'{"parts": 2}', "its parts are not lengths"),
    "a text": (b'{"parts": ["a"]}', "its parts are not lengths"),
    "true": (b'{"parts": [true]}', "its parts are not lengths"),
    "below nothing": (b'{"parts": [-1]}', "its parts are not lengths"),
    "too long": (b'{"parts": [2147483649]}', "its parts are not lengths"),
}


def reading(blob: bytes) -> tuple[Header, list[bytes]]:
    """As a pipe reads: so many bytes, or the end; -1 would be all there are."""
    file = io.BytesIO(blob)

    def read(count: int) -> bytes:
        found = file.read(count)
        if len(found) < count:
            raise EOFError
        return found

    return parse(read)


def headed(head: bytes) -> bytes:
    return struct.pack("<I", len(head)) + head


@given(
    st.dictionaries(st.sampled_from(["op", "device", "ids"]), st.integers() | st.text()),
    st.lists(st.binary(max_size=20), max_size=4),
)
def test_what_was_framed_is_read(header: Header, parts: list[bytes]) -> None:
    assert reading(frame(header, parts) + b"the next") == (header, parts)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_frame_is_refused(name: str) -> None:
    head, says = BAD[name]
    with pytest.raises(BadBytes, match=says) as caught:
        reading(headed(head) + b"the next frame")
    assert caught.value.where == "a frame"


def test_a_header_that_is_too_long_is_not_read() -> None:
    """The first four bytes of a text are a length of gigabytes."""
    with pytest.raises(BadBytes, match=r"a header of \d{10} bytes"):
        reading(b"hello, this is no frame")


@given(st.binary(max_size=60))
def test_whatever_bytes_there_are(blob: bytes) -> None:
    for whole in (blob, headed(blob)):
        try:
            header, _ = reading(whole)
        except (BadBytes, EOFError):
            continue
        assert isinstance(header, dict)


@pytest.mark.parametrize("name", ["not JSON", "a list", "no parts", "below nothing"])
def test_a_device_process_that_answers_otherwise_is_ended(name: str) -> None:
    head, says = BAD[name]
    with Pipe([sys.executable, "-c", ANSWERS.format(headed(head))], timeout=30) as pipe:
        with pytest.raises(RunError, match=f"does not answer in frames: {says}") as caught:
            pipe.call("device 3", {"op": "open"})
        assert caught.value.where == "device 3"
        with pytest.raises(RunError, match="has ended"):
            pipe.call("device 3", {"op": "open"})


@pytest.mark.parametrize("answer", [{"error": "X"}, {"error": 5, "text": ""}, {"error": []}])
def test_an_error_that_is_told_wrongly_is_one(answer: Header) -> None:
    code = ANSWERS.format(frame(answer, []))
    with (
        Pipe([sys.executable, "-c", code], timeout=30) as pipe,
        pytest.raises(RunError, match="an error without a name or a text"),
    ):
        pipe.call("device 3", {"op": "open"})


@pytest.mark.parametrize(
    ("name", "kind"), [("TaskError", TaskError), ("KeyError", BadReply), ("Iterable", BadReply)]
)
def test_an_error_keeps_its_name_if_it_is_ours(name: str, kind: type[Exception]) -> None:
    code = ANSWERS.format(frame({"error": name, "text": "no rows"}, []))
    with (
        Pipe([sys.executable, "-c", code], timeout=30) as pipe,
        pytest.raises(kind, match="no rows"),
    ):
        pipe.call("device 3", {"op": "open"})


def test_a_command_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and no file stays open."""
    opened = []
    whole = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: opened.append(whole()) or opened[-1])
    with pytest.raises(RunError, match=r"nothing: .* cannot be started \(No such file"):
        Pipe([str(tmp_path / "nothing")])
    assert [file.closed for file in opened] == [True]


def test_the_header_bound_is_above_what_is_sent() -> None:
    """The longest header names all devices of a round: a million of them."""
    ids = list(range(10**6))
    header, _ = reading(frame({"op": "settle", "ids": ids}, []))
    assert header["ids"] == ids
    assert len(json.dumps(ids)) < 16 * 2**20
