"""A process that answers each line of JSON with another; asleep until it is asked."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any


class Gone(Exception):
    """It has ended: its status, and what it had said on standard error."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"status {status}")
        self.status, self.said = status, said


class Answering:
    """Ends with the `with` that it is used in, whatever it does then."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True,
            env=env, start_new_session=True,
        )  # fmt: skip

    @property
    def id(self) -> int:
        return self._process.pid

    def ask(self, what: str, **how: Any) -> dict[str, Any]:
        """Raises `Gone` if it ends without an answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": what, **how}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            raise Gone(status, self._said.read())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
