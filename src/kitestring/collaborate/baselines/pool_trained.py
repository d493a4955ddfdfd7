"""Cloud only, and shipped: one model trained on the cloud's pool, before any device is asked.

*Cloud only* serves the large model from the cloud. *Shipped* sends the small one down once.
"joint" trains a device front with two backs, a small and a large one, for the collaborations that
cut a model in two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import cos, pi
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import InCloud, OnDevice, Split
from kitestring.collaborate.steps import recipe
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Message, Tree


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)
    large: Tree = field(default_factory=Tree)


def cosine(lr: float, step: int, steps: int) -> float:
    """A learning rate that falls to nearly zero (Loshchilov & Hutter 2017, SGDR, eq. 5, one
    cycle)."""
    return lr * (1 + cos(pi * step / steps)) / 2


@dataclass(frozen=True)
class PoolTrained:
    program: str  # "large", "small" or "joint"
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    crosses: ClassVar[Crossing] = {}
    state_type: ClassVar[type[State]] = State

    def install(self, devices: Devices) -> Tree:
        return Tree()

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, **{self._field: cloud.initial(self.program)})

    @property
    def _field(self) -> str:
        return "large" if self.program == "large" else "weights"

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        # Recorded answers come without a pool, and nothing trains.
        done = state.round == self.rounds or cloud.data is None
        return None if done else [Ask("think", np.array([], np.int64))]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        return Message(), Tree()

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        for _ in chunks:
            pass
        assert cloud.data is not None
        now = getattr(state, self._field)
        slower = replace(recipe(self), lr=cosine(self.lr, state.round, self.rounds))
        fit = cloud.fit(self.program, now, cloud.data, slower)
        return replace(state, round=state.round + 1, **{self._field: fit.parameters})

    def serve(self) -> Any:
        return {"large": InCloud(), "small": OnDevice(), "joint": Split(private=False)}[
            self.program
        ]


CLOUD_ONLY = About(
    "Cloud only",
    "baseline",
    "-",
    "The large model, trained on the cloud's pool, answers every request; requests go up raw.",
    needs=("pool",),
)
SHIPPED = About(
    "Shipped",
    "baseline",
    "-",
    "A small model, trained on the cloud's pool, is sent down once and answers on the device.",
    needs=("models", "pool"),
)


def trials(program: str, budget: Budget) -> list[PoolTrained]:
    rounds = min(10, budget.cloud_epochs)
    epochs, batch = budget.cloud_epochs // rounds, budget.cloud_batch
    return [
        PoolTrained(program, rounds, epochs, batch, lr, budget.cloud_optimiser)
        for lr in budget.cloud_lrs
    ]
