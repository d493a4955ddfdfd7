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

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.features.two_backs import State, TwoBacks, learned, taught, told, trials
from kitestring.collaborate.services import OnDevice, Split
from kitestring.collaborate.steps import recipe
from kitestring.core import Chunk, Cloud, Crossing, Devices, Lane, Message, Rows, Tree


@dataclass(frozen=True)
class LearnBack(TwoBacks):
    server_epochs: int = 3

    crosses: ClassVar[Crossing] = {
        "start": Lane(
            down={"parameters": ("front.*", "back.*")},
            up={"features": ("h", "logits", "counted")},
        ),
        "again": Lane(down={"features": ("logits",)}, up={"features": ("logits",)}),
    }
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
        return trials(LearnBack, budget.last_layer_lrs, budget)

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        how = replace(recipe(self), train=("back.",))
        weights, found = learned(verb, message, devices, how)
        up = Tree(logits=found["out"])
        if verb == "start":
            up = Tree({**up, "h": found["h"], "counted": counted(devices.data["y"])})
        return Message(features=up), weights

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        def kept(chunk: Chunk) -> Tree:
            f = chunk.message.features
            rows = {"h": f["h"], "y": f["counted"]} if "h" in f else cloud.table.get(chunk.ids)
            return Tree({**rows, "teacher": f["logits"]})

        blocks = told(chunks, kept, cloud)
        server = state.weights.pick("server.")
        if cloud.data is not None:
            front = state.weights.pick("front.")
            h = cloud.predict("front", front, {"x": cloud.data["x"]})["h"]
            own = {"h": h, "y": cloud.data["y"]}
            server = cloud.fit("server", server, own, self.server, tag="pool").parameters
        server = taught("server.taught", server, blocks, self.server, cloud, keep=True)
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
