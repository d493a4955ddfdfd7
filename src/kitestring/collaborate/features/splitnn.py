"""SplitNN: the device computes a front, the cloud the rest; features and labels go up, gradients
down.

Gupta & Raskar: "Distributed learning of deep neural network over multiple agents", J. Network and
Computer Applications 2018; Vepakomma et al., arXiv 1812.00564. All devices step at once and keep
their fronts to themselves, while the cloud's half is shared (Thapa et al., "SplitFed", AAAI 2022,
without averaging fronts).

One exchange is one minibatch: the gradient of the last one comes down, the features of the next
go up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import Split
from kitestring.collaborate.steps import moments, step
from kitestring.core import Array, Ask, Chunk, Cloud, Crossing, Devices, Lane, Message, Rows, Tree


@dataclass(frozen=True)
class State:
    step: int
    weights: Tree = field(default_factory=Tree)  # server.*, and the fronts' start front.*
    memory: Tree = field(default_factory=Tree)  # the server's optimiser


@dataclass(frozen=True)
class SplitNN:
    steps: int = 100
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"

    crosses: ClassVar[Crossing] = {
        "start": Lane(down={"parameters": ("front.*",)}, up={"features": ("h",), "data": ("y",)}),
        "turn": Lane(down={"features": ("gradient",)}, up={"features": ("h",), "data": ("y",)}),
        "end": Lane(down={"features": ("gradient",)}),
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "SplitNN",
        "features",
        "Gupta & Raskar 2018",
        "Device and cloud train one model cut in two; features and labels go up, gradients down.",
        needs=("models", "split"),
        large="joint",
    )

    @staticmethod
    def trials(budget: Budget) -> list[SplitNN]:
        return [SplitNN(budget.steps, budget.batch, lr, budget.optimiser) for lr in budget.lrs]

    def install(self, devices: Devices) -> Tree:
        none = np.zeros((len(devices.data["x"].n), self.batch), np.int64)
        return self._private(devices.initial("small").pick("front."), none, none[:, 0])

    def _private(self, front: Tree, at: Array, size: Array) -> Tree:
        """A front that has not stepped yet, and the minibatch whose gradient it waits for."""
        memory = moments(front, self.optimiser).inside("memory.")
        count = np.zeros(len(size), np.int64)
        return Tree({**front, **memory, "count": count, "batch": at, "size": size})

    def init(self, cloud: Cloud, seed: int) -> State:
        weights = cloud.pretrained("joint").pick("front.", "server.")
        return State(0, weights, moments(weights.pick("server."), self.optimiser))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.step > self.steps:
            return None
        waiting = np.array(cloud.table.ids(), np.int64)  # for the gradient of their last batch
        new = np.setdiff1d(cloud.sample(None), waiting)
        front = Message(parameters=state.weights.pick("front."))

        def each(ids: Array) -> Message:
            return Message(features=cloud.table.get(ids))

        if state.step == self.steps:
            return [Ask("end", waiting, each=each)]
        return [Ask("turn", waiting, each=each), Ask("start", new, all=front)]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        if verb == "start":
            at, size = draw(devices, self.batch)
            private = self._private(message.parameters, at, size)
        else:
            private = self._stepped(message.features["gradient"], devices)
            if verb == "end":
                return Message(), private
            at, size = draw(devices, self.batch)
            private = Tree({**private, "batch": at, "size": size})
        x, y = (devices.data[k].take(at, size) for k in ("x", "y"))
        h = devices.predict("front", private.pick("front."), {"x": x})["h"]
        return Message(features=Tree(h=h), data=Tree(y=y)), private

    def _stepped(self, gradient: Rows, devices: Devices) -> Tree:
        """The private state after the step that the last minibatch's gradient gives."""
        old = devices.private
        front, count = old.pick("front."), old["count"] + 1
        last = {"x": devices.data["x"].take(old["batch"], old["size"])}
        _, slope, _ = devices.backward("front", front, last, cotangent={"h": gradient})
        front, memory = step(
            front, slope, old.below("memory."), count, lr=self.lr, optimiser=self.optimiser
        )
        return Tree({**old, **front, **memory.inside("memory."), "count": count})

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        server, total, count = state.weights.pick("server."), None, 0
        for chunk in chunks:
            m = chunk.message
            if "h" not in m.features:
                continue
            h, y = m.features["h"], m.data["y"]
            share = h.mask() / np.maximum(1, h.n)[:, None]
            _, slope, back = cloud.backward(
                "server", server, {"h": h, "y": y}, row_weights=share.astype(np.float32)
            )
            cloud.table.put(chunk.ids, Tree(gradient=back["h"]))
            total = slope if total is None else total + slope
            count += chunk.count
        if total is None:
            return State(state.step + 1, state.weights, state.memory)
        slope, now = total * np.float32(1 / count), np.array(state.step + 1)
        server, memory = step(
            server, slope, state.memory, now, lr=self.lr, optimiser=self.optimiser
        )
        return State(state.step + 1, Tree({**state.weights, **server}), memory)

    def serve(self) -> Split:
        return Split()

    def large(self) -> Split:
        return Split()


def draw(devices: Devices, batch: int) -> tuple[Array, Array]:
    """A minibatch without repetition: row numbers [D, batch], and how many of them count [D]."""
    rows = devices.data["x"]
    drawn = devices.uniform("batch", rows.values.shape[1])
    order = np.argsort(np.where(rows.mask(), drawn, 2), axis=1, stable=True)
    size = np.minimum(rows.n, batch)
    counts = np.arange(batch) < size[:, None]
    chosen = np.take_along_axis(order, np.where(counts, np.arange(batch), 0), axis=1)
    return np.where(counts, chosen, 0), size
