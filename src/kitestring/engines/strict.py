"""The strict engine, for tests: the device half runs in another process, one device at a time.

`OtherProcess` are hands for `LocalEngine` through which nothing passes but packed messages, a
device's own rows on first contact, and names: the collaboration with its settings, and the function
that makes the programs that a device has installed; no names either where the process runs a
package. What device code could only reach in memory is not there. What crosses must be as long as
it is billed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

from kitestring.core import Array, Decision, Message, Tree
from kitestring.devices.session import Primitives
from kitestring.devices.side import DeviceSide, Opened, listen
from kitestring.engines.hands import Population, Reply
from kitestring.engines.pipe import Pipe
from kitestring.errors import BadBytes, TaskError
from kitestring.exchange import wire
from kitestring.exchange.frames import Header, Parts


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


class OtherProcess:
    """Hands that compute elsewhere; `programs(**arguments)`, by name, makes what devices installed.

    Without `programs` the process behind the pipe runs a package, and is told no names.

    `crossed` counts the packed bytes of messages, for tests to hold against the ledger. The pipe
    carries one question at a time, so an engine's other workers are of no use here."""

    concurrent = False

    def __init__(
        self,
        programs: str | None,
        arguments: Mapping[str, Any],
        population: Population,
        pipe: Pipe | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.crossed: Counter[str] = Counter()
        self._programs: Header | None = None
        if programs is not None:
            self._programs = {"name": programs, "settings": dict(arguments)}
        self._population, self._owns = population, pipe is None
        self._pipe = pipe or Pipe(timeout=timeout)
        self._met: set[tuple[int, str]] = set()
        self._calling: Array = np.zeros(0, bool)

    def open(self, collaboration: Any, seed: int) -> None:
        self._met.clear()
        self._name = type(collaboration).__name__
        header: Header = {"op": "open", "seed": seed}
        if self._programs is not None:
            header |= {"collaboration": _reference(collaboration), "programs": self._programs}
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
        header: Header = {"op": "decide", "split": split}
        if self._programs is not None:
            header["service"] = _reference(service)
        found = self._each(
            "decide", ids, deployed,
            lambda device: header,
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


class Shown(DeviceSide):
    """For tests: says what its devices keep as well."""

    frames = (*DeviceSide.frames, "private")

    def private(self, header: Header, parts: Parts) -> tuple[Header, Parts]:
        return {}, [wire.pack_tree(self._private.get(header["device"], Tree()))]


@cache
def _installed(reference: str) -> Primitives:
    """The programs, made once for each set of arguments."""
    from kitestring.devices.fit.compute import TorchCompute, thread_per_process

    thread_per_process()
    return TorchCompute(_made(json.loads(reference)))


def _open(header: Header) -> Opened:
    compute = _installed(json.dumps(header["programs"], sort_keys=True))
    return Opened(_made(header["collaboration"]), compute, header["collaboration"]["name"])


if __name__ == "__main__":
    listen(Shown(_open, lambda header: _made(header["service"])))
