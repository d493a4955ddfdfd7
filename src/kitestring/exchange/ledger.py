"""The ledger: what crossed, which way, in which compartment, and what computing it cost.

Bytes are those of packed messages; seconds and joules are modelled from the device profile.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from kitestring.core import Crossing, Kind, Lane, Message, Rows
from kitestring.errors import BadReply, Undeclared
from kitestring.exchange import wire

Way = Literal["down", "up"]


class Ledger:
    """Totals over all devices: bytes by (purpose, way, kind, leaf), amounts by (purpose, what)."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str, str, str]] = Counter()
        self.amounts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def bill(self, purpose: str, way: Way, message: Message, count: int) -> Any:
        """Enter a message to or from `count` devices; see `enter`."""
        return self.enter(purpose, way, wire.lengths(message), count)

    def enter(self, purpose: str, way: Way, lengths: wire.Lengths, count: int) -> Any:
        """Enter what is so long; the bytes, header and all: [D], or a number where they are the
        same for all of the `count` devices (0 for the empty message)."""
        total: Any = 0
        for (kind, name), size in lengths.items():
            whole = size * count if isinstance(size, int) else int(size.sum())
            self.bytes[purpose, way, kind, name] += whole
            total = total + size
        return total

    def add(self, purpose: str, **amounts: float) -> None:
        for what, amount in amounts.items():
            self.amounts[purpose, what] += amount

    def kinds(self, purpose: str, way: Way) -> dict[str, int]:
        out: Counter[str] = Counter()
        for (p, w, kind, _), size in self.bytes.items():
            if (p, w) == (purpose, way):
                out[kind] += size
        return dict(out)

    def leaves(self, purpose: str, way: Way) -> dict[str, int]:
        return {
            f"{kind}.{name}": size
            for (p, w, kind, name), size in sorted(self.bytes.items())
            if (p, w) == (purpose, way)
        }

    def copy(self) -> Ledger:
        ledger = Ledger()
        ledger.bytes, ledger.amounts = self.bytes.copy(), self.amounts.copy()
        return ledger

    def dump(self) -> bytes:
        pairs = [[list(k), v] for k, v in [*self.bytes.items(), *self.amounts.items()]]
        return json.dumps(pairs).encode()

    @classmethod
    def load(cls, blob: bytes) -> Ledger:
        ledger = cls()
        for key, value in json.loads(blob):
            if len(key) == 4:
                ledger.bytes[tuple(key)] = value
            else:
                ledger.amounts[tuple(key)] = value
        return ledger


def check(name: str, crosses: Crossing, verb: str, way: Way, message: Message, count: int) -> None:
    """Refuse what was not declared, and leaves that are not `count` devices' plain arrays."""
    lane, where = crosses.get(verb), f"{name}, {verb} {way}"
    for kind, leaf_name, leaf in message.leaves():
        if lane is None or not _allowed(lane, way, kind, leaf_name):
            raise Undeclared(
                f"{kind}.{leaf_name} crosses but is not declared",
                where,
                f"Declare it in {name}.crosses[{verb!r}] or do not send it",
            )
        dtype = leaf.row[1] if isinstance(leaf, Rows) else getattr(leaf, "dtype", None)
        if dtype is None or wire.code(dtype) is None:
            found = type(leaf).__name__ if dtype is None else dtype
            raise BadReply(
                f"{kind}.{leaf_name} is {found}", where, f"Send {', '.join(wire.DTYPES)}"
            )
        shape = tuple(leaf.shape)
        if shape[:1] != (count,) or (isinstance(leaf, Rows) and len(leaf.n) != count):
            raise BadReply(
                f"{kind}.{leaf_name} {shape} is not one slice for {count} devices", where
            )
        if kind == "scalars" and len(shape) != 1:
            raise BadReply(f"scalars.{leaf_name} has shape {shape}", where, "Send [D]")


def _allowed(lane: Lane, way: Way, kind: Kind, name: str) -> bool:
    """As the lane says, and sooner where it allows all parameters."""
    every = kind == "parameters" and "*" in getattr(lane, way).get(kind, ())
    return every or lane.allows(way, kind, name)


def leaf_names(crosses: Crossing, way: Way) -> Mapping[str, list[str]]:
    """What a collaboration declares, over all verbs: compartment -> leaf names."""
    out: dict[str, list[str]] = {}
    for lane in crosses.values():
        for kind, names in getattr(lane, way).items():
            known = out.setdefault(kind, [])
            known.extend(n for n in names if n not in known)
    return out
