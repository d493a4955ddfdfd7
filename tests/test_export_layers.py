"""Every layer and loss that the documentation names, exported and run in stock ONNX Runtime: what
is predicted, a fit, and gradients by weights and columns, against torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exported import CLOSE, Beside, Case, Make, case, fits, numbers, predicts, slopes, tokens
from kitestring.tasks.layers import Transformer

Seq = nn.Sequential
NORMED = 1e-4
"""Of a leaf's largest slope: a norm's is a difference of numbers that are nearly the same."""


class First(nn.Module):
    """The first of what a layer gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]  # type: ignore[no-any-return]


class Fn(nn.Module):
    """A product, then a function of what it gives."""

    def __init__(self, f: Callable[[Tensor], Tensor], inner: nn.Module) -> None:
        super().__init__()
        self.f, self.inner = f, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.inner(x))


class FrozenNorm(nn.BatchNorm2d):
    """Keeps its statistics in training."""

    def train(self, mode: bool = True) -> FrozenNorm:
        return super().train(False)


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attend(x, x, x, attn_mask=hidden)[0]  # type: ignore[no-any-return]


class Scaled(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.qkv, self.causal = nn.Linear(8, 24), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)


def _picked(x: Tensor) -> Tensor:
    """A different number of each row, by its own values."""
    return x.gather(1, x.argsort(1)[:, :2]) + x[torch.arange(len(x)), x.argmax(1)][:, None]


def _spread(x: Tensor) -> Tensor:
    return torch.zeros_like(x).scatter(1, x.argsort(1)[:, :3], x[:, :3])


def _masked(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * 2, x.exp()).masked_fill(x.abs() < 0.2, 0.5)


def _joined(x: Tensor) -> Tensor:
    a, b = x.split([2, 4], 1)
    return torch.cat([b, a, torch.stack([a, -a], 2).flatten(1)], 1)


def _two_of(x: Tensor) -> Tensor:
    return x[:, [0, 2, 2, -1]] * x[:, ::2][:, :1] + x[:, -1:]


def _one_hot(x: Tensor) -> Tensor:
    return F.one_hot(x, 7).float().mean(1)


OFF = torch.tensor([True, False, True, False, False, True])


class Pruned(nn.Linear):
    """Square, so that a mask of its columns would fit its rows as well."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.clone()
        weight[:, OFF] = 0
        return F.linear(x, weight, self.bias)


def _put_by_masks(x: Tensor) -> Tensor:
    """Of the last axis, of the last two, of all."""
    y = x.clone()
    y[:, OFF] = 0.5
    pairs = y.view(-1, 2, 3)
    pairs[:, OFF.view(2, 3).flip(1)] = 2.0
    pairs[pairs > 1] = 1.0
    return y


def _put_rows_by_masks(x: Tensor) -> Tensor:
    """Of an axis with another behind it, of the first axis."""
    y = x.clone()
    y.view(-1, 2, 3)[:, OFF[:2]] = torch.tensor([1.0, 2.0, 3.0])
    y[x[:, 0] > 0] = torch.arange(6.0)
    return y


def _put_by_places(x: Tensor) -> Tensor:
    y = x.index_add(1, torch.tensor([1, 1, 5]), x[:, :3], alpha=2).index_fill(
        1, torch.tensor(-2), 3
    )
    y[:, [0, 2]] += 1
    at = (torch.arange(len(x))[:, None], torch.tensor([[0, 1, 1]]))
    return y.view(-1, 2, 3).index_put(at, torch.ones(3), accumulate=True).flatten(1)


def _in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 0
    y[:, 2:4] *= 2
    y += 1
    return y.relu_()


def _activations() -> list[nn.Module]:
    return [
        nn.ReLU(), nn.LeakyReLU(0.1), nn.ELU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(),
        nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.Hardswish(), nn.Hardsigmoid(),
        nn.ReLU6(), nn.Softmax(-1), nn.LogSoftmax(-1), nn.ELU(0.5), nn.CELU(2.0), nn.SELU(),
        nn.Softplus(2.0), nn.Hardtanh(), nn.PReLU(), nn.Softsign(), nn.LogSigmoid(), nn.GLU(),
        nn.Tanhshrink(), nn.Softshrink(), nn.Hardshrink(), nn.Threshold(0.1, 0.2),
        nn.ReLU(inplace=True),
    ]  # fmt: skip


def _signals() -> list[nn.Module]:
    return [
        nn.Conv1d(4, 6, 3), nn.Conv1d(4, 4, 3, groups=4, dilation=2, padding=1),
        nn.Conv1d(4, 6, 5, stride=2, padding=2, bias=False), nn.ConvTranspose1d(4, 6, 3, stride=2),
        *(Seq(nn.Conv1d(4, 4, 1, bias=False), layer) for layer in (
            nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 2, 1), nn.AdaptiveAvgPool1d(3),
            nn.AdaptiveMaxPool1d(4), nn.ReflectionPad1d(2),
            nn.Upsample(scale_factor=2, mode="linear"),
        )),
    ]  # fmt: skip


def _convolutions() -> list[nn.Module]:
    return [
        nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, groups=4),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 3, 7, padding=3), nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
        nn.Conv2d(4, 8, 2, stride=3, groups=4, bias=False), nn.Conv2d(4, 5, 3, padding="same"),
        nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, groups=2),
    ]  # fmt: skip


def _pools_and_pads() -> list[nn.Module]:
    return [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.MaxPool2d(2, 1, dilation=2), nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d(3), nn.AdaptiveAvgPool2d((2, 4)), nn.AdaptiveMaxPool2d((3, 1)),
        nn.Softmax2d(), nn.LocalResponseNorm(2),
        nn.ZeroPad2d((1, 0, 2, 1)), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1),
        nn.ConstantPad2d((-1, 1, 0, 2), 3.5), nn.Upsample(scale_factor=2),
        nn.Upsample((5, 11), mode="bilinear"), nn.PixelShuffle(2), nn.Flatten(),
        nn.ChannelShuffle(2), nn.Unfold(2),
    ]  # fmt: skip


def _recurrent() -> list[nn.Module]:
    return [
        First(nn.GRU(8, 5, batch_first=True)), First(nn.LSTM(8, 5, batch_first=True)),
        First(nn.RNN(8, 5, batch_first=True)), First(nn.GRU(8, 4, 2, batch_first=True)),
        First(nn.LSTM(8, 4, batch_first=True, bidirectional=True)),
    ]  # fmt: skip


def _attention() -> list[nn.Module]:
    return [
        SelfAttention(), Scaled(True), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        SelfAttention(bias=False, add_zero_attn=True), Scaled(False),
        nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True),
    ]  # fmt: skip


SEQUENCES = [
    lambda x: x.cumsum(1), lambda x: x.flip(1).roll(1, 2), lambda x: x.amax(1),
    lambda x: x.max(1).values, lambda x: x.logsumexp(1), lambda x: x.std(1),
    lambda x: x.norm(dim=2), lambda x: x.topk(2, 1).values, lambda x: x.tril(),
    lambda x: torch.einsum("ntd,nsd->nts", x, x), lambda x: x.unfold(1, 2, 1).flatten(1),
    lambda x: F.normalize(x, dim=-1), lambda x: F.cosine_similarity(x[:, 0], x[:, 1])[:, None],
    lambda x: x[:, [0, 2, 2], [1, -1, 3]] + x[torch.arange(len(x)), :, x[:, 0].argmax(-1)],
    lambda x: x.diagonal(dim1=1, dim2=2), lambda x: x.sort(1, descending=True).values,
    lambda x: x[:, -1].repeat(1, 2) + x.repeat_interleave(2, 1)[:, 3].tile(2),
]  # fmt: skip
PARTS = [_picked, _spread, _masked, _joined, _two_of, _put_by_masks, _put_rows_by_masks,
         _put_by_places]  # fmt: skip


def _tables() -> list[nn.Module]:
    return [
        nn.Embedding(7, 4), nn.Embedding(7, 4, padding_idx=0), Transformer(7, 5, 8, 2, 1),
        Transformer(7, 5, 8, 2, 1, padding=True, tied=True, past=2),
        Fn(lambda h: h.mean(1), nn.Embedding(7, 4)), Fn(_one_hot, nn.Identity()),
    ]  # fmt: skip


def _norms() -> list[nn.Module]:
    return [
        nn.LayerNorm(6), nn.LayerNorm((4, 5, 6)), nn.LayerNorm(6, elementwise_affine=False),
        nn.RMSNorm(6), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), FrozenNorm(4),
        Seq(nn.Flatten(2), nn.InstanceNorm1d(4)),
    ]  # fmt: skip


def _images() -> list[nn.Module]:
    return [Seq(nn.Conv2d(4, 4, 1, bias=False), layer) for layer in _pools_and_pads()]


FAMILIES: Mapping[str, tuple[Callable[[], Sequence[nn.Module]], Make]] = {
    "activations": (lambda: [Seq(nn.Linear(6, 6), a) for a in _activations()], numbers(6)),
    "norms": (
        lambda: [Seq(nn.Conv2d(4, 4, 1, bias=False), layer) for layer in _norms()],
        numbers(4, 5, 6),
    ),
    "signals": (_signals, numbers(4, 8)),
    "convolutions": (_convolutions, numbers(4, 9, 8)),
    "images": (_images, numbers(4, 9, 8)),
    "recurrent": (_recurrent, numbers(2, 8)),
    "attention": (_attention, numbers(3, 8)),
    "functions of sequences": (
        lambda: [Fn(f, nn.Linear(8, 4, bias=False)) for f in SEQUENCES], numbers(3, 8),
    ),
    "functions of rows": (lambda: [Fn(f, nn.Linear(6, 6)) for f in PARTS], numbers(6)),
    "in place": (
        lambda: [
            Seq(nn.Conv1d(2, 2, 1), nn.CircularPad1d(1)),
            Seq(nn.Linear(6, 6), nn.ReLU(inplace=True)), Fn(_in_place, nn.Linear(6, 6)),
            Pruned(6, 6),
        ], numbers(2, 6),
    ),
    "tables": (_tables, tokens(7, 5)),
}  # fmt: skip
FIRST = {"activations": 15, "signals": 6, "images": 11, "recurrent": 2, "attention": 2,
         "functions of sequences": 8, "tables": 4}  # fmt: skip
"""So many of a family, and of the others all, are tried every time."""


def family(name: str, count: int | None = None, seed: int = 0) -> Case:
    torch.manual_seed(seed)
    layers, x = FAMILIES[name]
    return case(Beside(layers()[:count]), {"x": x})


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_train_as_in_torch(name: str) -> None:
    fits(family(name, FIRST.get(name)), close=NORMED if name == "norms" else CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_layers_train_predict_and_have_slopes_as_in_torch(name: str) -> None:
    c, close = family(name), NORMED if name == "norms" else CLOSE
    if name in FIRST:
        fits(c, close=close)
    predicts(c, close)
    slopes(c, close=close)
    slopes(c, list(c.program.module(_few(c))), close=close)


def _few(c: Case) -> dict[str, Tensor]:
    return {k: torch.from_numpy(r.values[0, :2]) for k, r in c.rows.items()}
