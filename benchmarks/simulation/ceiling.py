"""What the machine could do at most: matrix products of the best size, two processes at once.

    python benchmarks/simulation/ceiling.py WORKLOAD

Two single-threaded processes multiply square matrices at the same time; the best sum of both over
the sizes, divided by the useful operations of an average device of the workload.
"""

from __future__ import annotations

import json
import time
from multiprocessing.synchronize import Barrier

import torch
from contender import arguments
from torch import multiprocessing as mp
from workloads import sizes

PROCESSES, SIZES, SECONDS = 2, (256, 384, 512, 768, 1024), 0.3


def speed(size: int) -> float:
    """Operations a second."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = torch.mm(a, b)
    started, products = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < SECONDS:
        torch.mm(a, b, out=out)
        products += 1
    return products * 2 * size**3 / spent


def work(together: Barrier, found: mp.SimpleQueue) -> None:
    torch.set_num_threads(1)
    speeds = []
    for size in SIZES:
        together.wait()
        speeds.append(speed(size))
    found.put(speeds)


def main() -> None:
    w, _ = arguments(__doc__)
    context = mp.get_context("spawn")
    together, found = context.Barrier(PROCESSES), context.SimpleQueue()
    for _ in range(PROCESSES):
        context.Process(target=work, args=(together, found), daemon=True).start()
    both = [found.get() for _ in range(PROCESSES)]
    best = max(sum(speeds) for speeds in zip(*both, strict=True))
    said = {"updates_per_s": best / (w.flops * float(sizes(w).mean())), "gflops": best / 1e9}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
