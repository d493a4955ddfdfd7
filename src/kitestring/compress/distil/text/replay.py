"""The student's own text, only as much as it needs and each of it used more than once.

Ko, Kim, Chen, Yun 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models",
ICML, arXiv 2402.03898, section 3.2: own text is taken with a probability phi that rises when the
validation loss does; of it a share 1 - t / T is drawn anew and remembered, the rest comes from
memory. `divergences.skew_kl` and `skew_reverse_kl` are what the paper trains with.

The authors' code compares with the loss before training, or at the last rise; here it is the last
check's, since a student may begin untrained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kitestring.compress.distil.batches import Batches
from kitestring.compress.distil.objective import Batch
from kitestring.errors import SettingError


class Replay:
    """Batches of `data` (given text) and `own` (see `on_policy.own`), over `steps` steps.

    Every `every` steps `score(student)` is taken (lower is better); where it is more than `slack`
    above the last, the share of own text rises by `rise`. The memory has room for `room` rows; the
    oldest go first, and until it is full own text is always drawn anew.

    `share` is that of own text now, `drawn` how many batches of it were drawn so far.

    What it has seen is part of a training: it is called for one step after another, from 0, and
    begins anew at 0. `state_dict` and `load_state_dict` carry it over an interruption; `distil`
    keeps it with a checkpoint."""

    def __init__(
        self,
        data: Batches,
        own: Batches,
        score: Callable[[nn.Module], float],
        *,
        steps: int,
        every: int = 100,
        room: int = 1000,
        rise: float = 0.1,
        slack: float = 0.0,
        seed: int = 0,
    ) -> None:
        if min(steps, every, room) < 1 or not 0 < rise <= 1:
            what = f"steps {steps}, every {every}, room {room}, rise {rise}"
            raise SettingError(what, "Replay", "Give counts from 1, and a rise up to 1")
        self.data, self.own, self.score = data, own, score
        self.steps, self.every, self.room = steps, every, room
        self.rise, self.slack, self.seed = rise, slack, seed
        self._begin()

    def _begin(self) -> None:
        self.next, self.drawn, self.size = 0, 0, 0
        self.share, self.last = 0.0, 0.0
        self.x: Tensor | None = None  # [rows, T]
        self.y: Tensor | None = None

    def __call__(self, step: int, student: nn.Module) -> Batch:
        if step == 0:
            self._begin()
        elif step != self.next:
            what = f"step {step} is asked for after {self.next} steps"
            raise SettingError(what, "Replay", "Load the state of that step, or begin at 0")
        if step % self.every == 0:
            loss = float(self.score(student))
            if step and loss > self.last + self.slack:
                self.share = min(1.0, self.share + self.rise)
            self.last = loss
        self.next = step + 1
        rng = np.random.default_rng([self.seed, step])
        luck = rng.random()
        if luck >= self.share:
            return self.data(step, student)
        if self.memory() < self.room or luck < self.share * (1 - step / self.steps):
            drawn = self.own(step, student)
            self._remember(drawn)
            return drawn
        return self._recalled(rng)

    def memory(self) -> int:
        """How many rows it holds."""
        return 0 if self.x is None else len(self.x)

    def _remember(self, drawn: Batch) -> None:
        assert drawn.y is not None
        self.drawn, self.size = self.drawn + 1, len(drawn.x)
        x, y = drawn.x, drawn.y
        if self.x is not None and self.y is not None:  # out of a file they are on the CPU
            x = torch.cat([self.x.to(x.device), x])
            y = torch.cat([self.y.to(y.device), y])
        self.x, self.y = x[-self.room :], y[-self.room :]

    def _recalled(self, rng: np.random.Generator) -> Batch:
        assert self.x is not None
        assert self.y is not None
        index = rng.choice(len(self.x), min(self.size, len(self.x)), replace=False)
        chosen = torch.from_numpy(index).to(self.x.device)
        return Batch(self.x[chosen], self.y[chosen])

    def state_dict(self) -> dict[str, Any]:
        names = ("next", "drawn", "size", "share", "last", "x", "y")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
