"""Distilled: the large model teaches the small one on the cloud's pool, then the small one is sent
down.

Hinton, Vinyals, Dean: "Distilling the knowledge in a neural network", arXiv 1503.02531, section 2:
the small model learns from labels and from the large model's softened answers. With `bits=8` it is
sent and kept in 8 bits: whole numbers and one scale for each output row of a weight (Jacob et al.,
"Quantization and training of neural networks", CVPR 2018, section 2.1, symmetric). The device
computes in float32 either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines.pool_trained import State, cosine
from kitestring.collaborate.services import OnDevice, nothing_sent
from kitestring.collaborate.steps import recipe
from kitestring.core import Ask, Chunk, Cloud, Crossing, Decision, Devices, Message, Tree
from kitestring.errors import SettingError

_SCALE = "scale."


@dataclass(frozen=True)
class Distilled:
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    crosses: ClassVar[Crossing] = {}
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Distilled",
        "baseline",
        "Hinton et al. 2015",
        "The large model teaches a small one on the cloud's pool, which is then sent down once.",
        needs=("models", "pool"),
    )

    @staticmethod
    def trials(budget: Budget) -> list[Distilled]:
        rounds = min(10, budget.cloud_epochs)
        epochs, batch = budget.cloud_epochs // rounds, budget.cloud_batch
        return [
            Distilled(rounds, epochs, batch, lr, budget.cloud_optimiser) for lr in budget.cloud_lrs
        ]

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.initial("small"), cloud.pretrained("large"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        done = state.round == self.rounds or cloud.data is None
        return None if done else [Ask("think", np.array([], np.int64))]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        return Message(), Tree()

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        for _ in chunks:
            pass
        assert cloud.data is not None
        # Anew in every round: of long sequences over many classes they would fill the state.
        taught = cloud.predict("large", state.large, {"x": cloud.data["x"]})["out"]
        slower = replace(recipe(self), lr=cosine(self.lr, state.round, self.rounds))
        rows = {**cloud.data, "teacher": taught}
        fit = cloud.fit("small.distill", state.weights, rows, slower)
        return replace(state, round=state.round + 1, weights=fit.parameters)

    def serve(self) -> OnDevice:
        return OnDevice()


@dataclass(frozen=True)
class EightBits:
    """What `Distilled` made, sent down in 8 bits."""

    bits: int = 8  # 2 to 8, of which each takes a byte all the same
    reach: float = 1.0  # of a row's largest weight, beyond which weights are cut off

    crosses: ClassVar[Crossing] = {}
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Distilled int8",
        "baseline",
        "Jacob et al. 2018",
        "The distilled small model, sent down and kept on the device in 8 bits a weight.",
        needs=("models", "pool"),
    )

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SettingError(f"bits {self.bits}", "EightBits", "Give 2 to 8")
        if not 0 < self.reach <= 1:
            raise SettingError(f"reach {self.reach}", "EightBits", "Give a share in (0, 1]")

    @staticmethod
    def trials(budget: Budget) -> list[EightBits]:
        return [EightBits(reach=1 - 0.5 * i / len(budget.lrs)) for i in range(len(budget.lrs))]

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, rounded(cloud.pretrained("distilled"), self.bits, self.reach))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        return None

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        return Message(), Tree()

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        return state

    def serve(self) -> Restored:
        return Restored()


def rounded(weights: Tree, bits: int = 8, reach: float = 1.0) -> Tree:
    """Matrices and kernels as int8 [out, ...] and float32 scales [out] beside them; what has one
    axis stays as it is."""
    most = 2 ** (bits - 1) - 1
    found: dict[str, Any] = {}
    for name, leaf in weights.items():
        if leaf.ndim < 2:
            found[name] = leaf
            continue
        far = reach * np.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
        scale = (np.where(far > 0, far, 1) / most).astype(np.float32)
        wide = scale.reshape(-1, *[1] * (leaf.ndim - 1))
        found[name] = np.clip(np.rint(leaf / wide), -most, most).astype(np.int8)
        found[_SCALE + name] = scale
    return Tree(found)


def restored(found: Tree) -> Tree:
    """The float32 weights of `rounded` ones that have a device axis."""
    scales = found.below(_SCALE)
    return Tree(
        {
            k: a.astype(np.float32) * scales[k].reshape(*scales[k].shape, *[1] * (a.ndim - 2))
            if k in scales
            else a
            for k, a in found.items()
            if not k.startswith(_SCALE)
        }
    )


@dataclass(frozen=True)
class Restored:
    """The device answers everything with weights that were sent in 8 bits."""

    crosses: ClassVar[Crossing] = OnDevice.crosses

    def deploy(self, state: State) -> Tree:
        return state.weights

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        answer = devices.predict("small.answer", restored(deployed), devices.data)
        return Decision(answer, nothing_sent(devices), Message())

    def answer(self, state: Any, up: Message, cloud: Cloud) -> Message:
        return Message()

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return decision
