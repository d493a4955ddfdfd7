"""The comparison tables of the built-in tasks.

    python benchmarks/tables.py [digits qmnist ...]   -> benchmarks/results/TASK.txt

Each file is what `kitestring compare TASK` prints, the command on top, and the time it took below;
the whole run is kept in runs/TASK. The README's table and plot are those of digits.
With KITESTRING_DATA set, data is read from there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from kitestring.comparison.compare import load
from kitestring.report import page
from kitestring.report.prices import load as load_prices

ROOT = Path(__file__).parents[1]
TASKS = ("digits", "qmnist", "movielens", "shakespeare", "livestream", "assistant")


def main() -> None:
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    for task in sys.argv[1:] or TASKS:
        command = ["kitestring", "compare", task]
        started = time.monotonic()
        found = subprocess.run(
            [sys.executable, "-m", "kitestring.cli", *command[1:], "--fresh"],
            cwd=ROOT,
            env={**os.environ, "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.monotonic() - started
        table = found.stdout.split("\nReport:")[0].rstrip()
        text = (
            f"$ {' '.join(command)}\n{table}\n\n"
            f"{seconds:.0f} s on {os.cpu_count()} cores, commit {commit.strip()}\n"
        )
        (ROOT / "benchmarks" / "results" / f"{task}.txt").write_text(text)
        print(text, flush=True)
        if task == "digits":
            page.write_plot(load(ROOT / "runs" / task), load_prices(), ROOT / "docs" / "digits.svg")


if __name__ == "__main__":
    main()
