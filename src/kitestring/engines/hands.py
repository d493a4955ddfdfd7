"""Where the device half runs: `Hands`, and those that compute in this process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kitestring.core import Array, Decision, Message, Rows, Tree
from kitestring.devices.session import DeviceSession, Primitives
from kitestring.engines.threads import guarded
from kitestring.exchange.store import Store
from kitestring.exchange.wire import stack_trees


class Population(Protocol):
    """Who the devices are: their rows, stacked, when asked for; by any of the engine's threads."""

    size: int

    def rows(self, ids: Array, split: str) -> dict[str, Rows]: ...


@dataclass(frozen=True)
class Reply:
    """What devices send, the operations [D] that it took, and what they would keep of it."""

    up: Message
    flops: Array
    after: Tree = field(default_factory=Tree)


class Hands(Protocol):
    """The device half: where replies and decisions are computed. Operations [D] come with them."""

    concurrent: bool  # `reply` may be called by several threads at once

    def open(self, collaboration: Any, seed: int) -> None: ...
    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> Reply: ...
    def settle(self, ids: Array, serial: int, good: Array, after: Tree) -> None:
        """The cloud has these devices' replies (good), or not: keep or drop what they changed."""

    def end(self, kept: bool) -> None:
        """The round stands, or is void: then its good replies change nothing either."""

    def decide(
        self, service: Any, ids: Array, split: str, deployed: Message
    ) -> tuple[Decision, Array]: ...
    def merge(self, ids: Array, down: Message) -> tuple[Decision, Array]: ...


class InProcess:
    """Hands that compute here, D devices at a time; private states are kept in the store."""

    concurrent = True

    def __init__(self, compute: Primitives, population: Population, store: Store) -> None:
        self._compute, self._population, self._store = guarded(compute), population, store
        self._asked: tuple[Any, Tree, Decision, DeviceSession] | None = None

    def open(self, collaboration: Any, seed: int) -> None:
        self._collaboration, self._seed = collaboration, seed

    def _session(
        self, ids: Array, serial: int, split: str, hidden: tuple[str, ...] = ()
    ) -> DeviceSession:
        rows = self._population.rows(ids, split)
        data = {k: r for k, r in rows.items() if k not in hidden}
        session = DeviceSession(self._compute, ids, self._seed, serial, data, Tree())
        session.private = self._private(ids, session)
        return session

    def _private(self, ids: Array, session: DeviceSession) -> Tree:
        kept = self._store.stacked("private", ids)
        if kept is not None:
            return kept
        found = self._store.find("private", ids)
        fresh: Tree = self._collaboration.install(session)
        if all(tree is None for tree in found):
            return fresh
        one = [
            Tree({k: _slice(leaf, d) for k, leaf in fresh.items()}) if tree is None else tree
            for d, tree in enumerate(found)
        ]
        return stack_trees(one)

    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> Reply:
        session = self._session(ids, serial, "train")
        up, after = self._collaboration.reply(verb, down, session)
        return Reply(up, session.flops, after)

    def settle(self, ids: Array, serial: int, good: Array, after: Tree) -> None:
        if after:
            self._store.put("private", ids, after, np.nonzero(good)[0])

    def end(self, kept: bool) -> None:
        """Private states share the store with the run, and stand or fall with its transaction."""

    def decide(
        self, service: Any, ids: Array, split: str, deployed: Message
    ) -> tuple[Decision, Array]:
        session = self._session(ids, 0, split, hidden=("y",))
        decision = service.decide(session, deployed.parameters)
        self._asked = (service, deployed.parameters, decision, session)
        return decision, session.flops

    def merge(self, ids: Array, down: Message) -> tuple[Decision, Array]:
        assert self._asked is not None
        service, deployed, decision, session = self._asked
        session.flops = np.zeros(len(ids))
        decision = service.merge(session, deployed, decision, down)
        self._asked = (service, deployed, decision, session)
        return decision, session.flops


def _slice(leaf: Any, d: int) -> Any:
    return leaf.of(slice(d, d + 1)) if isinstance(leaf, Rows) else leaf[d : d + 1]
