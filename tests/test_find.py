"""Tasks by name: built in, in modules and in files; whatever can go wrong with them."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from kitestring.collaborate.baselines.device_only import DeviceOnly
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.comparison.jobs import Bench, Job, work
from kitestring.devices.profiles import profile
from kitestring.errors import DataError, SettingError, TaskError
from kitestring.tasks.find import BUILT_IN, find, first_users
from kitestring.tasks.task import Recorded, Task
from kitestring.tasks.validate import validate
from told import told

EXAMPLE = Path(__file__).parent / "examples" / "my_task.py"
TINY = f"{Path(tiny.__file__).resolve()}:task"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory of its own; modules found there are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if file.startswith(str(tmp_path)):
            del sys.modules[name]


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return name


# Built in


def test_built_in_tasks_are_there() -> None:
    for module, about in BUILT_IN.values():
        made = importlib.import_module(module).task
        assert next(iter(inspect.signature(made).parameters)) == "users"
        assert "\n" not in about


def test_a_built_in_task_by_name() -> None:
    task = find("digits", 12)
    assert isinstance(task, Task)
    assert len(task.users.pool) + len(task.users.devices) == 12
    validate(task)


@pytest.mark.parametrize("name", [n for n in BUILT_IN if n != "digits"])
def test_the_others_with_their_data(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITESTRING_DATA", str(data))
    task = find(name, 12)
    assert isinstance(task, Task | Recorded)
    validate(task)


def test_unknown_names() -> None:
    with told(SettingError, "unknown task 'digit'", mend="Did you mean 'digits'?"):
        find("digit")
    with told(SettingError, "unknown task 'nothing-like-it'", mend="Known: assistant, digits"):
        find("nothing-like-it")
    for name in ("my_task.py", "examples/my_task", "my_task.py:", ":task"):
        with told(SettingError, f"no task named in {name!r}", mend="my_task.py:task"):
            find(name)
    with told(SettingError, "1 users", where="task digits", mend="2 or more"):
        find("digits", 1)


# Fewer users


@pytest.mark.parametrize(("count", "pool"), [(2, 1), (4, 1), (7, 2), (8, 2)])
def test_the_first_users(count: int, pool: int) -> None:
    task = find(TINY)
    fewer = find(TINY, count)
    assert len(fewer.users.pool) == pool
    assert len(fewer.users.devices) == count - pool
    assert list(fewer.users.devices) == list(task.users.devices)[: count - pool]
    assert (f"Only {count} of its 8 users." in fewer.notes) is (count < 8)
    validate(first_users(tiny.task("binary"), count))


def test_too_many_users() -> None:
    with told(DataError, "9 users", where="task tiny", mend="2 to 8"):
        find(TINY, 9)


# Files and modules


def test_a_file_and_its_neighbours(here: Path) -> None:
    write(here, "work/beside.py", "import tiny\nmade = tiny.task('binary')\n")
    path = write(here, "work/mine_a.py", "from beside import made\ndef other(): return made\n")
    assert find(f"{path}:made").loss == "binary"  # type: ignore[union-attr]
    assert find(f"{here / path}:other").name == "tiny"
    (here / path).write_text("from beside import made as anew\n")
    assert find(f"{path}:anew").name == "tiny"  # read again, not remembered


def test_a_module_in_the_current_directory(here: Path) -> None:
    write(here, "pack_b/__init__.py", "")
    write(here, "pack_b/inside.py", "import tiny\ntask = tiny.task\n")
    assert find("pack_b.inside:task").name == "tiny"
    assert isinstance(find("kitestring.tasks.digits:task", 4), Task)


def test_files_that_are_not_there(here: Path) -> None:
    with told(SettingError, "no such file", where="nowhere.py", mend="path"):
        find("nowhere.py:task")
    write(here, "odd.txt", "")
    with told(SettingError, "not a Python file", where="odd.txt"):
        find("./odd.txt:task")
    with told(SettingError, "is a folder", where=str(here)):
        find(f"{here}:task")
    path = write(here, "json.py", "")
    with told(SettingError, "a module 'json' is already there", mend="Rename"):
        find(f"{path}:task")


def test_modules_that_are_not_there(here: Path) -> None:
    write(here, "pack_c/__init__.py", "")
    for name, absent in (("nowhere_c", "nowhere_c"), ("pack_c.no", "pack_c.no"),
                         ("gone_c.a.b", "gone_c"), ("json.tool.x", "json.tool.x")):  # fmt: skip
        with told(SettingError, f"no module {absent!r}", mend=str(here)):
            find(f"{name}:task")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("import numpy\nx = (1,\n", 2, "SyntaxError: '(' was never closed"),
        ("x = 1\ny = x / 0\n", 2, "ZeroDivisionError: division by zero"),
        ("import numpy\nnumpy.ones(3).reshape(2, 2)\n", 2, "ValueError: cannot reshape"),
        ("import nothing_of_the_kind\n", 1, "No module named 'nothing_of_the_kind'"),
        ("from numpy import no_such_name\n", 1, "ImportError: cannot import name"),
        ("\nraise SystemExit\n", 2, "SystemExit"),
        ("def f():\n    raise OSError('a\\nb')\n\nf()\n", 2, "OSError: a"),
    ],
)
def test_what_breaks_inside(here: Path, text: str, line: int, said: str) -> None:
    path = write(here, "broken_d.py", text)
    for name in (f"{path}:task", "broken_d:task"):
        with told(TaskError, said, where=f"broken_d.py:{line}"):
            find(name)
        assert "broken_d" not in sys.modules


def test_what_a_function_raises(here: Path) -> None:
    path = write(here, "mine_e.py", "def task():\n    return [][1]\n\ndef two(a): ...\n")
    with told(TaskError, "task() fails with IndexError", where="mine_e.py:2"):
        find(f"{path}:task")
    with told(TaskError, "two() fails with TypeError", "missing 1 required"):
        find(f"{path}:two")
    path = write(here, "mine_f.py", "from kitestring.tasks.users import deal\n"
                 "def task():\n    deal(3, 2)\n")  # fmt: skip
    with told(DataError, "a pool of 2 of the users"):  # ours are plain enough as they are
        find(f"{path}:task")


def test_nobody_is_sent_to_kitestring_s_or_python_s_files(here: Path) -> None:
    """The last line of one's own, also where that calls the standard library; else no line."""
    path = write(here, "mine_i.py", "import json, importlib\n"
                 "def two(a): ...\n"
                 "def late():\n    json.loads('{')\n"
                 "def lazy():\n    importlib.import_module('gone_i')\n"
                 "def ours():\n    from kitestring.units import number\n"
                 "    number('a')\n")  # fmt: skip
    for name, line in (("late", 4), ("lazy", 6), ("ours", 9)):
        with told(TaskError, f"{name}() fails with", where=f"mine_i.py:{line}", mend="there"):
            find(f"{path}:{name}")
    with pytest.raises(TaskError, match="missing 1 required") as found:
        find(f"{path}:two")
    assert "modules.py" not in found.value.where
    assert "find.py" not in found.value.where
    assert found.value.mend == "Check the name, and what it needs"
    with told(TaskError, "'package' argument is required", where=".mine_i"):
        find(".mine_i:task")


def test_an_installed_library_s_line_is_better_than_none(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where libraries are in a folder below Python's own."""
    write(here, "lib_j.py", "\ndef task():\n    1 / 0\n")
    paths = {"stdlib": str(here.parent), "purelib": str(here), "platlib": str(here)}
    monkeypatch.setattr("sysconfig.get_path", paths.__getitem__)
    with told(TaskError, "ZeroDivisionError", where="lib_j.py:3"):
        find("lib_j:task")


def test_names_in_a_file(here: Path) -> None:
    path = write(here, "mine_g.py", "import os\nfrom tiny import task as one\nmade = one()\n"
                 "def build(): return 3\nnumber = 4\n")  # fmt: skip
    with told(SettingError, "unknown name 'buidl'", where="mine_g.py",
              mend="Did you mean 'build'? Known: build, made"):  # fmt: skip
        find(f"{path}:buidl")
    for name, kind in (("build", "int"), ("number", "int"), ("os", "os")):
        with told(TaskError, f"gives {kind}, not a task", where=f"mine_g.py:{name}"):
            find(f"{path}:{name}")
    path = write(here, "mine_h.py", "x = 1\n")
    with told(SettingError, "no 'task', and no task at all", where="mine_h.py", mend="Define"):
        find(f"{path}:task")


# The example of the README


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_the_example_runs_and_collaboration_pays(tmp_path: Path) -> None:
    task = find(f"{EXAMPLE}:task", 40)
    assert isinstance(task, Task)
    assert validate(task) == []
    bench = Bench(task, profile("phone"), "auto", 0.0)

    def score(name: str, collaboration: Any) -> float:
        job = Job(name, 0, 0, "test", tmp_path / f"{name}.sqlite")
        return float(work(bench, job, collaboration, lambda done: None)["score"])

    alone = score("device_only", DeviceOnly(rounds=10, epochs=2, lr=0.1))
    together = score("fedavg", FedAvg(rounds=10, epochs=2, lr=0.1))
    assert 0.25 < alone < together - 0.05
    assert not np.isnan(together)
