"""What cannot be exported is told in one line: what, where in the module, what to write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exported import PLAIN, Beside, Case, case, fits, numbers, tokens
from kitestring.devices.fit.programs import Program
from kitestring.errors import ExportError
from kitestring.export.graphs import backward_graph, predict_graph, step_graph
from told import told


class Then(nn.Module):
    """A product, then a function of it."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.f = nn.Linear(6, 6), f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.inner(x))


class Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


def beside(layer: nn.Module, x: Any) -> Case:
    """Behind another layer, so that the place is not the first one that is tried."""
    return case(Beside([nn.Sequential(nn.Identity(), layer)]), {"x": x})


def put_by_a_mask(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, torch.arange(6) < 3] = torch.tensor([1.0, 2.0, 3.0])
    return y


FUNCTIONS: Mapping[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "spectra": (lambda x: torch.fft.rfft(x).abs(), "_fft_r2c", "spectra"),
    "inverses": (
        lambda x: torch.linalg.inv(x.reshape(-1, 2, 3) @ x.reshape(-1, 3, 2) + torch.eye(2)),
        "linalg_inv", "in the cloud",
    ),
    "branches": (lambda x: x * 2 if x.sum() > 0 else x, "branches on a value", "torch.where"),
    "items": (lambda x: x * x.max().item(), "branches on a value", "torch.where"),
    "masks": (lambda x: x * x[x > 0].sum(), "by a mask", "torch.where(mask"),
    "numbers for a mask": (
        put_by_a_mask, "index_put by a mask with a number for each place", "torch.where(mask",
    ),
    "arguments": (lambda x: x.round(decimals=1), "round with these arguments has no", "sums"),
    "steps without a slope": (
        lambda x: x * torch.heaviside(x, torch.tensor(0.5)), "heaviside", "(x > 0)",
    ),
    "quotients without a slope": (lambda x: x // 2.0, "floor_divide", "torch.floor(x / y)"),
    "fixed rows": (lambda x: x.view(4, 6) * 1, "cannot be traced", "any number of rows"),
    "rows by themselves": (lambda x: x * 2 if len(x) > 6 else x, "rows one like another", "len(x)"),
    "one row by itself": (
        lambda x: x * 2 if len(x) == 1 else x, "like another: 1 row is computed in", "len(x)",
    ),
    "many rows by themselves": (
        lambda x: x * 2 if len(x) > 20 else x, "like another: 33 rows are computed in", "len(x)",
    ),
    "rows up to a number": (lambda x: x + torch.ones(20, 1)[: len(x)], "(33)", "number of rows"),
    "rows squared": (lambda x: x * len(x) ** 2, "rows one like another", "rows"),
    "complex numbers": (
        lambda x: torch.view_as_complex(x.reshape(-1, 3, 2)).abs(), "complex", "two float tensors",
    ),
    "random numbers": (lambda x: x + torch.randn_like(x), "randn_like", "as a column"),
    "cumulated products": (lambda x: x.cumprod(1), "cumprod", "cumsum"),
    "narrow numbers": (lambda x: x.bfloat16().float(), "bfloat16", "float32"),
    "counted classes": (lambda x: F.one_hot(x.argmax(1)) * 1.0, "branches on a value", ""),
    "arrays": (lambda x: x * torch.from_numpy(x.detach().numpy()), "trace", "torch's operations"),
    "functions of one's own": (Copied.apply, "setup_context", "setup_context"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    f, what, mend = FUNCTIONS[name]
    c = beside(Then(f), numbers(6))
    with told(ExportError, what, where="program 'p', layers.0.1 (Then)", mend=mend):
        step_graph(c.program, c.rows, PLAIN)


def test_one_row_may_have_an_axis_less() -> None:
    c = beside(Then(lambda x: x[:, :1].squeeze()), numbers(6))
    program = Program("p", c.program.module, lambda o, b: sum(v.flatten() for v in o.values()))
    step_graph(program, c.rows, PLAIN)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
def test_masks_of_bytes() -> None:
    mask = torch.tensor([1, 0, 1, 0, 0, 0], dtype=torch.uint8)
    c = beside(Then(lambda x: x[:, mask]), numbers(6))
    with told(ExportError, "index by a mask", where="layers.0.1 (Then)", mend="torch.where(mask"):
        step_graph(c.program, c.rows, PLAIN)


class Encoder(nn.Module):
    """Its mask's values decide how torch computes it, where it is not told."""

    def __init__(self, **told: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.inner, self.told = nn.TransformerEncoder(layer, 1), told

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return {"out": self.inner(batch["x"], mask=mask, **self.told)}


def test_masks_that_may_be_causal() -> None:
    c = case(Encoder(), {"x": numbers(5, 8)})
    where = "program 'p', inner (TransformerEncoder)"
    with told(ExportError, "looks at the values of its mask", where=where, mend="is_causal=True"):
        step_graph(c.program, c.rows, PLAIN)
    for causal in (True, False):
        fits(case(Encoder(is_causal=causal), {"x": numbers(5, 8)}))


LAYERS: Mapping[str, tuple[nn.Module, Any, str, str]] = {
    "EmbeddingBag": (nn.EmbeddingBag(7, 4), tokens(7, 3), "_embedding_bag", "nn.Embedding"),
    "AdaptiveMaxPool2d": (
        nn.AdaptiveMaxPool2d(3), numbers(2, 7, 7), "windows of different sizes", "divides",
    ),
    "RReLU": (nn.RReLU(), numbers(6), "rrelu", "column"),
    "Embedding": (
        nn.Embedding(7, 4, scale_grad_by_freq=True), tokens(7, 3), "how often", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """The last one in its backward pass alone: it predicts."""
    layer, x, what, mend = LAYERS[name]
    weighed = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    c = beside(_seen(weighed, x), x)
    with told(ExportError, what, where=f"({name})", mend=mend):
        step_graph(c.program, c.rows, PLAIN)
    with told(ExportError, what, where="program 'p', layers.0.1.0", mend=mend):
        backward_graph(c.program, c.rows)
    if name == "Embedding":
        predict_graph(c.program, c.rows)


def _seen(module: nn.Module, x: Any) -> nn.Module:
    """Lazy layers know their sizes then."""
    import numpy as np

    module.eval()(torch.from_numpy(x(np.random.default_rng(0), 2)))
    return module


@pytest.mark.parametrize(
    ("layer", "x"),
    [(nn.BatchNorm1d(6), numbers(6)),
     (nn.InstanceNorm1d(2, track_running_stats=True), numbers(2, 6))],
)  # fmt: skip
def test_batch_statistics(layer: nn.Module, x: Any) -> None:
    """They are refused in training; what was kept serves to predict."""
    c = case(Beside([nn.Sequential(nn.Linear(6, 6), layer)]), {"x": x})
    with told(ExportError, "batch statistics", where="layers.0.1", mend="GroupNorm"):
        step_graph(c.program, c.rows, PLAIN)
    predict_graph(c.program, c.rows)


class Counting(nn.Module):
    """Keeps statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean(0)  # type: ignore[operator]
        return self.inner(x)  # type: ignore[no-any-return]


def test_statistics_of_ones_own() -> None:
    c = beside(Counting(), numbers(6))
    with told(ExportError, "statistics", where="layers.0.1.seen"):
        step_graph(c.program, c.rows, PLAIN)


def test_what_a_loss_computes_is_told_of_the_loss() -> None:
    def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        return torch.fft.rfft(next(iter(outputs.values()))).abs().sum(1)

    c = case(Beside([nn.Linear(6, 6)]), {"x": numbers(6)}, loss)
    with told(ExportError, "_fft_r2c", where="its loss"):
        step_graph(c.program, c.rows, PLAIN)
    predict_graph(c.program, c.rows)


@pytest.mark.parametrize(
    "f",
    [lambda x: F.dropout(x, 0.5),
     lambda x: F.dropout(x.reshape(-1, 2, 3).transpose(0, 2), 0.5).transpose(0, 2)],
)  # fmt: skip
def test_drawing_in_predictions(f: Callable[[Tensor], Tensor]) -> None:
    """However the numbers lie in memory for which something is drawn."""
    c = beside(Then(f), numbers(6))
    with told(ExportError, "draws random numbers when it predicts", mend="self.training"):
        predict_graph(c.program, c.rows)
    step_graph(c.program, c.rows, PLAIN)


@pytest.mark.parametrize("f", [lambda o: o.sum(), lambda o: o @ o.T, lambda o: o[:1]])
def test_outputs_are_of_rows(f: Callable[[Tensor], Tensor]) -> None:
    c = case(Beside([nn.Linear(6, 6)]), {"x": numbers(6)})
    program = Program("p", c.program.module, after=lambda o, b: {"made": f(next(iter(o.values())))})
    with told(ExportError, "its output 'made' is [", mend="each row"):
        predict_graph(program, c.rows)
