"""Shrunk: a model that was made smaller beforehand is sent down once, and answers on the device.

What made it so (distilling, pruning, quantising: `kitestring shrink`) is done before any device is
asked, and nothing is trained here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kitestring.collaborate.baselines.pool_trained import State
from kitestring.collaborate.services import OnDevice
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Message, Tree


@dataclass(frozen=True)
class Shrunk:
    model: str = "small"  # the program whose weights, as they were delivered, are sent

    crosses: ClassVar[Crossing] = {}
    state_type: ClassVar[type[State]] = State

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.initial(self.model))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        return None

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        return Message(), Tree()

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        return state

    def serve(self) -> OnDevice:
        return OnDevice(model=self.model)
