"""What came out, as tables of text and as JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import peers

from kitestring import units
from kitestring.measure.bench import machine

RESULT = peers.ROOT / "benchmarks" / "results" / "devices.md"


@dataclass(frozen=True)
class Results:
    """`found`: by case, the contenders' figures. `exports`: seconds by model, what and train.
    `sizes`: bytes by export and contender. `installed`: bytes by packages."""

    cases: Sequence[cases.Case]
    found: Mapping[str, Sequence[Any]]
    exports: Sequence[Mapping[str, Any]]
    sizes: Mapping[str, Mapping[str, int]]
    installed: Mapping[str, Any]
    passes: int


def title(measured: Any) -> str:
    return {"torch": "plain torch", "kitestring": "Kitestring"}.get(
        measured.name, measured.label.rpartition(" ")[0]
    )


def pooled(passes: Sequence[Sequence[float]]) -> list[float]:
    return [value for one in passes for value in one]


def spread(values: Sequence[float]) -> str:
    """The median, and the 10th and 90th percentile."""
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
    return f"{units.duration(middle)} ({units.duration(low)} to {units.duration(high)})"


def leads(measured: Any, own: Any) -> list[float]:
    """How many times as fast Kitestring was, run by run: 10th percentile, median, 90th."""
    if measured is own or own.failed or measured.failed:
        return []
    shares = np.array(pooled(measured.walls)) / np.array(pooled(own.walls))
    return [float(f"{q:.4g}") for q in np.quantile(shares, (0.1, 0.5, 0.9))]


def lead(measured: Any, own: Any) -> str:
    if not (found := leads(measured, own)):
        return ""
    low, middle, high = found
    return f"{middle:.2f}× ({low:.2f} to {high:.2f})"


def mebibytes(values: Sequence[int]) -> str:
    return f"{statistics.median(values) / 2**20:,.0f}"


def owned(found: Sequence[Any]) -> Any:
    (own,) = [m for m in found if m.name == "kitestring"]
    return own


def median(measured: Any) -> float | None:
    """Seconds, of all passes."""
    return float(np.median(pooled(measured.walls))) if measured.walls else None


def rows(results: Results, case: cases.Case) -> list[list[str]]:
    found = results.found[case.name]
    own = owned(found)
    return [[case.title if m is found[0] else "", *cells(m, own)] for m in found]


def cells(m: Any, own: Any) -> list[str]:
    if m.failed:
        return [title(m), m.failed, *[""] * 5]
    return [
        title(m), spread(pooled(m.walls)), lead(m, own), mebibytes(m.net), mebibytes(m.all),
        units.duration(statistics.median(m.ready)), "" if m.name == "torch" else f"{m.off:.0e}",
    ]  # fmt: skip


HEAD = [
    "", "", "time", "Kitestring is", "peak MiB above imports", "peak MiB in all", "first run",
    "difference",
]  # fmt: skip


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in body)]


def exports(results: Results) -> list[str]:
    """A row for each export; what the peer needs two steps for is added up."""
    named = {(e["model"], e["what"], e["train"]): e["seconds"] for e in results.exports}

    def seconds(model: str, train: str, *what: str) -> str:
        each = [named[model, w, train] for w in what]
        return units.duration(sum(map(statistics.median, each)))

    body = []
    for model in dict.fromkeys(c.model for c in results.cases):
        for train in dict.fromkeys(c.train for c in results.cases if c.model == model):
            peer = ("onnx_forward", "artifacts") if train else ("onnx_predict",)
            size = results.sizes[f"{model}-{train or 'predict'}"]
            body.append([
                f"{model}, {f'train {cases.TRAINED[train]}' if train else 'predict'}",
                seconds(model, train, "kitestring"), seconds(model, train, *peer),
                *(units.size(size[k]) if k in size else "" for k in peers.NAMES),
            ])  # fmt: skip
    head = ["", "Kitestring exports in", "the runtime's example in", "torch file", "package",
            "the runtime's files"]  # fmt: skip
    return table(head, body)


def installs(results: Results) -> list[str]:
    named = {
        "torch+numpy": "plain torch",
        "numpy+onnxruntime+cryptography+safetensors": "Kitestring on a device",
        "onnxruntime": "ONNX Runtime",
        "onnxruntime-training+torch": "onnxruntime-training in Python",
    }
    body = [
        [named[k], units.size(v["bytes"]), ", ".join(
            f"{n} {v['versions'][n]} ({units.size(b)})"
            for n, b in sorted(v["each"].items(), key=lambda item: -item[1])[:4]
        )]
        for k, v in results.installed.items()
    ]  # fmt: skip
    return table(["", "on disk, with all it needs", "the largest of it"], body)


def show(results: Results) -> str:
    lines: list[str] = []
    for model in dict.fromkeys(c.model for c in results.cases):
        body = [r for c in results.cases if c.model == model for r in rows(results, c)]
        lines += ["", f"## {model}: {cases.MODELS[model]}", "", *table(HEAD, body)]
    lines += ["", "## Exports and files", "", *exports(results)]
    lines += ["", "## Installed", "", *installs(results)]
    return "\n".join(lines)


ABOUT = """
One thread on one core, float32. Every contender is a fresh process; they take turns, run for run,
in alternating order, in each of {passes} passes. Times are the median (10th to 90th percentile) of
wall clock; "Kitestring is" so many times as fast, run by run. A training run is {steps} steps of
SGD: its time is divided by that, and holds what draws and gathers batches and what a fit does once.
Memory is the median peak of the process; what is resident after the imports is left out of the
first figure. "First run" is from there until one run is done. "Difference" is the largest of any
output, or of any weight after {checked} steps, from torch's, as a share of the largest output or
change of a weight.

Plain torch is an eager module, `loss.backward()` and `torch.optim.SGD`, or the module under
`torch.inference_mode()`. Kitestring reads a signed package and calls `OrtCompute.fit` and
`predict`, as a device does. ONNX Runtime predicts as in its tutorial (`torch.onnx.export` with
dynamo, `InferenceSession.run`) and trains as in its published example of training on a device
(`generate_artifacts`, `Module`, `Optimizer`), in onnxruntime-training 1.19.2. That is its last
release, of 2024; it needs an older onnx, its Python package imports torch (which is part of its
memory in all, and not of what is above imports), and its gradients need the older exporter of
torch. It takes a batch's statistics for frozen BatchNorm too, without a word: its ResNet-8 has
BatchNorm written out as a product and a sum. Its files are four: training, evaluation and optimiser
graphs, and a checkpoint. torch's file holds weights alone: the module's code travels apart.
"""


def write(results: Results) -> None:
    commit = subprocess.check_output(
        ["git", "rev-parse", "--short", "HEAD"], cwd=peers.ROOT, text=True
    )
    every = [m for found in results.found.values() for m in found]
    labels = ", ".join(dict.fromkeys(m.label for m in every))
    about = ABOUT.format(passes=results.passes, steps=cases.STEPS, checked=cases.CHECKED)
    top = [
        "# Devices: training and predicting without torch",
        "",
        f"Commit {commit.strip()}; {machine()}; {labels}; `python benchmarks/devices/run.py "
        "--write`.",
    ]
    RESULT.write_text("\n".join([*top, about.rstrip(), show(results)]) + "\n")
    raw = {
        "machine": machine(),
        "cases": [
            kept(m, own)
            for found in results.found.values()
            for own in [owned(found)]
            for m in found
        ],
        "exports": list(results.exports),
        "sizes": dict(results.sizes),
        "installed": dict(results.installed),
    }
    RESULT.with_suffix(".json").write_text(json.dumps(raw, indent=1) + "\n")


def kept(measured: Any, own: Any) -> dict[str, Any]:
    """Of all runs the quantiles, by pass."""

    def quantiles(passes: Sequence[Sequence[float]]) -> list[dict[str, float]]:
        at = (0.0, 0.1, 0.5, 0.9, 1.0)
        return [
            {"runs": len(p), **{f"{q:g}": float(f"{np.quantile(p, q):.4g}") for q in at}}
            for p in passes
        ]

    plain = {k: v for k, v in vars(measured).items() if k not in ("walls", "cpus")}
    times = {"wall": quantiles(measured.walls), "cpu": quantiles(measured.cpus)}
    return {**plain, "median": median(measured), "lead": leads(measured, own), **times}
