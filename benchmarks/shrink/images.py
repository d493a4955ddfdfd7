"""Small image models, taught by a large one or left alone, on made-up and on real writers.

    KITESTRING_DATA=DIR python benchmarks/shrink/images.py

The rows of the pool users train, those of the device users test; the score is the mean over device
users of the accuracy on their own test rows, as in a comparison. Every method has the same steps.
Then the small model alone once more, with as many operations as the method had, the teacher's
among them: of response distillation its answer to each row once, since these are kept; of the
others, which need what it computes inside, at every step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jobs import KEPT, Job, work_off
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kitestring.compress.distil.attention import Attention
from kitestring.compress.distil.batches import rows
from kitestring.compress.distil.contrast import Contrast
from kitestring.compress.distil.hints import Hints
from kitestring.compress.distil.objective import Objective, Sum, Supervised
from kitestring.compress.distil.relation import Relation
from kitestring.compress.distil.response import Response
from kitestring.compress.distil.train import Settings, distil
from kitestring.tasks.find import find
from kitestring.tasks.layers import Scale
from kitestring.tasks.population import DeviceUsers, pool_rows
from kitestring.tasks.task import Task

BATCH = 32


@dataclass(frozen=True)
class Case:
    task: str
    steps: int
    lr: float
    teacher_steps: int
    seeds: int


CASES = {
    "digits": Case("digits", 1500, 3e-3, 1500, 5),
    "qmnist": Case("qmnist", 1000, 3e-3, 2000, 3),
}
METHODS: dict[str, tuple[str, Callable[[int], Objective] | None]] = {
    "alone": ("-", None),
    "response (T = 4)": ("Hinton 2015", lambda n: Response()),
    "hints": ("FitNets 2015", lambda n: Sum((1.0, Supervised()), (1.0, Hints()))),
    "attention": (
        "Zagoruyko & Komodakis 2017", lambda n: Sum((1.0, Supervised()), (1.0, Attention())),
    ),
    "relations": ("RKD 2019", lambda n: Sum((1.0, Supervised()), (1.0, Relation()))),
    "contrast": ("CRD 2020", lambda n: Sum((1.0, Supervised()), (1.0, Contrast(n)))),
    "response and relations": (
        "RKD 2019", lambda n: Sum((1.0, Response()), (1.0, Relation())),
    ),
}  # fmt: skip


@cache
def _task(name: str) -> Task:
    found = find(name)
    assert isinstance(found, Task)
    return found


@cache
def pool(name: str) -> tuple[Tensor, Tensor]:
    found = pool_rows(_task(name).users)
    assert found is not None
    x, y = (torch.from_numpy(found[k].values[0].copy()) for k in ("x", "y"))
    return x, y


def student(name: str, seed: int) -> nn.Module:
    """Of qmnist the task's small model; of digits a small CNN, since the task's has no maps."""
    torch.manual_seed(seed)
    if name == "qmnist":
        return _task(name).small()
    return nn.Sequential(
        Scale(), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )  # fmt: skip


@cache
def teacher(name: str) -> nn.Module:
    """Trained once; its weights are kept beside the results."""
    case, (x, y) = CASES[name], pool(name)
    file = KEPT / f"teacher-{name}-{case.teacher_steps}.safetensors"
    torch.manual_seed(1000)
    large = _task(name).large()
    if file.is_file():
        large.load_state_dict(load_file(file))
        return large.eval()
    how = Settings(case.teacher_steps, BATCH, 1e-3, seed=1000)
    found = distil(large, None, rows(x, y, batch=BATCH, seed=1000), Supervised(), how).module
    part = file.with_suffix(f".{os.getpid()}")
    save_file(found.state_dict(), part)
    part.replace(file)
    return found


def flops(model: nn.Module, x: Tensor) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x[:1])
    return float(counter.get_total_flops())


@torch.no_grad()
def by_user(name: str, model: nn.Module) -> np.ndarray[Any, Any]:
    users = DeviceUsers(_task(name).users)
    found = []
    for at in range(users.size):
        test = users.rows(np.array([at]), "test")
        x, y = (torch.from_numpy(test[k].values[0, : test[k].n[0]].copy()) for k in ("x", "y"))
        if len(y):
            found.append(float((model(x).argmax(-1) == y).float().mean()))
    return np.array(found)


def teachers(case: str) -> dict[str, Any]:
    return {"accuracy": float(by_user(case, teacher(case)).mean())}


def taught(case: str, method: str, seed: int, steps: int | None = None) -> dict[str, Any]:
    x, y = pool(case)
    how, made = CASES[case], METHODS[method][1]
    small, steps = student(case, seed), steps or how.steps
    of_small = flops(small, x)
    spent, large, known = 3 * of_small * BATCH * steps, None, None
    if made is not None:
        large = teacher(case)
        seen = min(len(x), steps * BATCH) if method.startswith("response (") else steps * BATCH
        spent += seen * flops(large, x)
        if method.startswith("response ("):
            with torch.no_grad():
                known = torch.cat([large(part) for part in x.split(256)])
    objective = made(len(x)) if made is not None else Supervised()
    batches = rows(x, y, batch=BATCH, seed=seed, teacher=known)
    began = time.process_time()
    found = distil(small, large, batches, objective, Settings(steps, BATCH, how.lr, seed=seed))
    took = time.process_time() - began
    scores = by_user(case, found.module)
    return {
        "accuracy": float(scores.mean()), "p10": float(np.quantile(scores, 0.1)),
        "flops": spent, "seconds": took, "steps": steps,
    }  # fmt: skip


def table(case: str) -> str:
    """Means over seeds ± their standard deviation, as Markdown."""
    seeds = range(CASES[case].seeds)
    (of_large,) = work_off([Job("images:teachers", {"case": case})])
    first = [(m, Job("images:taught", {"case": case, "method": m, "seed": s}))
             for m in METHODS for s in seeds]  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in zip(first, work_off([j for _, j in first]), strict=True):
        found.setdefault(name, []).append(result)
    per_step = found["alone"][0]["flops"] / CASES[case].steps
    same = {m: round(f[0]["flops"] / per_step) for m, f in found.items() if m != "alone"}
    longer = [(steps, Job("images:taught", {"case": case, "method": "alone", "seed": s,
                                            "steps": steps}))
              for steps in sorted(set(same.values())) for s in seeds]  # fmt: skip
    alone: dict[int, list[dict[str, Any]]] = {}
    for (steps, _), result in zip(longer, work_off([j for _, j in longer]), strict=True):
        alone.setdefault(steps, []).append(result)
    heads = ("method", "source", "accuracy", "p10", "beats alone in", "operations",
             "CPU", "alone at equal compute")  # fmt: skip
    lines = [f"Large model: {100 * of_large['accuracy']:.1f} %.", "",
             f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]  # fmt: skip
    for name, results in found.items():
        pairs = zip(results, found["alone"], strict=True)
        wins = sum(a["accuracy"] > b["accuracy"] for a, b in pairs)
        took = float(np.mean([r["seconds"] for r in results]))
        at_same = "-" if name == "alone" else _mean(alone[same[name]], "accuracy")
        lines.append(
            f"| {name} | {METHODS[name][0]} | {_mean(results, 'accuracy')} | "
            f"{_mean(results, 'p10')} | {'-' if name == 'alone' else f'{wins} of {len(results)}'} "
            f"| {results[0]['flops'] / 1e9:.0f} G | {took:.0f} s | {at_same} |"
        )
    return "\n".join(lines)


def _mean(found: list[dict[str, Any]], key: str) -> str:
    values = [100 * r[key] for r in found]
    return f"{np.mean(values):.1f} ±{np.std(values, ddof=1):.1f} %"


if __name__ == "__main__":
    for case in CASES:
        print(f"### {case}\n\n{table(case)}\n")
