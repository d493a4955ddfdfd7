"""A large language model for what distils, prunes and quantises one: trained here, kept in a cache.

    KITESTRING_DATA=DIR python benchmarks/shrink/language.py

Next-character prediction on the 42 files of Shakespeare's plays (`kitestring.apps.assistant.
shakespeare`): of each file the first 90 % train, the next 5 % validate, the last 5 % test. The
model is a Llama of 4 layers of 192 (1.8 M parameters), trained on one thread by AdamW with a cosine
to nought; weights and the curve over steps are in KITESTRING_CACHE (~/.cache/kitestring), never in
the repository. A run that is stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from kitestring.apps.assistant.shakespeare import ALPHABET, IDS, PLAYS
from kitestring.tasks.fetch import read_all
from kitestring.tasks.llama import Llama, LlamaConfig

CONTEXT = 128
LARGE = LlamaConfig(IDS, 192, 512, 4, 4, 4, CONTEXT, 48)
SMALL = LlamaConfig(IDS, 64, 176, 2, 2, 2, CONTEXT, 32)
EVERY = 250  # steps between two looks at the validation text, and between checkpoints


@dataclass(frozen=True)
class Recipe:
    steps: int = 5000
    batch: int = 32  # windows of CONTEXT characters
    lr: float = 2e-3
    warm: int = 200  # steps
    decay: float = 0.1
    seed: int = 0


@cache
def texts() -> Mapping[str, Tensor]:
    """ "train", "validation", "test": character ids in one line each, file after file."""
    code = {c: i for i, c in enumerate(ALPHABET)}
    parts: dict[str, list[list[int]]] = {"train": [], "validation": [], "test": []}
    for _, content in sorted(read_all(PLAYS).items()):
        ids = [code.get(c, IDS - 1) for c in content.decode("ascii")]
        first, second = round(0.9 * len(ids)), round(0.95 * len(ids))
        parts["train"].append(ids[:first])
        parts["validation"].append(ids[first:second])
        parts["test"].append(ids[second:])
    return {name: torch.tensor(list(chain.from_iterable(found))) for name, found in parts.items()}


def windows(split: str, count: int, seed: int, length: int = CONTEXT + 1) -> Tensor:
    """[count, length] drawn from a split's text with repetition."""
    text = texts()[split]
    rng = np.random.default_rng(seed)
    starts = torch.from_numpy(rng.integers(0, len(text) - length, count))
    return text[starts[:, None] + torch.arange(length)]


def held_out(split: str, most: int = 1024) -> Tensor:
    """Windows [n, CONTEXT + 1] that do not overlap, evenly over a split's text."""
    text = texts()[split]
    whole = text[: (len(text) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    return whole[:: max(1, len(whole) // most)][:most]


@torch.no_grad()
def nats(model: torch.nn.Module, rows: Tensor) -> float:
    """Mean negative log-likelihood of a character; `exp` of it is the perplexity."""
    model.eval()
    total = 0.0
    for part in rows.split(64):
        out = model(part[:, :-1])
        total += float(
            functional.cross_entropy(out.flatten(0, 1), part[:, 1:].flatten()) * len(part)
        )
    return total / len(rows)


def rate(recipe: Recipe, step: int) -> float:
    if step < recipe.warm:
        return recipe.lr * (step + 1) / recipe.warm
    share = (step - recipe.warm) / max(1, recipe.steps - recipe.warm)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * share))


def home() -> Path:
    return Path(os.environ.get("KITESTRING_CACHE") or "~/.cache/kitestring").expanduser() / "models"


def large(recipe: Recipe = Recipe(), config: LlamaConfig = LARGE) -> tuple[Llama, dict[str, Any]]:
    """The trained model and what its training was: {"recipe", "config", "curve", "seconds"}.

    `curve` has [step, validation nats]; `seconds` are of one thread."""
    said = {"recipe": asdict(recipe), "config": asdict(config), "text": PLAYS.sha256}
    name = (
        f"shakespeare-{config.num_hidden_layers}x{config.hidden_size}-{recipe.steps}-{recipe.seed}"
    )
    file = home() / f"{name}.pt"
    torch.manual_seed(recipe.seed)
    model = Llama(config)
    optimiser = torch.optim.AdamW(
        model.parameters(), recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.decay
    )
    state: dict[str, Any] = {"step": 0, "curve": [], "seconds": 0.0}
    if file.is_file():
        kept = torch.load(file, weights_only=True)
        if json.loads(kept["said"]) == said:
            model.load_state_dict(kept["model"])
            if kept["optimiser"] is not None:
                optimiser.load_state_dict(kept["optimiser"])
            state = kept["state"]
    check = held_out("validation", 512)
    while state["step"] < recipe.steps:
        begun = time.perf_counter()
        model.train()
        for step in range(state["step"], min(recipe.steps, state["step"] + EVERY)):
            rows = windows("train", recipe.batch, recipe.seed * 1_000_003 + step)
            for group in optimiser.param_groups:
                group["lr"] = rate(recipe, step)
            out = model(rows[:, :-1])
            loss = functional.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        state["step"] = step + 1
        state["seconds"] += time.perf_counter() - begun
        state["curve"].append([state["step"], nats(model, check)])
        print(state["curve"][-1], f"{state['seconds']:.0f} s", flush=True)
        done = state["step"] == recipe.steps
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(
            {
                "said": json.dumps(said), "model": model.state_dict(), "state": state,
                "optimiser": None if done else optimiser.state_dict(),
            },
            part,
        )  # fmt: skip
        part.replace(file)
    return model.eval(), {**said, "curve": state["curve"], "seconds": state["seconds"]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found, about = large()
    print(json.dumps(about["curve"]), f"{about['seconds']:.0f} s on one thread")
    print(f"test: {math.exp(nats(found, held_out('test'))):.3f} per character")
