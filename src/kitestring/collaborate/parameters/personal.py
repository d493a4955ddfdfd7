"""Personal: the distilled model is sent down, and each device goes on to train its last layers on
its own rows.

Wang et al.: "Federated evaluation of on-device personalization", arXiv 1910.10252, section 3: a
model that was trained elsewhere is fine-tuned on the device, and accepted by what it does for that
user. Here the user's part is what `train` names, the rest stays as it was sent; a device holds out
some of its own rows and keeps the best of all its rounds on them, the model as it came among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.services import OnDevice
from kitestring.collaborate.steps import mean_loss, recipe
from kitestring.core import (
    Array,
    Ask,
    Chunk,
    Cloud,
    Crossing,
    Devices,
    Lane,
    Message,
    Rows,
    Tree,
)
from kitestring.errors import SettingError


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)


@dataclass(frozen=True)
class Personal:
    rounds: int = 10
    epochs: int = 2
    batch: int = 10
    lr: float = 0.1
    optimiser: str = "sgd"
    train: str = "back"  # how the names of the user's own weights begin; commas separate several
    held: float = 0.2  # of a device's own rows, to judge by; 0: the last round is kept
    start: str = "distilled"  # the program that the cloud trained, and sends

    crosses: ClassVar[Crossing] = {
        "start": Lane(down={"parameters": ("*",)}),
        "again": Lane(),
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Personal",
        "parameters",
        "Wang et al. 2019",
        "The distilled model is sent down once, and each device trains its last layers further.",
        needs=("models",),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.held <= 0.5:  # every second row at the most: the others are trained on
            raise SettingError(f"held {self.held}", "Personal", "Give a share in [0, 0.5]")

    @staticmethod
    def trials(budget: Budget) -> list[Personal]:
        return [
            Personal(budget.rounds, budget.epochs, budget.batch, lr, budget.optimiser)
            for lr in budget.last_layer_lrs
        ]

    def install(self, devices: Devices) -> Tree:
        weights = devices.initial("small")
        worst = np.full(len(devices.data["x"].n), np.inf, np.float32)
        return self._kept(weights, weights, worst)

    def _kept(self, best: Tree, now: Tree, loss: Array) -> Tree:
        """The best model so far, the user's part as it is trained, and the best's loss [D]."""
        return Tree(
            {
                **best.inside("best."),
                **now.pick(*self.train.split(",")).inside("now."),
                "loss": loss,
            }
        )

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.pretrained(self.start))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == self.rounds:
            return None
        if state.round == 0:
            return [Ask("start", cloud.sample(None), all=Message(parameters=state.weights))]
        return [Ask("again", cloud.sample(None))]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        train, check = self._parts(devices.data)
        if verb == "start":
            best = message.parameters
            now, least = best, self._loss(best, check, devices)
        else:
            best, least = devices.private.below("best."), devices.private["loss"]
            now = Tree({**best, **devices.private.below("now.")})
        fit = devices.fit(
            "small", now, train, replace(recipe(self), train=tuple(self.train.split(",")))
        )
        now, loss = fit.parameters, self._loss(fit.parameters, check, devices)
        user = now.pick(*self.train.split(","))
        better = {k: _where(loss <= least, a, best[k]) for k, a in user.items()}
        return Message(), self._kept(
            Tree({**best, **better}), now, np.where(loss <= least, loss, least)
        )

    def _parts(self, data: Any) -> tuple[dict[str, Rows], dict[str, Rows]]:
        """Rows to train on, and rows to judge by: every so manieth, the same in every round."""
        real = next(iter(data.values())).mask()
        if self.held == 0:
            return dict(data), dict(data)
        every = round(1 / self.held)
        out = real & (np.cumsum(real, axis=1) % every == 0)
        return (
            {k: r.keep(real & ~out) for k, r in data.items()},
            {k: r.keep(out) for k, r in data.items()},
        )

    def _loss(self, weights: Tree, check: dict[str, Rows], devices: Devices) -> Array:
        """[D] mean over the rows held out; 0 without any, so that the last round is kept."""
        if self.held == 0:
            return np.zeros(len(next(iter(check.values())).n), np.float32)
        mean: Array = mean_loss(weights, check, devices).astype(np.float32)
        return mean

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        for _ in chunks:
            pass
        return replace(state, round=state.round + 1)

    def serve(self) -> Own:
        return Own()


def _where(better: Array, new: Array, old: Array) -> Array:
    """[D] chooses whole leaves [D, ...]."""
    return np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)


@dataclass(frozen=True)
class Own(OnDevice):
    """The device answers everything with the best that it kept."""

    private: bool = True
    crosses: ClassVar[Crossing] = {"deploy": Lane(), "request": Lane()}

    def weights(self, devices: Devices, deployed: Tree) -> Tree:
        return devices.private.below("best.")
