"""The local engine: every device of a population on one machine, chunk by chunk.

It carries messages, refuses what was not declared, bills what crossed and models the time it would
have taken; where the device half runs is up to its `Hands`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kitestring import dice
from kitestring.cloud.session import CloudSession
from kitestring.core import KINDS, Array, Ask, Chunk, Decision, Message, Rows, Tree, Void
from kitestring.devices.profiles import Profile, joules
from kitestring.devices.session import DeviceSession, Primitives, broadcast
from kitestring.errors import NoReplies, ProtocolError, TaskError
from kitestring.exchange.ledger import Ledger, check
from kitestring.exchange.store import Store, Table, load_state, save_state
from kitestring.exchange.wire import stack_trees

_PATIENCE = 5  # void rounds in a row before giving up


class Population(Protocol):
    """Who the devices are: their rows, stacked, when asked for."""

    size: int

    def rows(self, ids: Array, split: str) -> dict[str, Rows]: ...


class Hands(Protocol):
    """The device half: where replies and decisions are computed. Operations [D] come with them."""

    def open(self, collaboration: Any, seed: int) -> None: ...
    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> tuple[Message, Array]: ...
    def settle(self, ids: Array, serial: int, good: Array) -> None:
        """The cloud has these devices' replies (good), or not: keep or drop what they changed."""

    def end(self, kept: bool) -> None:
        """The round stands, or is void: then its good replies change nothing either."""

    def decide(
        self, service: Any, ids: Array, split: str, deployed: Message
    ) -> tuple[Decision, Array]: ...
    def merge(self, ids: Array, down: Message) -> tuple[Decision, Array]: ...


class InProcess:
    """Hands that compute here, D devices at a time; private states are kept in the store."""

    def __init__(self, compute: Primitives, population: Population, store: Store) -> None:
        self._compute, self._population, self._store = compute, population, store
        self._pending: Tree = Tree()
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
        found = [self._store.get("private", i) for i in ids]
        if any(tree is None for tree in found):
            fresh = self._collaboration.install(session)
            for d, tree in enumerate(found):
                if tree is None:
                    found[d] = Tree({k: _slice(leaf, d) for k, leaf in fresh.items()})
        return stack_trees([tree for tree in found if tree is not None])

    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> tuple[Message, Array]:
        session = self._session(ids, serial, "train")
        up, self._pending = self._collaboration.reply(verb, down, session)
        return up, session.flops

    def settle(self, ids: Array, serial: int, good: Array) -> None:
        if self._pending:
            self._store.put("private", ids, self._pending, np.nonzero(good)[0])

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
    if isinstance(leaf, Rows):
        return Rows(leaf.values[d : d + 1, : int(leaf.n[d])], leaf.n[d : d + 1])
    return leaf[d : d + 1]


def _choose(message: Message, which: Array) -> Message:
    def leaf(v: Any) -> Any:
        return Rows(v.values[which], v.n[which]) if isinstance(v, Rows) else v[which]

    return Message(*(Tree({k: leaf(v) for k, v in getattr(message, c).items()}) for c in KINDS))


def _finite(message: Message, count: int) -> Array:
    """[D]: every real number that the device sent is finite."""
    good = np.ones(count, bool)
    for _, _, leaf in message.leaves():
        values = leaf.values if isinstance(leaf, Rows) else leaf
        if values.dtype.kind == "f":
            kept = 1 + isinstance(leaf, Rows)
            fine = np.isfinite(values).all(axis=tuple(range(kept, values.ndim)))
            good &= (fine | ~leaf.mask()).all(1) if isinstance(leaf, Rows) else fine
    return good


@dataclass(frozen=True)
class Setting:
    """What an engine needs beside the collaboration."""

    population: Population
    profile: Profile
    chunk: int = 64
    lost: float = 0.0  # share of replies that never arrive
    pool: Mapping[str, Rows] | None = None


class LocalEngine:
    """Runs one collaboration. `pretrained(program)` gives what the cloud trained beforehand."""

    def __init__(
        self,
        setting: Setting,
        compute: Primitives,
        store: Store | None = None,
        hands: Hands | None = None,
        pretrained: Callable[[str], Tree] | None = None,
    ) -> None:
        self.setting, self.compute = setting, compute
        self.store = store or Store()
        self.hands = hands or InProcess(compute, setting.population, self.store)
        self.ledger = Ledger()
        self.purpose = "learn"
        self.latencies: list[Array] = []
        self.costs: Array | None = None  # recorded dollars by sample number
        self._pretrained = pretrained or compute.initial
        self._void = 0

    @property
    def recorded_cost(self) -> float:
        """Dollars that the calls of this ledger cost, where the task has recorded them."""
        return float(self.ledger.amounts[self.purpose, "recorded_cost"])

    def open(self, collaboration: Any, seed: int) -> Any:
        self.collaboration, self.seed = collaboration, seed
        self.name = type(collaboration).__name__
        table = Table(self.store)
        self.cloud = CloudSession(
            self.compute, self.setting.population.size, seed, self.setting.pool, table,
            self._pretrained,
        )  # fmt: skip
        self.hands.open(collaboration, seed)
        state = load_state(self.store, collaboration.state_type)
        if state is not None:
            self.cloud.serial = int((self.store.load("serial") or b"0").decode())
            self.ledger = Ledger.load(self.store.load("ledger") or b"[]")
        return state

    def commit(self, state: Any) -> None:
        self._void = 0
        self._cloud_time()
        save_state(self.store, state)
        self._keep_books()
        self.store.commit()
        self.hands.end(True)

    def void(self) -> None:
        """Drop what the round changed; what crossed has crossed and stays billed."""
        self._void += 1
        self.store.rollback()
        self.hands.end(False)
        self._cloud_time()
        self._keep_books()
        self.store.commit()
        if self._void >= _PATIENCE:
            refused = int(self.ledger.amounts[self.purpose, "refused"])
            lost = int(self.ledger.amounts[self.purpose, "lost"])
            raise NoReplies(
                f"too few usable replies in {_PATIENCE} rounds running "
                f"({refused} held NaN or infinity, {lost} were lost)",
                self.name,
                "Lower the learning rate, or look at the devices' rows and links",
            )

    def _keep_books(self) -> None:
        self.store.save("serial", str(self.cloud.serial).encode())
        self.store.save("ledger", self.ledger.dump())

    def _cloud_time(self) -> None:
        spent, self.cloud.flops = self.cloud.flops, 0.0
        self.ledger.add(
            self.purpose, cloud_flops=spent, clock=spent / self.setting.profile.cloud_flops
        )

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Chunk]:
        asked = [int(i) for ask in asks for i in ask.to]
        if len(set(asked)) < len(asked):
            raise ProtocolError("a device is asked twice in one exchange", self.name)
        self.cloud.serial += 1
        self.ledger.add(self.purpose, rounds=1)
        replies, slowest = 0, 0.0
        for ask in asks:
            total: Message | None = None
            count = 0
            for at in range(0, len(ask.to), self.setting.chunk):
                ids = np.asarray(ask.to[at : at + self.setting.chunk])
                up, good, seconds = self._ask_chunk(ask, ids)
                slowest = max(slowest, seconds)
                replies += int(good.sum())
                if not good.any():
                    continue
                kept = up if good.all() else _choose(up, good)
                if ask.reduce == "sum":
                    total, count = _add(total, kept), count + int(good.sum())
                else:
                    yield Chunk(ask.key, ids[good], kept, int(good.sum()))
            if total is not None:
                yield Chunk(ask.key, None, total, count)
        self.ledger.add(self.purpose, clock=slowest)
        if replies < max((ask.at_least for ask in asks if len(ask.to)), default=0):
            raise Void

    def _ask_chunk(self, ask: Ask, ids: Array) -> tuple[Message, Array, float]:
        """The replies, which of them are there and usable [D], and the slowest device's seconds."""
        down = _addressed(ask, ids)
        crosses, serial = self.collaboration.crosses, self.cloud.serial
        check(self.name, crosses, ask.verb, "down", down, len(ids))
        received = self.ledger.bill(self.purpose, "down", down)
        up, flops = self.hands.reply(ask.verb, ids, serial, down)
        check(self.name, crosses, ask.verb, "up", up, len(ids))
        sent = self.ledger.bill(self.purpose, "up", up)
        good = _finite(up, len(ids))
        there = (
            dice.uniform(dice.keys(self.seed, ids, serial, "lost"), 1)[:, 0] >= self.setting.lost
        )
        self.hands.settle(ids, serial, good & there)
        self.ledger.add(self.purpose, lost=int((~there).sum()), refused=int((there & ~good).sum()))
        return up, good & there, self._spend(flops, sent, received)

    def _spend(self, flops: Array, sent: Any, received: Any) -> float:
        p = self.setting.profile
        seconds = flops / p.flops + sent / p.up + received / p.down
        seconds = seconds + p.round_trip * ((sent + received) > 0)
        low, high = joules(p, float(np.sum(flops)), float(np.sum(sent)), float(np.sum(received)))
        self.ledger.add(
            self.purpose, flops=float(np.sum(flops)), seconds=float(np.sum(seconds)),
            joules_low=low, joules_high=high,
        )  # fmt: skip
        return float(np.max(seconds, initial=0))

    def visits(self, service: Any, state: Any, split: str) -> Iterator[LocalVisit]:
        size, chunk = self.setting.population.size, self.setting.chunk
        deployed = Message(parameters=service.deploy(state))
        for at in range(0, size, chunk):
            ids = np.arange(at, min(size, at + chunk))
            down = Message(parameters=broadcast(deployed.parameters, len(ids)))
            check(self.name, service.crosses, "deploy", "down", down, len(ids))
            self.ledger.bill(f"{self.purpose}.deploy", "down", down)
            yield LocalVisit(self, service, state, ids, split, down)


@dataclass
class LocalVisit:
    """One chunk's requests; see `core.Visit`."""

    engine: LocalEngine
    service: Any
    state: Any
    ids: Array
    split: str
    deployed: Message

    def decide(self) -> Decision:
        e = self.engine
        decision, flops = e.hands.decide(self.service, self.ids, self.split, self.deployed)
        self.requests = np.asarray(next(iter(decision.answer.values())).n)
        per = flops / np.maximum(1, self.requests)
        self.seconds = np.broadcast_to(per[:, None] / e.setting.profile.flops, decision.send.shape)
        e.ledger.add(e.purpose, requests=int(self.requests.sum()))
        e._spend(flops, 0, 0)
        self._done(decision)
        return decision

    def call(self, decision: Decision) -> Message:
        e, p = self.engine, self.engine.setting.profile
        who = decision.send.any(1)
        self.calling = who
        up = _choose(decision.up, who)
        check(e.name, self.service.crosses, "request", "up", up, int(who.sum()))
        sent = e.ledger.bill(e.purpose, "up", up)
        before = e.cloud.flops
        down: Message = self.service.answer(self.state, up, e.cloud)
        spent = e.cloud.flops - before
        e.cloud.flops = before
        check(e.name, self.service.crosses, "request", "down", down, int(who.sum()))
        received = e.ledger.bill(e.purpose, "down", down)
        calls = decision.send.sum(1)
        if e.costs is not None:
            x = up.data["x"]
            e.ledger.add(e.purpose, recorded_cost=float(e.costs[x.values[x.mask()]].sum()))
        e.ledger.add(e.purpose, calls=int(calls.sum()), cloud_flops=spent)
        e._spend(np.zeros(int(who.sum())), sent, received)
        waited = np.zeros(len(who))
        waited[who] = (sent / p.up + received / p.down) / np.maximum(1, calls[who])
        waited += p.round_trip + spent / max(1, int(calls.sum())) / p.cloud_flops
        self.seconds = self.seconds + decision.send * waited[:, None]
        return down

    def merge(self, decision: Decision, down: Message) -> Decision:
        merged, flops = self.engine.hands.merge(self.ids, _spread(down, self.calling))
        self.engine._spend(flops, 0, 0)
        self._done(merged)
        return merged

    def _done(self, decision: Decision) -> None:
        if not decision.send.any():
            width = self.seconds.shape[1]
            self.engine.latencies.append(self.seconds[np.arange(width) < self.requests[:, None]])


def _spread(message: Message, who: Array) -> Message:
    """Give the devices that did not call an empty answer, so that all stay stacked."""

    def leaf(v: Any) -> Any:
        values = v.values if isinstance(v, Rows) else v
        wide = np.zeros((len(who), *values.shape[1:]), values.dtype)
        wide[who] = values
        if not isinstance(v, Rows):
            return wide
        n = np.zeros(len(who), np.int64)
        n[who] = v.n
        return Rows(wide, n)

    return Message(*(Tree({k: leaf(v) for k, v in getattr(message, c).items()}) for c in KINDS))


def _addressed(ask: Ask, ids: Array) -> Message:
    every = [broadcast(getattr(ask.all, kind), len(ids)) for kind in KINDS]
    own = ask.each(ids) if ask.each else Message()
    return Message(
        *(Tree({**a, **getattr(own, kind)}) for a, kind in zip(every, KINDS, strict=True))
    )


def _add(total: Message | None, message: Message) -> Message:
    """Sums over devices, in float64 and with a leading axis of 1."""
    for kind, name, leaf in message.leaves():
        if isinstance(leaf, Rows):
            raise TaskError(f"{kind}.{name} is ragged: rows cannot be summed over devices")
    parts = []
    for kind in KINDS:
        summed = {
            k: v.sum(0, dtype=np.float64, keepdims=True) for k, v in getattr(message, kind).items()
        }
        if total is not None:
            summed = {k: v + getattr(total, kind)[k] for k, v in summed.items()}
        parts.append(Tree(summed))
    return Message(*parts)
