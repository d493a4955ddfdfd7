"""Plain torch, well written: two single-threaded processes, each with one module that it reuses.

    python benchmarks/simulation/sequential.py WORKLOAD [--seconds 6] [--rounds 3] [--check N]

Weights are loaded in place and summed in shared memory; SGD steps all parameters at once; of a
round's devices, the one with the most rows left goes to the process that has least to do.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import Any

import models
import numpy as np
import torch
from contender import arguments, descend, finish
from torch import Tensor
from torch import multiprocessing as mp
from workloads import WORKLOADS, Workload, cohort, rows, sizes

PROCESSES = 2


def work(name: str, line: Connection, start: list[Tensor], total: list[Tensor]) -> None:
    """Train the devices that come down the line from `start`, sum the weighted ends in `total`."""
    torch.set_num_threads(1)
    w, module, loss = WORKLOADS[name], models.make(name), models.loss(name)
    weights = list(module.parameters())
    while (devices := line.recv()) is not None:
        torch._foreach_zero_(total)
        for device in devices:
            with torch.no_grad():
                torch._foreach_copy_(weights, start)
            x, y = rows(w, device)
            descend(module, loss, x, y, w)
            with torch.no_grad():
                torch._foreach_add_(total, weights, alpha=float(len(x)))
        line.send(None)


def dealt(w: Workload, devices: Any) -> list[list[int]]:
    """Largest first, each to whoever has the fewest rows so far."""
    parts: list[list[int]] = [[] for _ in range(PROCESSES)]
    loads = np.zeros(PROCESSES, np.int64)
    for device in sorted(devices.tolist(), key=lambda i: -sizes(w)[i]):
        least = int(loads.argmin())
        parts[least].append(device)
        loads[least] += sizes(w)[device]
    return parts


def main() -> None:
    w, clock = arguments(__doc__)
    mp.set_sharing_strategy("file_system")
    module, context = models.make(w.name), mp.get_context("spawn")
    shared = [v.detach().clone().share_memory_() for v in module.parameters()]
    lines, totals = [], []
    for _ in range(PROCESSES):
        mine, theirs = context.Pipe()
        totals.append([torch.zeros_like(v).share_memory_() for v in shared])
        job = (w.name, theirs, shared, totals[-1])
        context.Process(target=work, args=job, daemon=True).start()
        lines.append(mine)
    turn, more = 0, True
    clock.start()
    while more:
        devices = cohort(w, turn)
        for line, part in zip(lines, dealt(w, devices), strict=True):
            line.send(part)
        for line in lines:
            line.recv()
        for v, *parts in zip(shared, *totals, strict=True):
            torch.div(torch.stack(parts).sum(0), float(sizes(w)[devices].sum()), out=v)
        turn += 1
        more = clock.lap()
    for line in lines:
        line.send(None)
    names = [name for name, _ in module.named_parameters()]
    finish(w, clock, lambda: dict(zip(names, shared, strict=True)))


if __name__ == "__main__":
    main()
