"""What crosses between a device and the cloud, and the two conversations in which it does.

A *round* (the cloud asks; learning):    init -> (ask -> reply -> tell)*
A *request* (the device asks; serving):  decide -> (answer -> merge)*

Everything a device does is written for D devices at once: arrays have a leading axis [D, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

from kitestring.arrays import Array as Array
from kitestring.arrays import Rows as Rows
from kitestring.arrays import Touched as Touched
from kitestring.arrays import Tree as Tree

Kind: TypeAlias = Literal["data", "features", "parameters", "scalars"]
KINDS: tuple[Kind, ...] = ("data", "features", "parameters", "scalars")
S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)


@dataclass(frozen=True)
class Message:
    """Everything between a device and the cloud; each leaf is an array [D, ...] or `Rows`."""

    data: Tree = field(default_factory=Tree)
    features: Tree = field(default_factory=Tree)
    parameters: Tree = field(default_factory=Tree)
    scalars: Tree = field(default_factory=Tree)

    def leaves(self) -> Iterator[tuple[Kind, str, Any]]:
        for kind in KINDS:
            for name, leaf in getattr(self, kind).items():
                yield kind, name, leaf


@dataclass(frozen=True)
class Lane:
    """What may cross for one verb: compartment -> leaf names. Only parameters may say "*"."""

    down: Mapping[Kind, Sequence[str]] = field(default_factory=dict)
    up: Mapping[Kind, Sequence[str]] = field(default_factory=dict)

    def allows(self, way: Literal["down", "up"], kind: Kind, name: str) -> bool:
        names = getattr(self, way).get(kind, ())
        if kind == "parameters":
            return any(fnmatchcase(name, pattern) for pattern in names)
        return name in names


Crossing: TypeAlias = Mapping[str, Lane]


@dataclass(frozen=True)
class Ask:
    """One verb to many devices, which all answer in the same shapes.

    `all` has no device axis and goes to each; `each(ids)` has one and is called chunk by chunk.
    With reduce="sum" only the sum over devices comes back. Fewer than `at_least` replies in the
    whole exchange make the round void: `tell` is not called."""

    verb: str
    to: Array
    all: Message = field(default_factory=Message)
    each: Callable[[Array], Message] | None = None
    key: str = ""
    reduce: Literal["sum"] | None = None
    at_least: int = 1


@dataclass(frozen=True)
class Chunk:
    """Replies to one ask, stacked; `ids` is None and the leading axis 1 where they were summed."""

    key: str
    ids: Array | None
    message: Message
    count: int


@dataclass(frozen=True)
class Recipe:
    """How `fit` trains. The gradient is that of the mean loss over a minibatch, plus
    `mu` (w - centre) and `linear` where those are given; `clip` bounds its norm over all trained
    weights; then `decay` w is added and the optimiser steps (torch.optim's SGD and Adam)."""

    lr: float
    epochs: int = 1
    batch: int = 10
    optimiser: str = "sgd"  # or "adam"
    momentum: float = 0.0  # of sgd
    decay: float = 0.0
    clip: float | None = None
    mu: float = 0.0
    train: tuple[str, ...] = ("",)  # prefixes of the weights that are trained, others stay
    shuffle: bool = True  # every epoch anew; else the rows in their order


@dataclass(frozen=True)
class Fit:
    parameters: Tree
    loss: Array  # [D] mean training loss
    steps: Array  # [D] steps done


class Compute(Protocol):
    """The three primitives, on devices and in the cloud; D is whatever is stacked."""

    def initial(self, program: str) -> Tree:
        """The weights that the program is delivered with, for each of D devices."""

    def predict(self, program: str, weights: Tree, inputs: Mapping[str, Rows]) -> Tree: ...
    def fit(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        recipe: Recipe,
        *,
        centre: Tree | None = None,
        linear: Tree | None = None,
        tag: str = "fit",
    ) -> Fit:
        """`centre` is where `recipe.mu` pulls to, the start if None; `linear` is added to the
        gradient. Both name some or all of the trained weights, and concern no others."""

    def backward(
        self,
        program: str,
        weights: Tree,
        rows: Mapping[str, Rows],
        *,
        cotangent: Mapping[str, Rows] | None = None,
        row_weights: Array | None = None,
    ) -> tuple[Array, Tree, Tree]:
        """Loss [D], gradients of the weights, and gradients of the float columns (`Rows`)."""


class Devices(Compute, Protocol):
    """All that the device half can see: its own rows, its own private state, its own dice."""

    data: Mapping[str, Rows]
    private: Tree

    def uniform(self, tag: str, n: int) -> Array:
        """[D, n] numbers in [0, 1), keyed by seed, device, exchange and tag."""


class Cloud(Compute, Protocol):
    """All that the cloud half can see: who is there, its own pool, what it keeps per device.

    Its weights have no device axis: one model, whoever's rows, and gradients summed over them."""

    fleet: int  # how many devices there are, 0 .. fleet - 1
    serial: int  # of the exchange
    data: Mapping[str, Rows] | None  # the pool users' rows, [1, L, ...]
    table: Any  # device id -> Tree, on disk

    def sample(self, k: int | None) -> Array: ...
    def uniform(self, tag: str, n: int) -> Array: ...
    def pretrained(self, program: str) -> Tree:
        """What the cloud trained on its pool beforehand; the initial weights without a pool."""


@dataclass(frozen=True)
class Decision:
    """What the device would answer, which requests `send` [D, L] go up, and what goes with them.

    In `up`, the rows are those sent, in order."""

    answer: Tree
    send: Array
    up: Message


class Service(Protocol[S_contra]):
    """A request: device decides, cloud answers, device merges, until nothing is sent."""

    crosses: Crossing  # verbs: deploy (down), request (up and down)

    def deploy(self, state: S_contra) -> Tree: ...
    def decide(self, devices: Devices, deployed: Tree) -> Decision: ...
    def answer(self, state: S_contra, up: Message, cloud: Cloud) -> Message: ...
    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision: ...


class Collaboration(Protocol[S]):
    """A frozen dataclass of plain settings. All state is S, or private on devices, or
    `cloud.table`."""

    crosses: Crossing
    state_type: type[S]  # a flat dataclass of trees and plain values

    def install(self, devices: Devices) -> Tree:
        """A device's private state on day one."""

    def init(self, cloud: Cloud, seed: int) -> S: ...
    def ask(self, state: S, cloud: Cloud) -> Sequence[Ask] | None:
        """None ends. An Ask to nobody is a step of the cloud alone."""

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        """What goes up, and the new private state."""

    def tell(self, state: S, chunks: Iterator[Chunk], cloud: Cloud) -> S: ...
    def serve(self) -> Service[S]: ...


class Void(Exception):
    """Too few replies: the round did not happen, and its state is dropped."""


class Visit(Protocol):
    """Some devices with held-out requests, as an engine sees them through."""

    ids: Array

    def decide(self) -> Decision: ...
    def call(self, decision: Decision) -> Message: ...
    def merge(self, decision: Decision, down: Message) -> Decision: ...


class Engine(Protocol):
    """Where replies are computed and messages are carried, checked and billed."""

    cloud: Any  # a `Cloud`

    def open(self, collaboration: Collaboration[S], seed: int) -> S | None:
        """Make ready; the state to go on from, where a run was interrupted."""

    def exchange(self, asks: Sequence[Ask]) -> Iterator[Chunk]: ...
    def commit(self, state: S) -> None: ...
    def void(self) -> None: ...
    def visits(self, service: Service[S], state: S, split: str) -> Iterator[Visit]: ...


def run(collaboration: Collaboration[S], engine: Engine, seed: int = 0) -> Iterator[S]:
    """Every round there is: iterate it to evaluate, log or stop. The first state is the start."""
    state = engine.open(collaboration, seed)
    if state is None:
        state = collaboration.init(engine.cloud, seed)
        engine.commit(state)
    yield state
    while (asks := collaboration.ask(state, engine.cloud)) is not None:
        try:
            state = collaboration.tell(state, engine.exchange(asks), engine.cloud)
        except Void:
            engine.void()
            continue
        engine.commit(state)
        yield state


def serve(
    service: Service[S], state: S, engine: Engine, split: str = "test"
) -> Iterator[tuple[Array, Tree]]:
    """Every request there is, labels hidden: (device ids, their answers as `Rows`)."""
    for visit in engine.visits(service, state, split):
        decision = visit.decide()
        while decision.send.any():
            decision = visit.merge(decision, visit.call(decision))
        yield visit.ids, decision.answer
