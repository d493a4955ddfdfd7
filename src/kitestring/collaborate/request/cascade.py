"""Cascade: the device answers; what it is least sure of goes up, at most a given share of requests.

The threshold on confidence is calibrated for that budget from histograms that devices send
(summed, so none is seen alone), on their own rows without labels. Viola & Jones 2001 gave
cascades; thresholds under a call budget as in Chen, Zaharia, Zou: "FrugalGPT", arXiv 2305.05176,
and Teerapittayanon et al., BranchyNet, ICPR 2016.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.core import (
    Array,
    Ask,
    Chunk,
    Cloud,
    Crossing,
    Decision,
    Devices,
    Lane,
    Message,
    Rows,
    Tree,
)
from kitestring.errors import SettingError

_BINS = 256


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)
    large: Tree = field(default_factory=Tree)
    threshold: float = 0.0


@dataclass(frozen=True)
class Cascade:
    share: float = 0.2  # of requests that may go up
    personal: float = 0.0  # 0: the fleet's threshold, 1: each device's own, between: a blend

    crosses: ClassVar[Crossing] = {
        "calibrate": Lane(down={"parameters": ("*",)}, up={"features": ("histogram",)})
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Cascade",
        "request",
        "Chen et al. 2023",
        "The shipped small model answers; what it is least sure of goes up to the large one.",
        needs=("pool", "confidence"),
    )

    def __post_init__(self) -> None:
        share_and_blend("Cascade", self.share, self.personal)

    @staticmethod
    def trials(budget: Budget) -> list[Cascade]:
        count = len(budget.lrs)
        return [Cascade(budget.cloud_share, i / max(1, count - 1)) for i in range(count)]

    def rehearsed(self) -> Cascade:
        """To be recorded: half of the requests go up."""
        return replace(self, share=0.5)

    def install(self, devices: Devices) -> Tree:
        return Tree(cut=np.full(len(devices.data["x"].n), np.float32(self.share)))

    def init(self, cloud: Cloud, seed: int) -> State:
        return State(0, cloud.pretrained("small"), cloud.pretrained("large"))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == 1:
            return None
        model = Message(parameters=state.weights)
        return [Ask("calibrate", cloud.sample(None), all=model, reduce="sum")]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        sure = confidence(message.parameters, devices)[1]
        bins = np.clip((sure.values * _BINS).astype(np.int64), 0, _BINS - 1)
        counts = histogram(Rows(bins, sure.n), _BINS)
        return Message(features=Tree(histogram=counts)), Tree(cut=quantile(counts, self.share))

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        threshold = state.threshold
        for total in chunks:
            threshold = float(quantile(total.message.features["histogram"], self.share)[0])
        return State(1, state.weights, state.large, threshold)

    def serve(self) -> Escalate:
        return Escalate(self.personal)


def share_and_blend(name: str, share: float, personal: float) -> None:
    """Raises `SettingError` unless both are between 0 and 1."""
    for setting, value in (("share", share), ("personal", personal)):
        if not 0 <= value <= 1:
            raise SettingError(f"{setting} {value}", name, "Give a number from 0 to 1")


def confidence(weights: Tree, devices: Devices) -> tuple[Tree, Rows]:
    """The device's answers, and its confidence in [0, 1] spread over one bin, so that ties can be
    cut."""
    columns = {k: r for k, r in devices.data.items() if k != "y"}
    found = devices.predict("small.answer", weights, columns)
    sure: Rows = found["confidence"]
    spread = devices.uniform("tie", sure.values.shape[1]) / np.float32(_BINS)
    scaled = np.clip(sure.values, 0, 1) * np.float32(1 - 1 / _BINS) + spread
    return Tree(answer=found["answer"]), Rows(scaled, sure.n)


def histogram(bins: Rows, size: int) -> Array:
    """[D, size]: how many of a device's rows are in each bin."""
    inside = (bins.values[..., None] == np.arange(size)) & bins.mask()[..., None]
    counts: Array = inside.sum(1).astype(np.float32)
    return counts


def quantile(counts: Array, share: float) -> Array:
    """[D] confidence below which a `share` of the counted requests [D, bins] lie."""
    total = counts.sum(-1, keepdims=True)
    below = np.concatenate([np.zeros_like(total), np.cumsum(counts, -1)], -1)
    # The k-th smallest of n draws has k / (n + 1) of the others below it: with a few rows to
    # calibrate on, share * n would overspend.
    target = np.clip(share * (total + 1) - 0.5, 0, total)
    bin_ = np.clip((below[:, 1:] < target).sum(-1), 0, counts.shape[-1] - 1)[:, None]
    inside = (target - np.take_along_axis(below, bin_, -1)) / np.maximum(
        np.take_along_axis(counts, bin_, -1), 1e-9
    )
    cut = (bin_ + np.clip(inside, 0, 1))[:, 0] / counts.shape[-1]
    return np.where(share >= 1, 2.0, np.where(share <= 0, -1.0, cut)).astype(np.float32)


@dataclass(frozen=True)
class Escalate:
    """`personal` blends the fleet's threshold with the device's own."""

    personal: float = 0.0
    crosses: ClassVar[Crossing] = {
        "deploy": Lane(down={"parameters": ("*",)}),
        "request": Lane(up={"data": ("x",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: State) -> Tree:
        return Tree({**state.weights, "threshold": np.array(state.threshold, np.float32)})

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        fleet, own = deployed["threshold"], devices.private["cut"]
        weights = Tree({k: a for k, a in deployed.items() if k != "threshold"})
        answer, sure = confidence(weights, devices)
        cut = (1 - self.personal) * fleet + self.personal * own
        send = (sure.values < cut[:, None]) & sure.mask()
        return Decision(answer, send, Message(data=Tree(x=devices.data["x"].keep(send))))

    def answer(self, state: State, up: Message, cloud: Cloud) -> Message:
        found = cloud.predict("large.answer", state.large, {"x": up.data["x"]})
        return Message(features=Tree(answer=found["answer"]))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        own: Rows = decision.answer["answer"]
        theirs: Rows = down.features["answer"]
        # The k-th request sent is the k-th row that came back.
        place = np.clip(np.cumsum(decision.send, 1) - 1, 0, theirs.values.shape[1] - 1)
        came = theirs.take(place, own.n).values
        wide = decision.send.reshape(decision.send.shape + (1,) * (own.values.ndim - 2))
        merged = Rows(np.where(wide, came, own.values), own.n)
        return Decision(Tree(answer=merged), np.zeros_like(decision.send), Message())
