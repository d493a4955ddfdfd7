"""The device half of a collaboration as it was recorded: plans, interpreted on D devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kitestring.core import KINDS, Crossing, Decision, Devices, Lane, Message, Tree
from kitestring.errors import PackageError
from kitestring.package.plan import Plan, run

INSTALL, REPLY, DECIDE, MERGE = "install", "reply ", "decide", "merge"
"""The names of plans; a verb follows on `REPLY`."""


def form(message: Message) -> dict[str, Tree]:
    """A message as plans take it."""
    return {kind: getattr(message, kind) for kind in KINDS}


def chosen(decision: Decision) -> dict[str, Any]:
    """A decision as plans take it."""
    return {"answer": decision.answer, "send": decision.send, "up": form(decision.up)}


@dataclass(frozen=True)
class RecordedHalf:
    """Rounds and requests from plans, `core.Collaboration` and `core.Service` for a device."""

    plans: Mapping[str, Plan]
    rounds: Crossing
    requests: Crossing

    @property
    def crosses(self) -> Crossing:
        return {**self.requests, **self.rounds}

    def _run(self, name: str, devices: Devices, **given: Any) -> Any:
        if name not in self.plans:
            known = ", ".join(self.plans)
            raise PackageError(f"no plan {name!r} in it", "package", f"It has {known}")
        whole = {**given, "own": devices.data, "private": devices.private}
        return run(self.plans[name], whole, devices)

    def install(self, devices: Devices) -> Tree:
        return Tree(self._run(INSTALL, devices)["private"])

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        found = self._run(REPLY + verb, devices, message=form(message))
        return Message(**found["up"]), Tree(found["private"])

    def decide(self, devices: Devices, deployed: Tree) -> Decision:
        return _decision(self._run(DECIDE, devices, deployed=deployed))

    def merge(
        self, devices: Devices, deployed: Tree, decision: Decision, down: Message
    ) -> Decision:
        given = {"deployed": deployed, "decision": chosen(decision), "down": form(down)}
        return _decision(self._run(MERGE, devices, **given))


def _decision(found: Mapping[str, Any]) -> Decision:
    return Decision(found["answer"], found["send"], Message(**found["up"]))


def declared(crosses: Crossing) -> dict[str, Any]:
    """What may cross, as JSON."""
    ways = ("down", "up")
    return {
        verb: {way: {k: list(names) for k, names in getattr(lane, way).items()} for way in ways}
        for verb, lane in crosses.items()
    }


def crossing(found: Mapping[str, Any]) -> Crossing:
    """The inverse of `declared`."""
    return {verb: Lane(lane["down"], lane["up"]) for verb, lane in found.items()}
