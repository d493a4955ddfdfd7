"""When small CNNs are faster all at once (`vmap`) than one device after the other (`sequential`).

    python benchmarks/convolutions.py     -> benchmarks/results/convolutions.md

Sixteen devices of 40 images, two strided convolutions of growing width; processor time of one local
epoch, the two ways in turn, one thread. `auto` in kitestring.devices.fit.compute decides by these.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute, thread_per_process
from kitestring.devices.fit.programs import Program

ROOT = Path(__file__).parents[1]
DEVICES, IMAGES, RUNS = 16, 40, 7


class Small(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * channels, 10),
        )

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"out": self.layers(batch["x"])}


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs["out"], batch["y"], reduction="none")


def measure(channels: int) -> tuple[float, list[float]]:
    """Operations of a row, and how much longer `sequential` took than `vmap` in each pair."""
    program = Program("p", Small(channels), loss)
    dice, n = np.random.default_rng(0), np.full(DEVICES, IMAGES)
    x = dice.random((DEVICES, IMAGES, 1, 28, 28), dtype=np.float32)
    rows = {"x": Rows(x, n), "y": Rows(dice.integers(0, 10, (DEVICES, IMAGES)), n)}
    weights = Tree({k: np.repeat(a[None], DEVICES, 0) for k, a in program.initial().items()})
    key = np.arange(DEVICES, dtype=np.uint64)
    ways = [TorchCompute({"p": program}, how) for how in ("sequential", "vmap")]
    ratios = []
    for _ in range(1 + RUNS):
        spent = []
        for way in ways:
            started = time.process_time()
            way.fit("p", weights, rows, Recipe(0.01), key=key)
            spent.append(time.process_time() - started)
        ratios.append(spent[0] / spent[1])
    return program.flops(rows), ratios[1:]  # the first pair warms up


def main() -> None:
    thread_per_process()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    lines = [
        "# Convolutions: all at once or one by one",
        "",
        f"After commit {commit.strip()}, {os.cpu_count()} cores, Python {sys.version.split()[0]}; "
        "`python benchmarks/convolutions.py`.",
        "",
        "| channels | operations a row | sequential / vmap, median (min to max) |",
        "|---|---|---|",
    ]
    for channels in (4, 8, 16, 32, 64, 96):
        flops, ratios = measure(channels)
        spread = f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {channels}, {2 * channels} | {flops / 1e6:.2f} M | {spread} |")
        print(lines[-1], flush=True)
    (ROOT / "benchmarks" / "results" / "convolutions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
