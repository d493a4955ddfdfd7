"""Training a small model to do as a large one does: one loop for every objective."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kitestring.compress.distil.batches import Batches
from kitestring.compress.distil.kept import Progress, Whole, made_with, mark, resume, write
from kitestring.compress.distil.objective import Batch, Objective
from kitestring.compress.distil.pair import Pair, device_of, moved, paired
from kitestring.compress.distil.taps import evaluating
from kitestring.compress.matrices import copied
from kitestring.errors import SettingError, TaskError, unknown


@dataclass(frozen=True)
class Settings:
    """How to train. `batch` is for whoever makes the batches. The learning rate rises for `warm`
    steps; then it stays or, with "cosine", falls to zero at `steps`. "sgd" has a momentum of 0.9.
    `decay` is the weight decay, `clip` bounds the gradient's norm over all that is trained.

    Where there is a score, it is taken every `check_every` steps, and after `patience` times
    without gain training ends. A checkpoint is written every `keep_every` steps."""

    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    optimiser: Literal["adamw", "adam", "sgd"] = "adamw"
    decay: float = 0.0
    warm: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    clip: float | None = 1.0
    seed: int = 0
    check_every: int = 100
    patience: int | None = 5
    keep_every: int = 500

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch", 1), ("warm", 0), ("seed", 0),
                            ("check_every", 1), ("patience", 1), ("keep_every", 1)):  # fmt: skip
            value = getattr(self, name)
            if value is None and name == "patience":
                continue
            if not isinstance(value, int) or value < least:
                raise SettingError(f"{name} is {value!r}", "distil", f"Give a count from {least}")
        for name, low in (("lr", True), ("decay", False), ("clip", True)):
            value = getattr(self, name)
            if value is None and name == "clip":
                continue
            if not 0 <= value < math.inf or (low and value == 0):
                mend = "Give a number above 0" if low else "Give 0 or more"
                raise SettingError(f"{name} is {value!r}", "distil", mend)
        for name, known in (("optimiser", _OPTIMISERS), ("schedule", ("cosine", "constant"))):
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)


@dataclass(frozen=True)
class Distilled:
    module: nn.Module  # in eval mode
    steps: int  # done
    best_step: int  # the one whose weights these are
    curve: tuple[tuple[int, float], ...]  # (step, score); the first is from before training
    losses: tuple[float, ...]  # of each step
    seconds: float  # of training and scoring, those before an interruption too


_OPTIMISERS: dict[str, Callable[[list[nn.Parameter], Settings], torch.optim.Optimizer]] = {
    "adamw": lambda p, s: torch.optim.AdamW(p, s.lr, weight_decay=s.decay),
    "adam": lambda p, s: torch.optim.Adam(p, s.lr, weight_decay=s.decay),
    "sgd": lambda p, s: torch.optim.SGD(p, s.lr, momentum=0.9, weight_decay=s.decay),
}


def distil(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Batches,
    objective: Objective,
    settings: Settings | None = None,
    *,
    score: Callable[[nn.Module], float] | None = None,
    heard: Callable[[int, int, float], None] | None = None,
    keep: Path | None = None,
) -> Distilled:
    """Train a copy of `student` to minimise `objective`; neither model, nor the objective, nor
    torch's global generator is changed.

    `score` (lower is better; of the model in eval mode) chooses the weights that are returned: the
    best it saw, those from before training included. Without it they are the last. `heard` is told
    (steps done, of how many, loss) after each step. With `keep`, a training that was killed goes on
    from that file when it is called again with the same arguments, and ends with the same result,
    to the bit.

    Raises `TaskError` for models that do not fit the objective, and names the step at which a loss
    or gradient is not finite; `SettingError` for a checkpoint that is damaged or of another
    training; `RunError` where none can be written."""
    s = settings or Settings()
    module, own = copied(student).train(), copy.deepcopy(objective).train()
    device = device_of(module)
    with _dice(s.seed, device), nullcontext() if teacher is None else evaluating(teacher):
        first = moved(_batch(batches, 0, module), device)
        pair = paired(module, teacher, own, first)
        with evaluating(module), torch.no_grad():
            own.ready(pair.see(first))
        own.to(device)
        trained = [p for p in (*module.parameters(), *own.parameters()) if p.requires_grad]
        if not any(p.requires_grad for p in module.parameters()):
            raise TaskError("nothing of the student is trained", "distil", "Unfreeze some of it")
        optimiser = _OPTIMISERS[s.optimiser](trained, s)
        whole = Whole(module, own, optimiser, batches, Progress())
        save: Callable[[], None] = _nothing
        if keep is not None:
            plain = {**asdict(s), "score": score is not None}
            made = plain | _digests(student, teacher, objective, first)
            resume(keep, made, whole)
            save = partial(write, keep, made, whole)
        _train(whole, pair, batches, s, score, heard, save)
    at = whole.progress
    if at.best is not None:
        module.load_state_dict(at.best)
    for p in module.parameters():
        p.grad = None
    best_step = at.step if at.best is None else at.best_step
    return Distilled(
        module.eval(), at.step, best_step, tuple(at.curve), tuple(at.losses), at.seconds
    )


def _nothing() -> None:
    pass


def _train(
    whole: Whole,
    pair: Pair,
    batches: Batches,
    s: Settings,
    score: Callable[[nn.Module], float] | None,
    heard: Callable[[int, int, float], None] | None,
    save: Callable[[], None],
) -> None:
    """From where `whole` is to the end."""
    at, module = whole.progress, whole.module
    device, began = device_of(module), time.perf_counter() - at.seconds
    if at.step == 0:
        if score is not None and not at.curve:
            _check(at, module, score, s)
        save()  # that it cannot be written is told before the work
    while at.step < s.steps and not at.ended:
        batch = moved(_batch(batches, at.step, module), device)
        loss = _descend(pair, whole.optimiser, batch, s, at.step)
        at.step += 1
        at.losses.append(loss)
        last = at.step == s.steps
        if score is not None and (last or at.step % s.check_every == 0):
            _check(at, module, score, s)
        at.seconds = time.perf_counter() - began
        if last or at.ended or at.step % s.keep_every == 0:
            save()
        if heard is not None:
            heard(at.step, s.steps, loss)


def _descend(
    pair: Pair,
    optimiser: torch.optim.Optimizer,
    batch: Batch,
    s: Settings,
    step: int,
) -> float:
    """One step; the loss before it."""
    for group in optimiser.param_groups:
        group["lr"] = s.lr * _share(s, step)
    optimiser.zero_grad()
    loss = pair.objective(pair.see(batch))
    if loss.ndim or not loss.requires_grad:
        what = f"a loss {list(loss.shape)}" if loss.ndim else "a loss without a gradient"
        raise TaskError(
            f"the objective gives {what}",
            "distil",
            "Give a scalar that depends on the student's output",
        )
    loss.backward()
    trained = [p for group in optimiser.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, math.inf if s.clip is None else s.clip)
    value, slope = torch.stack([loss.detach(), norm.to(loss.dtype)]).tolist()
    if not math.isfinite(value + slope):
        what = f"at step {step + 1} the loss is {value:g} and its gradient's norm {slope:g}"
        raise TaskError(what, "distil", "Lower lr, or look for such numbers in the rows")
    optimiser.step()
    return float(value)


def _share(s: Settings, step: int) -> float:
    """Of the learning rate, at a step from 0."""
    if step < s.warm:
        return (step + 1) / s.warm
    if s.schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - s.warm) / (s.steps - s.warm))) / 2


def _check(
    at: Progress, module: nn.Module, score: Callable[[nn.Module], float], s: Settings
) -> None:
    with evaluating(module), torch.no_grad():
        value = float(score(module))
    if math.isnan(value):
        raise TaskError(f"the score is nan at step {at.step}", "distil", "Give a number")
    lowest = min((v for _, v in at.curve), default=math.inf)
    at.curve.append((at.step, value))
    if at.best is None or value < lowest:
        at.best = {name: a.clone() for name, a in module.state_dict().items()}
        at.best_step, at.waited = at.step, 0
        return
    at.waited += 1
    at.ended = s.patience is not None and at.waited >= s.patience


def _digests(
    student: nn.Module,
    teacher: nn.Module | None,
    objective: Objective,
    first: Batch,
) -> dict[str, str]:
    """Of what, besides settings, a checkpoint was made with: it is good for nothing else."""
    of_teacher = {} if teacher is None or not objective.needs_teacher else teacher.state_dict()
    return {
        "objective": made_with(objective),
        "student": mark(student.state_dict().values()),
        "teacher": mark(of_teacher.values()),
        "rows": mark([first.x, first.y, first.index, first.teacher, first.weight]),
    }


def _batch(batches: Batches, step: int, module: nn.Module) -> Batch:
    """Those that sample from the student sample from it as it is used: without dropout."""
    with evaluating(module):
        return batches(step, module)


@contextmanager
def _dice(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's dice, thrown from `seed` inside the block, are as they were after it."""
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        for one in cuda:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield
