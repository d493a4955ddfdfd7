"""A small language model of Shakespeare, taught by the large one of language.py or left alone.

    KITESTRING_DATA=DIR python benchmarks/shrink/text.py

Every row has the same optimiser steps on windows of 128 characters. What it computed is counted in
operations, the teacher's too (its outputs for a window count once, as they are kept); "alone" runs
for several times the steps as well, so that each method can be held against plain training at its
own compute, between whose runs the logarithm of operations interpolates.
"""

from __future__ import annotations

import os
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from jobs import KEPT, Job, work_off
from language import CONTEXT, SMALL, Recipe, held_out, large, texts, windows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kitestring.compress.distil.batches import Batches
from kitestring.compress.distil.objective import Batch, Objective, Sum, Supervised
from kitestring.compress.distil.text import divergences as d
from kitestring.compress.distil.text.measure import acceptance, exposure, perplexity
from kitestring.compress.distil.text.minillm import MiniLLM, teacher_mixed
from kitestring.compress.distil.text.on_policy import mixture, own, text
from kitestring.compress.distil.text.replay import Replay
from kitestring.compress.distil.text.sequence import answered, taught
from kitestring.compress.distil.train import Settings, distil
from kitestring.tasks.llama import Llama

STEPS, BATCH, SEEDS = 600, 32, 3
LR, ON_POLICY_LR, WARM = 4e-3, 1e-3, 100
PROMPT = 64  # characters; the rest of a window is drawn
ALONE = (1, 3, 6)  # times the steps
GIVEN: dict[str, Objective] = {
    "forward KL": d.Divergence(d.forward_kl),
    "forward KL, half labels": Sum((0.5, Supervised()), (0.5, d.Divergence(d.forward_kl))),
    "reverse KL": d.Divergence(d.reverse_kl),
    "JSD 0.5": d.Divergence(d.jsd, beta=0.5),
    "skew KL 0.1": d.Divergence(d.skew_kl, alpha=0.1),
    "skew reverse KL 0.1": d.Divergence(d.skew_reverse_kl, alpha=0.1),
}
HEADS = (
    "method", "perplexity", "alone at equal compute", "operations", "CPU", "accepted on text",
    "on its own text", "characters a call (k = 4)", "teacher's nats of its text", "excess",
)  # fmt: skip
JUDGED = ("accepted", "accepted_own", "tokens_a_call", "own_nats", "excess")
OWN = ("GKD: JSD 0.5, half own text", "MiniLLM", "DistiLLM: skew reverse KL, replay")


@cache
def teacher() -> Llama:
    return large(Recipe())[0]


@cache
def given() -> Tensor:
    """All of the training text in windows [n, CONTEXT + 1] that do not overlap."""
    ids = texts()["train"]
    return ids[: (len(ids) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)


def fresh(seed: int) -> Llama:
    torch.manual_seed(seed)
    return Llama(SMALL)


def flops(model: nn.Module) -> float:
    """Operations of one window forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, CONTEXT, dtype=torch.int64))
    return float(counter.get_total_flops())


def outputs() -> np.ndarray[Any, Any]:
    """What the teacher says of `given()`, float16 [n, CONTEXT, V], computed once and kept."""
    file, n = KEPT / f"teacher-{CONTEXT}-{teacher().config.hidden_size}.f16", len(given())
    shape = (n, CONTEXT, SMALL.vocab_size)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        made = np.memmap(part, np.float16, "w+", shape=shape)
        with torch.no_grad():
            for at in range(0, n, 64):
                made[at : at + 64] = teacher()(given()[at : at + 64, :-1]).numpy()
        made.flush()
        part.replace(file)
    return np.memmap(file, np.float16, "r", shape=shape)


def with_outputs(batches: Batches) -> Batches:
    known = outputs()

    def at(step: int, student: nn.Module) -> Batch:
        b = batches(step, student)
        assert b.index is not None
        found = torch.from_numpy(known[b.index.numpy()].astype(np.float32))
        return Batch(b.x, b.y, b.index, found)

    return at


def settings(steps: int, seed: int, lr: float = LR) -> Settings:
    return Settings(steps, BATCH, lr, "adamw", 0.01, min(WARM, steps // 10), seed=seed)


def judged(model: nn.Module, spent: float, began: float) -> dict[str, Any]:
    """`spent`: operations of the training, which began when the process had taken `began`."""
    took, rows = time.process_time() - began, held_out("test", 512)
    found = acceptance(model, teacher(), rows[:256], k=4)
    bias = exposure(model, teacher(), rows[:256, :PROMPT], CONTEXT - PROMPT)
    return {
        "perplexity": perplexity(model, rows), "flops": spent, "seconds": took,
        "accepted": found.text, "accepted_own": found.own, "tokens_a_call": found.tokens,
        "own_nats": bias.own, "teachers_nats": bias.teacher, "excess": bias.excess,
    }  # fmt: skip


def training(steps: int) -> float:
    """Operations of so many steps of the small model: forward, and a backward of twice that."""
    return 3 * flops(Llama(SMALL)) * BATCH * steps


def alone(seed: int, times: float) -> dict[str, Any]:
    steps, began = round(STEPS * times), time.process_time()
    found = distil(
        fresh(seed), None, text(given(), batch=BATCH, seed=seed), Supervised(),
        settings(steps, seed),
    )  # fmt: skip
    return judged(found.module, training(steps), began)


def on_given(seed: int, name: str) -> dict[str, Any]:
    """The teacher says what comes next in given text."""
    batches = with_outputs(text(given(), batch=BATCH, seed=seed))
    began = time.process_time()
    found = distil(fresh(seed), None, batches, GIVEN[name], settings(STEPS, seed))
    seen = min(STEPS * BATCH, len(given()))
    return judged(found.module, training(STEPS) + seen * flops(teacher()), began)


def by_heart(seed: int) -> dict[str, Any]:
    """Sequence-level: half the steps on given text, half on what the teacher drew."""
    half, began = STEPS // 2, time.process_time()
    prompts = windows("train", 12_000, seed, PROMPT)
    written = taught(
        teacher(), prompts, CONTEXT + 1 - PROMPT, temperature=1.0, batch=256, seed=seed
    )
    begun = _begun(seed, half)
    found = distil(
        begun, None, answered(written, PROMPT, batch=BATCH, seed=seed), Supervised(),
        settings(half, seed, ON_POLICY_LR),
    )  # fmt: skip
    return judged(found.module, training(STEPS) + len(prompts) * flops(teacher()), began)


def _begun(seed: int, steps: int) -> nn.Module:
    return distil(
        fresh(seed), None, text(given(), batch=BATCH, seed=seed), Supervised(),
        settings(steps, seed),
    ).module  # fmt: skip


def on_own(seed: int, name: str) -> dict[str, Any]:
    """Half the steps on given text alone, then half with text that the student draws itself."""
    half, began = STEPS // 2, time.process_time()
    begun, prompts = _begun(seed, half), windows("train", 12_000, seed, PROMPT)
    drawn = CONTEXT + 1 - PROMPT
    written = own(prompts, drawn, batch=BATCH, seed=seed)
    data = text(given(), batch=BATCH, seed=seed)
    small, big = flops(Llama(SMALL)), flops(teacher())
    spent = training(STEPS) + half * BATCH * big  # the teacher judges every batch
    if name == "MiniLLM":
        batches: Batches = teacher_mixed(teacher(), prompts, drawn, batch=BATCH, seed=seed)
        objective: Objective = MiniLLM()
        spent += half * BATCH * (small + big)  # and writes with the student
    elif name.startswith("GKD"):
        batches, objective = mixture(data, written, 0.5, seed=seed), d.Divergence(d.jsd, beta=0.5)
        spent += half * BATCH * small / 2
    else:
        check = held_out("validation", 64)
        replay = Replay(
            data, written, lambda student: perplexity(student, check), steps=half, seed=seed
        )
        batches, objective = replay, d.Divergence(d.skew_reverse_kl, alpha=0.1)
    found = distil(begun, teacher(), batches, objective, settings(half, seed, ON_POLICY_LR))
    if isinstance(batches, Replay):
        spent += batches.drawn * BATCH * small
    return judged(found.module, spent, began)


def jobs() -> list[tuple[str, Job]]:
    found = []
    for seed in range(SEEDS):
        for t in ALONE:
            name = "alone" if t == 1 else f"alone, {t} x the steps"
            found.append((name, Job("text:alone", {"seed": seed, "times": t})))
        found += [(name, Job("text:on_given", {"seed": seed, "name": name})) for name in GIVEN]
        found.append(("sequence-level", Job("text:by_heart", {"seed": seed})))
        found += [(name, Job("text:on_own", {"seed": seed, "name": name})) for name in OWN]
    return found


def table() -> str:
    """Means over seeds ± their standard deviation, as Markdown."""
    named = jobs()
    results = work_off([job for _, job in named])
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, _), result in zip(named, results, strict=True):
        rows.setdefault(name, []).append(result)
    curve = sorted(
        tuple(np.mean([np.log(r[key]) for r in rows[name]]) for key in ("flops", "perplexity"))
        for name in rows
        if name.startswith("alone")
    )
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name, found in rows.items():
        spent = float(np.mean([r["flops"] for r in found]))
        same = float(np.exp(np.interp(np.log(spent), *zip(*curve, strict=True))))
        took = float(np.mean([r["seconds"] for r in found]))
        cells = [name, _mean(found, "perplexity"), f"{same:.3f}", f"{spent / 1e12:.1f} T"]
        cells.append(f"{took:.0f} s")
        cells += [_mean(found, key) for key in JUDGED]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(found: list[dict[str, Any]], key: str) -> str:
    values = [r[key] for r in found]
    return f"{np.mean(values):.3f} ±{np.std(values, ddof=1):.3f}"


if __name__ == "__main__":
    large(Recipe())
    outputs()
    print(table())
