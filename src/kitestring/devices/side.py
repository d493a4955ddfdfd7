"""The device's end of a pipe: what it has and keeps, and the answers to frames.

It keeps `(serial, before, after)` of every reply until the cloud has said what became of it. A
device that is asked again, or was never told, starts from `before`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from kitestring.core import Crossing, Decision, Devices, Message, Rows, Tree
from kitestring.devices.session import DeviceSession, Primitives, frozen
from kitestring.exchange import wire
from kitestring.exchange.frames import Header, Parts, frame, parse
from kitestring.exchange.ledger import check


class Half(Protocol):
    """The device half of rounds."""

    @property
    def crosses(self) -> Crossing: ...

    def install(self, devices: Devices) -> Tree: ...
    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]: ...


class Serving(Protocol):
    """The device half of requests."""

    @property
    def crosses(self) -> Crossing: ...

    def decide(self, devices: Devices, deployed: Tree) -> Decision: ...
    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision: ...


@dataclass(frozen=True)
class Opened:
    """What runs on this device, and what it computes with."""

    half: Half
    compute: Primitives
    name: str


@dataclass
class _Entry:
    """The journal of one device's last reply; `arrived`: the cloud has it, if the round stands."""

    serial: int
    before: Tree | None
    after: Tree
    arrived: bool = False


class DeviceSide:
    """What runs in the device process: for each kind of frame the method of that name.

    `opens(header)` says what runs here, `serves(header)` what answers requests."""

    frames: ClassVar[tuple[str, ...]] = ("open", "reply", "settle", "end", "decide", "merge")

    def __init__(
        self, opens: Callable[[Header], Opened], serves: Callable[[Header], Serving]
    ) -> None:
        self._opens, self._serves = opens, serves

    def open(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        self._running, self._seed = self._opens(header), header["seed"]
        self._own: dict[tuple[int, str], Tree] = {}
        self._private: dict[int, Tree] = {}
        self._journal: dict[int, _Entry] = {}
        self._asked: dict[int, tuple[Serving, Tree, Decision, DeviceSession]] = {}
        self._deployed = b"", Tree()
        return {}, []

    def _session(
        self, header: Header, parts: Parts, what: str, serial: int, kept: Tree | None
    ) -> DeviceSession:
        device = header["device"]
        if header["first"]:
            self._own[device, what] = wire.stack([wire.unpack(parts[0])]).data
        data = self._own[device, what]
        session = DeviceSession(
            self._running.compute, np.array([device]), self._seed, serial, data, Tree()
        )
        session.private = self._running.half.install(session) if kept is None else kept
        return session

    def reply(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        device, serial = header["device"], header["serial"]
        # Asked again, or never told that its last reply arrived: it starts from `before`.
        entry = self._journal.get(device)
        before = self._private.get(device) if entry is None else entry.before
        session = self._session(header, parts, "own", serial, before)
        down = wire.stack([wire.unpack(parts[-1])])
        up, after = self._running.half.reply(header["verb"], down, session)
        check(self._running.name, self._running.half.crosses, header["verb"], "up", up, 1)
        blob = wire.pack(up, 0)
        if after:
            after = wire.stack_trees([wire.unpack_tree(wire.pack_tree(after))])
        # Nothing can go wrong from here on: until here all is as it was.
        self._keep(device, before)
        self._journal.pop(device, None)
        if after:
            self._journal[device] = _Entry(serial, before, after)
            self._keep(device, after)
        return {"flops": float(session.flops[0])}, [blob]

    def _keep(self, device: int, private: Tree | None) -> None:
        if private is None:
            self._private.pop(device, None)
        else:
            self._private[device] = private

    def settle(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        for device, good in zip(header["ids"], header["good"], strict=True):
            entry = self._journal.get(device)
            if entry is not None and entry.serial == header["serial"]:
                entry.arrived = good
        return {}, []

    def end(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        for device, entry in list(self._journal.items()):
            if not (header["kept"] and entry.arrived):
                self._keep(device, entry.before)
        self._journal.clear()
        return {}, []

    def decide(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        service = self._serves(header)
        kept = self._private.get(header["device"])
        session = self._session(header, parts, f"requests.{header['split']}", 0, kept)
        if self._deployed[0] != parts[-1]:
            fresh = wire.stack([wire.unpack(parts[-1])]).parameters
            self._deployed = parts[-1], frozen(fresh)
        deployed = self._deployed[1]
        decision = service.decide(session, deployed)
        return self._decided(header["device"], service, deployed, decision, session)

    def merge(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        service, deployed, decision, session = self._asked[header["device"]]
        session.flops = np.zeros(1)
        down = wire.stack([wire.unpack(parts[-1])])
        merged = service.merge(session, deployed, decision, down)
        return self._decided(header["device"], service, deployed, merged, session)

    def _decided(
        self,
        device: int,
        service: Serving,
        deployed: Tree,
        decision: Decision,
        session: DeviceSession,
    ) -> tuple[Header, Parts]:
        check(self._running.name, service.crosses, "request", "up", decision.up, 1)
        self._asked[device] = (service, deployed, decision, session)
        send = Rows(decision.send, np.array([decision.send.shape[1]]))
        blobs = [
            wire.pack(Message(features=decision.answer), 0),
            wire.pack(Message(features=Tree(send=send)), 0),
            wire.pack(decision.up, 0),
        ]
        return {"flops": float(session.flops[0])}, blobs


def _exactly(count: int) -> bytes:
    blob = sys.stdin.buffer.read(count)
    if len(blob) < count:
        raise EOFError
    return blob


def listen(here: DeviceSide) -> None:
    """Answer frames on standard input until there are no more.

    What device code prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            header, parts = parse(_exactly)
        except EOFError:
            return
        try:
            if header["op"] not in here.frames:
                raise ValueError(f"no frame is called {header['op']!r}")
            answer, back = getattr(here, header["op"])(header, parts)
        except Exception as problem:
            answer, back = {"error": type(problem).__name__, "text": str(problem)}, []
        out.write(frame(answer, back))
        out.flush()
