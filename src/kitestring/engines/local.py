"""The local engine: every device of a population on one machine, chunk by chunk.

It carries messages, refuses what was not declared, bills what crossed and models the time it would
have taken; where the device half runs is up to its `Hands`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from kitestring import dice
from kitestring.cloud.session import CloudSession
from kitestring.core import Array, Ask, Chunk, Decision, Message, Rows, Tree, Void
from kitestring.devices.profiles import Profile, joules
from kitestring.devices.session import Primitives, broadcast
from kitestring.engines import fold
from kitestring.engines.hands import Hands, InProcess, Population
from kitestring.engines.threads import guarded, in_order, new_pool
from kitestring.errors import NoReplies, ProtocolError
from kitestring.exchange import wire
from kitestring.exchange.ledger import Ledger, check
from kitestring.exchange.store import Store, Table, load_state, save_state

_PATIENCE = 5  # void rounds in a row before giving up
_CACHE = 2 * 2**20  # bytes of parameters in a chunk: what one core's second-level cache holds
_ROOM = 64 * 2**20  # bytes of parameters in a chunk of devices that have little to compute
_WORK = 5e8  # operations beside which what Python does for a chunk is little: some milliseconds
_LITTLE = 2e8  # operations too few to be shared out: Python's part would be as much
_FEWEST, _MOST = 64, 512  # devices in a chunk: where there are no parameters, and ever


@dataclass(frozen=True)
class Setting:
    """What an engine needs beside the collaboration.

    `chunk` devices are computed at a time; None chooses: as many as have 2 MiB of parameters or,
    by the replies so far, some milliseconds of work, in chunks of one size and as many for each
    worker that they are enough for. `workers` threads compute chunks, where the hands let them:
    those in another process take one at a time. Results do not depend on how many there are; on
    the chunk, sums over devices do, in the last digits of a float64."""

    population: Population
    profile: Profile
    chunk: int | None = None
    lost: float = 0.0  # share of replies that never arrive
    pool: Mapping[str, Rows] | None = None
    workers: int = 1


@dataclass(frozen=True)
class _Answered:
    """A chunk of devices: what they were sent, and what became of their replies."""

    ids: Array
    received: Any  # bytes [D], or 0
    kept: Message  # the good replies, or their sum
    good: Array  # [D]
    there: Array  # [D]: not lost
    sent: wire.Lengths
    flops: Array
    after: Tree


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

    @cached_property
    def _threads(self) -> Any:
        return new_pool(self._workers)

    @property
    def _workers(self) -> int:
        return self.setting.workers if self.hands.concurrent else 1

    @property
    def recorded_cost(self) -> float:
        """Dollars that the calls of this ledger cost, where the task has recorded them."""
        return float(self.ledger.amounts[self.purpose, "recorded_cost"])

    def open(self, collaboration: Any, seed: int) -> Any:
        self.collaboration, self.seed = collaboration, seed
        self.name = type(collaboration).__name__
        table = Table(self.store)
        self.cloud = CloudSession(
            guarded(self.compute), self.setting.population.size, seed, self.setting.pool, table,
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
        serial, ledger = str(self.cloud.serial), self.ledger.copy()
        self.store.save_all({"serial": serial.encode, "ledger": ledger.dump})

    def _cloud_time(self) -> None:
        spent, self.cloud.flops = self.cloud.flops, 0.0
        self.ledger.add(
            self.purpose, cloud_flops=spent, clock=spent / self.setting.profile.cloud_flops
        )

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Chunk]:
        self._check_once(asks)
        self.cloud.serial += 1
        self.ledger.add(self.purpose, rounds=1)
        replies, slowest = 0, 0.0
        for ask in asks:
            total: Message | None = None
            count = 0
            with closing(self._answered(ask)) as chunks:
                for a in chunks:
                    good = int(np.count_nonzero(a.good))
                    slowest = max(slowest, self._enter(a, good))
                    replies, count = replies + good, count + good
                    if ask.reduce == "sum":
                        total = fold.add(total, a.kept)
                    elif good:
                        yield Chunk(ask.key, a.ids[a.good], a.kept, good)
                    del a  # so that it is gone while the next is awaited
            if total is not None and count:
                yield Chunk(ask.key, None, total, count)
        self.ledger.add(self.purpose, clock=slowest)
        if replies < max((ask.at_least for ask in asks if len(ask.to)), default=0):
            raise Void

    def _check_once(self, asks: Sequence[Ask]) -> None:
        asked = np.sort(np.concatenate([np.zeros(0, np.int64), *(ask.to for ask in asks)]))
        if (asked[1:] == asked[:-1]).any():
            raise ProtocolError("a device is asked twice in one exchange", self.name)

    def _answered(self, ask: Ask) -> Generator[_Answered, None, None]:
        """Chunk by chunk. Where they are not summed, who asked has one of them in hand."""
        ahead = self._workers + (ask.reduce == "sum")
        return in_order(self._calls(ask), self._threads, ahead)

    def _calls(self, ask: Ask) -> Iterator[Callable[[], _Answered]]:
        """What is sent is checked and billed here; the rest may run in any thread."""
        to = np.asarray(ask.to)
        size = self._size(ask.all.parameters, len(to), self._workers)
        alike: dict[int, tuple[Message, wire.Lengths]] = {}
        for at in range(0, len(to), size):
            ids = to[at : at + size]
            if ask.each:
                down, lengths = self._addressed(ask, ids)
            else:
                if len(ids) not in alike:
                    alike[len(ids)] = self._addressed(ask, ids)
                down, lengths = alike[len(ids)]
            received = self.ledger.enter(self.purpose, "down", lengths, len(ids))
            yield partial(self._answer, ask, ids, fold.copied(down), received)

    def _addressed(self, ask: Ask, ids: Array) -> tuple[Message, wire.Lengths]:
        down = fold.addressed(ask, ids)
        check(self.name, self.collaboration.crosses, ask.verb, "down", down, len(ids))
        return down, wire.lengths(down)

    def _size(self, parameters: Tree, count: int, workers: int) -> int:
        """Devices in a chunk."""
        if self.setting.chunk is not None:
            return self.setting.chunk
        each = sum(np.asarray(a).nbytes for a in parameters.values())
        most = _CACHE // each if each else _FEWEST
        replies = self.ledger.amounts[self.purpose, "replies"]
        if replies:
            work = self.ledger.amounts[self.purpose, "flops"] / replies
            most = max(most, int(min(_WORK / max(1.0, work), _ROOM / max(1, each))))
            workers = max(1, min(workers, int(count * work / _LITTLE)))
        turns = -(-count // max(1, min(most, _MOST)))
        return max(1, -(-count // (-(-turns // workers) * workers)))

    def _answer(self, ask: Ask, ids: Array, down: Message, received: Any) -> _Answered:
        serial, count = self.cloud.serial, len(ids)
        reply = self.hands.reply(ask.verb, ids, serial, down)
        check(self.name, self.collaboration.crosses, ask.verb, "up", reply.up, count)
        there = np.ones(count, bool)
        if self.setting.lost:
            key = dice.keys(self.seed, ids, serial, "lost")
            there = dice.uniform(key, 1)[:, 0] >= self.setting.lost
        kept, good = (fold.total if ask.reduce == "sum" else fold.usable)(reply.up, there)
        sent = wire.lengths(reply.up)
        return _Answered(ids, received, kept, good, there, sent, reply.flops, reply.after)

    def _enter(self, a: _Answered, good: int) -> float:
        """Bill it and let the devices know; the slowest device's seconds."""
        sent = self.ledger.enter(self.purpose, "up", a.sent, len(a.ids))
        self.hands.settle(a.ids, self.cloud.serial, a.good, a.after)
        there = int(np.count_nonzero(a.there))
        asked = len(a.ids)
        self.ledger.add(self.purpose, replies=asked, lost=asked - there, refused=there - good)
        return self._spend(a.flops, sent, a.received)

    def _spend(self, flops: Array, sent: Any, received: Any) -> float:
        """`sent` and `received` bytes: [D], or the same for all."""
        p, count = self.setting.profile, len(flops)
        on_the_way = sent / p.up + received / p.down + p.round_trip * ((sent + received) > 0)
        seconds = flops / p.flops + on_the_way
        done, up, down = (
            float(v.sum()) if isinstance(v, np.ndarray) else float(v * count)
            for v in (flops, sent, received)
        )
        low, high = joules(p, done, up, down)
        self.ledger.add(
            self.purpose, flops=done, seconds=float(seconds.sum()), joules_low=low, joules_high=high
        )
        return float(seconds.max(initial=0))

    def visits(self, service: Any, state: Any, split: str) -> Iterator[LocalVisit]:
        count = self.setting.population.size
        deployed = Message(parameters=service.deploy(state))
        size = self._size(deployed.parameters, count, 1)
        for at in range(0, count, size):
            ids = np.arange(at, min(count, at + size))
            down = Message(parameters=broadcast(deployed.parameters, len(ids)))
            check(self.name, service.crosses, "deploy", "down", down, len(ids))
            self.ledger.bill(f"{self.purpose}.deploy", "down", down, len(ids))
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
        up, count = fold.choose(decision.up, who), int(who.sum())
        check(e.name, self.service.crosses, "request", "up", up, count)
        sent = e.ledger.bill(e.purpose, "up", up, count)
        before = e.cloud.flops
        down: Message = self.service.answer(self.state, up, e.cloud)
        spent = e.cloud.flops - before
        e.cloud.flops = before
        check(e.name, self.service.crosses, "request", "down", down, count)
        received = e.ledger.bill(e.purpose, "down", down, count)
        calls = decision.send.sum(1)
        if e.costs is not None:
            x = up.data["x"]
            e.ledger.add(e.purpose, recorded_cost=float(e.costs[x.values[x.mask()]].sum()))
        e.ledger.add(e.purpose, calls=int(calls.sum()), cloud_flops=spent)
        e._spend(np.zeros(count), sent, received)
        waited = np.zeros(len(who))
        waited[who] = (sent / p.up + received / p.down) / np.maximum(1, calls[who])
        waited += p.round_trip + spent / max(1, int(calls.sum())) / p.cloud_flops
        self.seconds = self.seconds + decision.send * waited[:, None]
        return down

    def merge(self, decision: Decision, down: Message) -> Decision:
        merged, flops = self.engine.hands.merge(self.ids, fold.spread(down, self.calling))
        self.engine._spend(flops, 0, 0)
        self._done(merged)
        return merged

    def _done(self, decision: Decision) -> None:
        if not decision.send.any():
            width = self.seconds.shape[1]
            self.engine.latencies.append(self.seconds[np.arange(width) < self.requests[:, None]])
