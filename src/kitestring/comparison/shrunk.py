"""The models that a search found (`kitestring shrink`), as rows of a comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kitestring import units
from kitestring.collaborate.about import About, Budget
from kitestring.collaborate.baselines.shrunk import Shrunk
from kitestring.comparison.methods import Method
from kitestring.core import Array
from kitestring.devices.fit.programs import Program
from kitestring.errors import RunError
from kitestring.tasks.task import Task

FRONT = "front.json"
_MOST = 5  # rows
_SHORT = {
    "half": "½", "quarter": "¼", "eighth": "⅛", "distilled": "", "8 bits": "int8",
    "8-bit weights": "w8", "4-bit weights": "w4",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One model of a search's front. Size in bytes of its file, seconds as it was measured in the
    runtime on the machine that searched."""

    name: str
    title: str
    size: int
    seconds: float

    @property
    def method(self) -> str:
        return "shrunk_" + "".join(c if c.isalnum() else "_" for c in self.name)

    @property
    def short(self) -> str:
        """For a column: "large, quarter, distilled, 4-bit weights" is "Large ¼ w4"."""
        words = [_SHORT.get(word, word) for word in self.title.split(", ")]
        return " ".join(word for word in words if word).capitalize()


def fingerprint(folder: str) -> str:
    """Of what a search found, so that a comparison is not resumed with another one's."""
    if not folder:
        return ""
    return hashlib.sha256(_text(Path(folder)).encode()).hexdigest()[:16]


def variants(folder: str) -> list[Variant]:
    """Of the search's front its choice and a few others between the smallest and the largest, by
    size. Raises `RunError` where there is no finished search."""
    if not folder:
        return []
    found = _read(Path(folder))
    try:
        each = [(name, found["candidates"][name]) for name in found["front"]]
        front = [
            Variant(name, c["title"], int(c["here"]["size"]), float(c["here"]["p50"]))
            for name, c in each
        ]
        choice = [v for v in front if v.name == found["choice"]]
    except (KeyError, TypeError, ValueError) as problem:
        raise _unreadable(Path(folder), problem) from None
    front.sort(key=lambda v: v.size)
    last, room = len(front) - 1, _MOST - len(choice)
    spread = {round(i * last / max(1, room - 1)) for i in range(room)}
    return [v for i, v in enumerate(front) if i in spread or v in choice]


def methods(folder: str) -> Mapping[str, Method]:
    return {v.method: Method(v.method, _about(v), partial(_trials, v.method)) for v in
            variants(folder)}  # fmt: skip


def _about(v: Variant) -> About:
    says = "Made by `kitestring shrink` on the cloud's pool, sent down once, answers on the device."
    return About(v.short, "baseline", "-", says, needs=("models", "pool"))


def _trials(model: str, budget: Budget) -> list[Shrunk]:
    return [Shrunk(model)] * len(budget.cloud_lrs)


def programs(task: Task, folder: str, seed: int, some_x: Array) -> dict[str, Program]:
    """Of each variant what it is, and what answers a request. A comparison with more seeds than the
    search had begins again with the first. Raises `RunError` where users that are compared on were
    in the search's pool, which models have learnt from."""
    made: dict[str, Program] = {}
    if not folder:
        return made
    from kitestring.shrink.answer import program
    from kitestring.shrink.models import load, task_of

    _unseen(task, task_of(Path(folder)), folder)
    seeds = int(_read(Path(folder))["seeds"])
    for v in variants(folder):
        answers = program(task, load(Path(folder), v.name, seed % seeds), some_x)
        made[v.method] = replace(answers, name=v.method, after=None)
        made[f"{v.method}.answer"] = replace(answers, name=f"{v.method}.answer")
    return made


def _unseen(task: Task, searched: Task, folder: str) -> None:
    mine, theirs = task.users, searched.users
    if mine.devices == theirs.devices and mine.pool == theirs.pool:
        return
    learnt = {theirs.names[i] for i in theirs.pool}
    if seen := [name for name in (mine.names[i] for i in mine.devices) if name in learnt]:
        what = f"its models learnt from {seen[0]}, on whom they would be compared"
        raise RunError(what, folder, "Search and compare with the same --users")


def note(folder: str) -> list[str]:
    """What was measured of them, in a line for the report."""
    if not folder:
        return []
    each = [
        f"{v.short} ({v.title}) {units.size(v.size)}, {units.duration(v.seconds)}"
        for v in variants(folder)
    ]
    seeds = int(_read(Path(folder))["seeds"])
    return [
        "Measured in ONNX Runtime by the search that made them, size and one request on one core: "
        f"{'; '.join(each)}. The search had {seeds} seed{'s' * (seeds > 1)}; further seeds here "
        "take its models again from the first."
    ]


def of_task(folder: str, task: str) -> None:
    """Raises `RunError` where the search was of another task."""
    if folder and _read(Path(folder)).get("task") != task:
        what = f"is a search on {_read(Path(folder)).get('task')}, not on {task}"
        raise RunError(what, folder, f"Run: kitestring shrink {task}")


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(folder))
    except ValueError as problem:
        raise _unreadable(folder, problem) from None
    if not isinstance(found, dict):
        raise _unreadable(folder, TypeError("no JSON object"))
    return found


def _text(folder: Path) -> str:
    try:
        return (folder / FRONT).read_text(encoding="utf-8")
    except FileNotFoundError:
        mend = "Run `kitestring shrink` to its end first, and name its folder"
        raise RunError("no finished search is here", str(folder), mend) from None
    except (OSError, ValueError) as problem:
        raise _unreadable(folder, problem) from None


def _unreadable(folder: Path, problem: Exception) -> RunError:
    what = f"cannot be read: {type(problem).__name__}: {problem}"
    return RunError(what, str(folder / FRONT), "Run the search again")
