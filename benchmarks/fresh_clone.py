"""What a new user waits for: `make demo` and `make test` on a fresh clone.

    python benchmarks/fresh_clone.py [demo test]      -> benchmarks/results/fresh_clone.md

Wall time of each command; peak memory of the whole process tree (sum of resident
sets, sampled ten times a second from /proc; shared pages count in each process: an upper bound).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = os.sysconf("SC_PAGE_SIZE")


def tree_memory(root: int) -> int:
    """Resident bytes of a process and all below it."""
    parents, resident = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                resident[int(entry.name)] = int(stat[21]) * PAGE
                parents[int(entry.name)] = int(stat[1])
            except (OSError, IndexError):
                continue
    inside = {root}
    while more := {p for p, parent in parents.items() if parent in inside} - inside:
        inside |= more
    return sum(resident.get(p, 0) for p in inside)


def measure(command: list[str], where: Path) -> tuple[float, float, int]:
    """Seconds, peak GiB, exit status."""
    started, peak, done = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen(command, cwd=where, stdin=subprocess.DEVNULL)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, tree_memory(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    done.set()
    watcher.join()
    return time.monotonic() - started, peak / 2**30, status


def main() -> None:
    targets = sys.argv[1:] or ["demo", "test"]
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    lines = [
        "# A fresh clone",
        "",
        f"Commit {commit.strip()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; "
        "`python benchmarks/fresh_clone.py`.",
        "",
        "| command | wall time | peak memory of the process tree |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "kitestring"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        for name, target in {
            "install": "install",
            **dict(zip(targets, targets, strict=True)),
        }.items():
            command = ["make", ".venv/compare"] if target == "install" else ["make", target]
            seconds, peak, status = measure(command, clone)
            if status:
                raise SystemExit(f"{' '.join(command)} ended with {status}")
            label = "installing alone" if name == "install" else f"`make {target}`, installed"
            lines.append(f"| {label} | {seconds:.0f} s | {peak:.2f} GiB |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "results" / "fresh_clone.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
