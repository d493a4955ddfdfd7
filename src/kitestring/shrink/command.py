"""`kitestring shrink`: what of a task's models fits a device, and what that costs whom."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitestring import asked
from kitestring.errors import KitestringError
from kitestring.extras import need

if TYPE_CHECKING:
    from kitestring.comparison.order import Order
    from kitestring.shrink.bench import Bench
    from kitestring.shrink.budget import Budget
    from kitestring.shrink.personal import Gained, How, Missing
    from kitestring.shrink.results import Found
    from kitestring.shrink.study import Study

EXAMPLE = 'kitestring shrink digits --profile raspberry-pi-4 --budget "100kB, 1ms"'
UNMET = 3
"""The exit status where not all that was asked for is there."""
HOW = ("last", "adapters")


def add(commands: Any) -> None:
    """Registers the command with argparse's subparsers."""
    shrink = commands.add_parser(
        "shrink",
        help="find the smallest model that is good enough for a device, and pack it",
        description="Search combinations of distilling, pruning, quantising and width for a "
        "device: the front of quality, size and time, whom each costs what, and the choice as a "
        "signed package, measured again in the device's runtime. Exit status 3: nothing meets the "
        "budget, or the choice cannot be personalised.",
    )
    asked.add_task(shrink)
    what = shrink.add_argument_group("the search")
    what.add_argument(
        "--profile", default="phone", metavar="NAME",
        help="a size class (phone), a device of `kitestring measure --profiles`, or a profile file",
    )  # fmt: skip
    what.add_argument(
        "--budget", default="", metavar="LIMITS",
        help='what a model may take, as in "1MB, 5ms, p95 8ms, 64MB memory": its file, the median '
        "time of a request, the peak of memory (memory: what the profile has)",
    )  # fmt: skip
    what.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds (default 1)")
    what.add_argument(
        "--personal", choices=HOW,
        help="then train a part of the choice on each user's device, its last layer or low-rank "
        "adapters beside every linear layer; say who gains, and pack that too (not done)",
    )  # fmt: skip
    run = shrink.add_argument_group("the run")
    run.add_argument("--out", type=Path, metavar="DIR", help="where to keep it (runs/shrink-TASK)")
    run.add_argument(
        "--key", type=Path, metavar="FILE",
        help="signs the package (kitestring.key, or one that is made in the folder)",
    )  # fmt: skip
    run.add_argument(
        "--resume", action="store_true",
        help="go on with a search that was interrupted, or judge by another budget or profile, or "
        "personalise what was found",
    )  # fmt: skip
    run.add_argument("--fresh", action="store_true", help="start over, whatever is there")
    run.add_argument("--workers", type=int, metavar="N", help="processes (one for each core)")


def run(given: argparse.Namespace, command: str) -> int:
    """Prints the front, and writes the study, models, front.json, .svg, .png, report.html,
    choice.kite and, where it is asked for, personal.kite. 3 where nothing meets the budget, or the
    choice cannot be personalised. Raises `KitestringError`."""
    need("shrinking", "torch", "onnx", "rich", "matplotlib")
    from kitestring.comparison import forks
    from kitestring.comparison.assemble import cores
    from kitestring.comparison.order import Order
    from kitestring.shrink.budget import parse

    # What can be wrong with names is told now, not after the work.
    budget = parse(given.budget)
    order = Order(
        task=given.task or "digits", csv=asked.table(given), user=given.user or "",
        target=given.target or "", users=given.users, seeds=given.seeds, trials=1,
        profile=given.profile,
    )  # fmt: skip
    asked.check_run(given)
    folder = given.out or Path("runs") / f"shrink-{order.title}"
    workers = given.workers or cores()
    if workers > 1:
        forks.begin()
    return _search(order, budget, folder, workers, given, command)


def _search(
    order: Order, budget: Budget, folder: Path, workers: int, given: argparse.Namespace,
    command: str,
) -> int:  # fmt: skip
    from rich.console import Console

    from kitestring.package import keys
    from kitestring.report.terminal import indented
    from kitestring.shrink import kept, page, personal, picture, show
    from kitestring.shrink.bench import Bench
    from kitestring.shrink.package import FILE, KEY, packed
    from kitestring.shrink.progress import Progress
    from kitestring.shrink.search import search
    from kitestring.shrink.study import claimed

    bench = Bench(order, folder)
    _ = bench.task  # what is wrong with it is told before the folder is touched
    key = given.key or Path(KEY)
    if given.key is not None or key.exists():
        keys.load(key)
    else:
        key = folder / KEY
    console = Console()
    with claimed(folder, order, given.resume, given.fresh) as begin:
        study = begin()
        with Progress("search") as progress:
            found = search(bench, budget, study, workers, progress, seconds=not given.resume)
        console.print(show.table(found))
        console.print(show.verdict(found))
        done = None
        for name in (FILE, personal.FILE):
            (folder / name).unlink(missing_ok=True)
        if found.choice is not None:
            if not key.exists():
                keys.create(key)
                console.print(f"Made a key that signs: {key}", soft_wrap=True, highlight=False)
            chosen, large = found.choice.candidate, found.scale.reference
            done = packed(bench, chosen, large, key, folder / FILE)
            console.print(show.remeasured(found, done))
        gained = None
        if given.personal:
            gained = _personal(bench, found, given.personal, key, folder, study)
            console.print(show.personalised(found, gained))
        console.print("")
        for line in show.basis(found.scale):
            console.print(indented(line))
        kept.write(found, done, gained, folder, command)
        picture.draw(found, f"{found.task} on {found.scale.device.name}", folder)
        page.write(found, done, gained, folder / "report.html", command)
    made = [name for name in (FILE, personal.FILE) if (folder / name).exists()]
    names = ", ".join([*made, "report.html", "front.json"])
    console.print(f"\nKept: {folder.resolve()}/{names}", soft_wrap=True, highlight=False)
    return UNMET if done is None or isinstance(gained, personal.Missing) else 0


def _personal(
    bench: Bench, found: Found, how: How, key: Path, folder: Path, study: Study
) -> Gained | Missing:
    """Whatever is wrong with it, the choice is packed already: what was found is not lost."""
    from kitestring.shrink import personal
    from kitestring.shrink.progress import Progress

    if found.choice is None:
        return personal.Missing(how, "nothing meets the budget")
    path = folder / personal.FILE
    try:
        with Progress("personal") as progress:
            return personal.personal(bench, found.choice.candidate, how, key, path, study, progress)
    except KitestringError as problem:
        path.unlink(missing_ok=True)
        return personal.Missing(how, str(problem))
