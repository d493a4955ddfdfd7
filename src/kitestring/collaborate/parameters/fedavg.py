"""FedAvg: devices train the shared model on their rows; the cloud averages what they changed.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas: "Communication-efficient learning of deep
networks from decentralized data", AISTATS 2017, algorithm 1. Here the start is the model that the
cloud trained on its pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import OnDevice
from kitestring.collaborate.steps import recipe
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Lane, Message, Tree


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)


@dataclass(frozen=True)
class FedAvg:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    cohort: int | None = None  # devices asked in a round; None: all of them
    shuffle: bool = True  # a device's rows, every epoch anew

    crosses: ClassVar[Crossing] = {
        "train": Lane(
            down={"parameters": ("*",)}, up={"parameters": ("*",), "scalars": ("examples",)}
        )
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "FedAvg",
        "parameters",
        "McMahan et al. 2017",
        "Devices train the shared small model on their rows; the cloud averages the changes.",
        needs=("models",),
    )

    @staticmethod
    def trials(budget: Budget) -> list[FedAvg]:
        return [
            FedAvg(budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser)
            for lr in budget.lrs
        ]

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.pretrained("small"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        model = Message(parameters=state.weights)
        return [Ask("train", cloud.sample(self.cohort), all=model, reduce="sum")]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        start, n = message.parameters, devices.data["y"].n.astype(np.float32)
        fit = devices.fit("small", start, devices.data, recipe(self))
        change = (fit.parameters - start) * n
        return Message(parameters=change, scalars=Tree(examples=n)), devices.private

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        weights = state.weights
        for total in chunks:
            examples = max(1.0, float(total.message.scalars["examples"][0]))
            weights = weights + Tree(
                {k: a[0] / examples for k, a in total.message.parameters.items()}
            )
        return State(state.round + 1, weights)

    def serve(self) -> OnDevice:
        return OnDevice()
