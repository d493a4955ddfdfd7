"""A task by name: one that is built in, or anybody's in a module or a file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from kitestring.errors import DataError, KitestringError, SettingError, TaskError, unknown
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
    if source.endswith(".py") or "/" in source:
        module = _from_file(Path(source))
    else:
        module = _from_module(source)
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
        with _told(f"{attribute}() fails"):
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


def _from_module(name: str) -> ModuleType:
    _reach(Path.cwd())
    try:
        with _told(f"module {name} fails"):
            return importlib.import_module(name)
    except TaskError as problem:
        absent = problem.__cause__
        missing = absent.name if isinstance(absent, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(missing + ".")):
            mend = f"Looked in {Path.cwd()} and among the installed packages"
            raise SettingError(f"no module {missing!r}", mend=mend) from None
        raise


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise SettingError(what, str(path), "Check the path")
    path = path.resolve()
    _reach(path.parent)  # so that a task's file can import its neighbours
    there = sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) != str(path):
        what = f"a module {path.stem!r} is already there"
        raise SettingError(what, str(path), "Rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SettingError("not a Python file", str(path), "Name a file that ends with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # as dataclasses and pickle want it
    try:
        with _told("the file fails"):
            spec.loader.exec_module(module)
    except TaskError:
        del sys.modules[path.stem]
        raise
    return module


def _reach(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Whatever somebody's code raises, as one line with the line of that code."""
    try:
        yield
    except KitestringError:
        raise
    except (Exception, SystemExit) as problem:
        said = (str(problem).strip().splitlines() or [""])[0][:160]
        if isinstance(problem, SyntaxError):
            said = problem.msg
        kind = type(problem).__name__
        said = f"{kind}: {said}" if said else kind
        raise TaskError(f"{what} with {said}", _line(problem), "Mend it there") from problem


def _line(problem: BaseException) -> str:
    """File and line: of a SyntaxError its own, else the last one that is not a library's."""
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{problem.filename}:{problem.lineno}"
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if f.filename != __file__]
    frames = [f for f in frames if not f.filename.startswith("<")]
    libraries = tuple({sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib")})
    own = [f for f in frames if not f.filename.startswith(libraries)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
