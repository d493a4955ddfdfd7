"""From a rehearsal's scenes to plans, each of which gives what the code gave, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kitestring.core import Decision, Devices, Message, Tree
from kitestring.devices.runtime.half import DECIDE, INSTALL, MERGE, REPLY, chosen, form
from kitestring.errors import TaskError
from kitestring.pack.rehearse import EXAMPLES, Scene, apart
from kitestring.package.plan import Plan, run
from kitestring.package.record import Call, record


def plans(
    collaboration: Any, scenes: Mapping[str, Sequence[Scene]]
) -> tuple[dict[str, Plan], list[Call]]:
    """The device half, and the primitives it calls. Raises `TaskError` where code cannot be
    recorded, or a plan gives something else than the code did."""
    made, calls = {}, []
    for name, found in scenes.items():
        examples = _different(found)
        sessions, given = [s.session.anew() for s in examples], [s.given for s in examples]
        plan, called = record(name, _code(collaboration, name), sessions, given)
        for scene in found:
            _same(plan, scene)
        made[name] = plan
        calls += called
    return made, calls


def _different(found: Sequence[Scene]) -> list[Scene]:
    """Of devices with different numbers of rows: what a plan may depend on is seen by that."""
    by_rows = {scene.rows: scene for scene in reversed(found)}
    most = sorted(by_rows, reverse=True)[:EXAMPLES]
    return [by_rows[rows] for rows in most]


def _same(plan: Plan, scene: Scene) -> None:
    session = scene.session.anew()
    inputs = {**scene.given, "own": Tree(session.data), "private": session.private}
    far = apart(run(plan, inputs, session), scene.made)
    if far:
        what = f"the recorded plan gives something else than the code ({far:.1e} apart)"
        mend = "Let device code depend on its message, rows and private state alone"
        raise TaskError(f"{what} with {scene.rows} rows", f"recording {plan.name}", mend)


def _code(collaboration: Any, name: str) -> Callable[[Any, Devices], Any]:
    """What is recorded under that name, between forms that plans have."""
    service = collaboration.serve()

    def install(given: Any, devices: Devices) -> Any:
        return {"private": collaboration.install(devices)}

    def reply(given: Any, devices: Devices) -> Any:
        message = Message(**given["message"])
        up, after = collaboration.reply(name.removeprefix(REPLY), message, devices)
        return {"up": form(up), "private": after}

    def decide(given: Any, devices: Devices) -> Any:
        return chosen(service.decide(devices, Tree(given["deployed"])))

    def merge(given: Any, devices: Devices) -> Any:
        before, down = given["decision"], Message(**given["down"])
        decision = Decision(before["answer"], before["send"], Message(**before["up"]))
        return chosen(service.merge(devices, Tree(given["deployed"]), decision, down))

    return {INSTALL: install, DECIDE: decide, MERGE: merge}.get(name, reply)
