"""What to pack: a task with a collaboration's settings, or what a finished comparison trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from kitestring.collaborate.baselines.pool_trained import State
from kitestring.comparison.jobs import Bench
from kitestring.comparison.methods import METHODS, POOL_TRAINED, Method
from kitestring.comparison.order import Order, budget, missing
from kitestring.core import Tree
from kitestring.devices.profiles import profile
from kitestring.errors import RunError, SettingError, unknown
from kitestring.exchange.store import Store, load_state
from kitestring.pack.build import Source
from kitestring.tasks.validate import validate


def find(what: str, name: str, settings: Sequence[str], seed: int) -> Source:
    """`what` names a task, or the folder of a finished comparison."""
    if name not in METHODS:
        raise unknown("collaboration", name, METHODS)
    if (Path(what) / "settings.json").is_file():
        if settings:
            raise SettingError(f"--set {settings[0]}: the run in {what} has chosen its settings")
        return _from_run(Path(what), METHODS[name])
    bench, order = _bench(Order(task=what, trials=1, seeds=1)), Order(task=what)
    collaboration = _trials(bench, order, METHODS[name])[0]
    return Source(bench.task, _changed(collaboration, settings), seed=seed)


def _bench(order: Order) -> Bench:
    task = order.load()
    validate(task)
    return Bench(task, profile("phone"), "sequential", 0.0)


def _trials(bench: Bench, order: Order, method: Method) -> Sequence[Any]:
    why = missing(bench.task, set(bench.compute(0).programs), method.about)
    if why:
        raise SettingError(f"{method.name} {why}", f"task {bench.task.name}")
    return method.trials(budget(bench, order.trials))


def _changed(collaboration: Any, settings: Sequence[str]) -> Any:
    """With NAME=VALUE as its settings; values as JSON, or texts."""
    kind = type(collaboration).__name__
    known = [f.name for f in fields(collaboration)] if is_dataclass(collaboration) else []
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise SettingError(f"--set {setting!r}", mend="Give NAME=VALUE")
        if name not in known:
            raise unknown(f"setting of {kind}", name, known)
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        kinds = _kinds(collaboration, name)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            wanted = " or ".join("null" if k is NoneType else k.__name__ for k in kinds)
            mend = f"As in {name}={json.dumps(getattr(collaboration, name))}"
            raise SettingError(f"--set {setting}: {name} is a {wanted}", mend=mend)
        collaboration = replace(collaboration, **{name: value})
    return collaboration


def _kinds(collaboration: Any, name: str) -> tuple[type, ...]:
    """The types that a setting may have."""
    hint = get_type_hints(type(collaboration))[name]
    return get_args(hint) or (hint,)


def _from_run(folder: Path, method: Method) -> Source:
    """The settings that won, with seed 0, and the state that they ended in."""
    try:
        kept = json.loads((folder / "settings.json").read_text())
        order = Order(**{**kept, "only": tuple(kept["only"])})
    except (OSError, KeyError, ValueError, TypeError) as problem:
        raise RunError(f"its settings cannot be read: {problem}", str(folder)) from None
    bench = _bench(order)
    trials = _trials(bench, order, method)
    trial, path = _won(folder, method.name, len(trials))
    starts = {
        program: _trained(_won(folder, POOL_TRAINED[program], order.trials)[1], program)
        for program in method.after
    }
    state = _state(path, trials[trial].state_type)
    return Source(bench.task, trials[trial], state, starts)


def _won(folder: Path, name: str, trials: int) -> tuple[int, Path]:
    """The trial that was served test rows with seed 0."""
    for trial in range(trials):
        path = folder / "jobs" / f"{name}-{trial}-0.sqlite"
        if path.is_file():
            store = Store(path)
            try:
                if store.load("result.test") is not None:
                    return trial, path
            finally:
                store.close()
    mend = "Run compare to its end, with this collaboration"
    raise RunError(f"no finished {name} in it", str(folder), mend)


def _state(path: Path, kind: Any) -> Any:
    store = Store(path)
    try:
        return load_state(store, kind)
    finally:
        store.close()


def _trained(path: Path, program: str) -> Tree:
    state: State = _state(path, State)
    return state.large if program == "large" else state.weights
