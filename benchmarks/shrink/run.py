"""Every way from the large model to a small one: quality, size, time, memory and what it costs.

    KITESTRING_DATA=DIR python benchmarks/shrink/run.py [images text weights] [--write]

Work that was done is found again under .bench/shrink; the large language model is trained once
(hours: language.py) and kept in the cache. --write keeps the tables in results/shrink.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import images
import numpy as np
import others
import text
import timed
import weights
from jobs import Job, work_off
from language import SMALL, Recipe, held_out, large

from kitestring import units
from kitestring.measure.bench import Pair, machine
from kitestring.tasks.llama import Llama

PAGE = Path(__file__).resolve().parents[1] / "results" / "shrink.md"
PARTS = ("images", "text", "weights")
HEADS = ("method", "quality", "file", "a request", "float's time", "peak memory", "CPU to make")
IMAGES = """\
Small models of pictures: mean accuracy over device users ± standard deviation over seeds, equal
steps; the last column is the small model alone with as many operations as the row's."""
TEXT = """\
A small language model of Shakespeare (2 layers of 64), taught by one of 4 layers of 192 or left
alone: test perplexity a character. Accepted: the chance that the large model keeps a character that
the small one drafts, after given text and after its own; then what it writes itself, in nats a
character by the large model, and how much more that is than for the large model's own."""
WEIGHTS = """\
The same model by each method, theirs on the same rows: quality (perplexity a character; accuracy
over device users) ± standard deviation over draws of calibration rows and steps; the file, the
median of a request of one row on one thread, that time over the float file's (median of runs in
turn, and the middle eight tenths), memory above ONNX Runtime's own, and CPU seconds to make it."""


def weight_tables() -> list[str]:
    others.install()
    seeds = range(weights.SEEDS)
    names = ["float32", *weights.PRUNED, *weights.QUANTISED]
    of_text = {n: [Job("weights:of_text", {"name": n, "seed": s}) for s in seeds] for n in names}
    of_text |= {n: [Job("others:of_text", {"name": n})] for n in others.TEXT}
    cnn = ["float32", *weights.CNN]
    of_images = {n: [Job("weights:of_images", {"name": n, "seed": s}) for s in seeds] for n in cnn}
    of_images |= {n: [Job("others:of_images", {"name": n, "seed": s}) for s in seeds]
                  for n in others.IMAGES}  # fmt: skip
    images.teacher("qmnist")
    every = [job for jobs in (*of_text.values(), *of_images.values()) for job in jobs]
    results = dict(zip((job.path for job in every), work_off(every), strict=True))
    picture = images.pool("qmnist")[0][:1].numpy()
    line = held_out("test", 1)[:, :-1].numpy()
    return [
        _weight_table({n: [results[j.path] for j in js] for n, js in jobs.items()}, x, shown)
        for jobs, x, shown in ((of_text, line, "{:.4f}"), (of_images, picture, "{:.2%}"))
    ]


def _weight_table(
    found: Mapping[str, Sequence[dict[str, Any]]], x: np.ndarray[Any, Any], shown: str
) -> str:
    files = {n: rows[0]["file"] for n, rows in found.items() if "file" in rows[0]}
    took = timed.timed(files, x)
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name, rows in found.items():
        quality = [r["quality"] for r in rows]
        told = shown.format(np.mean(quality))
        if len(quality) > 1 and np.std(quality) > 0:
            told += f" ±{shown.format(np.std(quality, ddof=1))}"
        cells = [name, told, *_runtime(took.get(name))]
        cells.append("-" if name == "float32" else f"{np.mean([r['seconds'] for r in rows]):.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _runtime(pair: Pair | None) -> list[str]:
    if pair is None:
        return ["-"] * 4
    one, share = pair.subject, pair.wall
    assert one.wall is not None
    assert one.size is not None
    assert one.peak is not None
    ratio = "1" if share is None else f"{share.median:.2f} ({share.low:.2f}–{share.high:.2f})"
    return [units.size(one.size), units.duration(one.wall.p50), ratio, units.size(one.peak)]


def models() -> str:
    """What the models of the first two parts take, whoever taught them."""
    lines = ["| model | file | a request | peak memory |", "|---|---|---|---|"]
    line = held_out("test", 2)[:, :-1]
    every = [(f"{case}, {which}", made, images.pool(case)[0][:2])
             for case in images.CASES
             for which, made in (("large", images.teacher(case)),
                                 ("small", images.student(case, 0)))]  # fmt: skip
    every += [("text, large", large(Recipe())[0], line), ("text, small", Llama(SMALL), line)]
    for name, module, x in every:
        path = weights.kept(f"model {name}", weights.file_of(module, x))
        size, median, _, peak = _runtime(timed.timed({name: path}, x[:1].numpy())[name])
        lines.append(f"| {name} | {size} | {median} | {peak} |")
    return "\n".join(lines)


def page(parts: Sequence[str]) -> str:
    large(Recipe())
    pieces = [f"# From large to small\n\n{machine()}, one thread; `make bench-shrink`."]
    if "images" in parts or "text" in parts:
        pieces += [f"## The models\n\n{models()}"]
    if "images" in parts:
        tables = [f"### {case}\n\n{images.table(case)}" for case in images.CASES]
        pieces += [f"## Distilling, pictures\n\n{IMAGES}", *tables]
    if "text" in parts:
        text.outputs()
        pieces += [f"## Distilling, text\n\n{TEXT}\n\n{text.table()}"]
    if "weights" in parts:
        of_text, of_images = weight_tables()
        pieces += [f"## Pruning and quantising\n\n{WEIGHTS}", f"### Language model\n\n{of_text}",
                   f"### CNN of qmnist\n\n{of_images}"]  # fmt: skip
    return "\n\n".join(pieces) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    found = page(given.parts or PARTS)
    print(found)
    if given.write:
        PAGE.write_text(found)
