"""What lets a simulation grow: rows that are kept side by side, threads, chunks, a million users.

Results do not depend on how many threads computed them, and no more is held than was said.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import tiny
from kitestring import dice
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.core import Ask, Message, Rows, Tree, run
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.profiles import PROFILES
from kitestring.engines.hands import InProcess, Reply
from kitestring.engines.local import LocalEngine, Setting
from kitestring.engines.threads import guarded, in_order
from kitestring.errors import DataError, ProtocolError, Undeclared
from kitestring.exchange.store import Store
from kitestring.tasks.metrics import accuracy
from kitestring.tasks.population import Arena, DeviceUsers, pool_rows
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task
from kitestring.tasks.users import SPLITS, Numbered, Users
from kitestring.tasks.validate import validate
from test_engine import Count, Numbers, Still

PHONE = PROFILES["phone"]


# --- rows, side by side


def columns(user: int) -> dict[str, Any]:
    """1 to 5 rows of two columns, all the user's number."""
    n = 1 + user * 3 % 5
    return {"x": np.full((n, 4), user, np.float32), "y": np.full(n, user)}


class Noted:
    """Users whose loads are counted."""

    def __init__(self, count: int = 50, rows: Callable[[int], dict[str, Any]] = columns) -> None:
        self.loads: list[int] = []
        self._rows = rows
        self.users = Users(Numbered(count), self.load, range(0), range(count))

    def load(self, user: int) -> Any:
        self.loads.append(user)
        return dict.fromkeys(SPLITS, self._rows(user))


def assert_of(rows: dict[str, Rows], ids: Sequence[int]) -> None:
    """Each device's own rows, and zeros around them where they are stacked."""
    assert rows["y"].n.tolist() == [1 + i * 3 % 5 for i in ids]
    for r in rows.values():
        assert r.values.shape[:2] == (len(ids), max(r.n))
        for d, i in enumerate(ids):
            assert (r.values[d, : r.n[d]] == i).all()
            assert (r.values[d, r.n[d] :] == 0).all()


def test_rows_of_any_devices_in_any_order() -> None:
    noted = Noted()
    population = DeviceUsers(noted.users)
    dice = np.random.default_rng(0)
    for _ in range(100):
        ids = dice.integers(0, 50, dice.integers(1, 9))
        assert_of(population.rows(ids, "train"), ids.tolist())
    assert sorted(noted.loads) == list(range(50)), "each was loaded once"
    assert_of(population.rows([3, 4], "test"), [3, 4])
    assert sorted(noted.loads)[3:7] == [3, 3, 4, 4], "a split at a time"


def test_rows_that_are_there_are_not_copied() -> None:
    population = DeviceUsers(Noted().users)
    population.rows(range(50), "train")
    a, b = (population.rows([7, 9], "train")["x"].flat[0] for _ in range(2))
    assert a is b
    in_turn = DeviceUsers(Noted(rows=lambda user: columns(1)).users).rows(range(8), "train")["x"]
    assert np.shares_memory(in_turn.values, in_turn.flat[0]), "not even to stack them"


def test_what_was_handed_out_stays_when_the_arena_grows() -> None:
    arena = Arena()
    arena.add(0, columns(0))
    before = arena.rows([0])
    for device in range(1, 300):
        arena.add(device, columns(device))
    assert before["x"].flat[0] is not arena.rows([0])["x"].flat[0], "it has grown"
    assert_of(before, [0])
    assert_of(arena.rows([299, 0, 150]), [299, 0, 150])
    assert arena.bytes == sum(1 + i * 3 % 5 for i in range(300)) * (4 * 4 + 8)


def test_a_full_arena_is_dropped_but_not_what_was_handed_out() -> None:
    noted = Noted()
    population = DeviceUsers(noted.users, most=20 * 24)  # of 24 bytes a row
    early = population.rows([0, 1, 2, 3], "train")  # 1 + 4 + 2 + 5 rows
    population.rows([4, 5], "train")  # 3 + 1: 16
    kept = population.rows([3, 6, 0], "train")  # 4 more would just do
    assert len(noted.loads) == 7
    assert_of(population.rows([3, 7], "train"), [3, 7])  # 2 too many; 3 is carried over
    assert noted.loads[7:] == [7]
    assert_of(early, [0, 1, 2, 3])
    assert_of(kept, [3, 6, 0])
    population.rows([3], "train")
    population.rows([0], "train")
    assert noted.loads[7:] == [7, 0], "0 was let go"
    everybody = population.rows(range(50), "train")  # more than the bound in one chunk
    assert_of(everybody, list(range(50)))


def test_columns_that_do_not_fit_are_told() -> None:
    arena = Arena()
    arena.add(0, columns(0))
    with pytest.raises(DataError, match=r"device 1: columns x \[4\]"):
        arena.add(1, {"x": np.zeros((4, 4), np.float32)})
    with pytest.raises(DataError, match=r"device 2: columns x \[2\], y \[1\]"):
        arena.add(2, {"x": np.zeros((2, 4), np.float32), "y": np.zeros(1, int)})


def test_rows_for_many_threads() -> None:
    """Some of a device's rows may be asked for while others are added or dropped."""
    noted = Noted(400)
    population = DeviceUsers(noted.users, most=100_000 // 8)

    def ask(seed: int) -> None:
        dice = np.random.default_rng(seed)
        for _ in range(60):
            ids = dice.integers(0, 400, 6)
            assert_of(population.rows(ids, "train"), ids.tolist())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))
    assert len(noted.loads) > 400, "it was full at times"


def test_the_pools_rows_are_one_users() -> None:
    users = tiny.users()
    rows = pool_rows(users)
    assert rows is not None
    parts = [users.load(i)[split] for i in users.pool for split in SPLITS]
    for name, r in rows.items():
        whole = np.concatenate([p[name] for p in parts])
        assert r.n.tolist() == [len(whole)]
        assert np.array_equal(r.values, whole[None])


# --- threads


def test_results_come_in_their_order() -> None:
    def call(i: int) -> int:
        time.sleep(0.001 * (7 - i % 8))
        return i

    with ThreadPoolExecutor(2) as pool:
        assert list(in_order((partial(call, i) for i in range(20)), pool, 3)) == list(range(20))
        assert list(in_order(iter(()), pool, 3)) == []
    assert list(in_order((partial(call, i) for i in range(5)), None, 1)) == list(range(5))


def test_this_thread_computes_too() -> None:
    """With the pool's only thread held up, everything is done here."""
    gate, where = threading.Event(), []
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.wait, 10)
        calls = (lambda: where.append(threading.current_thread().name) for _ in range(6))
        list(in_order(calls, pool, 2))
        gate.set()
    assert where == [threading.current_thread().name] * 6


def fails(at: int, i: int) -> int:
    if i == at:
        raise ZeroDivisionError(f"chunk {i}")
    return i


@pytest.mark.parametrize("at", [0, 1, 5, 9])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_exception_comes_in_its_turn(at: int, workers: int) -> None:
    done: list[int] = []
    calls = (partial(fails, at, i) for i in range(10))
    with ThreadPoolExecutor(3) as pool, pytest.raises(ZeroDivisionError, match=f"chunk {at}"):
        done.extend(in_order(calls, pool, workers))
    assert done == list(range(at))


def test_who_stops_early_leaves_nothing_running() -> None:
    running, most = set(), []

    def call(i: int) -> int:
        running.add(i)
        time.sleep(0.01)
        running.discard(i)
        return i

    with ThreadPoolExecutor(3) as pool:
        results = in_order((partial(call, i) for i in range(50)), pool, 4)
        most.append(next(results))
        results.close()
        assert not running
    assert most == [0]


ASKED = ["fedavg", "fedgkt", "splitnn", "coda", "cascade", "early_exit", "device_only"]


@pytest.mark.parametrize("name", ASKED)
def test_as_many_workers_as_one_likes(name: str) -> None:
    """To the bit: states, answers, private states and the ledger. Replies are lost, too."""
    found = []
    for workers in (1, 3):
        e = tiny.engine(chunk=1, lost=0.2)
        e = LocalEngine(
            Setting(e.setting.population, PHONE, 1, 0.2, e.setting.pool, workers), tiny.compute()
        )
        collaboration = tiny.collaboration(name)
        state = tiny.learn(collaboration, e)
        private = [tiny.private(e, d) for d in range(tiny.DEVICES)]
        found.append((state, tiny.answers(collaboration, state, e), private, e.ledger))
    (one, answers, private, ledger), (other, again, theirs, books) = found
    assert tiny.apart(one, other) == 0
    for a, b in zip([*answers, *private], [*again, *theirs], strict=True):
        assert tiny.apart(a, b) == 0
    assert ledger.bytes == books.bytes
    assert ledger.amounts == books.amounts


class Slow(InProcess):
    """Chunks take their time, and not the same."""

    def reply(self, verb: str, ids: Any, serial: int, down: Message) -> Reply:
        time.sleep(0.002 * (5 - int(ids[0]) % 5))
        return super().reply(verb, ids, serial, down)


def test_private_states_with_threads_and_a_kill(tmp_path: Path) -> None:
    """Killed after two rounds, resumed by more threads: as one thread in one go."""
    wanted = tiny.engine(chunk=2, lost=0.3)
    collaboration = tiny.collaboration("splitnn")
    state = tiny.learn(collaboration, wanted)
    path = tmp_path / "run.sqlite"
    for workers in (3, 2):
        store = Store(path)
        setting = Setting(tiny.population(), PHONE, 2, 0.3, wanted.setting.pool, workers)
        hands = Slow(tiny.compute(), setting.population, store)
        e = LocalEngine(setting, tiny.compute(), store, hands)
        states = islice(run(collaboration, e, 0), 3 if workers == 3 else None)
        last = list(states)[-1]
        private = [tiny.private(e, d) for d in range(tiny.DEVICES)]
        store.close()
    assert tiny.apart(last, state) == 0
    for d, kept in enumerate(private):
        assert tiny.apart(kept, tiny.private(wanted, d)) == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("reduce", ["sum", None])
def test_a_round_holds_a_chunk_for_each_worker_and_one(reduce: Any, workers: int) -> None:
    alive: list[weakref.ref[Any]] = []
    most, lock = 0, threading.Lock()

    def reply(ids: Any) -> Message:
        nonlocal most
        made = np.zeros((len(ids), 1000), np.float32)
        with lock:
            alive.append(weakref.ref(made))
            most = max(most, sum(a() is not None for a in alive))
        time.sleep(0.001 * (int(ids[0]) % 3))
        return Message(features=Tree(sum=made))

    e = LocalEngine(Setting(Numbers(64), PHONE, 1, workers=workers), tiny.compute())
    e.open(Count(), 0)
    e.hands = Still(reply)
    count = 0
    for chunk in e.exchange([Ask("count", np.arange(64), reduce=reduce)]):
        count += chunk.count
    assert count == len(alive) == 64
    assert most <= workers + 1


def test_device_code_that_fails_in_a_thread() -> None:
    e = LocalEngine(Setting(Numbers(6), PHONE, 1, workers=3), tiny.compute())
    with pytest.raises(ZeroDivisionError, match="one over nothing"):
        tiny.learn(Count(trouble="fail"), e)
    e = LocalEngine(Setting(Numbers(6), PHONE, 1, workers=3), tiny.compute())
    with pytest.raises(Undeclared, match=r"features\.secret"):
        tiny.learn(Count(leak="up"), e)
    assert tiny.learn(Count(), e).round == 3, "and it goes on"


class Alone:
    """A compute that cannot do two things at once, and can tell."""

    def __init__(self) -> None:
        self.inside = self.most = 0

    def initial(self, program: str) -> Tree:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.001)
        self.inside -= 1
        return Tree()


def test_a_compute_is_called_by_one_thread_unless_it_says_otherwise() -> None:
    alone = Alone()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(guarded(alone).initial, ["small"] * 20))  # type: ignore[arg-type]
    assert alone.most == 1
    alone.concurrent = True  # type: ignore[attr-defined]
    assert guarded(alone) is alone  # type: ignore[arg-type,comparison-overlap]


def test_a_device_may_be_asked_once() -> None:
    e = LocalEngine(Setting(Numbers(6), PHONE), tiny.compute())
    e.open(Count(), 0)
    with pytest.raises(ProtocolError, match="asked twice"):
        list(e.exchange([Ask("count", np.array([4, 1])), Ask("count", np.array([0, 4]))]))


# --- chunks


def sizes(
    parameters: int, cohort: int, workers: int, chunk: int | None = None, flops: float = 0
) -> list[int]:
    """Devices in each chunk, of a message with so many bytes of parameters; where a reply has
    taken so many operations so far."""
    e = LocalEngine(Setting(Numbers(cohort), PHONE, chunk, workers=workers), tiny.compute())
    e.open(FedAvg(), 0)
    if flops:
        e.ledger.add("learn", replies=7, flops=7 * flops)
    seen = []

    def reply(ids: Any) -> Message:
        seen.append(len(ids))
        return Message()

    e.hands = Still(reply)
    tree = Tree({"w": np.zeros(parameters // 4, np.float32)} if parameters else {})
    list(e.exchange([Ask("train", np.arange(cohort), all=Message(parameters=tree))]))
    return sorted(seen, reverse=True)


@pytest.mark.parametrize(
    ("parameters", "cohort", "workers", "first", "count"),
    [
        (0, 1000, 1, 63, 16),  # nothing to go by: at most 64
        (2440, 100, 1, 100, 1),
        (2440, 100, 2, 50, 2),
        (2440, 100, 3, 34, 3),
        (2440, 10_000, 2, 500, 20),  # never more than 512
        (145_176, 100, 1, 13, 8),  # 2 MiB are 14
        (145_176, 100, 3, 12, 9),  # as many for each worker
        (2**20, 5, 1, 2, 3),
        (2**23, 5, 2, 1, 5),  # never less
    ],
)
def test_devices_in_a_chunk(
    parameters: int, cohort: int, workers: int, first: int, count: int
) -> None:
    found = sizes(parameters, cohort, workers)
    assert (found[0], len(found), sum(found)) == (first, count, cohort)


@pytest.mark.parametrize(
    ("parameters", "flops", "first", "count"),
    [
        (2**20, 1e5, 50, 2),  # 64 MiB at most
        (2**14, 1e5, 100, 1),  # too little to be shared out
        (2**14, 5e6, 50, 2),
        (2**20, 4e6, 50, 2),
        (2**20, 2.5e7, 17, 6),  # 20 devices make some milliseconds
        (2**20, 1e9, 2, 50),  # much: no more than fit the cache
        (2**24, 1e6, 4, 25),  # and no more than 64 MiB
    ],
)
def test_more_devices_in_a_chunk_where_they_have_little_to_compute(
    parameters: int, flops: float, first: int, count: int
) -> None:
    found = sizes(parameters, 100, 2, flops=flops)
    assert (found[0], len(found), sum(found)) == (first, count, 100)


def test_a_chunk_that_was_asked_for() -> None:
    assert sizes(2440, 100, 2, chunk=70) == [70, 30]


# --- a million users


def generated(user: int) -> Any:
    """A made-up user of a logistic task: six rows for each split."""
    key = dice.keys(1, np.array([user]), 0, "rows")
    x = dice.uniform(key, 6 * 4).reshape(6, 4)
    rows = {"x": x, "y": (x @ np.arange(4) > 3).astype(np.int64)}
    return dict.fromkeys(SPLITS, rows)


def logistic() -> nn.Module:
    return nn.Linear(4, 2)


def test_a_million_users_of_whom_few_are_asked() -> None:
    """Neither to set up nor to check the task, nor in a round, are the others touched."""
    count, loads = 10**6, set[int]()

    def load(user: int) -> Any:
        loads.add(user)
        return generated(user)

    who = Users(Numbered(count), load, range(0), range(count))
    task = Task("million", who, logistic, logistic, accuracy)
    notes = validate(task)
    assert {0, count - 1} <= loads
    assert len(loads) == 1000
    assert "Of so many users only 1,000 were looked at, from the first to the last." in notes
    loads.clear()
    compute = TorchCompute(programs(task, 0, load(0)["train"]["x"][:2]))
    population = DeviceUsers(who)
    e = LocalEngine(Setting(population, PHONE, workers=2), compute)
    states = list(run(FedAvg(rounds=3, epochs=1, cohort=20), e))
    assert len(states) == 4
    assert 20 < len(loads) <= 61


def test_a_range_of_users_is_checked_by_its_ends() -> None:
    def task(pool: Any, devices: Any, count: int = 30_000) -> Task:
        who = Users(Numbered(count), generated, pool, devices)
        return Task("many", who, logistic, logistic, accuracy)

    def twice(count: int) -> Any:
        return pytest.raises(DataError, match=f"^task many: {count} users twice")

    with pytest.raises(DataError, match="user number 30000 of 30000 users"):
        validate(task(range(0), range(30_001)))
    for pool, devices, count in (
        (range(15_000), range(14_990, 30_000), 10),
        ([3, 20_000, 20_000], range(10_000, 30_000), 2),
        (range(5), [*range(4, 29_000), 28_999], 2),
        ([1, 2], [2, 3, 3], 2),
    ):
        with twice(count):
            validate(task(pool, devices))


def test_numbered_names() -> None:
    names = Numbered(3, "role")
    assert list(names) == ["role 1", "role 2", "role 3"]
    assert (names[-1], names[1:], len(names)) == ("role 3", ["role 2", "role 3"], 3)
    with pytest.raises(IndexError):
        names[3]
