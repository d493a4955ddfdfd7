"""The engine: what it refuses, drops, counts, bills, times and holds in memory.

Most of it on `Count`, a collaboration whose devices add up their rows and keep how often they did.
Device d's rows are all d, so that each figure can be done in the head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import tiny
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.core import (
    Ask,
    Chunk,
    Cloud,
    Crossing,
    Decision,
    Devices,
    Lane,
    Message,
    Rows,
    Tree,
    run,
    serve,
)  # fmt: skip
from kitestring.devices.profiles import PROFILES, Profile
from kitestring.engines.hands import Reply
from kitestring.engines.local import LocalEngine, Setting
from kitestring.engines.pipe import Pipe
from kitestring.engines.strict import OtherProcess
from kitestring.errors import BadBytes, BadReply, NoReplies, RunError, TaskError, Undeclared
from kitestring.exchange import wire

PHONE = PROFILES["phone"]


@dataclass(frozen=True)
class State:
    round: int
    total: float = 0.0


def shape(leaf: Any, devices: Devices) -> Any:
    return np.full(len(devices.data["x"].n), leaf, np.float32)


@dataclass(frozen=True)
class Count:
    """`leak`: where a leaf crosses that is not declared. `nan`: who replies with it."""

    rounds: int = 3
    leak: str = ""
    leaf: str = "features.secret"
    nan: int = -1
    at_least: int = 1
    backwards: bool = False
    summed: bool = True
    trouble: str = ""

    crosses: ClassVar[Crossing] = {
        "count": Lane(down={"scalars": ("factor",)}, up={"features": ("sum",), "scalars": ("n",)})
    }
    state_type: ClassVar[type[State]] = State

    def install(self, devices: Devices) -> Tree:
        return Tree(done=shape(0, devices))

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0)

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        to = cloud.sample(None)[:: -1 if self.backwards else 1]
        down = message(self, "down", Message(scalars=Tree(factor=np.float32(2))))
        reduce: Any = "sum" if self.summed else None
        return [Ask("count", to, all=down, reduce=reduce, at_least=self.at_least)]

    def reply(self, verb: str, down: Message, devices: Devices) -> tuple[Message, Tree]:
        trouble(self.trouble)
        x = devices.data["x"]
        total = np.where(x.mask(), x.values, 0).sum(1) * down.scalars["factor"]
        total = np.where(x.values[:, 0] == self.nan, np.nan, total).astype(np.float32)
        up = Message(features=Tree(sum=total), scalars=Tree(n=x.n.astype(np.float32)))
        return message(self, "up", up, len(total)), devices.private + 1.0

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        cloud.table.put([state.round], Tree(told=np.ones(1)))
        total = sum(float(c.message.features["sum"].sum()) for c in chunks)
        return State(state.round + 1, total)

    def serve(self) -> Ask2:
        return Ask2(self.leak, self.leaf, self.trouble)


def message(who: Any, way: str, declared: Message, count: int | None = None) -> Message:
    """What is declared and, where it is to leak, a leaf that is not."""
    if who.leak == way:
        kind, _, name = who.leaf.partition(".")
        getattr(declared, kind)[name] = (
            np.float32(1) if count is None else np.ones(count, np.float32)
        )
    return declared


def trouble(kind: str) -> None:
    if kind == "exit":
        import os

        print("device code may print, and then leave")
        os._exit(3)
    if kind == "hang":
        import time

        time.sleep(60)
    if kind == "fail":
        raise ZeroDivisionError("one over nothing")


@dataclass(frozen=True)
class Ask2:
    """Sends every request up once; the cloud doubles it."""

    leak: str = ""
    leaf: str = ""
    trouble: str = ""
    crosses: ClassVar[Crossing] = {
        "deploy": Lane(),
        "request": Lane(up={"data": ("x",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: State) -> Tree:
        return Tree(w=np.ones(1)) if self.leak == "deploy" else Tree()

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        assert set(devices.data) == {"x"}, "labels are hidden"
        x = devices.data["x"]
        up = message(self, "request up", Message(data=Tree(x=x)), len(x.n))
        return Decision(Tree(answer=x), x.mask(), up)

    def answer(self, state: State, up: Message, cloud: Cloud) -> Message:
        x = up.data["x"]
        down = Message(features=Tree(answer=Rows(x.values * 2, x.n)))
        return message(self, "request down", down, len(x.n))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return Decision(Tree(answer=down.features["answer"]), decision.send & False, Message())


class Numbers:
    """Device d has 1 + d % 3 rows, all of them d."""

    def __init__(self, size: int = 6) -> None:
        self.size = size

    def rows(self, ids: Any, split: str) -> dict[str, Rows]:
        ids = np.asarray(ids)
        values = np.repeat(ids[:, None], 3, 1).astype(np.float32)
        n = 1 + ids % 3
        return {"x": Rows(values, n), "y": Rows(values, n)}


WHOLE = sum(2.0 * d * (1 + d % 3) for d in range(6))


def no_programs() -> dict[str, Any]:
    return {}


def engine(chunk: int = 4, lost: float = 0.0, hands: Any = None, size: int = 6) -> LocalEngine:
    return LocalEngine(Setting(Numbers(size), PHONE, chunk, lost), tiny.compute(), hands=hands)


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipe]:
    with Pipe() as pipe:
        yield pipe


@pytest.fixture(params=["here", "another process"])
def new(request: Any, pipe: Pipe) -> Callable[..., LocalEngine]:
    """Makes engines whose device half runs in this process or in another."""

    def make(**how: Any) -> LocalEngine:
        if request.param == "here":
            return engine(**how)
        hands = OtherProcess("test_engine:no_programs", {}, Numbers(how.get("size", 6)), pipe)
        return engine(**how, hands=hands)

    return make


def done(engine: LocalEngine) -> list[float]:
    """How often each device counted, as it remembers it."""
    private = [tiny.private(engine, d) for d in range(6)]
    return [float(p["done"][0]) if p else 0.0 for p in private]


def test_an_undisturbed_run(new: Any) -> None:
    e = new()
    assert tiny.learn(Count(), e) == State(3, WHOLE)
    assert done(e) == [3] * 6
    found = list(serve(Ask2(), State(3), e))
    assert [a["answer"].values[0, 0] for _, a in found] == [0, 8]
    assert e.ledger.amounts["learn", "requests"] == sum(1 + d % 3 for d in range(6))


# --- refused


@pytest.mark.parametrize("leaf", ["features.secret", "data.x", "parameters.w", "scalars.m"])
@pytest.mark.parametrize("way", ["down", "up"])
def test_learning_refuses_what_is_not_declared(way: str, leaf: str, new: Any) -> None:
    with pytest.raises(Undeclared) as told:
        tiny.learn(Count(leak=way, leaf=leaf), new())
    assert "Count" in str(told.value)
    assert f"count {way}" in str(told.value)
    assert leaf in str(told.value)


@pytest.mark.parametrize(
    ("way", "leaf"),
    [("request up", "features.h"), ("request down", "data.y"), ("deploy", "parameters.w")],
)
def test_serving_refuses_what_is_not_declared(way: str, leaf: str, new: Any) -> None:
    e, collaboration = new(), Count(leak=way, leaf=leaf)
    state = tiny.learn(collaboration, e)
    with pytest.raises(Undeclared) as told:
        list(serve(collaboration.serve(), state, e))
    assert "Count" in str(told.value)
    assert f"{way} down" if way == "deploy" else way in str(told.value)
    assert leaf in str(told.value)


def test_a_scalar_is_one_number() -> None:
    e = engine()
    e.open(Count(), 0)
    wide = Message(scalars=Tree(factor=np.ones((2, 2), np.float32)))
    with pytest.raises(BadReply, match=r"scalars\.factor has shape \(2, 2\)"):
        list(e.exchange([Ask("count", np.arange(2), each=lambda ids: wide)]))


def test_ragged_rows_cannot_be_summed() -> None:
    e = engine(chunk=8)
    e.open(Count(), 0)
    ragged = Rows(np.zeros((6, 1), np.float32), np.ones(6, int))
    e.hands = Still(lambda ids: Message(features=Tree(sum=ragged)))
    with pytest.raises(TaskError, match=r"features\.sum is ragged"):
        list(e.exchange([Ask("count", np.arange(6), reduce="sum")]))


# --- dropped and counted


@pytest.mark.parametrize("summed", [True, False])
def test_nan_of_one_device_is_dropped_and_counted(summed: bool, new: Any) -> None:
    """Device 2 has three rows of 2, doubled: 12 is missing. It forgets that it replied."""
    e = new()
    assert tiny.learn(Count(nan=2, summed=summed), e) == State(3, WHOLE - 12)
    assert e.ledger.amounts["learn", "refused"] == 3
    assert e.ledger.amounts["learn", "lost"] == 0
    assert done(e) == [3, 3, 0, 3, 3, 3]


def test_lost_replies_are_counted_and_forgotten(new: Any) -> None:
    e = new(lost=0.4)
    states = list(run(Count(rounds=8), e, 0))
    lost = e.ledger.amounts["learn", "lost"]
    assert 0 < lost < 48
    assert sum(done(e)) == 48 - lost
    assert all(s.total <= WHOLE for s in states)
    again = new(lost=0.4, chunk=1)
    assert list(run(Count(rounds=8), again, 0)) == states
    assert done(again) == done(e)


@pytest.mark.parametrize("how", ["all are lost", "too few are good"])
def test_too_few_replies_void_the_round(how: str, new: Any) -> None:
    """Nothing is told and nothing kept, on the devices that did reply neither; then it gives up."""
    few = how == "too few are good"
    e = new(lost=0.0 if few else 1.0)
    seen = []
    with pytest.raises(NoReplies) as told:  # noqa: PT012
        for state in run(Count(nan=2, at_least=6) if few else Count(), e, 0):
            seen.append(state)
    assert seen == [State(0)]
    assert "\n" not in str(told.value)
    assert "Count" in str(told.value)
    assert ("5 held NaN" if few else "30 were lost") in str(told.value)
    assert e.cloud.table.ids() == []
    assert done(e) == [0] * 6
    assert e.ledger.amounts["learn", "rounds"] == 5, "what crossed has crossed, and stays billed"
    assert e.ledger.bytes["learn", "up", "scalars", "n"] > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_fold_does_not_depend_on_the_order(dtype: Any) -> None:
    """Sums are float64: of 64 numbers they differ by 64 roundings at most, 64 x 1.1e-16."""
    numbers = np.random.default_rng(0).normal(0, 1, 64).astype(dtype)
    order = np.random.default_rng(1).permutation(64)
    sums = []
    for to, chunk in ((np.arange(64), 64), (np.arange(64)[::-1], 1), (order, 5)):
        e = engine(chunk, size=64)
        e.open(Count(), 0)
        e.hands = Still(lambda ids: Message(features=Tree(sum=numbers[ids])))
        (found,) = e.exchange([Ask("count", to, reduce="sum")])
        assert found.ids is None
        assert found.count == 64
        sums.append(found.message.features["sum"][0])
    assert np.ptp(sums) <= 64 * 1.2e-16 * np.abs(numbers).sum()
    assert tiny.learn(Count(backwards=True), engine()) == tiny.learn(Count(), engine())


# --- time and memory


class Still:
    """Hands whose replies are given."""

    concurrent = True

    def __init__(self, make: Callable[[Any], Message]) -> None:
        self.make = make

    def open(self, collaboration: Any, seed: int) -> None: ...

    def settle(self, ids: Any, serial: int, good: Any, after: Tree) -> None: ...

    def end(self, kept: bool) -> None: ...

    def reply(self, verb: str, ids: Any, serial: int, down: Message) -> Reply:
        return Reply(self.make(ids), np.zeros(len(ids)))

    def decide(self, *what: Any) -> Any: ...

    def merge(self, *what: Any) -> Any: ...


def test_the_clock_of_one_device() -> None:
    """Bytes over the rates, operations over the speed (a backward pass is two forward ones), one
    round trip; joules as in devices/profiles.py. One device, two epochs over its rows."""
    p = Profile("slow", 1e3, 2**20, up=10.0, down=20.0, round_trip=0.5, joules_up=3, joules_down=2)
    population = tiny.population()
    population.size = 1
    e = LocalEngine(Setting(population, p), tiny.compute())
    state = tiny.learn(FedAvg(rounds=1, epochs=2, batch=4), e)
    n = int(population.rows([0], "train")["y"].n[0])
    model = Message(parameters=Tree({k: v[None] for k, v in state.weights.items()}))
    down = len(wire.pack(model, 0))
    up = down + len(wire.pack(Message(scalars=Tree(examples=np.ones(1, np.float32))), 0))
    flops = n * 2 * 3 * 2 * (tiny.WIDTH * 6 + 6 * tiny.CLASSES)
    a = {what: v for (_, what), v in e.ledger.amounts.items()}
    assert sum(e.ledger.kinds("learn", "down").values()) == down
    assert sum(e.ledger.kinds("learn", "up").values()) == up
    assert a["flops"] == flops
    assert a["clock"] == pytest.approx(up / 10 + down / 20 + flops / 1e3 + 0.5)
    assert a["seconds"] == a["clock"]
    assert a["joules_low"] == pytest.approx(flops * 2.3e-12 + up * 3 + down * 2)
    assert a["joules_high"] == pytest.approx(flops * 70e-12 + up * 3 + down * 2)


def test_the_slowest_device_sets_the_clock() -> None:
    e = LocalEngine(Setting(tiny.population(), PHONE, 2), tiny.compute())
    tiny.learn(FedAvg(rounds=1), e)
    a = e.ledger.amounts
    assert a["learn", "seconds"] / 6 < a["learn", "clock"] < a["learn", "seconds"]


class Millions:
    """Only the devices that were asked are ever looked at."""

    size = 10**6

    def __init__(self, most: int) -> None:
        self.most, self.met = most, set[int]()
        self._rows = tiny.population()

    def rows(self, ids: Any, split: str) -> dict[str, Rows]:
        self.met |= {int(i) for i in ids}
        assert len(self.met) <= self.most, "rows of devices that were not asked"
        return self._rows.rows(np.asarray(ids) % tiny.DEVICES, split)


def test_a_million_devices_of_which_four_are_asked() -> None:
    population = Millions(4)
    e = LocalEngine(Setting(population, PHONE), tiny.compute())
    state = tiny.learn(FedAvg(rounds=1, cohort=4), e)
    assert len(population.met) == 4
    assert max(population.met) > 10**4, "drawn from all of them"
    assert state.round == 1


@pytest.mark.parametrize("reduce", ["sum", None])
def test_a_round_holds_one_chunk_of_replies(reduce: Any) -> None:
    """The one in hand and the one that is made, of 64; and of the sum one more, the size of one."""
    alive: list[weakref.ref[Any]] = []
    most = 0

    def reply(ids: Any) -> Message:
        nonlocal most
        most = max(most, sum(a() is not None for a in alive))
        made = np.zeros((len(ids), 1000), np.float32)
        alive.append(weakref.ref(made))
        return Message(features=Tree(sum=made))

    e = engine(1, size=64)
    e.open(Count(), 0)
    e.hands = Still(reply)
    count = 0
    for chunk in e.exchange([Ask("count", np.arange(64), reduce=reduce)]):
        count += chunk.count
    assert count == len(alive) == 64
    assert most <= 2


# --- the other process


def strict(pipe: Pipe, collaboration: Any = None) -> OtherProcess:
    hands = OtherProcess("test_engine:no_programs", {}, Numbers(), pipe)
    hands.open(collaboration or Count(), 0)
    return hands


def factor(count: int) -> Message:
    return Message(scalars=Tree(factor=np.full(count, 2, np.float32)))


def test_a_device_keeps_a_journal(pipe: Pipe) -> None:
    """A repeated ask starts from before; what is not acknowledged rolls back."""
    hands, ids = strict(pipe), np.array([1, 2])
    yes, no = np.array([True, True]), np.array([True, False])

    def kept() -> list[float]:
        return [float(hands.private(d).get("done", np.zeros(1))[0]) for d in (1, 2)]

    for _ in range(2):  # asked twice: a reply was slow, say
        up = hands.reply("count", ids, 1, factor(2)).up
        assert up.features["sum"].tolist() == [4, 12]
        assert kept() == [1, 1]
    hands.settle(ids, 1, no, Tree())
    hands.end(True)
    assert kept() == [1, 0]
    hands.reply("count", ids, 2, factor(2))
    hands.settle(ids, 2, yes, Tree())
    hands.end(False)  # the round was void
    assert kept() == [1, 0]
    hands.reply("count", ids, 3, factor(2))  # nothing was said of this one
    hands.reply("count", ids, 4, factor(2))
    hands.settle(ids, 3, yes, Tree())  # an acknowledgement that is late is of another reply
    hands.end(True)
    assert kept() == [1, 0]
    hands.reply("count", ids, 5, factor(2))
    hands.settle(ids, 5, yes, Tree())
    hands.end(True)
    assert kept() == [2, 1]


def test_rows_go_to_their_device_once(pipe: Pipe) -> None:
    class Once(Numbers):
        asked: ClassVar[list[tuple[int, str]]] = []

        def rows(self, ids: Any, split: str) -> dict[str, Rows]:
            assert len(ids) == 1
            self.asked.append((int(ids[0]), split))
            return super().rows(ids, split)

    hands = OtherProcess("test_engine:no_programs", {}, Once(), pipe)
    e = engine(hands=hands)
    state = tiny.learn(Count(rounds=3), e)
    list(serve(Ask2(), state, e))
    assert sorted(Once.asked) == sorted([(d, s) for d in range(6) for s in ("test", "train")])


def test_bytes_that_are_not_billed_are_refused(pipe: Pipe, monkeypatch: Any) -> None:
    hands = strict(pipe)
    honest = wire.sizes
    monkeypatch.setattr(wire, "sizes", lambda m: {k: s - 1 for k, s in honest(m).items()})
    with pytest.raises(BadBytes, match="device 1, count down: 14 bytes were packed and 13 billed"):
        hands.reply("count", np.array([1]), 1, factor(1))


@dataclass(frozen=True)
class Odd:
    settings: Any = None
    state_type: ClassVar[type[State]] = State


@pytest.mark.parametrize("settings", [np.ones(2), (1, 2), {1: 2}, object(), lambda: 1])
def test_settings_are_plain_values(settings: Any, pipe: Pipe) -> None:
    with pytest.raises(TaskError, match="test_engine:Odd"):
        strict(pipe, Odd(settings))


def test_what_cannot_be_found_by_name_is_refused(pipe: Pipe) -> None:
    @dataclass(frozen=True)
    class Local:
        settings: int = 0

    with pytest.raises(TaskError, match="cannot be sent by name"):
        strict(pipe, Local())


def test_a_failing_device_is_named(pipe: Pipe) -> None:
    with pytest.raises(BadReply, match=r"Count, device 0, count: ZeroDivisionError: one over"):
        tiny.learn(Count(trouble="fail"), engine(hands=strict(pipe)))
    # An error of our own keeps its kind. And the process goes on.
    lost = OtherProcess("test_engine:nothing", {}, Numbers(), pipe)
    with pytest.raises(BadReply, match="no attribute 'nothing'"):
        lost.open(Count(), 0)
    assert tiny.learn(Count(), engine(hands=strict(pipe))).total == WHOLE


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("exit", r"died \(exit code 3\): device code may print"),
        ("hang", "did not answer within 1 s"),
    ],
)
def test_a_device_process_that_leaves_or_hangs(kind: str, told: str) -> None:
    with Pipe() as own:
        hands = strict(own, Count(trouble=kind))
        own.timeout = 1.0 if kind == "hang" else own.timeout
        with pytest.raises(RunError, match=told) as error:
            hands.reply("count", np.array([1]), 1, factor(1))
        assert "Count, device 1, count" in str(error.value)
        assert "\n" not in str(error.value)
        with pytest.raises(RunError, match="has ended"):
            hands.private(1)


def test_the_process_ends_with_its_context() -> None:
    with OtherProcess("test_engine:no_programs", {}, Numbers()) as hands:
        process = hands._pipe._process
        assert process is not None
        assert process.poll() is None
    assert process.poll() == 0
