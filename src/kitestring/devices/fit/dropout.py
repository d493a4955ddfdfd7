"""What a dropout keeps in training, by `kitestring.dice.drawn` instead of torch's generator.

So it is a function of device, exchange, step and place alone: the same on every torch device, in
compiled code, and where there is no torch. Kernels for torch's Bernoulli draws are registered under
a dispatch key that nothing else of torch uses. While a thread includes that key, its draws come
here, from whatever layer, functional or fused operation; all other operations run as ever. (A
TorchDispatchMode would do as well, but takes every operation of a pass through Python.)

On a GPU cuDNN drops out between the layers of a recurrent network by itself, by torch's generator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kitestring import dice
from kitestring.core import Array

aten = torch.ops.aten
_KEY = "TESTING_ONLY_GenericMode"
_INCLUDED = torch._C._dispatch_key_parse(_KEY)
_BELOW = torch._C._dispatch_keyset_full_after(_INCLUDED)
_AHEAD = 2**14  # numbers that are drawn for several steps at once where each takes few
_NONE = np.empty((0, 0), np.float32)
_now = threading.local()


class Draws:
    """The draws of one device's fit, of so many `steps`, by its `key` [1]."""

    def __init__(self, key: Array, steps: int) -> None:
        self._key, self._steps = key, steps
        self._step = self.places = 0
        self._made: dict[int, tuple[int, Array]] = {}  # place -> from which step on, numbers

    @contextmanager
    def serving(self, step: int) -> Iterator[None]:
        """The calling thread's draws are those of a forward pass in that step."""
        self._step, self.places, _now.draws = step, 0, self
        with torch._C._IncludeDispatchKeyGuard(_INCLUDED):
            yield

    def numbers(self, n: int) -> Array:
        """The next draw: n numbers in [0, 1)."""
        place = self.places
        self.places += 1
        first, made = self._made.get(place, (self._step, _NONE))
        if self._step >= first + len(made) or n > made.shape[1]:
            first = self._step
            count = max(1, min(_AHEAD // max(1, n), self._steps - first))
            keys = dice.drawn(self._key, np.arange(first, first + count), place)
            made = dice.uniform(keys, n)
            if count > 1:
                self._made[place] = first, made
        return made[self._step - first, :n]


@dataclass(frozen=True)
class Sources:
    """Whether a pass in training draws by Kitestring's dice, and whether by torch's generator."""

    dice: bool
    generator: bool


def tried(forward: Callable[[], Tensor]) -> Sources:
    """What a pass draws, tried with the gradient of the loss that `forward` gives.

    One that is computed again for its gradient (a checkpoint) must draw the same again. torch sees
    to that for its own generator alone, so such a pass draws all by that."""
    draws = Draws(np.zeros(1, np.uint64), 1)
    with _Watch() as watch:
        with draws.serving(0):
            loss = forward()
        drew, watch.seen = watch.seen, []
        loss.backward()  # type: ignore[no-untyped-call]
    if any(not name.endswith("_backward") for name in watch.seen):
        return Sources(dice=False, generator=True)
    # Fused attention may draw, but none that has a dropout stays fused while it is served.
    return Sources(draws.places > 0, any("attention" not in name for name in drew))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the operations of its thread that take from torch's generator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# --- kernels, called in place of torch's own while a thread is being served


def _kept(like: Tensor, chance: float | Tensor) -> Tensor:
    """True with that chance, in the shape of `like` and where that lies."""
    numbers = _now.draws.numbers(like.numel())
    if isinstance(chance, Tensor):
        drawn = torch.from_numpy(numbers).to(like.device).view(like.shape)
        return drawn < chance.detach().float()
    return torch.from_numpy(numbers < np.float32(chance)).to(like.device).view(like.shape)


def _fill(x: Tensor, p: float | Tensor = 0.5, *, generator: Any = None) -> Tensor:
    return x.copy_(_kept(x, p))


def _bernoulli(x: Tensor, p: float | Tensor, *, generator: Any = None) -> Tensor:
    return _kept(x, p).to(x.dtype)


def _of_itself(x: Tensor, *, generator: Any = None) -> Tensor:
    return _kept(x, x).to(x.dtype)


def _native_dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """One operation elsewhere than on the CPU; with the numbers of those that it is there."""
    if train is False:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = _kept(x, 1 - p)
    return x * kept.to(x.dtype).div_((1 - p) or 1.0), kept


def _attention(
    keys: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, p: float = 0.0,
    causal: bool = False, **more: Any,
) -> Tensor:  # fmt: skip
    """On the CPU torch takes it apart by itself where it drops out."""
    if p > 0 and not q.is_cpu:
        return apart(q, k, v, mask, p, causal, **more)
    whole = aten.scaled_dot_product_attention.default
    return whole.redispatch(keys & _BELOW, q, k, v, mask, p, causal, **more)  # type: ignore[no-any-return]


def apart(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, **more: Any
) -> Tensor:
    """Attention whose dropout is an operation of its own."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    found = aten._scaled_dot_product_attention_math(q, k, v, mask, p, causal, **more)
    return found[0]  # type: ignore[no-any-return]


_SERVED: dict[str, Callable[..., Any]] = {
    "bernoulli_.float": _fill, "bernoulli_.Tensor": _fill,
    "bernoulli.p": _bernoulli, "bernoulli.Tensor": _bernoulli, "bernoulli": _of_itself,
    "native_dropout": _native_dropout,
}  # fmt: skip


def _register() -> list[Any]:
    """Kernels stay as long as what is returned does."""
    library: Any = torch.library.Library
    rest, served = library("_", "IMPL"), library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, _KEY)
    for name, kernel in _SERVED.items():
        served.impl(name, kernel, _KEY)
    served.impl("scaled_dot_product_attention", _attention, _KEY, with_keyset=True)
    return [rest, served]


_KERNELS = _register()
