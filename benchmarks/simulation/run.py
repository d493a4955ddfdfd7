"""Client updates a second: Kitestring beside plain torch, Flower and pfl-research.

    make bench-simulation          (or: python benchmarks/simulation/run.py [--passes 2] ...)

Every contender trains the same devices on the same rows with two single-threaded processes. Each
run is a fresh process; contenders take turns, in another order on each workload and in each pass.
Virtual environments are made in .bench on first use. A run of everything is kept in
benchmarks/results/simulation.md and simulation.json, a part of it in .bench.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BENCH = ROOT / ".bench"
CONSTRAINTS = ROOT / "constraints.txt"


@dataclass(frozen=True)
class Contender:
    title: str
    venv: str
    words: tuple[str, ...]  # after python

    def command(self, workload: str, options: Sequence[str]) -> list[str]:
        return [str(BENCH / self.venv / "bin" / "python"), *self.words, workload, *options]


def _script(name: str) -> str:
    return str((HERE / name).relative_to(ROOT))


CONTENDERS = {
    "kitestring": Contender("Kitestring", "kitestring", (_script("kite.py"),)),
    "sequential": Contender("plain torch", "kitestring", (_script("sequential.py"),)),
    "flower": Contender("Flower", "flower", (_script("flower_peer.py"),)),
    "pfl": Contender(
        "pfl-research", "pfl",
        ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         _script("pfl_peer.py")),
    ),
    "ceiling": Contender("ceiling", "kitestring", (_script("ceiling.py"),)),
}  # fmt: skip


# --- environments


def pinned(*names: str) -> list[str]:
    """Those packages in the versions that Kitestring is tested with."""
    lines = CONSTRAINTS.read_text().splitlines()
    return [line for line in lines if line.partition("==")[0] in names]


def installs(venv: str) -> list[list[str]]:
    """What pip is called with, in turn."""
    torch = pinned("torch", "numpy")
    if venv == "flower":
        return [[*torch, "flwr[simulation]==1.41.0", "ray==2.55.1"]]
    if venv == "pfl":
        return [[*torch, "pfl[pytorch]==0.6.0"]]
    kept = ["-c", str(CONSTRAINTS)]
    return [[*kept, "hatchling"], [*kept, "--no-build-isolation", "-e", f"{ROOT}[compare]"]]


def environment(venv: str, console: Console) -> None:
    """Make it, unless it is there as it is wanted."""
    home, wanted = BENCH / venv, installs(venv)
    texts = [sys.version, json.dumps(wanted)]
    if venv == "kitestring":
        texts += [CONSTRAINTS.read_text(), (ROOT / "pyproject.toml").read_text()]
    stamp = home / f"made-{hashlib.sha256(''.join(texts).encode()).hexdigest()[:12]}"
    if stamp.exists():
        return
    console.print(f"Making .bench/{venv} (a minute or two) ...")
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-qq"]
    for words in wanted:
        subprocess.run([*pip, "install", *words], check=True)
    stamp.touch()


# --- one run


def processes() -> dict[int, tuple[int, int]]:
    """Of each process its parent and when it was started: a number may be given again."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                found[int(entry.name)] = int(stat[1]), int(stat[19])
    return found


def memory(process: int) -> int:
    """Bytes; of a page that several processes share, each has its part."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class Watch(threading.Thread):
    """Peak memory of a process and all below it; in the end, none of them is left."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()
        self._seen = {root: processes()[root]}

    def run(self) -> None:
        pause = 0.0
        while not self._done.wait(pause):
            started = time.monotonic()
            self._look()
            self.peak = max(self.peak, sum(memory(p) for p in self._seen))
            pause = max(0.25, 20 * (time.monotonic() - started))  # looking takes time from them

    def _look(self) -> None:
        """Who is below, and who was once and lives on without its parent."""
        now = processes()
        inside = {p for p, (_, born) in self._seen.items() if now.get(p, (0, -1))[1] == born}
        while more := {p for p, (parent, _) in now.items() if parent in inside} - inside:
            inside |= more
        self._seen = {p: now[p] for p in inside}

    def end(self) -> None:
        self._done.set()
        self.join()
        self._look()
        for process in self._seen:
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)


@dataclass
class Run:
    contender: str
    workload: str
    turn: int
    peak_mib: float
    failed: str = ""
    said: dict[str, Any] = field(default_factory=dict)


def reason(errors: str) -> str:
    """The last exception that was told, or else the last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"\w(Error|Exception|Exit): \S", line)]
    return (told or lines or [""])[-1][:200]


def run(contender: str, workload: str, turn: int, options: Sequence[str], limit: float) -> Run:
    command = CONTENDERS[contender].command(workload, options)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        watch = Watch(process.pid)
        watch.start()
        failed = ""
        try:
            if status := process.wait(limit):
                failed = f"ended with {status}"
        except subprocess.TimeoutExpired:
            failed = f"took more than {limit:.0f} s"
        finally:
            watch.end()
            process.wait()
        out.seek(0), err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        why = reason(err.read())
    done = Run(contender, workload, turn, watch.peak / 2**20)
    if failed or not lines:
        done.failed = ": ".join(filter(None, (failed or "said nothing", why)))
    else:
        done.said = json.loads(lines[-1])
    return done


# --- what came out


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median, least and most."""
    middle = show(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({show(min(values))} to {show(max(values))})"


def short(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@dataclass
class Results:
    runs: list[Run]

    def speeds(self, contender: str, workload: str) -> dict[int, float]:
        """Updates a second by pass."""
        return {
            r.turn: r.said["updates_per_s"]
            for r in self.runs
            if (r.contender, r.workload) == (contender, workload) and not r.failed
        }

    def ratios(self, one: str, other: str, workload: str) -> list[float]:
        """How many times as fast `one` was, pass by pass."""
        a, b = self.speeds(one, workload), self.speeds(other, workload)
        return [a[turn] / b[turn] for turn in a if turn in b]

    def row(self, contender: str, workload: str) -> list[str]:
        title = CONTENDERS[contender].title
        mine = [r for r in self.runs if (r.contender, r.workload) == (contender, workload)]
        good = [r for r in mine if not r.failed]
        if not good:
            return [title, mine[0].failed, "", "", "", ""]
        speed = spread(list(self.speeds(contender, workload).values()), short)
        if len(good) < len(mine):
            speed += f", {len(mine) - len(good)} failed"
        if how := good[0].said.get("how", "").partition(":")[0]:
            title += f", {how}"
        lead = self.ratios("kitestring", contender, workload)
        share = self.ratios(contender, "ceiling", workload)
        if contender == "ceiling":
            return [title, speed, "", "", "", ""]
        return [
            title,
            speed,
            spread(lead, lambda v: f"{short(v)}×") if lead and contender != "kitestring" else "",
            f"{short(100 * statistics.median(share))}%" if share else "",
            f"{max(r.peak_mib for r in good):,.0f}",
            short(statistics.median(r.said["first_s"] for r in good)),
        ]

    def check(self, contender: str, workload: str) -> list[str]:
        """Of a run with --check, how far the weights are from the plain loop's."""
        (mine,) = [r for r in self.runs if (r.contender, r.workload) == (contender, workload)]
        title = CONTENDERS[contender].title
        if mine.failed:
            return [title, mine.failed, ""]
        return [title, *(f"{mine.said[what]:.2g}" for what in ("difference", "moved"))]

    def tables(self, check: bool) -> dict[str, tuple[list[str], list[list[str]]]]:
        """Of each workload, the head and the rows."""
        heads = {
            False: [
                "", "client updates/s", "Kitestring is", "of ceiling", "peak MiB", "first round, s"
            ],
            True: ["", "largest difference", "largest change of a weight"],
        }  # fmt: skip
        row = self.check if check else self.row
        names = dict.fromkeys(r.workload for r in self.runs)
        return {
            name: (
                heads[check],
                [
                    row(contender, name)
                    for contender in CONTENDERS
                    if any((r.contender, r.workload) == (contender, name) for r in self.runs)
                ],
            )
            for name in names
        }

    def packages(self) -> str:
        found: dict[str, str] = {}
        for r in self.runs:
            found |= r.said.get("packages", {})
        return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def caption(name: str) -> str:
    w = WORKLOADS[name]
    return (
        f"{name}: {w.about}; {w.cohort} of {w.devices} devices a round, {w.rows} rows each on "
        f"average, batch {w.batch}"
    )


def machine() -> str:
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.partition(":")[2].strip() for x in about if x.startswith("model name")), "CPU")
    total = int(Path("/proc/meminfo").read_text().split()[1]) / 2**20
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {total:.0f} GiB"


def page(results: Results, seconds: float, passes: int) -> str:
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    options = ["--seconds", f"{seconds:g}"]
    ran = dict.fromkeys(r.contender for r in results.runs)
    commands = [" ".join(CONTENDERS[name].command("W1", options)) for name in ran]
    gflops = [r.said["gflops"] for r in results.runs if "gflops" in r.said]
    ceiling = f" ({spread(gflops, short)} GFLOP/s)" if gflops else ""
    lines = [
        "# Simulation: client updates a second",
        "",
        f"Commit {commit.strip()}; {machine()}; Python {sys.version.split()[0]}; "
        f"{results.packages()}.",
        "",
        f"One local epoch of SGD in float32, two single-threaded workers, {passes} passes: the "
        "median, the least and the most of them. A pass gives the median round; the first round is "
        f"not counted. The ceiling is what matrix products of the best size would give{ceiling}. "
        "Memory is that of the whole process tree, shared pages counted once.",
    ]
    for name, (head, rows) in results.tables(False).items():
        lines += ["", f"## {caption(name)}", "", *(f"| {' | '.join(r)} |" for r in (head,))]
        lines += ["|" + "---|" * len(head), *(f"| {' | '.join(r)} |" for r in rows)]
    lines += ["", "All of it, and one workload of each contender:", "", "```sh"]
    lines += ["make bench-simulation", *(c.replace(f"{ROOT}/", "") for c in commands), "```", ""]
    return "\n".join(lines)


def show(results: Results, console: Console, check: bool) -> None:
    for name, (head, rows) in results.tables(check).items():
        table = Table(title=caption(name), title_justify="left", box=box.SIMPLE_HEAD)
        for i, title in enumerate(head):
            table.add_column(title, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--passes", type=int, default=2, help="%(default)s by default")
    parser.add_argument(
        "--workloads", choices=WORKLOADS, default=list(WORKLOADS), **several,
        help=", ".join(WORKLOADS),
    )  # fmt: skip
    parser.add_argument(
        "--contenders", choices=CONTENDERS, default=list(CONTENDERS), **several,
        help=", ".join(CONTENDERS),
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=6, help="of rounds a run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="at least (%(default)s)")
    parser.add_argument("--limit", type=float, default=400, help="seconds a run (%(default)s)")
    parser.add_argument(
        "--check", type=int, default=0, metavar="N",
        help="instead: hold the weights after N rounds against those of a plain loop",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    given, console = arguments(), Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # either way nobody is left behind
    names = [name for name in given.contenders if not (given.check and name == "ceiling")]
    options = ["--seconds", f"{given.seconds:g}", "--rounds", str(given.rounds)]
    passes = 1 if given.check else given.passes
    if given.check:
        options = ["--check", str(given.check)]
    for venv in dict.fromkeys(CONTENDERS[name].venv for name in names):
        environment(venv, console)
    results = Results([])
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, suppress(KeyboardInterrupt):
        task = progress.add_task("", total=passes * len(given.workloads) * len(names))
        for turn in range(passes):
            for at, workload in enumerate(given.workloads):
                first = (turn + at) % len(names)
                for name in names[first:] + names[:first]:
                    progress.update(task, description=f"pass {turn + 1}, {workload}, {name}")
                    done = run(name, workload, turn, options, given.limit)
                    results.runs.append(done)
                    progress.advance(task)
                    if done.failed:
                        progress.print(f"{workload}, {CONTENDERS[name].title}: {done.failed}")
                    elif not given.check:
                        speed = short(done.said["updates_per_s"])
                        progress.print(f"{workload}, {CONTENDERS[name].title}: {speed} updates/s")
    show(results, console, bool(given.check))
    if given.check or not results.runs:
        return
    whole = passes * len(WORKLOADS) * len(CONTENDERS)
    home = ROOT / "benchmarks" / "results" if len(results.runs) >= whole else BENCH
    (home / "simulation.md").write_text(page(results, given.seconds, passes))
    raw = {"machine": machine(), "runs": [asdict(r) for r in results.runs]}
    (home / "simulation.json").write_text(json.dumps(raw, indent=1) + "\n")
    console.print(f"Kept in {home.relative_to(ROOT)}/simulation.md and simulation.json")


if __name__ == "__main__":
    main()
