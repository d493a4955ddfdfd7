"""The plain ways to serve: all on the device, all in the cloud, or cut in the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from kitestring.core import Array, Cloud, Crossing, Decision, Devices, Lane, Message, Rows, Tree


def nothing_sent(devices: Devices) -> Array:
    """[D, L] False: every request is answered here."""
    return np.zeros_like(devices.data["x"].mask())


@dataclass(frozen=True)
class OnDevice:
    """The device answers everything, with what was deployed or with its private weights."""

    private: bool = False
    model: str = "small"
    crosses: ClassVar[Crossing] = {"deploy": Lane(down={"parameters": ("*",)}), "request": Lane()}

    def deploy(self, state: Any) -> Tree:
        return Tree() if self.private else state.weights

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        weights = self.weights(devices, deployed)
        answer = devices.predict(f"{self.model}.answer", weights, devices.data)
        return Decision(answer, nothing_sent(devices), Message())

    def weights(self, devices: Devices, deployed: Tree) -> Tree:
        return devices.private if self.private else deployed

    def answer(self, state: Any, up: Message, cloud: Cloud) -> Message:
        return Message()

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return decision


@dataclass(frozen=True)
class InCloud:
    """Every request goes up raw, and the large model answers."""

    crosses: ClassVar[Crossing] = {
        "deploy": Lane(),
        "request": Lane(up={"data": ("x",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: Any) -> Tree:
        return Tree()

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        x = devices.data["x"]
        return Decision(Tree(answer=x), x.mask(), Message(data=Tree(x=x)))

    def answer(self, state: Any, up: Message, cloud: Cloud) -> Message:
        found = cloud.predict("large.answer", state.large, {"x": up.data["x"]})
        return Message(features=Tree(answer=found["answer"]))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return Decision(Tree(answer=down.features["answer"]), nothing_sent(devices), Message())


@dataclass(frozen=True)
class Split:
    """The device computes the front, its features go up, and the cloud's `server` answers."""

    private: bool = True
    crosses: ClassVar[Crossing] = {
        "deploy": Lane(down={"parameters": ("front.*",)}),
        "request": Lane(up={"features": ("h",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: Any) -> Tree:
        return Tree() if self.private else state.weights.pick("front.")

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        front = devices.private.pick("front.") if self.private else deployed
        h: Rows = devices.predict("front", front, {"x": devices.data["x"]})["h"]
        return Decision(Tree(answer=h), h.mask(), Message(features=Tree(h=h)))

    def answer(self, state: Any, up: Message, cloud: Cloud) -> Message:
        server = state.weights.pick("server.")
        found = cloud.predict("server.answer", server, {"h": up.features["h"]})
        return Message(features=Tree(answer=found["answer"]))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return Decision(Tree(answer=down.features["answer"]), nothing_sent(devices), Message())
