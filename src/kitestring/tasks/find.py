"""A task by name: one that is built in, or anybody's in a module or a file."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace
from types import ModuleType
from typing import Any

from kitestring.errors import DataError, SettingError, TaskError, unknown
from kitestring.tasks import named
from kitestring.tasks.task import Recorded, Task

BUILT_IN: dict[str, tuple[str, str]] = {
    "digits": (
        "kitestring.tasks.digits", "handwritten digits of made-up writers, no download"
    ),
    "qmnist": ("kitestring.tasks.qmnist", "MNIST by its 836 real writers"),
    "movielens": (
        "kitestring.apps.recommender.movielens", "the next film of 943 people, among 1,682"
    ),
    "shakespeare": (
        "kitestring.apps.assistant.shakespeare", "the next character of Shakespeare's roles"
    ),
    "livestream": (
        "kitestring.apps.livestream.tvsum", "highlights of 50 videos, recorded answers of people"
    ),
    "assistant": (
        "kitestring.apps.assistant.routellm",
        "which question to ask the stronger language model, recorded answers",
    ),
}  # fmt: skip
"""Name -> its module, and what it is in one line."""


def find(name: str, users: int | None = None) -> Task | Recorded:
    """A built-in name, `package.module:task`, or `path/to/file.py:task`.

    What is named there is a task or a function that returns one. With `users` it has only that
    many users: a built-in's own choice, else the first ones of pool and devices."""
    if users is not None and users < 2:
        raise SettingError(f"{users} users", f"task {name}", "Give 2 or more")
    if name in BUILT_IN:
        task: Task | Recorded = importlib.import_module(BUILT_IN[name][0]).task(users)
        return task
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        if colon or name.endswith(".py") or "/" in name:
            mend = "Name the task in it, as in my_task.py:task"
            raise SettingError(f"no task named in {name!r}", mend=mend)
        raise unknown("task", name, BUILT_IN)
    module = named.module(source)
    found = _called(getattr(module, attribute, None), module, attribute, name)
    return found if users is None else first_users(found, users)


def first_users(task: Task | Recorded, count: int) -> Task | Recorded:
    """The same task with its first `count` users, as large a share of them in the pool."""
    users = task.users
    total = len(users.pool) + len(users.devices)
    if not 2 <= count <= total:
        raise DataError(f"{count} users", f"task {task.name}", f"Give 2 to {total}")
    pool = min(count - 1, max(1, round(count * len(users.pool) / total))) if users.pool else 0
    devices = min(count - pool, len(users.devices))
    pool = min(count - devices, len(users.pool))
    fewer = replace(users, pool=users.pool[:pool], devices=users.devices[:devices])
    note = f"Only {pool + devices} of its {total} users."
    return replace(task, users=fewer, notes=(*task.notes, note) if count < total else task.notes)


def _called(found: Any, module: ModuleType, attribute: str, name: str) -> Task | Recorded:
    if not hasattr(module, attribute):
        raise _no_such_name(module, attribute)
    if callable(found):
        with named.told(f"{attribute}() fails", name):
            found = found()
    if not isinstance(found, Task | Recorded):
        kind = found.__name__ if isinstance(found, ModuleType) else type(found).__name__
        mend = "Name a Task, or a function that returns one without arguments"
        raise TaskError(f"gives {kind}, not a task", name, mend)
    return found


def _no_such_name(module: ModuleType, attribute: str) -> SettingError:
    """With the nearest of the tasks, and of the functions that the module itself defines."""
    known = [
        key
        for key, value in vars(module).items()
        if isinstance(value, Task | Recorded)
        or (inspect.isfunction(value) and value.__module__ == module.__name__)
    ]
    where = module.__file__ or module.__name__
    if not known:
        mend = "Define a Task there, or a function that returns one"
        return SettingError(f"no {attribute!r}, and no task at all", where, mend)
    found = unknown("name", attribute, known)
    return SettingError(found.what, where, found.mend)
