"""A whole comparison, as a person runs it: in processes of its own, killed, resumed, refused."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kitestring.collaborate.about import Budget
from kitestring.comparison.compare import load
from kitestring.comparison.methods import METHODS, shown
from kitestring.comparison.order import Order, missing

HERE = Path(__file__).parent
TINY = f"{HERE / 'tiny.py'}:task"


def kitestring(*words: str | Path, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kitestring.cli", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"}, timeout=240, **how,
    )  # fmt: skip


def figures(folder: Path) -> dict[str, Any]:
    """All that was measured, but for what a clock on the wall said."""
    found = json.loads((folder / "comparison.json").read_text())
    for row in found["rows"]:
        for seed in row["seeds"]:
            del seed["wall_s"], seed["computed"]
    del found["times"]
    return dict(found)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished comparison of the tiny task, and what it printed."""
    folder = tmp_path_factory.mktemp("done")
    found = kitestring("compare", TINY, "--seeds", 2, "--trials", 2, "--out", folder)
    assert found.returncode == 0, found.stderr
    return folder, found.stdout


def refused(found: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error: status 2, nothing but that line, never a traceback."""
    assert found.returncode == 2, found.stdout + found.stderr
    lines = [line for line in found.stderr.splitlines() if not line.startswith("done: ")]
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith("kitestring: ")
    return lines[0]


def test_every_collaboration_has_a_row_and_every_row_its_figures(done: tuple[Path, str]) -> None:
    comparison = load(done[0])
    assert [row.name for row in comparison.rows] == [m.name for m in shown()]
    for row in comparison.rows:
        assert row.missing is None
        assert len(row.trials) == comparison.trials == 2  # the same number for everybody
        assert [s.seed for s in row.seeds] == [0, 1]
        assert all(len(s.scores) == comparison.device_users for s in row.seeds)
    assert "Use " in done[1]
    assert (done[0] / "report.html").exists()


def test_the_ledger_says_what_left(done: tuple[Path, str]) -> None:
    """By the methods' definitions, not by their declarations: see each file's first lines."""
    rows = {row.name: row for row in load(done[0]).rows}

    def up(name: str, part: str = "learning") -> set[str]:
        return {k for s in rows[name].seeds for k, n in getattr(s, part).up.kinds.items() if n}

    assert up("device_only") == up("shipped") == up("cloud_only") == set()
    assert up("pooled") == {"data"}
    assert up("fedavg") == {"parameters", "scalars"}
    assert up("splitnn") == up("fedgkt") == {"features", "data"}
    assert up("coda") == {"features", "scalars"}
    assert up("cascade") == up("early_exit") == {"features"}
    assert up("cloud_only", "serving") == up("cascade", "serving") == {"data"}
    assert up("splitnn", "serving") == up("fedgkt", "serving") == {"features"}
    assert up("early_exit", "serving") == {"features"}
    assert up("fedavg", "serving") == up("coda", "serving") == set()
    assert {s.serving.cloud_calls for s in rows["cloud_only"].seeds} == {1.0}
    assert {s.serving.cloud_calls for s in rows["fedavg"].seeds} == {0.0}


def test_only_the_collaborations_that_may_change_the_large_model_do(done: tuple[Path, str]) -> None:
    for row in load(done[0]).rows:
        assert all(s.large_before is not None for s in row.seeds)
        if not METHODS[row.name].about.large:
            assert all(s.large_before == s.large_after for s in row.seeds)


def test_judged_anew_with_other_limits(done: tuple[Path, str]) -> None:
    found = kitestring("report", done[0], "--limit", "no data up, no features up")
    assert found.returncode == 0
    assert "Use " in found.stdout
    assert "limit: no data up" in found.stdout


def test_where_the_time_went(done: tuple[Path, str], tmp_path: Path) -> None:
    """Of every job: two trials and two seeds of each, with what is trained on the pool alone."""
    times = load(done[0]).times
    assert times is not None
    assert times.wall_s is not None
    for trials in (True, False):
        titles = [job.title for job in times.jobs if job.trial is trials]
        assert sorted(titles) == sorted(2 * [m.about.title for m in METHODS.values()])
    assert all(seconds >= 0 for job in times.jobs for seconds in job.parts.values())
    work = sum(sum(job.parts.values()) for job in times.jobs)
    assert 0 < work < times.workers * times.wall_s
    assert any(job.parts.get("fit small", 0) > 0 for job in times.jobs if job.title == "FedAvg")

    found = kitestring("report", done[0], "--profile")
    assert found.returncode == 0
    table = found.stdout.split("Where the time went")[1]
    assert all(m.about.title in table for m in METHODS.values())
    assert "Where the time went" not in done[1], "it was not asked for"

    old = json.loads((done[0] / "comparison.json").read_text())
    del old["times"]
    (tmp_path / "comparison.json").write_text(json.dumps(old))
    found = kitestring("report", tmp_path, "--profile")
    assert found.returncode == 0, found.stderr
    assert "did not keep" in found.stdout


def test_killed_at_any_moment_and_resumed(done: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL in the middle of early, middling and late jobs: the figures stay the same."""
    words = ["compare", TINY, "--seeds", "2", "--trials", "2", "--out", str(tmp_path)]
    for jobs in (2, 11, 24):
        resume = ["--resume"] if jobs > 2 else []
        process = subprocess.Popen(
            [sys.executable, "-m", "kitestring.cli", *words, *resume],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(tmp_path.glob("jobs/*.sqlite"))) < jobs:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "comparison.json").exists(), "it was over before it was killed"
    said = refused(kitestring(*words))
    assert "unfinished" in said
    assert "--resume" in said
    found = kitestring(*words, "--resume")
    assert found.returncode == 0, found.stderr
    assert figures(tmp_path) == figures(done[0])
    resumed, whole = load(tmp_path).times, load(done[0]).times
    assert resumed is not None
    assert whole is not None
    assert resumed.wall_s is None  # of the last start alone it would mean nothing
    assert len(resumed.jobs) == len(whole.jobs)


def test_resuming_something_else_is_refused(done: tuple[Path, str], tmp_path: Path) -> None:
    found = kitestring("compare", TINY, "--seeds", 3, "--trials", 2, "--out", done[0], "--resume")
    assert "seeds" in refused(found)
    assert "nothing to resume" in refused(
        kitestring("compare", TINY, "--out", tmp_path / "new", "--resume")
    )


def test_a_finished_run_resumes_to_itself(done: tuple[Path, str]) -> None:
    before = figures(done[0])
    again = kitestring("compare", TINY, "--seeds", 2, "--trials", 2, "--out", done[0], "--resume")
    assert again.returncode == 0
    assert figures(done[0]) == before


WRONG: list[tuple[list[str], str]] = [
    (["compare", "digit"], "Did you mean 'digits'"),
    (["compare", "--only", "fedavgg"], "Did you mean 'fedavg'"),
    (["compare", "--hardware", "fone"], "Did you mean 'phone'"),
    (["compare", "--device", "gpu"], "device 'gpu': torch has no such device here"),
    (["compare", "--device", "cuda:99"], "Leave --device out"),
    (["compare", "--limit", "fast please"], "fast please"),
    (["compare", "--prices", "no-such-file.toml"], "no-such-file.toml"),
    (["compare", "--seeds", "0"], "--seeds 0"),
    (["compare", "--lost", "1"], "--lost"),
    (["compare", "--csv", "no-such-file.csv", "--user", "a", "--target", "b"], "no-such-file"),
    (["compare", "--user", "a"], "--csv"),
    (["compare", "no.such.module:task"], "no module 'no'"),
    (["compare", f"{HERE / 'tiny.py'}:nothing"], "nothing"),
    (["compare", TINY, "--hardware", "microcontroller", "--users", "1"], "--users 1"),
    (["report", "no-such-folder"], "no finished comparison"),
]
EACH = """
import contextlib, io, json, sys
from kitestring.cli import main

found = []
for words in json.load(sys.stdin):
    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        status = main(words)
    found.append((status, told.getvalue()))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, str]], Path]:
    """Status and standard error of each, one after the other in one process, and its folder."""
    folder = tmp_path_factory.mktemp("wrong")
    done = subprocess.run(
        [sys.executable, "-c", EACH], input=json.dumps([words for words, _ in WRONG]), cwd=folder,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), folder


@pytest.mark.parametrize("place", range(len(WRONG)), ids=[says for _, says in WRONG])
def test_what_is_wrong_is_one_line(wrong: Any, place: int) -> None:
    found, folder = wrong
    status, told = found[place]
    assert WRONG[place][1] in refused(subprocess.CompletedProcess([], status, "", told))
    assert not list(folder.glob("**/*.html"))


def test_a_run_that_is_going_on_is_left_alone(tmp_path: Path) -> None:
    # A longer one, so that it still goes on when the other comes.
    command = [sys.executable, "-m", "kitestring.cli", "compare", "digits", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "settings.json").exists() and first.poll() is None:
            time.sleep(0.1)
        assert "another comparison" in refused(kitestring("compare", TINY, "--out", tmp_path))
    finally:
        first.kill()
        first.wait()


def test_nothing_outlives_a_comparison_that_is_killed(tmp_path: Path) -> None:
    """Neither its workers nor the process that they were forked from."""
    command = [sys.executable, "-m", "kitestring.cli", "compare", "digits", "--out", str(tmp_path)]
    first = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not list(tmp_path.glob("jobs/*.sqlite")) and first.poll() is None:
        time.sleep(0.1)
    first.kill()
    first.wait()
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            os.killpg(first.pid, 0)  # its own session: whoever it started is in this group
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(first.pid, 9)
    pytest.fail("somebody is still there")


@pytest.mark.parametrize("part", ["report", "work"])
def test_no_room_on_the_disk(done: tuple[Path, str], tmp_path: Path, part: str) -> None:
    """A file-size limit stands in for a full disk: writing beyond it fails with an OSError."""

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    if part == "report":
        page = done[0] / "report.html"
        before = page.read_bytes()
        line = refused(kitestring("report", done[0], preexec_fn=full))
        assert page.read_bytes() == before, "the old report must stay whole"
        assert not list(done[0].glob("*.part"))
    else:
        line = refused(kitestring("compare", TINY, "--out", tmp_path, preexec_fn=full))
        assert not (tmp_path / "comparison.json").exists()
    assert str(done[0] if part == "report" else tmp_path) in line


def test_a_fault_in_a_users_module_is_one_line_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "from dataclasses import replace\n"
        "import tiny, torch\n"
        "class Moody(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        if self.training: raise KeyError('my mistake')\n"
        "        return super().forward(x)\n"
        "task = replace(tiny.task(), large=lambda: Moody(8, 3))\n"
    )
    said = refused(kitestring("compare", f"{tmp_path / 'mine.py'}:task", "--out", tmp_path / "o"))
    assert "KeyError" in said
    assert "my mistake" in said


def test_needs_are_named() -> None:
    import tiny

    whole = tiny.task(pool=False, split=False)
    names = {"small", "large"}
    lacking = {m.name: missing(whole, names, m.about) for m in shown()}
    assert lacking["fedavg"] is lacking["device_only"] is lacking["pooled"] is None
    for name in ("cloud_only", "shipped", "cascade", "early_exit", "coda"):
        assert "a pool" in str(lacking[name])
    for name in ("splitnn", "fedgkt"):
        assert "differentiable features" in str(lacking[name])
    recorded = {m.name: missing(tiny.task("recorded"), names, m.about) for m in shown()}
    can = {name for name, lack in recorded.items() if lack is None}
    assert can == {"cloud_only", "device_only", "cascade"}


def test_every_collaboration_gets_as_many_trials_as_it_is_given() -> None:
    for count in (1, 2, 5):
        rates = tuple(0.1 * (i + 1) for i in range(count))
        budget = Budget(4, 2, 4, "sgd", rates, 6, 4, 8, "adam", rates, 8, 0.2)
        tried = {name: method.trials(budget) for name, method in METHODS.items()}
        assert {len(found) for found in tried.values()} == {count}
        assert all(len(set(found)) == count for found in tried.values()), "trials must differ"


def test_orders_are_plain_values() -> None:
    order = Order(task="digits", only=("fedavg",))
    assert Order(**json.loads(json.dumps(order.__dict__)) | {"only": ("fedavg",)}) == order
