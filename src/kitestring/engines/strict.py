"""The strict engine, for tests: the device half runs in another process, one device at a time.

`OtherProcess` are hands for `LocalEngine` through which nothing passes but packed messages, a
device's own rows on first contact, and names: the collaboration with its settings, and the function
that makes the programs that a device has installed. What device code could only reach in memory is
not there. A frame on the pipe is a JSON header and packed parts; what crosses must be as long as it
is billed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kitestring import errors
from kitestring.core import Array, Decision, Message, Rows, Tree
from kitestring.devices.session import DeviceSession, Primitives
from kitestring.engines.hands import Population, Reply
from kitestring.errors import BadBytes, BadReply, KitestringError, RunError, TaskError
from kitestring.exchange import wire

Parts = Sequence[bytes]
Header = dict[str, Any]


def _frame(header: Header, parts: Parts) -> bytes:
    head = json.dumps({**header, "parts": [len(p) for p in parts]}).encode()
    return b"".join([struct.pack("<I", len(head)), head, *parts])


def _parse(read: Callable[[int], bytes]) -> tuple[Header, list[bytes]]:
    """`read(n)` gives exactly n bytes or raises."""
    (length,) = struct.unpack("<I", read(4))
    header: Header = json.loads(read(length))
    return header, [read(n) for n in header.pop("parts")]


def _resolve(name: str) -> Any:
    """What "package.module:qualified.name" names."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for step in path.split("."):
        found = getattr(found, step)
    return found


def _reference(thing: Any) -> Header:
    """A frozen dataclass of plain values by name and settings, proved to come back equal."""
    kind = type(thing)
    name = f"{kind.__module__}:{kind.__qualname__}"
    try:
        settings = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
        made = _resolve(name)(**json.loads(json.dumps(settings)))
    except (ImportError, AttributeError, TypeError, ValueError) as problem:
        raise TaskError(f"cannot be sent by name: {problem}", name) from None
    if made != thing:
        raise TaskError("its settings are not plain values", name, "Use numbers, text, lists")
    return {"name": name, "settings": settings}


def _made(reference: Header) -> Any:
    return _resolve(reference["name"])(**reference["settings"])


class Pipe:
    """Another Python process, spoken to in frames. One that dies or is late is a `RunError`."""

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [sys.executable, "-m", "kitestring.engines.strict"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            bufsize=0,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)

    def call(self, where: str, header: Header, *parts: bytes) -> tuple[Header, list[bytes]]:
        """Ask and wait; `where` names device and verb in errors."""
        if self._process is None:
            raise RunError("the device process has ended", where)
        until = time.monotonic() + self.timeout
        try:
            self._write(_frame(header, parts), until)
            answer, back = _parse(lambda n: self._read(n, until))
        except TimeoutError:
            self.close(kill=True)
            what = f"the device process did not answer within {self.timeout:g} s"
            raise RunError(what, where) from None
        except (EOFError, BrokenPipeError):
            raise self._death(where) from None
        except BaseException:  # half a frame is of no use to anybody: an interrupt, or not JSON
            self.close(kill=True)
            raise
        if "error" in answer:
            kind = getattr(errors, answer["error"], None)
            if isinstance(kind, type) and issubclass(kind, KitestringError):
                raise kind(answer["text"], where)
            raise BadReply(f"{answer['error']}: {answer['text']}", where)
        return answer, back

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


class OtherProcess:
    """Hands that compute elsewhere; `programs(**arguments)`, by name, makes what devices installed.

    `crossed` counts the packed bytes of messages, for tests to hold against the ledger. The pipe
    carries one question at a time, so an engine's other workers are of no use here."""

    concurrent = False

    def __init__(
        self,
        programs: str,
        arguments: Mapping[str, Any],
        population: Population,
        pipe: Pipe | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.crossed: Counter[str] = Counter()
        self._programs: Header = {"name": programs, "settings": dict(arguments)}
        self._population, self._owns = population, pipe is None
        self._pipe = pipe or Pipe(timeout)
        self._met: set[tuple[int, str]] = set()
        self._calling: Array = np.zeros(0, bool)

    def open(self, collaboration: Any, seed: int) -> None:
        self._met.clear()
        self._name = type(collaboration).__name__
        header = {
            "op": "open", "seed": seed,
            "collaboration": _reference(collaboration), "programs": self._programs,
        }  # fmt: skip
        self._pipe.call(f"{self._name}, open", header)

    def _rows(self, device: int, split: str, asked: str) -> list[bytes]:
        """The device's own rows, on first contact only; with requests their labels stay hidden."""
        if (device, asked) in self._met:
            return []
        self._met.add((device, asked))
        rows = self._population.rows(np.array([device]), split)
        shown = Tree({k: r for k, r in rows.items() if asked == "own" or k != "y"})
        return [wire.pack(Message(data=shown), 0)]

    def _each(
        self, what: str, ids: Array, down: Message, header: Callable[[int], Header],
        first: Callable[[int], list[bytes]],
    ) -> list[tuple[Header, list[bytes]]]:  # fmt: skip
        billed, answers = wire.sizes(down), []
        for d, device in enumerate(int(i) for i in ids):
            where = f"{self._name}, device {device}, {what}"
            blob = wire.pack(down, d)
            self._check(len(blob), billed, d, f"{where} down")
            parts = first(device)
            head = {**header(device), "device": device, "first": len(parts)}
            answers.append(self._pipe.call(where, head, *parts, blob))
        return answers

    def _check(self, packed: int, billed: Mapping[Any, Any], d: int, where: str) -> None:
        bill = sum(int(size[d]) for size in billed.values())
        if packed != bill:
            raise BadBytes(f"{packed} bytes were packed and {bill} billed", where)

    def _sent(self, what: str, ids: Array, blobs: Parts) -> Message:
        up = wire.stack([wire.unpack(blob) for blob in blobs])
        billed = wire.sizes(up)
        for d, blob in enumerate(blobs):
            self._check(len(blob), billed, d, f"{self._name}, device {int(ids[d])}, {what} up")
        return up

    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> Reply:
        found = self._each(
            verb, ids, down,
            lambda device: {"op": "reply", "verb": verb, "serial": serial},
            lambda device: self._rows(device, "train", "own"),
        )  # fmt: skip
        up = self._sent(verb, ids, [parts[0] for _, parts in found])
        self.crossed["learn.down"] += sum(len(wire.pack(down, d)) for d in range(len(ids)))
        self.crossed["learn.up"] += sum(len(parts[0]) for _, parts in found)
        return Reply(up, np.array([header["flops"] for header, _ in found]))

    def settle(self, ids: Array, serial: int, good: Array, after: Tree) -> None:
        """`after` is empty: what devices keep never left them."""
        header = {
            "op": "settle", "ids": [int(i) for i in ids], "serial": serial,
            "good": [bool(g) for g in good],
        }  # fmt: skip
        self._pipe.call(f"{self._name}, settle", header)

    def end(self, kept: bool) -> None:
        self._pipe.call(f"{self._name}, end of round", {"op": "end", "kept": kept})

    def decide(
        self, service: Any, ids: Array, split: str, deployed: Message
    ) -> tuple[Decision, Array]:
        reference = _reference(service)
        found = self._each(
            "decide", ids, deployed,
            lambda device: {"op": "decide", "service": reference, "split": split},
            lambda device: self._rows(device, split, f"requests.{split}"),
        )  # fmt: skip
        return self._decision(ids, found)

    def merge(self, ids: Array, down: Message) -> tuple[Decision, Array]:
        calling = (d for d in range(len(ids)) if self._calling[d])
        self.crossed["request.down"] += sum(len(wire.pack(down, d)) for d in calling)
        found = self._each("merge", ids, down, lambda device: {"op": "merge"}, lambda device: [])
        return self._decision(ids, found)

    def _decision(
        self, ids: Array, found: list[tuple[Header, list[bytes]]]
    ) -> tuple[Decision, Array]:
        answer = wire.stack([wire.unpack(parts[0]) for _, parts in found]).features
        send = wire.stack([wire.unpack(parts[1]) for _, parts in found]).features["send"].values
        up = self._sent("request", ids, [parts[2] for _, parts in found])
        self._calling = send.any(1)
        self.crossed["request.up"] += sum(len(found[d][1][2]) for d in np.nonzero(self._calling)[0])
        return Decision(answer, send, up), np.array([header["flops"] for header, _ in found])

    def private(self, device: int) -> Tree:
        """For tests: what a device keeps, with a leading axis of 1; empty for nothing."""
        where = f"{self._name}, device {device}, private"
        _, (blob,) = self._pipe.call(where, {"op": "private", "device": int(device)})
        return wire.unpack_tree(blob)

    def close(self) -> None:
        if self._owns:
            self._pipe.close()

    def __enter__(self) -> OtherProcess:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()


@dataclasses.dataclass
class _Entry:
    """The journal of one device's last reply; `arrived`: the cloud has it, if the round stands."""

    serial: int
    before: Tree | None
    after: Tree
    arrived: bool = False


class _DeviceSide:
    """What runs in the other process. One method for each kind of frame."""

    def __init__(self) -> None:
        self._computes: dict[str, Primitives] = {}

    def open(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        self._compute = self._installed(header["programs"])
        self._collaboration, self._seed = _made(header["collaboration"]), header["seed"]
        self._own: dict[tuple[int, str], Tree] = {}
        self._private: dict[int, Tree] = {}
        self._journal: dict[int, _Entry] = {}
        self._asked: dict[int, tuple[Any, Tree, Decision, DeviceSession]] = {}
        return {}, []

    def _installed(self, reference: Header) -> Primitives:
        """The programs, made once for each set of arguments."""
        key = json.dumps(reference, sort_keys=True)
        if key not in self._computes:
            from kitestring.devices.fit.compute import TorchCompute, thread_per_process

            thread_per_process()
            self._computes[key] = TorchCompute(_made(reference))
        return self._computes[key]

    def _session(self, header: Header, parts: Parts, what: str, serial: int) -> DeviceSession:
        device = header["device"]
        if header["first"]:
            self._own[device, what] = wire.stack([wire.unpack(parts[0])]).data
        data = self._own[device, what]
        session = DeviceSession(self._compute, np.array([device]), self._seed, serial, data, Tree())
        kept = self._private.get(device)
        session.private = self._collaboration.install(session) if kept is None else kept
        return session

    def reply(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        device, serial = header["device"], header["serial"]
        # Asked again, or never told that its last reply arrived: it starts from `before`.
        self._roll_back(device)
        session = self._session(header, parts, "own", serial)
        down = wire.stack([wire.unpack(parts[-1])])
        up, after = self._collaboration.reply(header["verb"], down, session)
        blob = wire.pack(up, 0)
        before = self._private.get(device)
        if after:
            after = wire.stack_trees([wire.unpack_tree(wire.pack_tree(after))])
            self._journal[device] = _Entry(serial, before, after)
            self._private[device] = after
        return {"flops": float(session.flops[0])}, [blob]

    def _roll_back(self, device: int) -> None:
        entry = self._journal.pop(device, None)
        if entry is not None and entry.before is None:
            del self._private[device]
        elif entry is not None and entry.before is not None:
            self._private[device] = entry.before

    def settle(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        for device, good in zip(header["ids"], header["good"], strict=True):
            entry = self._journal.get(device)
            if entry is not None and entry.serial == header["serial"]:
                entry.arrived = good
        return {}, []

    def end(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        for device, entry in list(self._journal.items()):
            if not (header["kept"] and entry.arrived):
                self._roll_back(device)
        self._journal.clear()
        return {}, []

    def decide(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        service = _made(header["service"])
        session = self._session(header, parts, f"requests.{header['split']}", 0)
        deployed = wire.stack([wire.unpack(parts[-1])]).parameters
        decision = service.decide(session, deployed)
        return self._decided(header["device"], service, deployed, decision, session)

    def merge(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        service, deployed, decision, session = self._asked[header["device"]]
        session.flops = np.zeros(1)
        down = wire.stack([wire.unpack(parts[-1])])
        merged = service.merge(session, deployed, decision, down)
        return self._decided(header["device"], service, deployed, merged, session)

    def _decided(
        self, device: int, service: Any, deployed: Tree, decision: Decision, session: DeviceSession
    ) -> tuple[Header, Parts]:
        self._asked[device] = (service, deployed, decision, session)
        send = Rows(decision.send, np.array([decision.send.shape[1]]))
        blobs = [
            wire.pack(Message(features=decision.answer), 0),
            wire.pack(Message(features=Tree(send=send)), 0),
            wire.pack(decision.up, 0),
        ]
        return {"flops": float(session.flops[0])}, blobs

    def private(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        return {}, [wire.pack_tree(self._private.get(header["device"], Tree()))]


def _exactly(count: int) -> bytes:
    blob = sys.stdin.buffer.read(count)
    if len(blob) < count:
        raise EOFError
    return blob


def main() -> None:
    """Answer frames until there are no more. What device code prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    here = _DeviceSide()
    while True:
        try:
            header, parts = _parse(_exactly)
        except EOFError:
            return
        try:
            answer, back = getattr(here, header["op"])(header, parts)
        except Exception as problem:
            answer, back = {"error": type(problem).__name__, "text": str(problem)}, []
        out.write(_frame(answer, back))
        out.flush()


if __name__ == "__main__":
    main()
