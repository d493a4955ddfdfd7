"""A device process: another Python, which is spoken to in frames."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from kitestring import errors
from kitestring.errors import BadBytes, BadReply, KitestringError, RunError
from kitestring.exchange.frames import Header, frame, parse

STRICT = (sys.executable, "-m", "kitestring.engines.strict")
"""Runs the collaborations and programs that it is told by name."""


class Pipe:
    """Another process, spoken to in frames. One that does not start, dies, is late or answers with
    something else is a `RunError`.

    `command` starts it; what this Python can import, it can as well."""

    def __init__(self, command: Sequence[str] = STRICT, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        try:
            self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "PYTHONPATH": path},
                bufsize=0,
            )
        except OSError as problem:
            self._errors.close()
            what = f"the device process cannot be started ({problem.strerror})"
            raise RunError(what, command[0]) from None
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def call(self, where: str, header: Header, *parts: bytes) -> tuple[Header, list[bytes]]:
        """Ask and wait; `where` names device and verb in errors."""
        if self._process is None:
            raise RunError("the device process has ended", where)
        until = time.monotonic() + self.timeout
        try:
            self._write(frame(header, parts), until)
            answer, back = parse(lambda n: self._read(n, until))
        except TimeoutError:
            self.close(kill=True)
            what = f"the device process did not answer within {self.timeout:g} s"
            raise RunError(what, where) from None
        except (EOFError, BrokenPipeError):
            raise self._death(where) from None
        except BadBytes as problem:
            raise self._garbled(problem.what, where) from None
        except BaseException:  # half a frame is of no use to anybody: an interrupt
            self.close(kill=True)
            raise
        if "error" in answer:
            raise self._refusal(answer, where)
        return answer, back

    def _refusal(self, answer: Header, where: str) -> KitestringError:
        """The error that the other process told, under its own name if it is one of ours."""
        name, text = answer["error"], answer.get("text")
        if not isinstance(name, str) or not isinstance(text, str):
            return self._garbled("an error without a name or a text", where)
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, KitestringError):
            return kind(text, where)
        return BadReply(f"{name}: {text}", where)

    def _garbled(self, what: str, where: str) -> RunError:
        """Nothing that it says after that can be made sense of: it is ended."""
        self.close(kill=True)
        return RunError(f"the device process does not answer in frames: {what}", where)

    def _write(self, blob: bytes, until: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        fd, rest = self._process.stdin.fileno(), memoryview(blob)
        while rest:
            if not select.select([], [fd], [], max(0.0, until - time.monotonic()))[1]:
                raise TimeoutError
            rest = rest[os.write(fd, rest[:65536]) :]

    def _read(self, count: int, until: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        fd, blob = self._process.stdout.fileno(), bytearray()
        while len(blob) < count:
            if not select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            got = os.read(fd, min(count - len(blob), 2**20))
            if not got:
                raise EOFError
            blob += got
        return bytes(blob)

    def _death(self, where: str) -> RunError:
        assert self._process is not None
        code = None
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close(kill=True)
        last = f": {said[-1].strip()}" if said else ""
        return RunError(f"the device process died (exit code {code}){last}", where)

    def close(self, kill: bool = False) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        if kill:
            process.kill()
        process.stdin.close()  # at the end of its input it leaves
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()
