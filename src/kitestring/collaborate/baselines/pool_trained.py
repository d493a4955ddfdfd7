"""Cloud only, and shipped: one model trained on the cloud's pool, before any device is asked.

*Cloud only* serves the large model from the cloud. *Shipped* sends the small one down once.
"joint" trains a device front with two backs, a small and a large one, for the collaborations that
cut a model in two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import cos, pi
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import InCloud, OnDevice, Split
from kitestring.collaborate.steps import recipe
from kitestring.core import Ask, Chunk, Cloud, Crossing, Devices, Message, Recipe, Rows, Tree


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)
    large: Tree = field(default_factory=Tree)


def cosine(lr: float, step: int, steps: int) -> float:
    """A learning rate that falls to nearly zero (Loshchilov & Hutter 2017, SGDR, eq. 5, one
    cycle)."""
    return lr * (1 + cos(pi * step / steps)) / 2


def slower(settings: Any, round: int) -> Recipe:
    """How a collaboration trains in one of its rounds, at a rate that falls over all of them."""
    return replace(recipe(settings), lr=cosine(settings.lr, round, settings.rounds))


class Beforehand:
    """What the cloud makes before any device is asked: `trained` in rounds on its pool, or at once
    by `init`."""

    rounds = 0
    crosses: ClassVar[Crossing] = {}
    state_type: ClassVar[type[State]] = State

    def install(self, devices: Devices) -> Tree:
        return Tree()

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
        trained = self.trained(state, cloud, cloud.data, slower(self, state.round))
        return replace(trained, round=state.round + 1)

    def trained(self, state: State, cloud: Cloud, pool: Mapping[str, Rows], how: Recipe) -> State:
        """The state with what a round's training made of it."""
        return state


@dataclass(frozen=True)
class PoolTrained(Beforehand):
    program: str  # "large", "small" or "joint"
    rounds: int = 10
    epochs: int = 3
    batch: int = 32
    lr: float = 1e-3
    optimiser: str = "adam"

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, **{self._field: cloud.initial(self.program)})

    @property
    def _field(self) -> str:
        return "large" if self.program == "large" else "weights"

    def trained(self, state: State, cloud: Cloud, pool: Mapping[str, Rows], how: Recipe) -> State:
        fit = cloud.fit(self.program, getattr(state, self._field), pool, how)
        new: dict[str, Any] = {self._field: fit.parameters}
        return replace(state, **new)

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
    return [PoolTrained(program, *how) for how in budget.in_cloud]
