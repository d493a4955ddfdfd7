"""Somebody's code by name, in `package.module` or `path/to/file.py`; its faults in one line."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import kitestring
from kitestring.errors import KitestringError, SettingError, TaskError


def module(source: str) -> ModuleType:
    """Raises `SettingError` where there is none, and `TaskError` where it fails."""
    if source.endswith(".py") or "/" in source:
        return _from_file(Path(source))
    return _from_module(source)


def _from_module(name: str) -> ModuleType:
    _reach(Path.cwd())
    try:
        with told(f"module {name} fails", name):
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
    _reach(path.parent)  # so that a file can import its neighbours
    there = sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) != str(path):
        what = f"a module {path.stem!r} is already there"
        raise SettingError(what, str(path), "Rename the file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SettingError("not a Python file", str(path), "Name a file that ends with .py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found  # as dataclasses and pickle want it
    try:
        with told("the file fails", str(path)):
            spec.loader.exec_module(found)
    except TaskError:
        del sys.modules[path.stem]
        raise
    return found


def _reach(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


@contextmanager
def told(what: str, name: str = "") -> Iterator[None]:
    """Whatever somebody's code raises, as one line with the line of that code, or with the `name`
    that a person gave it where none of its lines was running."""
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
        line = _line(problem)
        mend = "Mend it there" if line else "Check the name, and what it needs"
        raise TaskError(f"{what} with {said}", line or name, mend) from problem


def _line(problem: BaseException) -> str:
    """File and line: of a SyntaxError its own, else the last one that is not an installed
    library's, if any. Never Kitestring's or Python's own, which nobody is asked to mend."""
    if isinstance(problem, SyntaxError) and problem.filename:
        return f"{problem.filename}:{problem.lineno}"
    ours = str(Path(kitestring.__file__).parent) + os.sep
    python = sysconfig.get_path("stdlib") + os.sep
    # Installed libraries may be in a folder below Python's own.
    installed = tuple({sysconfig.get_path(p) + os.sep for p in ("purelib", "platlib")})
    files = [f for f in traceback.extract_tb(problem.__traceback__) if f.filename[:1] != "<"]
    files = [f for f in files if not f.filename.startswith(ours)]
    libraries = [f for f in files if f.filename.startswith(installed)]
    own = [f for f in files if not f.filename.startswith((python, *installed))] or libraries
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
