"""The ledger: what crossed, which way, in which compartment, and what computing it cost.

Bytes are those of packed messages; seconds and joules are modelled from the device profile.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Literal

from kitestring.core import Crossing, Message, Rows
from kitestring.errors import BadReply, Undeclared
from kitestring.exchange import wire

Way = Literal["down", "up"]


class Ledger:
    """Totals over all devices: bytes by (purpose, way, kind, leaf), amounts by (purpose, what)."""

    def __init__(self) -> None:
        self.bytes: Counter[tuple[str, str, str, str]] = Counter()
        self.amounts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def bill(self, purpose: str, way: Way, message: Message) -> Any:
        """Enter a message and return its bytes [D], header and all; 0 for the empty one."""
        total: Any = 0
        for (kind, name), size in wire.sizes(message).items():
            self.bytes[purpose, way, kind, name] += int(size.sum())
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
    lane = crosses.get(verb)
    for kind, leaf_name, leaf in message.leaves():
        where = f"{name}, {verb} {way}"
        if lane is None or not lane.allows(way, kind, leaf_name):
            raise Undeclared(
                f"{kind}.{leaf_name} crosses but is not declared",
                where,
                f"Declare it in {name}.crosses[{verb!r}] or do not send it",
            )
        array = leaf.values if isinstance(leaf, Rows) else leaf
        if getattr(array, "dtype", None) is None or array.dtype.name not in wire.DTYPES:
            found = getattr(array, "dtype", type(leaf).__name__)
            raise BadReply(
                f"{kind}.{leaf_name} is {found}", where, f"Send {', '.join(wire.DTYPES)}"
            )
        if array.ndim < 1 or len(array) != count:
            shape = tuple(array.shape)
            raise BadReply(
                f"{kind}.{leaf_name} {shape} is not one slice for {count} devices", where
            )
        if kind == "scalars" and array.ndim != 1:
            raise BadReply(f"scalars.{leaf_name} has shape {tuple(array.shape)}", where, "Send [D]")


def leaf_names(crosses: Crossing, way: Way) -> Mapping[str, list[str]]:
    """What a collaboration declares, over all verbs: compartment -> leaf names."""
    out: dict[str, list[str]] = {}
    for lane in crosses.values():
        for kind, names in getattr(lane, way).items():
            known = out.setdefault(kind, [])
            known.extend(n for n in names if n not in known)
    return out
