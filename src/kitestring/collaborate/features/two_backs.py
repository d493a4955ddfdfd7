"""What FedGKT and Learn back share: device and cloud each train a back on a front's features, and
teach each other by their logits for the devices' rows.

He, Annavaram, Avestimehr: "Group knowledge transfer: federated learning of large CNNs at the
edge", NeurIPS 2020, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

import numpy as np

from kitestring.collaborate.about import Budget
from kitestring.core import Array, Ask, Chunk, Cloud, Devices, Message, Recipe, Tree

_BLOCK = 16  # devices whose rows the cloud trains on at a time, whatever the engine's chunk


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)  # server.*, and the devices' start front.*, back.*


@dataclass(frozen=True)
class TwoBacks:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    server_epochs: int = 1
    server_batch: int = 32
    server_lr: float = 1e-3
    server_optimiser: str = "adam"

    state_type: ClassVar[type[State]] = State

    def install(self, devices: Devices) -> Tree:
        return devices.initial("small")

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.pretrained("joint"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        known = np.array(cloud.table.ids(), np.int64)
        new = np.setdiff1d(cloud.sample(None), known)
        model = Message(parameters=state.weights.pick("front.", "back."))

        def each(ids: Array) -> Message:
            return Message(features=Tree(logits=cloud.table.get(ids)["logits"]))

        return [Ask("start", new, all=model), Ask("again", known, each=each)]

    @property
    def server(self) -> Recipe:
        """How the cloud trains its back."""
        return Recipe(self.server_lr, self.server_epochs, self.server_batch, self.server_optimiser)


T = TypeVar("T", bound=TwoBacks)


def trials(kind: type[T], lrs: Sequence[float], budget: Budget) -> list[T]:
    """One for each rate on devices; the cloud's is the middle one of those it may try."""
    server_lr = sorted(budget.cloud_lrs)[len(budget.cloud_lrs) // 2]
    return [
        kind(
            budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser,
            server_batch=budget.cloud_batch, server_lr=server_lr,
            server_optimiser=budget.cloud_optimiser,
        )
        for lr in lrs
    ]  # fmt: skip


def learned(verb: str, message: Message, devices: Devices, how: Recipe) -> tuple[Tree, Tree]:
    """A device's weights, trained on its labels and, but for the first time, on the cloud's logits;
    and what they make of its rows."""
    if verb == "start":
        fit = devices.fit("small", message.parameters, devices.data, how)
    else:
        rows = {**devices.data, "teacher": message.features["logits"]}
        fit = devices.fit("small.distill", devices.private, rows, how)
    return fit.parameters, devices.predict("small", fit.parameters, {"x": devices.data["x"]})


def told(chunks: Iterator[Chunk], kept: Callable[[Chunk], Tree], cloud: Cloud) -> list[list[int]]:
    """The devices that replied, in blocks. What is `kept` of their replies goes into the table."""
    ids: list[int] = []
    for chunk in chunks:
        assert chunk.ids is not None
        ids.extend(int(i) for i in chunk.ids)
        cloud.table.put(chunk.ids, kept(chunk))
    ids.sort()
    return [ids[at : at + _BLOCK] for at in range(0, len(ids), _BLOCK)]


def taught(
    program: str, server: Tree, blocks: list[list[int]], how: Recipe, cloud: Cloud, *, keep: bool
) -> Tree:
    """The cloud's back, trained on one block after the other. Then its logits for each row go into
    the table, beside what it was trained on if that is to `keep`."""
    for block in blocks:
        rows = cloud.table.get(block).pick("h", "y", "teacher")
        server = cloud.fit(program, server, rows, how, tag=f"block {block[0]}").parameters
    for block in blocks:
        kept = cloud.table.get(block)
        logits = cloud.predict("server", server, {"h": kept["h"]})["out"]
        cloud.table.put(block, Tree({**(kept if keep else {}), "logits": logits}))
    return server
