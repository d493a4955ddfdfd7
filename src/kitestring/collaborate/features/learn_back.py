"""Learn back: the large model teaches the devices' small ones, and learns from what they have
become, from features and soft answers alone.

Niu et al., arXiv 2504.15300, call it collaboration from large to small and from small to large;
the exchange is that of He, Annavaram, Avestimehr: "Group knowledge transfer", NeurIPS 2020
(algorithm 1), without labels. The device keeps the front that was sent, trains the back on its own
labels and on the cloud's answers, and sends features once and its own soft answers each round. The
cloud's large back trains on the pool's labels and on those answers, and its own go down again.

Features are not the rows, but rows can be guessed from them: they are no privacy by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import OnDevice, Split
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
    Rows,
    Tree,
)

_BLOCK = 16  # devices whose rows the cloud trains on at a time, whatever the engine's chunk


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)  # front.*, back.* and server.*


@dataclass(frozen=True)
class LearnBack:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    server_epochs: int = 3
    server_batch: int = 32
    server_lr: float = 1e-3
    server_optimiser: str = "adam"

    crosses: ClassVar[Crossing] = {
        "start": Lane(
            down={"parameters": ("front.*", "back.*")},
            up={"features": ("h", "logits", "counted")},
        ),
        "again": Lane(down={"features": ("logits",)}, up={"features": ("logits",)}),
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Learn back",
        "features",
        "He et al. 2020",
        "The large model teaches the small ones and learns from their features and soft answers.",
        needs=("models", "split"),
        large="joint",
    )

    @staticmethod
    def trials(budget: Budget) -> list[LearnBack]:
        server_lr = sorted(budget.cloud_lrs)[len(budget.cloud_lrs) // 2]
        server: dict[str, Any] = {
            "server_batch": budget.cloud_batch,
            "server_lr": server_lr,
            "server_optimiser": budget.cloud_optimiser,
        }
        return [
            LearnBack(budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser, **server)
            for lr in budget.last_layer_lrs
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
            return Message(features=Tree(logits=cloud.table.get(ids)["logits"]))

        return [Ask("start", new, all=model), Ask("again", known, each=each)]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        how = replace(recipe(self), train=("back.",))
        if verb == "start":
            fit = devices.fit("small", message.parameters, devices.data, how)
        else:
            rows = {**devices.data, "teacher": message.features["logits"]}
            fit = devices.fit("small.distill", devices.private, rows, how)
        found = devices.predict("small", fit.parameters, {"x": devices.data["x"]})
        up = Tree(logits=found["out"])
        if verb == "start":
            up = Tree({**up, "h": found["h"], "counted": counted(devices.data["y"])})
        return Message(features=up), fit.parameters

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        told: list[int] = []
        for chunk in chunks:
            assert chunk.ids is not None
            told.extend(int(i) for i in chunk.ids)
            f = chunk.message.features
            kept = {"h": f["h"], "y": f["counted"]} if "h" in f else cloud.table.get(chunk.ids)
            cloud.table.put(chunk.ids, Tree({**kept, "teacher": f["logits"]}))
        told.sort()
        blocks = [told[at : at + _BLOCK] for at in range(0, len(told), _BLOCK)]
        server = state.weights.pick("server.")
        how = Recipe(self.server_lr, self.server_epochs, self.server_batch, self.server_optimiser)
        if cloud.data is not None:
            front = state.weights.pick("front.")
            h = cloud.predict("front", front, {"x": cloud.data["x"]})["h"]
            own = {"h": h, "y": cloud.data["y"]}
            server = cloud.fit("server", server, own, how, tag="pool").parameters
        for block in blocks:
            rows = {k: cloud.table.get(block)[k] for k in ("h", "y", "teacher")}
            server = cloud.fit(
                "server.taught", server, rows, how, tag=f"block {block[0]}"
            ).parameters
        for block in blocks:
            kept = cloud.table.get(block)
            logits = cloud.predict("server", server, {"h": kept["h"]})["out"]
            cloud.table.put(block, Tree({**kept, "logits": logits}))
        return State(state.round + 1, Tree({**state.weights, **server}))

    def serve(self) -> OnDevice:
        return OnDevice(private=True)

    def large(self) -> Split:
        """The device's front and the cloud's large back, as it has become."""
        return Split(private=False)


def counted(y: Rows) -> Rows:
    """0 where there is a truth, -1 where there is none (padding): nothing else of the labels."""
    if np.dtype(y.row[1]).kind == "f":
        return Rows(np.zeros_like(y.values), y.n)
    return Rows(np.minimum(y.values, 0), y.n)
