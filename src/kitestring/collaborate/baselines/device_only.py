"""Device only: each user trains alone on its own rows. Nothing crosses, ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import OnDevice
from kitestring.collaborate.steps import recipe
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Lane, Message, Tree


@dataclass(frozen=True)
class State:
    round: int


@dataclass(frozen=True)
class DeviceOnly:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"

    crosses: ClassVar[Crossing] = {"train": Lane()}
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Device only",
        "baseline",
        "-",
        "Each user trains a small model alone, on its own rows.",
        needs=(),
    )

    @staticmethod
    def trials(budget: Budget) -> list[DeviceOnly]:
        return [
            DeviceOnly(budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser)
            for lr in budget.lrs
        ]

    def install(self, devices: Devices) -> Tree:
        return devices.initial("small")

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0)

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds or not cloud.initial("small"):
            return None
        return [Ask("train", cloud.sample(None))]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        fit = devices.fit("small", devices.private, devices.data, recipe(self))
        return Message(), fit.parameters

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        for _ in chunks:
            pass
        return replace(state, round=state.round + 1)

    def serve(self) -> OnDevice:
        return OnDevice(private=True)
