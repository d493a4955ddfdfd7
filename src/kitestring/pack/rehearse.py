"""A rehearsal: a collaboration runs with a few made-up devices, and every scene is kept.

A scene is what one device had and was given, and what it made of it. From scenes of devices with
different numbers of rows its half is recorded; all of them then have to come out of the plans as
they came out of the code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kitestring.core import Array, Decision, Lane, Message, Rows, Tree, run, serve
from kitestring.devices.profiles import PROFILES
from kitestring.devices.runtime.half import DECIDE, INSTALL, MERGE, REPLY, chosen, form
from kitestring.devices.session import DeviceSession, Primitives
from kitestring.engines.hands import InProcess, Reply
from kitestring.engines.local import LocalEngine, Setting
from kitestring.errors import TaskError
from kitestring.exchange.store import Store
from kitestring.pack.schema import Column, draw

_COUNTS = (3, 5, 8, 1, 2, 4, 13, 6, 10, 21, 17, 30)  # rows of the made-up devices
_POOL = 24
_PLAYS = 30  # at the most
_PLENTY = 8  # different numbers of rows: enough to hold a plan against
EXAMPLES = 3
"""So many different numbers of rows a plan is recorded from."""


@dataclass(frozen=True)
class Scene:
    """`session` is as the device was; `given` and `made` have the form that plans take."""

    session: DeviceSession
    given: Mapping[str, Any]
    made: Mapping[str, Any]

    @property
    def rows(self) -> int:
        return int(next(iter(self.session.data.values())).n[0])


@dataclass
class MadeUp:
    """A population of devices whose rows are drawn."""

    columns: Mapping[str, Column]
    size: int = len(_COUNTS)

    def rows(self, ids: Array, split: str) -> dict[str, Rows]:
        (device,) = (int(i) for i in ids)
        return draw(self.columns, _COUNTS[device], device, split)


@dataclass
class Stage(InProcess):
    """Hands that keep a scene of whatever they do; one device at a time."""

    concurrent = False
    compute: Primitives
    population: MadeUp
    store: Store
    scenes: dict[str, list[Scene]]

    def __post_init__(self) -> None:
        super().__init__(self.compute, self.population, self.store)

    def _keep(self, name: str, like: DeviceSession, given: Any, made: Any) -> None:
        self.scenes.setdefault(name, []).append(Scene(like.anew(), given, made))

    def _private(self, ids: Array, session: DeviceSession) -> Tree:
        new = self._store.stacked("private", ids) is None
        found = super()._private(ids, session)
        known = self.scenes.get(INSTALL)
        if new and (known is None or known[0].session.data.keys() == session.data.keys()):
            self._keep(INSTALL, session, {}, {"private": found})
        return found

    def reply(self, verb: str, ids: Array, serial: int, down: Message) -> Reply:
        session = self._session(ids, serial, "train")
        up, after = self._collaboration.reply(verb, down, session)
        made = {"up": form(up), "private": after}
        self._keep(REPLY + verb, session, {"message": form(down)}, made)
        return Reply(up, session.flops, after)

    def decide(
        self, service: Any, ids: Array, split: str, deployed: Message
    ) -> tuple[Decision, Array]:
        decision, flops = super().decide(service, ids, split, deployed)
        assert self._asked is not None
        given = {"deployed": deployed.parameters}
        self._keep(DECIDE, self._asked[3], given, chosen(decision))
        return decision, flops

    def merge(self, ids: Array, down: Message) -> tuple[Decision, Array]:
        assert self._asked is not None
        _, deployed, before, session = self._asked
        decision, flops = super().merge(ids, down)
        given = {"deployed": deployed, "decision": chosen(before), "down": form(down)}
        self._keep(MERGE, session, given, chosen(decision))
        return decision, flops


@dataclass(frozen=True)
class Rehearsal:
    """`scenes` by the name of their plan; `start` is the collaboration's first state."""

    scenes: Mapping[str, Sequence[Scene]]
    start: Any


def rehearse(
    collaboration: Any,
    columns: Mapping[str, Column],
    compute: Primitives,
    pool: bool,
    pretrained: Callable[[str], Tree] | None = None,
) -> Rehearsal:
    """Raises `TaskError` where too few devices play a scene that a device may have to play."""
    shared = draw(columns, _POOL, len(_COUNTS), "pool") if pool else None
    scenes: dict[str, list[Scene]] = {}
    start = None

    def play(actor: Any, seed: int, into: dict[str, list[Scene]]) -> Any:
        store, people = Store(), MadeUp(columns)
        stage = Stage(compute, people, store, into)
        setting = Setting(people, PROFILES["phone"], chunk=1, pool=shared)
        engine = LocalEngine(setting, compute, store, stage, pretrained)
        first = _learn_and_serve(actor, engine, seed, into)
        store.close()
        return first

    for seed in range(_PLAYS):  # another seed asks other devices
        first = play(collaboration, seed, scenes)
        start = first if seed == 0 else start
        if set(_too_few(collaboration, scenes)) <= {MERGE}:
            break
    if MERGE in _too_few(collaboration, scenes) and hasattr(collaboration, "rehearsed"):
        actor, others = collaboration.rehearsed(), dict[str, list[Scene]]()
        if actor.serve() != collaboration.serve():
            what = "rehearsed() serves otherwise than the collaboration itself"
            raise TaskError(what, type(collaboration).__name__, "Change no setting of its service")
        play(actor, 0, others)
        for name in (DECIDE, MERGE):
            scenes.setdefault(name, []).extend(others.get(name, ()))
    for name, found in _too_few(collaboration, scenes).items():
        what = f"{name} was rehearsed with {found} numbers of rows, and a plan needs {EXAMPLES}"
        mend = "Let more devices take part: a larger cohort, or more rounds"
        if name == MERGE:
            mend = "Let more requests go up, or give it rehearsed(): itself with such settings"
        raise TaskError(what, f"collaboration {type(collaboration).__name__}", mend)
    return Rehearsal(scenes, start)


def _learn_and_serve(
    actor: Any, engine: LocalEngine, seed: int, scenes: Mapping[str, Sequence[Scene]]
) -> Any:
    """Its first state. Learning stops early once each verb has been seen with many devices."""
    start = state = None
    for state in run(actor, engine, seed):
        start = state if start is None else start
        if all(_numbers(scenes, REPLY + verb) >= _PLENTY for verb in actor.crosses):
            break
    for _ in serve(actor.serve(), state, engine):
        pass
    return start


def _too_few(collaboration: Any, scenes: Mapping[str, Sequence[Scene]]) -> dict[str, int]:
    """Scenes that a device may have to play and too few did: their names, and numbers of rows. A
    verb that these settings never ask is none."""
    request = collaboration.serve().crosses.get("request", Lane())
    goes_up = any(request.up.values())
    asked = [name for name in scenes if name.startswith(REPLY)]
    wanted = [*asked, DECIDE, *[MERGE] * goes_up]
    found = {name: _numbers(scenes, name) for name in wanted}
    return {name: count for name, count in found.items() if count < EXAMPLES}


def _numbers(scenes: Mapping[str, Sequence[Scene]], name: str) -> int:
    return len({scene.rows for scene in scenes.get(name, ())})


def apart(a: Any, b: Any) -> float:
    """The largest difference, relative to the largest value of a leaf; infinite where the form, a
    whole number or what is no number differs."""
    if isinstance(a, Rows):
        if not isinstance(b, Rows) or not np.array_equal(a.n, b.n):
            return float("inf")
        return max(
            (apart(a.values[d, :n], b.values[d, :n]) for d, n in enumerate(a.n)), default=0.0
        )
    if isinstance(a, Mapping):
        if not isinstance(b, Mapping) or a.keys() != b.keys():
            return float("inf")
        return max((apart(a[k], b[k]) for k in a), default=0.0)
    one, other = np.asarray(a), np.asarray(b)
    if one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if not np.issubdtype(one.dtype, np.floating):
        return 0.0 if np.array_equal(one, other) else float("inf")
    there = np.isfinite(one) & np.isfinite(other)
    if not np.array_equal(one[~there], other[~there], equal_nan=True):
        return float("inf")
    off = np.abs(one[there] - other[there]).max(initial=0.0)
    return float(off / max(np.abs(one[there]).max(initial=0.0), 1e-30))
