"""FedGKT: a small model on the device and a large one on its features teach each other by their
logits.

He, Annavaram, Avestimehr: "Group knowledge transfer: federated learning of large CNNs at the
edge", NeurIPS 2020, algorithm 1. The device trains front and small back on labels and the
server's logits, then sends features, logits and labels; the server trains its large back on those
and returns its logits for each row. Requests take the same way: the device computes the front,
the server answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.features.two_backs import State, TwoBacks, learned, taught, told, trials
from kitestring.collaborate.services import Split
from kitestring.collaborate.steps import recipe
from kitestring.core import Chunk, Cloud, Crossing, Devices, Lane, Message, Tree


@dataclass(frozen=True)
class FedGKT(TwoBacks):
    crosses: ClassVar[Crossing] = {
        "start": Lane(
            down={"parameters": ("front.*", "back.*")},
            up={"features": ("h", "logits"), "data": ("y",)},
        ),
        "again": Lane(
            down={"features": ("logits",)}, up={"features": ("h", "logits"), "data": ("y",)}
        ),
    }
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
        return trials(FedGKT, budget.lrs, budget)

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        weights, found = learned(verb, message, devices, recipe(self))
        up = Tree(h=found["h"], logits=found["out"])
        return Message(features=up, data=Tree(y=devices.data["y"])), weights

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        def kept(chunk: Chunk) -> Tree:
            f = chunk.message.features
            return Tree(h=f["h"], teacher=f["logits"], y=chunk.message.data["y"])

        blocks = told(chunks, kept, cloud)
        server = state.weights.pick("server.")
        server = taught("server.distill", server, blocks, self.server, cloud, keep=False)
        return State(state.round + 1, Tree({**state.weights, **server}))

    def serve(self) -> Split:
        return Split()

    def large(self) -> Split:
        return Split()
