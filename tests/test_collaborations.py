"""Every collaboration, on tiny tasks: the same on every engine, and what each of them promises.

Float error: results that differ only in how they are computed (stacked or one by one, chunk by
chunk) are held to TOLERANCE of a leaf's largest value. Numbers are float32 (24 bits, 6e-8); after
the up to 16 steps here the largest difference measured on x86-64 was 7e-6, in FedAvg's changes
(small differences of weights, so that digits cancel), and 2e-6 in states and private states.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from kitestring.collaborate.baselines.device_only import DeviceOnly
from kitestring.collaborate.baselines.pooled import Pooled
from kitestring.collaborate.data.coda import CoDA
from kitestring.collaborate.features.fedgkt import FedGKT
from kitestring.collaborate.features.splitnn import SplitNN
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.collaborate.request.cascade import Cascade, Escalate
from kitestring.collaborate.services import InCloud, OnDevice
from kitestring.comparison.methods import METHODS
from kitestring.core import Decision, Message, Rows, Tree, run, serve
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.profiles import PROFILES
from kitestring.engines.hands import InProcess, Reply
from kitestring.engines.local import LocalEngine, Setting
from kitestring.engines.pipe import Pipe
from kitestring.engines.strict import OtherProcess
from kitestring.exchange import wire
from kitestring.exchange.store import Store
from kitestring.tasks.population import DeviceUsers, pool_rows
from kitestring.tasks.users import Users

TOLERANCE = 5e-5
CASES = [
    pytest.param(kind, name, id=f"{kind}-{name}")
    for kind in tiny.KINDS
    for name in METHODS
    if tiny.fits(name, kind)
]
NAMES = [name for name in METHODS if tiny.fits(name, "classes")]


def test_every_method_is_tried() -> None:
    assert set(NAMES) == set(METHODS)


class Watched(InProcess):
    """Hands that note each device's messages as they were: (serial, verb, device) -> down, up."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.seen: dict[tuple[int, str, int], tuple[Message, Message]] = {}

    def reply(self, verb: str, ids: Any, serial: int, down: Message) -> Reply:
        found = super().reply(verb, ids, serial, down)
        for d, device in enumerate(ids):
            both = (wire.unpack(wire.pack(down, d)), wire.unpack(wire.pack(found.up, d)))
            self.seen[serial, verb, int(device)] = both
        return found


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipe]:
    with Pipe() as pipe:
        yield pipe


def finish(
    name: str, engine: LocalEngine, optimiser: str = "sgd"
) -> tuple[Any, list[Any], list[Tree]]:
    """The last state, the answers to requests and the devices' private states."""
    collaboration = tiny.collaboration(name, optimiser)
    state = tiny.learn(collaboration, engine)
    engine.purpose = "serve"
    found = tiny.answers(collaboration, state, engine)
    return state, found, [tiny.private(engine, i) for i in range(tiny.DEVICES)]


def assert_same(a: LocalEngine, b: LocalEngine, name: str, optimiser: str = "sgd") -> None:
    """From learning to answers, and the bytes of every leaf."""
    one, other = finish(name, a, optimiser), finish(name, b, optimiser)
    for x, y in zip(one, other, strict=True):
        parts = zip(x, y, strict=True) if isinstance(x, list) else [(x, y)]
        for p, q in parts:
            assert tiny.apart(p, q) < TOLERANCE
    assert a.ledger.bytes == b.ledger.bytes
    if isinstance(a.hands, Watched) and isinstance(b.hands, Watched):
        assert a.hands.seen.keys() == b.hands.seen.keys()
        for where, (_, up) in a.hands.seen.items():
            assert tiny.apart(up, b.hands.seen[where][1]) < TOLERANCE, where


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_in_another_process_as_here(kind: str, name: str, pipe: Pipe) -> None:
    def hands(compute: Any, population: Any, store: Any) -> OtherProcess:
        return OtherProcess("tiny:programs", {"kind": kind}, population, pipe)

    strict = tiny.engine(kind, hands=hands)
    assert_same(strict, tiny.engine(kind), name)
    # What was billed is what was packed: learning, and requests on top of it.
    for purpose, way, label in (
        ("learn", "down", "learn.down"), ("learn", "up", "learn.up"),
        ("serve", "down", "request.down"), ("serve", "up", "request.up"),
    ):  # fmt: skip
        billed = sum(strict.ledger.kinds(purpose, way).values())  # type: ignore[arg-type]
        assert strict.hands.crossed[label] == billed, label  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_device_does_not_see_its_neighbours(kind: str, name: str) -> None:
    a, b = (tiny.engine(kind, chunk, hands=Watched) for chunk in (1, 8))
    assert_same(a, b, name)


@pytest.mark.parametrize("name", NAMES)
def test_under_adam_too(name: str) -> None:
    a, b = (tiny.engine(chunk=chunk, lost=0.2, hands=Watched) for chunk in (1, 8))
    assert_same(a, b, name, "adam")


@pytest.mark.parametrize("name", NAMES)
def test_nor_whose_reply_was_lost(name: str) -> None:
    a, b = (tiny.engine(chunk=chunk, lost=0.3, hands=Watched) for chunk in (1, 8))
    assert_same(a, b, name)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_one_by_one_as_side_by_side(kind: str, name: str) -> None:
    a, b = (tiny.engine(kind, 8, how=how, hands=Watched) for how in ("sequential", "vmap"))
    assert_same(a, b, name)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_padding_may_hold_anything(kind: str, name: str) -> None:
    """NaN, and tokens that do not exist."""
    a, b = (tiny.engine(kind, 8, padded=padded, hands=Watched) for padded in (True, False))
    assert_same(a, b, name)


class Killed(Exception): ...


class Mortal(InProcess):
    """Hands that are cut off at their n-th reply."""

    left = 0

    def reply(self, *what: Any) -> Reply:
        self.left -= 1
        if self.left == 0:
            raise Killed
        return super().reply(*what)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_as_uninterrupted(name: str, after: int, tmp_path: Path) -> None:
    """Killed in the `after`-th chunk of replies, two a round, or after as many states."""
    whole = tiny.engine(lost=0.2)
    wanted = tiny.learn(tiny.collaboration(name), whole)
    path = tmp_path / "run.sqlite"
    store = Store(path)
    cut = tiny.engine(lost=0.2, store=store, hands=Mortal)
    cut.hands.left = after  # type: ignore[attr-defined]
    try:
        for i, _ in enumerate(run(tiny.collaboration(name), cut, 0)):
            if i == after:
                break
    except Killed:
        pass
    store.close()
    resumed = tiny.engine(lost=0.2, store=Store(path))
    found = tiny.learn(tiny.collaboration(name), resumed)
    assert tiny.apart(found, wanted) == 0
    for i in range(tiny.DEVICES):
        assert tiny.apart(tiny.private(resumed, i), tiny.private(whole, i)) == 0
    assert resumed.ledger.bytes == whole.ledger.bytes
    assert resumed.ledger.amounts == pytest.approx(whole.ledger.amounts, rel=1e-12)
    resumed.store.close()


@pytest.mark.parametrize("name", NAMES)
def test_lost_replies_are_survived(name: str) -> None:
    """Serving in the middle too, when some devices have answered and others never have."""
    engine = tiny.engine(chunk=8, lost=0.5)
    collaboration = tiny.collaboration(name)
    for state in run(collaboration, engine, 1):
        found = tiny.answers(collaboration, state, engine)
        assert len(found) == tiny.DEVICES
        assert all(np.isfinite(a).all() for a in found)


@pytest.mark.parametrize(("pool", "split"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", [kind for kind in tiny.KINDS if kind != "recorded"])
def test_tasks_that_have_less(kind: str, pool: bool, split: bool) -> None:
    """Without a pool, or without a small model that can be split, the others run."""
    who = tiny.users(kind, pool)
    compute = TorchCompute(tiny.programs(kind, 0, pool, split))
    names = [name for name in METHODS if tiny.fits(name, kind, pool, split)]
    assert {"device_only", "fedavg", "pooled"} <= set(names)
    for name in names:
        setting = Setting(DeviceUsers(who), PROFILES["phone"], 4, pool=pool_rows(who))
        engine = LocalEngine(setting, compute)
        collaboration = tiny.collaboration(name)
        found = tiny.answers(collaboration, tiny.learn(collaboration, engine), engine)
        assert len(found) == tiny.DEVICES
        assert all(np.isfinite(a).all() for a in found)


# --- what each of them promises


def small_world(rows: list[int]) -> tuple[LocalEngine, Any]:
    """Devices with so many training rows each, of the tiny task with classes."""

    def load(user: int) -> Any:
        columns = tiny._rows("classes", user)
        dice = np.random.default_rng([23, user])
        x = dice.normal(0, 1, (rows[user], tiny.WIDTH)).astype(np.float32)
        own = {"x": x, "y": dice.integers(0, tiny.CLASSES, rows[user])}
        return {**columns, "train": own}

    who = Users([str(i) for i in range(len(rows))], load, [], range(len(rows)))
    population = DeviceUsers(who)
    setting = Setting(population, PROFILES["phone"], 4)
    return LocalEngine(setting, tiny.compute()), population


def step(program: str, weights: Tree, rows: dict[str, Any], lr: float) -> Tree:
    """One plain gradient step on the mean loss of a device's rows."""
    p = tiny.compute().program(program)
    module = p.training
    module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights.items()})
    batch = {k: torch.from_numpy(np.array(v)) for k, v in rows.items()}
    assert p.loss is not None
    loss = p.loss(module(batch), batch).mean()
    names = dict(module.named_parameters())
    slopes = torch.autograd.grad(loss, list(names.values()))
    return Tree({k: weights[k] - lr * g.numpy() for k, g in zip(names, slopes, strict=True)})


def own(population: Any, device: int) -> dict[str, Any]:
    return {k: r.values[0] for k, r in population.rows(np.array([device]), "train").items()}


def test_fedavg_with_one_device_and_one_batch_is_one_step_of_gradient_descent() -> None:
    engine, population = small_world([9])
    state = tiny.learn(FedAvg(rounds=1, epochs=1, batch=9, lr=0.1), engine)
    wanted = step("small", tiny.compute().initial("small"), own(population, 0), 0.1)
    assert tiny.apart(state.weights, wanted) < 1e-6


def test_fedavg_of_devices_of_one_size_is_their_plain_mean() -> None:
    engine, population = small_world([5, 5, 5])
    state = tiny.learn(FedAvg(rounds=1, epochs=2, batch=5, lr=0.1), engine)
    start = tiny.compute().initial("small")
    ends = []
    for d in range(3):
        rows = own(population, d)
        ends.append(step("small", step("small", start, rows, 0.1), rows, 0.1))
    mean = Tree({k: np.mean([e[k] for e in ends], axis=0, dtype=np.float64) for k in start})
    assert (
        tiny.apart(state.weights, Tree({k: v.astype(np.float32) for k, v in mean.items()})) < 1e-6
    )


def test_fedavg_weighs_devices_by_their_rows() -> None:
    engine, population = small_world([2, 6])
    state = tiny.learn(FedAvg(rounds=1, epochs=1, batch=6, lr=0.1), engine)
    start = tiny.compute().initial("small")
    a, b = (step("small", start, own(population, d), 0.1) for d in range(2))
    wanted = Tree({k: ((2 * a[k] + 6 * b[k]) / 8).astype(np.float32) for k in start})
    assert tiny.apart(state.weights, wanted) < 1e-6


def test_one_step_of_splitnn_is_one_of_the_unsplit_model() -> None:
    """Full batches, so that nothing is drawn; autograd through front and server in one."""
    rows, lr = [4, 7, 3], 0.1
    engine, population = small_world(rows)
    state = tiny.learn(SplitNN(steps=1, batch=7, lr=lr), engine)
    start = tiny.compute().initial("joint").pick("front.", "server.")
    joint = tiny.compute().program("joint").module
    loss = tiny.compute().program("server").loss
    assert loss is not None
    server = []
    for d in range(len(rows)):
        joint.load_state_dict({k: torch.from_numpy(v) for k, v in start.items()}, strict=False)
        batch = {k: torch.from_numpy(v) for k, v in own(population, d).items()}
        value = loss({"out": joint(batch)["out"]}, batch).mean()
        names = {k: p for k, p in joint.named_parameters() if k in start}
        slope = dict(zip(names, torch.autograd.grad(value, list(names.values())), strict=True))
        front = {k: start[k] - lr * slope[k].numpy() for k in start.pick("front.")}
        found = Tree({k: v[0] for k, v in tiny.private(engine, d).pick("front.").items()})
        assert tiny.apart(found, Tree(front)) < 1e-6
        server.append({k: g.numpy() for k, g in slope.items() if k.startswith("server.")})
    for k in start.pick("server."):
        wanted = start[k] - lr * np.mean([s[k] for s in server], axis=0)
        assert tiny.apart(state.weights[k], wanted) < 1e-6


def test_fedgkt_sends_no_rows_and_the_model_only_once() -> None:
    engine = tiny.engine(hands=Watched)
    tiny.learn(FedGKT(rounds=3, epochs=1), engine)
    seen = engine.hands.seen  # type: ignore[attr-defined]
    assert {verb for _, verb, _ in seen} == {"start", "again"}
    for (_, verb, _), (down, up) in seen.items():
        assert not up.parameters
        assert set(up.data) == {"y"}
        assert bool(down.parameters) == (verb == "start")


def test_device_only_crosses_nothing() -> None:
    engine = tiny.engine()
    collaboration = DeviceOnly(rounds=2, epochs=1)
    tiny.answers(collaboration, tiny.learn(collaboration, engine), engine)
    assert sum(engine.ledger.bytes.values()) == 0
    assert engine.ledger.amounts["learn", "flops"] > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "pooled"])
def test_nobodys_rows_leave_but_in_pooled(name: str) -> None:
    """No packed reply holds the bytes of a row of x: 32 random bytes do not occur by chance."""
    engine = tiny.engine(hands=Watched)
    tiny.learn(tiny.collaboration(name), engine)
    for (_, _, device), (_, up) in engine.hands.seen.items():  # type: ignore[attr-defined]
        packed = wire.pack(up, 0)
        for x in own(tiny.population(), device)["x"]:
            assert x.tobytes() not in packed


def test_pooled_uploads_are_the_devices_rows() -> None:
    engine = tiny.engine()
    tiny.learn(tiny.collaboration("pooled"), engine)
    for d in range(tiny.DEVICES):
        kept = engine.cloud.table.get([d])
        for name, values in own(tiny.population(), d).items():
            assert np.array_equal(kept[name].values[0], values)


class Noting(TorchCompute):
    """Notes the rows that the small model is trained on."""

    def fit(self, program: str, weights: Tree, rows: Any, *how: Any, **rest: Any) -> Any:
        if program == "small":
            self.rows = [*getattr(self, "rows", []), rows]
        return super().fit(program, weights, rows, *how, **rest)


def test_coda_trains_on_its_own_rows_and_the_pools_and_nothing_else() -> None:
    population = tiny.population()
    pool = pool_rows(tiny.users())
    assert pool is not None
    compute = Noting(tiny.programs())
    engine = LocalEngine(Setting(population, PROFILES["phone"], 8, pool=pool), compute)
    tiny.learn(CoDA(rounds=3, epochs=1, batch=4, lr=0.1, gift=8), engine)

    def known(columns: dict[str, Any], n: int) -> set[bytes]:
        return {columns["x"][i].tobytes() + columns["y"][i].tobytes() for i in range(n)}

    devices = [own(population, d) for d in range(tiny.DEVICES)]
    mine = [known(rows, len(rows["y"])) for rows in devices]
    shared = known({k: r.values[0] for k, r in pool.items()}, int(pool["x"].n[0]))
    foreign = 0
    for rows in compute.rows:
        for d in range(tiny.DEVICES):
            used = known({k: r.values[d] for k, r in rows.items()}, int(rows["x"].n[d]))
            assert used <= mine[d] | shared
            foreign += len(used & shared)
    assert foreign > 0, "no gift was kept: the test shows nothing"


def test_coda_never_gets_worse_where_it_looks() -> None:
    """The loss on the rows that a device chooses by (every fourth, or all) cannot rise."""
    engine = tiny.engine()
    compute, population = tiny.compute(), tiny.population()
    before: list[float] | None = None
    for state in run(CoDA(rounds=4, epochs=1, batch=4, lr=0.3, gift=8), engine, 0):
        if state.round < 0:
            continue
        losses = []
        for d in range(tiny.DEVICES):
            rows = own(population, d)
            held = np.arange(len(rows["y"])) % 4 == 3
            if held.any():
                rows = {k: v[held] for k, v in rows.items()}
            columns = {k: Rows(v[None], np.array([len(v)])) for k, v in rows.items()}
            found = compute.predict("small.loss", tiny.private(engine, d), columns)
            losses.append(float(found["loss"].values.mean()))
        if before is not None:
            assert all(now <= was + 1e-6 for now, was in zip(losses, before, strict=True))
        before = losses
    assert before is not None


# --- cascade


def cascade(share: float, personal: float = 0.0) -> tuple[LocalEngine, Any, Cascade]:
    engine, collaboration = tiny.engine(), Cascade(share, personal)
    return engine, tiny.learn(collaboration, engine), collaboration


def served(service: Any, state: Any, engine: LocalEngine, split: str = "test") -> list[Any]:
    return [
        found["answer"].values[d, : int(found["answer"].n[d])]
        for ids, found in serve(service, state, engine, split)
        for d in range(len(ids))
    ]


@pytest.mark.parametrize("personal", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("share", "other"), [(0.0, OnDevice()), (1.0, InCloud())])
def test_a_cascade_at_its_ends(share: float, other: Any, personal: float) -> None:
    engine, state, collaboration = cascade(share, personal)
    for mine, theirs in zip(
        served(collaboration.serve(), state, engine), served(other, state, engine), strict=True
    ):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("personal", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_a_cascade_sends_what_its_budget_says(share: float, personal: float) -> None:
    """On the rows that it was calibrated on, within one request for each device.

    In all, and not device by device: requests as sure as one another (in one bin of 256) are told
    apart by dice, so that of several in a bin any number may go."""
    engine, state, collaboration = cascade(share, personal)
    sent, total = 0, 0
    for visit in engine.visits(collaboration.serve(), state, "train"):
        decision = visit.decide()
        n = decision.answer["answer"].n
        sent, total = sent + int(decision.send.sum()), total + int(n.sum())
    assert abs(sent - share * total) <= tiny.DEVICES


def test_the_kth_answer_goes_to_the_kth_request_that_was_sent() -> None:
    """Two devices, four and two requests; the first sends its 2nd and 4th, the second its 1st."""
    own = Rows(
        np.array([[[1.0], [2.0], [3.0], [4.0]], [[5.0], [6.0], [0.0], [0.0]]]), np.array([4, 2])
    )
    send = np.array([[False, True, False, True], [True, False, False, False]])
    back = Rows(np.array([[[20.0], [40.0]], [[50.0], [np.nan]]]), np.array([2, 1]))
    merged = Escalate().merge(
        None,  # type: ignore[arg-type]
        Tree(),
        Decision(Tree(answer=own), send, Message()),
        Message(features=Tree(answer=back)),
    )
    assert not merged.send.any()
    answer = merged.answer["answer"]
    assert answer.values[0, :, 0].tolist() == [1, 20, 3, 40]
    assert answer.values[1, :2, 0].tolist() == [50, 6]


def test_pooled_is_asked_for_rows_once() -> None:
    engine = tiny.engine(hands=Watched)
    tiny.learn(Pooled(rounds=2, epochs=1), engine)
    assert len(engine.hands.seen) == tiny.DEVICES  # type: ignore[attr-defined]
