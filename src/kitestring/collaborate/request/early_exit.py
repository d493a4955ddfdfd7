"""Early exit: the device computes a front and an exit of its own; what the exit is not sure of goes
up as features, and the cloud's large back answers.

Teerapittayanon, McDanel, Kung: "BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks", ICPR 2016, arXiv 1709.01686: section III-C, figure 2, with one early exit. A request
exits where the entropy of the exit's softmax is below a threshold T, in nats; the paper prints the
entropy without its minus sign. The cut between device and cloud is that of SPINN: Laskaridis et
al., MobiCom 2020, arXiv 2008.06402.

Front, exit and large back are the program `joint`, trained on the pool with both losses at once
(section III-B) and equal weights, as in the authors' code for LeNet. For AlexNet the paper weighs
the first exit 1 and the last 0.3 (section V-A).

T is given, or found for a budget: the share of requests that may go up. Devices then send
histograms of their entropies on their own rows, without labels, as in `cascade`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.request.cascade import Escalate, histogram, quantile, share_and_blend
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

# Entropies of trained models lie over many powers of ten, so the histogram's bins are even in their
# logarithm. e^4 nats are the most that e^55 classes can have; below e^-40 all are alike.
_LEAST, _MOST, _BINS = -40.0, 4.0, 512
_STEP = (_MOST - _LEAST) / _BINS


@dataclass(frozen=True)
class State:
    round: int
    weights: Tree = field(default_factory=Tree)  # front.*, back.* and server.*
    threshold: float = 0.0  # T


@dataclass(frozen=True)
class EarlyExit:
    share: float = 0.2  # of requests that may go up; T follows from it
    threshold: float | None = None  # T in nats: then nothing is calibrated
    personal: float = 0.0  # 0: the fleet's threshold, 1: each device's own, between: a blend

    crosses: ClassVar[Crossing] = {
        "calibrate": Lane(
            down={"parameters": ("front.*", "back.*")}, up={"features": ("histogram",)}
        )
    }
    state_type: ClassVar[type[State]] = State
    about: ClassVar[About] = About(
        "Early exit",
        "request",
        "Teerapittayanon et al. 2016",
        "A front and an exit answer on the device; what they are not sure of goes up as features.",
        needs=("models", "pool", "split", "entropy"),
    )

    def __post_init__(self) -> None:
        share_and_blend("EarlyExit", self.share, self.personal)
        if self.threshold is not None and not self.threshold >= 0:
            mend = "Give nats: 0 sends everything, more than log(classes) nothing"
            raise SettingError(f"threshold {self.threshold}", "EarlyExit", mend)

    @staticmethod
    def trials(budget: Budget) -> list[EarlyExit]:
        count = len(budget.lrs)
        blends = [i / max(1, count - 1) for i in range(count)]
        return [EarlyExit(budget.cloud_share, personal=blend) for blend in blends]

    def rehearsed(self) -> EarlyExit:
        """To be recorded: half of the requests go up, or all."""
        return replace(self, share=0.5, threshold=None if self.threshold is None else 0.0)

    def install(self, devices: Devices) -> Tree:
        # Until it is calibrated, a device asks nobody.
        return Tree(cut=np.full(len(devices.data["x"].n), np.exp(_MOST), np.float32))

    def init(self, cloud: Cloud, seed: int) -> State:
        weights = cloud.pretrained("joint").pick("front.", "back.", "server.")
        if self.threshold is not None:
            return State(1, weights, self.threshold)
        return State(0, weights, float(np.exp(_MOST)))

    def ask(self, state: State, cloud: Cloud) -> Sequence[Ask] | None:
        if state.round == 1:
            return None
        model = Message(parameters=state.weights.pick("front.", "back."))
        return [Ask("calibrate", cloud.sample(None), all=model, reduce="sum")]

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        entropy: Rows = spread(exits(message.parameters, devices)["entropy"], devices)
        sure = (_MOST - np.log(entropy.values)) / _STEP  # in bins, the surest last
        bins = np.clip(sure, 0, _BINS - 1).astype(np.int64)
        counts = histogram(Rows(bins, entropy.n), _BINS)
        return Message(features=Tree(histogram=counts)), Tree(cut=threshold(counts, self.share))

    def tell(self, state: State, chunks: Iterator[Chunk], cloud: Cloud) -> State:
        found = state.threshold
        for total in chunks:
            found = float(threshold(total.message.features["histogram"], self.share)[0])
        return State(1, state.weights, found)

    def serve(self) -> Exit:
        return Exit(self.personal) if self.threshold is None else Exit(given=True)


def exits(weights: Tree, devices: Devices) -> Tree:
    """The features, the answers of the device's exit and their entropy in nats; what is not a
    number is as unsure as can be."""
    found = devices.predict("small.exit", weights, {"x": devices.data["x"]})
    entropy: Rows = found["entropy"]
    known = np.nan_to_num(entropy.values, nan=float(np.exp(_MOST)))
    return Tree({**found, "entropy": Rows(known, entropy.n)})


def spread(entropy: Rows, devices: Devices) -> Rows:
    """Spread over one bin, so that ties can be cut."""
    dice = devices.uniform("tie", entropy.values.shape[1])
    least = np.maximum(entropy.values, np.float32(np.exp(_LEAST)))
    return Rows(least * np.exp(dice * _STEP).astype(np.float32), entropy.n)


def threshold(counts: Array, share: float) -> Array:
    """[D] entropies above which a `share` of the counted requests [D, bins] lie; all at 1, none at
    0."""
    return np.exp(_MOST - quantile(counts, share) * (_MOST - _LEAST)).astype(np.float32)


@dataclass(frozen=True)
class Exit:
    """`personal` blends the fleet's threshold with the device's own; a `given` one is taken as it
    is."""

    personal: float = 0.0
    given: bool = False
    crosses: ClassVar[Crossing] = {
        "deploy": Lane(down={"parameters": ("front.*", "back.*", "threshold")}),
        "request": Lane(up={"features": ("h",)}, down={"features": ("answer",)}),
    }

    def deploy(self, state: State) -> Tree:
        device = state.weights.pick("front.", "back.")
        return Tree({**device, "threshold": np.array(state.threshold, np.float32)})

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        found = exits(deployed.pick("front.", "back."), devices)
        entropy, h, cut = found["entropy"], found["h"], deployed["threshold"]
        if not self.given:
            entropy = spread(entropy, devices)
            cut = cut ** (1 - self.personal) * devices.private["cut"] ** self.personal
        send = (entropy.values >= cut[:, None]) & entropy.mask()
        return Decision(Tree(answer=found["answer"]), send, Message(features=Tree(h=h.keep(send))))

    def answer(self, state: State, up: Message, cloud: Cloud) -> Message:
        server = state.weights.pick("server.")
        found = cloud.predict("server.answer", server, {"h": up.features["h"]})
        return Message(features=Tree(answer=found["answer"]))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        return Escalate().merge(devices, deployed, decision, down)
