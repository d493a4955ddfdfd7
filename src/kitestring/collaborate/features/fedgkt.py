"""FedGKT: a small model on the device and a large one on its features teach each other by their
logits.

He, Annavaram, Avestimehr: "Group knowledge transfer: federated learning of large CNNs at the
edge", NeurIPS 2020, algorithm 1. The device trains front and small back on labels and the
server's logits, then sends features, logits and labels; the server trains its large back on those
and returns its logits for each row. Requests take the same way: the device computes the front,
the server answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import Split
from kitestring.collaborate.steps import recipe
from kitestring.core import (
    Array,
    Ask,
    Chunk,
    Cloud,
    Crossing,
    Devices,
    Lane,
    Message,
    Recipe,
    Tree,
)

_BLOCK = 16  # devices whose rows the server trains on at a time, whatever the engine's chunk


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)  # server.*, and the devices' start front.*, back.*


@dataclass(frozen=True)
class FedGKT:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    server_epochs: int = 1
    server_batch: int = 32
    server_lr: float = 1e-3
    server_optimiser: str = "adam"

    crosses: ClassVar[Crossing] = {
        "start": Lane(
            down={"parameters": ("front.*", "back.*")},
            up={"features": ("h", "logits"), "data": ("y",)},
        ),
        "again": Lane(
            down={"features": ("logits",)}, up={"features": ("h", "logits"), "data": ("y",)}
        ),
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "FedGKT",
        "features",
        "He et al. 2020",
        "A small model on the device and a large one on its features teach each other by logits.",
        needs=("models", "split"),
        large="joint",
    )

    @staticmethod
    def trials(budget: Budget) -> list[FedGKT]:
        server_lr = sorted(budget.cloud_lrs)[len(budget.cloud_lrs) // 2]
        server: dict[str, Any] = {
            "server_batch": budget.cloud_batch,
            "server_lr": server_lr,
            "server_optimiser": budget.cloud_optimiser,
        }
        return [
            FedGKT(budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser, **server)
            for lr in budget.lrs
        ]

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
            return Message(features=cloud.table.get(ids))

        return [Ask("start", new, all=model), Ask("again", known, each=each)]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        if verb == "start":
            fit = devices.fit("small", message.parameters, devices.data, recipe(self))
        else:
            rows = {**devices.data, "teacher": message.features["logits"]}
            fit = devices.fit("small.distill", devices.private, rows, recipe(self))
        found = devices.predict("small", fit.parameters, {"x": devices.data["x"]})
        up = Tree(h=found["h"], logits=found["out"])
        return Message(features=up, data=Tree(y=devices.data["y"])), fit.parameters

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        told: list[int] = []
        for chunk in chunks:
            assert chunk.ids is not None
            told.extend(int(i) for i in chunk.ids)
            f = chunk.message.features
            cloud.table.put(
                chunk.ids, Tree(h=f["h"], teacher=f["logits"], y=chunk.message.data["y"])
            )
        told.sort()
        blocks = [told[at : at + _BLOCK] for at in range(0, len(told), _BLOCK)]
        server = state.weights.pick("server.")
        how = Recipe(self.server_lr, self.server_epochs, self.server_batch, self.server_optimiser)
        for block in blocks:
            server = cloud.fit(
                "server.distill", server, cloud.table.get(block), how, tag=f"block {block[0]}"
            ).parameters
        for block in blocks:
            logits = cloud.predict("server", server, {"h": cloud.table.get(block)["h"]})["out"]
            cloud.table.put(block, Tree(logits=logits))
        return State(state.round + 1, Tree({**state.weights, **server}))

    def serve(self) -> Split:
        return Split()

    def large(self) -> Split:
        return Split()
