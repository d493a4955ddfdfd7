"""Small modules drawn at random: what computes devices must do well by modules that nobody chose.

`draw(seed)` is the same every time. Inputs are numbers, tokens, signals or images; layers are those
that people stack, with their options; every row is independent of the others, and nothing is random
in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = Mapping[str, Tensor]
Columns = dict[str, np.ndarray[Any, Any]]
Input = Callable[[int, np.random.Generator], np.ndarray[Any, Any]]
LEAST, MOST = 200, 100_000  # parameters
NORMED = 6  # numbers at least: the norm of two is 1 and -1, and its gradient nothing but noise


@dataclass(frozen=True)
class Drawn:
    """`module` and `loss` as `Program` takes them; `columns(n, rng)` makes n rows, x and y."""

    about: str
    module: nn.Module
    loss: Callable[[Batch, Batch], Tensor]
    columns: Callable[[int, np.random.Generator], Columns]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def draw(seed: int) -> Drawn:
    attempt = 0
    while True:
        rng = np.random.default_rng([seed, attempt])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = _drawn(rng)
        if LEAST <= found.parameters <= MOST:
            return found
        attempt += 1


def _drawn(rng: np.random.Generator) -> Drawn:
    kind = rng.choice(["numbers", "tokens", "signal", "image"])
    stack, x = {"numbers": _numbers, "tokens": _tokens, "signal": _signal, "image": _image}[kind](
        rng
    )
    for _ in range(rng.integers(0, 5)):
        stack.layer()
    stack.flatten()
    loss, y = _goal(rng, stack)

    def columns(n: int, dice: np.random.Generator) -> Columns:
        return {"x": x(n, dice), "y": y(n, dice)}

    module = _OfColumns(nn.Sequential(*stack.layers))
    return Drawn(", ".join([*stack.words, loss.about]), module, loss, columns)


# --- inputs


def _numbers(rng: np.random.Generator) -> tuple[_Stack, Input]:
    return _of_floats(rng, "numbers", (int(rng.integers(4, 65)),))


def _signal(rng: np.random.Generator) -> tuple[_Stack, Input]:
    return _of_floats(rng, "signal", (int(rng.integers(1, 7)), int(rng.integers(16, 65))))


def _image(rng: np.random.Generator) -> tuple[_Stack, Input]:
    height, width = rng.integers(8, 17, 2).tolist()
    return _of_floats(rng, "image", (int(rng.choice([1, 2, 3])), height, width))


def _of_floats(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> tuple[_Stack, Input]:
    def x(n: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
        return dice.standard_normal((n, *shape), dtype=np.float32)

    about = f"{name} {'x'.join(map(str, shape))}"
    return _Stack(rng, torch.randn(2, *shape), about), x


def _tokens(rng: np.random.Generator) -> tuple[_Stack, Input]:
    vocabulary, length = int(rng.integers(20, 501)), int(rng.integers(4, 17))
    width = int(rng.choice([4, 8, 12, 16, 32]))

    def x(n: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
        return dice.integers(0, vocabulary, (n, length))

    few = torch.from_numpy(x(2, rng))
    stack = _Stack(rng, few, f"{length} tokens of {vocabulary}", sequence=True)
    stack.add(nn.Embedding(vocabulary, width), f"Embedding {width}")
    if rng.random() < 0.3:
        stack.add(_Turned(), "turned")  # to channels and positions, for convolutions
        stack.sequence = False
    return stack, x


# --- layers


class _Stack:
    """Layers so far, and `now`, what they make of two rows: numbers [n, width], a `sequence`
    [n, length, width], or a signal or image [n, channels, ...]."""

    def __init__(
        self, rng: np.random.Generator, now: Tensor, about: str = "", sequence: bool = False
    ) -> None:
        self.rng, self.now, self.sequence = rng, now, sequence
        self.layers: list[nn.Module] = []
        self.words = [about] if about else []

    def add(self, module: nn.Module, about: str) -> None:
        with torch.no_grad():
            self.now = module(self.now)
        self.layers.append(module)
        self.words.append(about)

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    @property
    def spatial(self) -> bool:
        return self.now.ndim > 2 and not self.sequence

    @property
    def channels(self) -> int:
        return self.now.shape[1] if self.spatial else self.now.shape[-1]

    @property
    def side(self) -> int:
        return min(self.now.shape[2:])

    def layer(self) -> None:
        """A product or convolution, perhaps with a shortcut, then perhaps a norm, an activation and
        a pool."""
        shape = self.pick("straight", "straight", "residual", "concatenated")
        if shape == "straight":
            self.product()
        else:
            inner = _Stack(self.rng, self.now, sequence=self.sequence)
            inner.product(keep=True)
            inner.activation()
            inside = nn.Sequential(*inner.layers)
            axis = 1 if self.spatial else -1
            joined = _Residual(inside) if shape == "residual" else _Concatenated(inside, axis)
            self.add(joined, f"{shape} ({', '.join(inner.words)})")
        if self.chance(0.4):
            self.norm()
        if self.chance(0.85):
            self.activation()
        if self.spatial and self.side >= 4 and self.chance(0.4):
            self.pool()

    def product(self, keep: bool = False) -> None:
        """`keep`: the same shape comes out."""
        bias = self.chance(0.85)
        if not self.spatial:
            wide = self.channels if keep else int(self.rng.integers(4, 97))
            about = f"Linear {wide}" + (" without bias" * (not bias))
            self.add(nn.Linear(self.channels, wide, bias), about)
            return
        kind = (nn.Conv1d, nn.Conv2d)[self.now.ndim - 3]
        dilation = 2 if self.side >= 8 and self.chance(0.2) else 1
        kernels = [k for k in (1, 2, 3, 3, 5) if dilation * (k - 1) < self.side and k % 2 >= keep]
        kernel = self.pick(*kernels)
        around = dilation * (kernel // 2)
        padding = around if keep else int(self.rng.integers(0, around + 1))
        stride = 2 if not keep and self.side >= 8 and self.chance(0.3) else 1
        wide = self.channels if keep else int(self.rng.integers(2, 17))
        groups = 1
        if self.chance(0.25):  # depthwise
            groups = self.channels
            wide = self.channels if keep else self.channels * self.pick(1, 2)
        elif self.channels % 2 == 0 and wide % 2 == 0 and self.chance(0.3):
            groups = 2
        options = {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        }  # fmt: skip
        said = [f"{name} {v}" for name, v in options.items() if v != (name != "padding")]
        about = " ".join([f"{kind.__name__} {wide} of {kernel}", *said])
        self.add(kind(self.channels, wide, kernel, bias=bias, **options), about)

    def norm(self) -> None:
        """None where too few numbers would be normed."""
        whole = tuple(self.now.shape[1:]) if self.spatial else (self.channels,)
        each = self.now[0, 0].numel() if self.spatial else 1
        found: list[tuple[nn.Module, str]] = []
        if int(np.prod(whole)) >= NORMED:
            found.append((nn.LayerNorm(whole), "LayerNorm"))
            found.append((nn.RMSNorm(whole), "RMSNorm"))
        groups = 2 if self.channels % 2 == 0 else 1
        if not self.sequence and each * self.channels // groups >= NORMED:
            found.append((nn.GroupNorm(groups, self.channels), f"GroupNorm {groups}"))
        if self.spatial and each >= NORMED:
            kind = (nn.InstanceNorm1d, nn.InstanceNorm2d)[self.now.ndim - 3]
            found.append((kind(self.channels, affine=self.chance(0.5)), "InstanceNorm"))
        if found:
            self.add(*self.pick(*found))

    def activation(self) -> None:
        slope = round(float(self.rng.uniform(0.01, 0.3)), 2)
        axis = 1 if self.spatial else -1
        self.add(
            *self.pick(
                (nn.ReLU(), "ReLU"),
                (nn.LeakyReLU(slope), f"LeakyReLU {slope}"),
                (nn.ELU(), "ELU"),
                (nn.GELU(), "GELU"),
                (nn.GELU(approximate="tanh"), "GELU by tanh"),
                (nn.SiLU(), "SiLU"),
                (nn.Tanh(), "Tanh"),
                (nn.Sigmoid(), "Sigmoid"),
                (nn.Softplus(), "Softplus"),
                (nn.Hardswish(), "Hardswish"),
                (nn.Hardtanh(), "Hardtanh"),
                (nn.ReLU6(), "ReLU6"),
                (nn.LogSoftmax(axis), "LogSoftmax"),
            )
        )

    def pool(self) -> None:
        flat = self.now.ndim == 3
        most = nn.MaxPool1d if flat else nn.MaxPool2d
        mean = nn.AvgPool1d if flat else nn.AvgPool2d
        adaptive = nn.AdaptiveAvgPool1d if flat else nn.AdaptiveAvgPool2d
        self.add(
            *self.pick(
                (most(2), "MaxPool 2"),
                (most(3, stride=2, padding=1), "MaxPool 3 stride 2 padding 1"),
                (mean(2), "AvgPool 2"),
                (mean(3, stride=1, padding=1), "AvgPool 3 stride 1 padding 1"),
                (adaptive(3), "AdaptiveAvgPool 3"),
            )
        )

    def flatten(self) -> None:
        """To numbers [n, width]."""
        if self.sequence and self.chance(0.6):
            self.add(_Mean(), "mean over positions")
        elif self.spatial and self.chance(0.4):
            adaptive = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[self.now.ndim - 3]
            self.add(adaptive(1), "mean over positions")
        self.sequence = False
        if self.now.ndim > 2:
            self.add(nn.Flatten(), "Flatten")


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


class _Concatenated(nn.Module):
    def __init__(self, inner: nn.Module, axis: int) -> None:
        super().__init__()
        self.inner, self.axis = inner, axis

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], self.axis)


class _Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class _OfColumns(nn.Module):
    """From columns to outputs, as a program's module."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"out": self.layers(batch["x"])}


# --- losses


@dataclass(frozen=True)
class _Loss:
    """`each(out, y)` of single numbers or rows; the mean of a row's."""

    about: str
    each: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, outputs: Batch, batch: Batch) -> Tensor:
        found = self.each(outputs["out"], batch["y"])
        return found if found.ndim == 1 else found.mean(1)


def _goal(rng: np.random.Generator, stack: _Stack) -> tuple[_Loss, Input]:
    """The last layer, a loss, and what to aim at."""
    kind = stack.pick("classes", "classes", "squares", "labels", "Huber")
    if kind == "classes":
        return _classes(rng, stack)
    wide = stack.pick(0, 0, 2, 3)  # 0: one number a row, [n]
    stack.add(nn.Linear(stack.channels, max(1, wide)), f"Linear {max(1, wide)}")
    if not wide:
        stack.add(nn.Flatten(0), "one number")
    shape = (wide,) if wide else ()

    def values(n: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
        return dice.standard_normal((n, *shape), dtype=np.float32)

    def labels(n: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
        return dice.integers(0, 2, (n, *shape)).astype(np.float32)

    if kind == "labels":

        def binary(out: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(out, y, reduction="none")

        return _Loss("binary cross-entropy", binary), labels
    if kind == "squares":
        return _Loss("squares", lambda out, y: F.mse_loss(out, y, reduction="none")), values
    delta = stack.pick(0.5, 1.0, 2.0)

    def huber(out: Tensor, y: Tensor) -> Tensor:
        return F.huber_loss(out, y, reduction="none", delta=delta)

    return _Loss(f"Huber {delta}", huber), values


def _classes(rng: np.random.Generator, stack: _Stack) -> tuple[_Loss, Input]:
    count = int(rng.integers(2, 13))
    smoothing = round(float(rng.uniform(0.02, 0.2)), 2) if stack.chance(0.4) else 0.0
    stack.add(nn.Linear(stack.channels, count), f"Linear {count}")

    def y(n: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
        return dice.integers(0, count, n)

    if stack.chance(0.25):
        stack.add(nn.LogSoftmax(-1), "LogSoftmax")
        return _Loss("likelihood", lambda out, y: F.nll_loss(out, y, reduction="none")), y

    def entropy(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none", label_smoothing=smoothing)

    about = f", smoothing {smoothing}" if smoothing else ""
    return _Loss(f"cross-entropy{about}", entropy), y
