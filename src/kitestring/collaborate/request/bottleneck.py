"""Bottleneck: split inference whose features are made few, and few bits each, by learned layers.

Shao, Zhang: "BottleNet++: an end-to-end approach for feature compression in device-edge
co-inference systems", ICC 2020, arXiv 1910.14315, section III: an encoder on the device ends in a
sigmoid, what it gives is quantised, a decoder in the cloud goes on from it, and all of it is
trained end to end. Their noisy channel and the entropy coder are left out. Rounding passes
gradients as they are (straight through: Bengio et al., arXiv 1308.3432, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines.pool_trained import Beforehand, State
from kitestring.collaborate.services import nothing_sent
from kitestring.core import (
    Cloud,
    Crossing,
    Decision,
    Devices,
    Lane,
    Message,
    Recipe,
    Rows,
    Tree,
)

BITS = 4
"""Of a feature as it crosses; two to a byte. The program `bottleneck` is trained with as many."""
_MOST = 2**BITS - 1


@dataclass(frozen=True)
class Bottleneck(Beforehand):
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    about: ClassVar[About] = About(
        "Bottleneck",
        "request",
        "Shao & Zhang 2020",
        "A cut model whose features are squeezed by learned layers and cross in 4 bits each.",
        needs=("models", "pool", "split"),
    )

    @staticmethod
    def trials(budget: Budget) -> list[Bottleneck]:
        return [Bottleneck(*how) for how in budget.in_cloud]

    def init(self, cloud: Cloud, seed: int) -> State:
        # With encoder.* and decoder.*, which nothing has trained yet.
        start = cloud.pretrained("joint").pick("front.", "server.")
        return State(0, Tree({**cloud.initial("bottleneck"), **start}))

    def trained(self, state: State, cloud: Cloud, pool: Mapping[str, Rows], how: Recipe) -> State:
        fit = cloud.fit("bottleneck", state.weights, pool, how)
        return replace(state, weights=fit.parameters)

    def serve(self) -> Squeezed:
        return Squeezed()


def packed(code: Rows) -> Rows:
    """Features in [0, 1], [D, L, ..., k] with k even -> bytes [D, L, ..., k / 2]."""
    levels = np.floor(code.values * np.float32(_MOST) + np.float32(0.5)).astype(np.uint8)
    return Rows(levels[..., 0::2] * np.uint8(_MOST + 1) + levels[..., 1::2], code.n)


def unpacked(sent: Rows) -> Rows:
    """Features in [0, 1] from what `packed` made of them."""
    levels = np.stack([sent.values >> BITS, sent.values & _MOST], axis=-1)
    shape = (*sent.values.shape[:-1], 2 * sent.values.shape[-1])
    return Rows(levels.reshape(shape).astype(np.float32) / np.float32(_MOST), sent.n)


@dataclass(frozen=True)
class Squeezed:
    """The device computes front and encoder, a few bits go up, and the cloud answers."""

    crosses: ClassVar[Crossing] = {
        "deploy": Lane(down={"parameters": ("front.*", "encoder.*")}),
        "request": Lane(up={"features": ("code",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: State) -> Tree:
        return state.weights.pick("front.", "encoder.")

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        code: Rows = devices.predict("encoder", deployed, {"x": devices.data["x"]})["code"]
        sent = packed(code)
        return Decision(Tree(answer=sent), sent.mask(), Message(features=Tree(code=sent)))

    def answer(self, state: State, up: Message, cloud: Cloud) -> Message:
        far = state.weights.pick("decoder.", "server.")
        found = cloud.predict("decoder.answer", far, {"code": unpacked(up.features["code"])})
        return Message(features=Tree(answer=found["answer"]))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return Decision(Tree(answer=down.features["answer"]), nothing_sent(devices), Message())
