"""The README's commands do what it says, here with fewer seeds, trials and users."""

from __future__ import annotations

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kitestring.comparison.compare import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("kitestring ")
]
QUICK = ["--seeds", "1", "--trials", "1"]


def run(words: list[str], where: Path) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "kitestring.cli", *words],
        capture_output=True, text=True, cwd=where, timeout=500,
        env={**os.environ, "COLUMNS": "100"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return found.stdout


def words(start: str) -> list[str]:
    """The README's command that starts so, without the program's name."""
    found = [line for line in COMMANDS if line.startswith(f"kitestring {start}")]
    assert len(found) == 1, COMMANDS
    return shlex.split(found[0])[1:]


def test_all_commands_are_known_here() -> None:
    starts = (
        *("compare digits", "compare --csv", "compare tests/examples", "report", "tasks"),
        *("keys", "pack", "show", "measure", "cut", "export", "shrink"),
    )
    for line in COMMANDS:
        assert line.removeprefix("kitestring ").startswith(starts), line


def test_the_tasks_are_listed(tmp_path: Path) -> None:
    listed = [line.split()[0] for line in run(words("tasks"), tmp_path).splitlines()]
    table = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert listed == table


def test_a_package_is_made_shown_and_measured(tmp_path: Path) -> None:
    """The README's comments say what else a command takes; a shell leaves them out."""
    for start in ("keys", "pack", "show"):
        said = run(_first(start), tmp_path)
    assert "Signed by a trusted key, whole, and runs here" in said
    assert "plan reply train" in said
    assert "step" in run([*_first("measure digits"), "--runs", "3"], tmp_path)


def _first(start: str) -> list[str]:
    line = next(line for line in COMMANDS if line.startswith(f"kitestring {start}"))
    return shlex.split(line, comments=True)[1:]


def test_profiles_cuts_and_exports(tmp_path: Path) -> None:
    assert "raspberry-pi-4" in run(_first("measure --profiles"), tmp_path)
    assert "Fastest:" in run(_first("cut"), tmp_path)
    run(_first("export"), tmp_path)
    assert list(tmp_path.glob("*.onnx"))


def test_digits_under_limits(tmp_path: Path) -> None:
    said = run([*words("compare digits --limit"), *QUICK, "--users", "16"], tmp_path)
    assert "Use " in said
    assert "limit: no data up" in said
    page = Path(said.split("Report: ")[1].strip())
    assert page == tmp_path / "runs" / "digits" / "report.html"
    again = run(["report", "runs/digits", "--limit", "100kB/day"], tmp_path)
    assert "Use " in again


@pytest.mark.slow
def test_what_fits_is_found_and_compared(tmp_path: Path) -> None:
    few = ["--users", "16"]
    run([*words("shrink"), *few], tmp_path)
    assert (tmp_path / "runs" / "shrink-digits" / "choice.kite").exists()
    said = run([*_first("compare digits --shrunk"), *QUICK, *few], tmp_path)
    assert "int8" in said


def test_the_readmes_own_task(tmp_path: Path) -> None:
    path = ROOT / "tests" / "examples" / "my_task.py"
    assert f"```python\n{path.read_text().strip()}\n```" in README
    assert len(path.read_text().splitlines()) <= 40
    command = words("compare tests/examples")
    run([*command, *QUICK, "--out", str(tmp_path)], ROOT)
    comparison = load(tmp_path)
    ran = {row.name for row in comparison.rows if row.missing is None}
    assert {"device_only", "fedavg", "splitnn", "fedgkt", "coda", "pooled"} <= ran
    scores = {r.name: np.nanmean(r.seeds[0].scores) for r in comparison.rows if r.seeds}
    assert scores["pooled"] > scores["device_only"]  # more data of the same kind helps


@pytest.mark.parametrize("kind", ["label", "number"])
def test_a_table_without_code(tmp_path: Path, kind: str) -> None:
    """60 customers, churn (or spend) follows from two columns and a bit of the customer."""
    dice = np.random.default_rng(0)
    with (tmp_path / "visits.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["customer", "age", "plan", "visits", "churned"])
        for customer in range(60):
            own = dice.normal(0, 0.5)
            for _ in range(20):
                age, plan, visits = dice.integers(18, 80), dice.choice(["a", "b"]), dice.poisson(4)
                score = (plan == "a") + 0.5 * (4 - visits) + own + dice.normal(0, 0.5)
                target = ("yes" if score > 0 else "no") if kind == "label" else f"{score:.3f}"
                out.writerow([f"c{customer}", age, plan, visits, target])
    run([*words("compare --csv"), *QUICK], tmp_path)
    comparison = load(tmp_path / "runs" / "visits")
    rows = {row.name: row for row in comparison.rows}
    if kind == "label":
        assert comparison.metric == "accuracy"
        assert all(row.missing is None for row in rows.values())
        # About 60 % churn or not; the rule above is easy to learn from 1,200 rows.
        assert np.nanmean(rows["pooled"].seeds[0].scores) > 0.75
    else:
        assert comparison.metric == "RMSE"
        assert not comparison.higher_is_better
        assert "confidence" in str(rows["cascade"].missing)
        # Always answering the mean is wrong by the standard deviation, about 1.3 here.
        assert np.nanmean(rows["pooled"].seeds[0].scores) < 1.0
