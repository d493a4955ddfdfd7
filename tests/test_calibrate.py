"""What layers are fed, against sums written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from kitestring.compress.calibrate import in_order, in_turn, inputs_of
from kitestring.errors import TaskError
from kitestring.tasks.llama import Llama, LlamaConfig
from told import told


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).eval()


def test_the_sums_are_those_of_all_rows_of_all_batches() -> None:
    """The definitions, over [n, 6] put together by hand; leading axes do not matter."""
    model = mlp()
    batches = [drawn(4, 5, 6), drawn(7, 6, seed=1)]
    found = inputs_of(model, batches, ["0", "3"])
    x = torch.cat([b.reshape(-1, 6) for b in batches])
    with torch.no_grad():
        hidden = torch.cat([model[:3](b).reshape(-1, 8) for b in batches])
    for given, rows in ((found["0"], x), (found["3"], hidden)):
        wide = rows.double()
        assert given.rows == 27
        assert torch.allclose(given.hessian, 2 / 27 * wide.T @ wide, rtol=1e-12, atol=1e-12)
        assert torch.allclose(given.norm, wide.norm(dim=0), rtol=1e-12)
        assert torch.allclose(given.mean, wide.abs().mean(0), rtol=1e-12)
        assert given.hessian.dtype == torch.float64


def test_batches_may_be_made_while_they_are_taken_and_have_several_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(input=x + y)

    x, y = drawn(9, 6), drawn(9, 6, seed=1)
    alive: list[Tensor] = []

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for i in range(3):
            alive.append(x[3 * i : 3 * i + 3])
            yield alive[-1], y[3 * i : 3 * i + 3]

    found = inputs_of(Two(), batches(), ["inner"])["inner"]
    assert len(alive) == 3
    assert torch.allclose(found.norm, (x + y).double().norm(dim=0), rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"padding": (2, 1), "padding_mode": "reflect"},
        {"stride": (1, 3), "padding_mode": "circular", "padding": 1},
    ],
)
def test_a_convolution_is_a_linear_layer_on_its_patches(settings: dict[str, Any]) -> None:
    """|| conv(x; W') - conv(x; W) ||^2 = n / 2 tr(D H D^T), D the change of the flat weights: so
    patches, their order and their number are those that the convolution itself takes."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), bias=False, **settings)
    change = drawn(5, 3, 3, 2, seed=1)
    batches = [drawn(20, 3, 9, 8), drawn(3, 9, 8, seed=2)]  # the last is one image
    found = inputs_of(nn.Sequential(layer), batches, ["0"])["0"]
    d = change.flatten(1).double()
    wanted, places = 0.0, 0
    other = nn.Conv2d(3, 5, (3, 2), bias=False, **settings)
    other.weight = nn.Parameter(change)
    for x in batches:
        y = other(x).detach().double()
        wanted, places = wanted + float(y.square().sum()), places + y.numel() // 5
    assert found.rows == places
    assert float(((d @ found.hessian) * d).sum()) * places / 2 == pytest.approx(wanted, rel=1e-6)


def test_a_layer_that_is_called_twice_is_fed_both_times() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = drawn(5, 4)
    found = inputs_of(model, [x], ["0"])["0"]
    both = torch.cat([x, layer(x).tanh()]).double()
    assert found.rows == 10
    assert torch.allclose(found.norm, both.norm(dim=0), rtol=1e-6)
    assert [f.once for f in in_order(model, [x], ["0"])] == [False]
    assert [found.rows for _, found in in_turn(model, [x], ["0"])] == [10]


def test_the_model_is_left_as_it_was() -> None:
    """Heard in eval mode (a dropout lets all through), and put back, after an error too."""
    model = mlp()
    model.train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = drawn(5, 6)
    found = inputs_of(model, [x], ["3"])["3"]
    assert torch.equal(found.norm, inputs_of(mlp(), [x], ["3"])["3"].norm)
    with told(TaskError, "the model fails on a batch: RuntimeError: mat1", mend="as it takes"):
        inputs_of(model, [drawn(5, 7)], ["3"])
    with told(TaskError, "the model fails on a batch"):
        list(in_turn(model, [x, drawn(5, 7)], ["0", "3"]))
    assert [m.training for m in model.modules()] == [True, False, True, True, True]
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Fan(nn.Module):
    """b and c get what a gives, d what is left of it after it was written to."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.c, self.b, self.a = (nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        out = self.b(h) + self.c(h)
        h.relu_()
        return self.d(h) + out


def test_layers_come_in_the_order_in_which_they_are_called() -> None:
    model, x = Fan(), drawn(5, 4)
    fed = in_order(model, [x], ["d", "c", "b", "a"])
    assert [(f.names, f.once) for f in fed] == [
        (("a",), True),
        (("b", "c"), True),
        (("d",), True),
    ]
    h = functional.linear(x, model.a.weight).detach().double()
    found = inputs_of(model, [x], ["b", "c", "d"])
    assert torch.equal(found["b"].hessian, found["c"].hessian)
    assert torch.allclose(found["b"].norm, h.norm(dim=0), rtol=1e-6)
    assert torch.allclose(found["d"].norm, h.relu().norm(dim=0), rtol=1e-6)
    turn = dict(in_turn(model, [x[:2], x[2:]], ["b", "c", "d"]))
    assert list(turn) == ["b", "c", "d"]
    assert all(torch.allclose(turn[n].hessian, found[n].hessian, rtol=1e-6) for n in turn)


def test_queries_keys_and_values_are_fed_the_same() -> None:
    model = Llama(LlamaConfig(11, 8, 16, 2, 2, 2, 6, 4))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    fed = [f.names for f in in_order(model, [torch.arange(6)[None]], names)]
    assert [[n.rpartition(".")[2] for n in names] for names in fed] == [
        *[["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]] * 2,
        ["lm_head"],
    ]


def test_later_layers_are_fed_by_the_model_as_it_is_by_then() -> None:
    model, x = mlp(), drawn(5, 6)
    wanted = inputs_of(model, [x], ["3"])["3"].norm
    turn = in_turn(model, [x], ["3", "0"])
    assert next(turn)[0] == "0"
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.mul_(2)
    name, given = next(turn)
    assert name == "3"
    assert torch.allclose(given.norm, 2 * wanted, rtol=1e-6)


def test_what_comes_after_the_layers_is_not_run() -> None:
    """Of two batches: the order is found on the first, then each layer hears both, and nothing
    behind it runs: 1 run of what is behind, not 5."""

    class Count(nn.Module):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return x

    count = Count()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), count)
    found = dict(in_turn(model, [drawn(3, 4), drawn(2, 4, seed=1)], ["0", "1"]))
    assert [given.rows for given in found.values()] == [5, 5]
    assert count.runs == 1


class Either(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(x) if x.mean() > 0 else self.low(x)


def test_layers_that_only_some_batches_reach() -> None:
    model, one = Either(), torch.ones(3, 2)
    found = dict(in_turn(model, [one, -one, one], ["high", "low"]))
    assert {name: given.rows for name, given in found.items()} == {"high": 6, "low": 3}


def test_what_cannot_be_heard_is_said() -> None:
    x = drawn(5, 6)
    with told(TaskError, "no batch"):
        inputs_of(mlp(), [], ["0"])
    with told(TaskError, "no batch"):
        inputs_of(mlp(), iter([]), ["0"])
    with told(TaskError, "no batch"):
        list(in_turn(mlp(), iter([]), ["0"]))
    with told(TaskError, "one tensor"):
        inputs_of(mlp(), x, ["0"])
    with told(TaskError, "low got no row"):
        inputs_of(Either(), [torch.ones(3, 2)], ["high", "low"])
    with told(TaskError, "low got no row"):
        list(in_turn(Either(), [torch.ones(3, 2)], ["high", "low"]))
    with told(TaskError, "0 got no row"):
        inputs_of(mlp(), [x[:0]], ["0"])
    with told(TaskError, "no layer is called '9'"):
        inputs_of(mlp(), [x], ["9"])
    with told(TaskError, "ReLU", where="1"):
        inputs_of(mlp(), [x], ["1"])
    with told(TaskError, "NaN", where="0"):
        inputs_of(mlp(), [x, x * float("nan")], ["0"])
    with told(TaskError, "2 groups", where="0"):
        inputs_of(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), [drawn(1, 4, 5, 5)], ["0"])
