"""Where to cut: every cut of every model really runs, and the best is the best of them all."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tiny
from kitestring.core import Message, Rows, Tree
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.profiles import PROFILES, Profile
from kitestring.errors import KitestringError, SettingError, TaskError
from kitestring.exchange import wire
from kitestring.partition import command
from kitestring.partition import graph as graphs
from kitestring.partition.choose import (
    Place,
    cost,
    fastest,
    over_bandwidth,
    over_device,
    thriftiest,
)
from kitestring.partition.graph import Graph, trace
from kitestring.partition.halves import Cut, cuts, halves
from kitestring.partition.model import linked
from kitestring.partition.study import places, study
from kitestring.partition.timing import Times
from kitestring.tasks.layers import Transformer
from kitestring.tasks.programs import programs
from kitestring.tasks.task import Task

PHONE = PROFILES["phone"]

# --- models of all kinds


class Block(nn.Module):
    """A residual connection around two convolutions, in place where it can be."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm, self.act = nn.BatchNorm2d(width), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.norm(self.act(self.a(x))))
        h += x
        return self.act(h)


class Skips(nn.Module):
    """The input and an early value of no width are needed at the end; the batch's size too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 3)
        self.last = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum(1)
        h = torch.relu(self.up(x))
        h = h.view(x.shape[0] * 2, 8).tanh().reshape(x.size(0), -1)
        return self.last(torch.cat([self.down(h), x], 1)) * total.unsqueeze(-1)


class Recurrent(nn.Module):
    """Two layers, the second with time in front: rows are its other axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.first = nn.LSTM(5, 6, batch_first=True)
        self.second = nn.LSTM(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        found, _ = self.first(self.table(x))
        found, _ = self.second(found.transpose(0, 1))
        return self.out(found[-1])


class Typed(nn.Module):
    """What crosses is of two dtypes, with sizes of the batch among what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = x < 0
        places = torch.arange(x.shape[0]).unsqueeze(1) * 0
        for layer in self.layers:
            x = torch.where(hidden, 0.0, layer(x)) + places
        return x


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), Block(4), nn.MaxPool2d(2), Block(4), nn.Flatten(),
        nn.Dropout(), nn.Linear(4 * 9, 3),
    )  # fmt: skip


def transformer() -> nn.Module:
    """With padding, so that a mask that comes of the tokens is needed by all blocks."""
    return Transformer(11, 6, 8, 2, 2, dropout=0.1, padding=True, past=2, tied=True)


MODELS: dict[str, tuple[Any, tuple[int, ...], int]] = {  # what makes it, a row, bound of its tokens
    "chain": (chain, (4,), 0),
    "residual": (convolutions, (1, 6, 6), 0),
    "skips": (Skips, (4,), 0),
    "recurrent": (Recurrent, (5,), 9),
    "typed": (Typed, (6,), 0),
    "transformer": (transformer, (6,), 11),
    "pairs": (lambda: Pairs(), (8,), 0),
}


class Pairs(nn.Module):
    """Operations that give several tensors, which are taken apart only later: views, and not."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.out = nn.Linear(8, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.wide(x), 2, dim=1)
        best = torch.max(x, 1, keepdim=True)
        scale = torch.relu(x).mean(1, keepdim=True)
        return self.out(parts[0] * scale + parts[1] * best[0])


def rows(name: str, count: int, seed: int = 0) -> Tensor:
    _, shape, below = MODELS[name]
    generator = torch.Generator().manual_seed(seed)
    if below:
        return torch.randint(0, below, (count, *shape), generator=generator)
    return torch.randn((count, *shape), generator=generator)


@cache
def model(name: str) -> tuple[nn.Module, Graph]:
    torch.manual_seed(1)
    module = MODELS[name][0]().eval()
    return module, trace(module, rows(name, 5))


def packed(values: Any, count: int, data: bool) -> bytes:
    """What the front gave for some rows as bytes on the wire."""
    parts = values if isinstance(values, tuple) else (values,)
    names = ["h"] if len(parts) == 1 else [f"h{i}" for i in range(len(parts))]
    leaves = Tree(
        {k: Rows(p.numpy()[None], np.array([count])) for k, p in zip(names, parts, strict=True)}
    )
    if data:
        return wire.pack(Message(data=Tree(x=leaves["h"])), 0)
    return wire.pack(Message(features=leaves), 0)


def unpacked(blob: bytes) -> Any:
    message = wire.unpack(blob)
    leaves = [torch.from_numpy(r.values[0]) for r in (message.data or message.features).values()]
    return leaves[0] if len(leaves) == 1 else tuple(leaves)


# --- every cut


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_cut_runs_and_its_bytes_are_those_packed(name: str, count: int) -> None:
    """Front on rows, packed, unpacked, back: the uncut model's answers."""
    module, graph = model(name)
    x = rows(name, count, seed=7)
    wanted = module(x).detach()
    found = [cut for cut in cuts(graph) if not cut.why]
    assert found[0].at == 0
    assert found[-1].at == len(graph.layers)
    for cut in found:
        front, back = halves(graph, cut)
        with torch.no_grad():
            blob = packed(front.eval()(x), count, data=cut.at == 0)
            answer = back.eval()(unpacked(blob))
        torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6)
        last = cut.at == len(graph.layers)
        if count == 1:
            assert cut.up == (0 if last else len(blob)), cut.name
            down = Message(features=Tree(answer=Rows(answer.numpy()[None], np.array([1]))))
            assert cut.down == (0 if last else len(wire.pack(down, 0))), cut.name


def test_bytes_by_hand() -> None:
    """A record is 4 bytes, the name, 4 for each size and the values: x [1, 4] 4 + 1 + 8 + 16, h
    [1, 6] 4 + 1 + 8 + 24, answer [1, 2] 4 + 6 + 8 + 8."""
    _, graph = model("chain")
    assert [(c.up, c.down) for c in cuts(graph)] == [(29, 26), (37, 26), (37, 26), (0, 0)]


def test_what_is_alive_is_billed() -> None:
    """Within a residual block its input crosses too: twice the bytes of the values beside it."""
    _, graph = model("residual")
    inside = next(c for c in cuts(graph) if c.name == "after 1.b Conv2d")
    before = next(c for c in cuts(graph) if c.name == "after 0 Conv2d")
    assert len(inside.alive) == 2
    values = 4 * 4 * 6 * 6
    assert before.up == 5 + 4 * 4 + values  # its name, four sizes
    assert inside.up == 5 + 2 * 4 + 2 * values  # side by side in one row


def test_what_does_not_depend_on_the_input_does_not_cross() -> None:
    """The causal mask and the places are computed on both sides; the mask of padding crosses."""
    _, graph = model("transformer")
    assert graph.how == "torch.export"
    fixed = {n for n, kind in graph.kinds.items() if kind in ("fixed", "size")}
    for cut in cuts(graph):
        assert not fixed & set(cut.alive)
    # Two shifted views of the padded tokens: those, [1 + 6, 8], are less than both.
    shifted = next(c for c in cuts(graph) if c.name == "after past.0 pad")
    assert (7, 8) in [graph.shape(n).row for n in shifted.alive]
    middle = next(c for c in cuts(graph) if c.name == "after blocks.0 add #3")
    shapes = sorted(graph.shape(n).row for n in middle.alive)
    assert shapes == [(1, 6, 6), (6, 8)]


def test_torchs_own_transformer_is_cut_within() -> None:
    """Not before and after it only: between its layers what crosses is as wide as its input."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(self.table(x)).mean(1)

    torch.manual_seed(0)
    module, x = Encoder().eval(), torch.randint(0, 9, (5, 4))
    graph = trace(module, x)
    middle = next(c for c in cuts(graph) if c.name == "after layers.layers.0.norm2 LayerNorm")
    assert middle.up == 5 + 3 * 4 + 4 * 8 * 4
    front, back = halves(graph, middle)
    torch.testing.assert_close(back(front(x[:3])), module(x[:3]), rtol=1e-5, atol=1e-6)


def test_where_it_cannot_be_cut_it_says_so() -> None:
    class Merged(nn.Module):
        """Rows and places in one axis between two layers; before and after it can be cut."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).reshape(-1, 4).relu()).reshape(-1, 3, 4)

    torch.manual_seed(0)
    graph = trace(Merged(), torch.randn(5, 3, 4))
    found = {cut.name: cut.why for cut in cuts(graph)}
    assert "no axis of rows alone" in found["after relu"]
    assert not found["before the first layer"]
    assert not found["after b Linear"]
    with pytest.raises(TaskError, match="no cut after relu"):
        halves(graph, [c.name for c in cuts(graph)].index("after relu"))
    with pytest.raises(SettingError, match="Give 0 to"):
        halves(graph, 99)
    pairs = {cut.name: cut for cut in cuts(model("pairs")[1])}
    assert "max_1, which is needed behind it, is several tensors" in pairs["after relu"].why
    # Two halves of one tensor, needed with x: that tensor crosses, and x.
    assert [n.name for n in pairs["after wide Linear"].alive] == ["x", "wide"]
    assert not pairs["after add"].why


def test_what_is_of_no_dtype_on_the_wire_cannot_cross() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).bfloat16().float())

    graph = trace(Narrow(), torch.randn(5, 4))
    why = {cut.name: cut.why for cut in cuts(graph)}
    assert "bfloat16" in why["after bfloat16"]
    assert not why["after float"]


# --- models that write in place


class Layers(nn.Module):
    """What those below are made of; nothing of it is idempotent in place but `act`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(inplace=True)
        self.flat, self.shrink = nn.Flatten(), nn.Conv1d(8, 8, 1)
        self.register_buffer("last", torch.zeros(8))


class Item(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, 0] = 0
        h[:, 2:4] *= 3
        return self.b(h)


class Columns(Layers):
    """Of a tensor that depends on how many rows there are, and on no value."""

    def forward(self, x: Tensor) -> Tensor:
        h, out = self.a(x), torch.zeros(x.shape[0], 8)
        for i in range(2):
            out[:, i] = h[:, i] * (i + 2)
        return self.b(out)


class Lost(Layers):
    """Nobody takes the result of the module in place."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.act(h)
        return self.b(h)


class LostMethod(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h.relu_()
        return self.b(h)


class LostFunction(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        nn.functional.relu(h, inplace=True)
        return self.b(h)


class LostBetween(Layers):
    """What was read before the write must be as before, what is read behind it not."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        early = h + 0
        self.act(h)
        return self.b(early) + self.b(h).tanh()


class LostDropout(Layers):
    """It writes in training only."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.drop(h)
        return self.b(h)


class OfView(Layers):
    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h[:, :4].mul_(3)
        return self.b(h)


class Overlap(Layers):
    """The result is used, and so are the whole and another view."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        one, other = h[:, :6], h[:, 2:]
        one = one.mul_(2)
        return self.b(h).tanh() + torch.cat([one, other[:, :2]], 1)


class Named(Layers):
    """Two names of one tensor."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        g = h
        g += 1
        return self.b(h)


class Later(Layers):
    """The result is used, and what was written to is used later."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = h.mul_(2)
        return self.b(y) + h.tanh()


class Flattened(Layers):
    """The module's view is written to, and what it is a view of is used later."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).unsqueeze(1)
        y = self.flat(h).mul_(-2)
        return self.b(h.squeeze(1)) + y


class Copied(Layers):
    """`reshape` copies here; of what has crossed it would be a view, and `h` be written to."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.shrink(x.unsqueeze(-1).expand(-1, -1, 3)).transpose(1, 2)
        y = h.reshape(x.shape[0], 24).mul_(3)
        return self.b(h.sum(1)) + y[:, :8]


class OfSize(Layers):
    """Of the result only its size is asked."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = h.relu_()
        return self.b(h).view(y.size(0), 2, 4)


class OfInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.b(self.a(x)) + x


class Kept(Layers):
    """A buffer is written to and read: the model's own tensor, that both halves share."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        last = self.last.copy_(h[0].detach() * 0 + 2)
        return self.b(h * last).tanh() + self.last


class Chain(nn.Sequential):
    """Results in place that are used, as everywhere in torchvision."""

    def __init__(self) -> None:
        relu, drop = nn.ReLU(inplace=True), nn.Dropout(inplace=True)
        super().__init__(nn.Linear(8, 8), relu, drop, nn.Linear(8, 8), nn.ELU(inplace=True))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (Item, "torch.export"), (Columns, "torch.export"), (Lost, "torch.fx"),
        (LostMethod, "torch.fx"), (LostFunction, "torch.fx"), (LostBetween, "torch.fx"),
        (OfView, "torch.export"), (Overlap, "torch.export"), (Named, "torch.export"),
        (Later, "torch.fx"), (Flattened, "torch.export"), (Copied, "torch.export"),
        (OfSize, "torch.fx"), (OfInput, "torch.fx"), (Kept, "torch.export"), (Chain, "torch.fx"),
    ],
)  # fmt: skip
def test_halves_of_what_writes_in_place(kind: type[nn.Module], how: str) -> None:
    """At every cut, for 1, 3 and 7 rows; neither half writes into what it is given, so that a back
    can be asked twice, and learn from features that are leaves."""
    torch.manual_seed(2)
    module = kind().eval()
    graph = trace(module, torch.randn(5, 8))
    assert graph.how == how
    found = [cut for cut in cuts(graph) if not cut.why]
    assert len(found) >= 3
    assert found[-1].at == len(graph.layers)
    for cut in found:
        front, back = halves(graph, cut)
        for count in (1, 3, 7):
            x = torch.randn(count, 8)
            given = x.clone()
            wanted = module(x.clone()).detach()
            h = front(given).detach()
            leaf = h.clone().requires_grad_()
            answer = back(leaf)
            answer.sum().backward()
            torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-6, msg=cut.name)
            assert torch.equal(given, x), cut.name
            assert torch.equal(leaf, h), cut.name
        slopes = [
            torch.autograd.grad(f(x.clone()).sum(), list(module.parameters()), allow_unused=True)
            for f in (lambda x, front=front, back=back: back(front(x)), module)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5, msg=cut.name)


def test_a_dropout_in_place_whose_result_is_dropped_drops_in_training() -> None:
    module = LostDropout()
    front, back = halves(trace(module, torch.randn(5, 8)), 1)
    h = front(torch.randn(4, 8)).detach()
    assert not torch.equal(back.train()(h), back(h))
    assert torch.equal(back.eval()(h), back(h))


def test_wrong_halves_are_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody looked for writes: the halves lose one, and the check is what sees it."""
    monkeypatch.setattr(graphs, "settle", lambda traced, rows: {})
    module, x = OfView().eval(), torch.randn(5, 8)
    graph = trace(module, x)
    for cut in cuts(graph):
        with pytest.raises(TaskError, match=f"no cut {cut.name}: the halves give something else"):
            halves(graph, cut)
    with pytest.raises(TaskError, match="the halves give something else"):
        study(module, x)


@fx.wrap
def judged(x: Tensor) -> Tensor:
    """`torch.fx` does not look into it; `torch.export` does, and cannot follow it."""
    return x if float(x[0, 0]) > 1e9 else x * 1


class Judged(OfView):
    def forward(self, x: Tensor) -> Tensor:
        return judged(super().forward(x))


def test_what_writes_in_place_and_cannot_be_followed_is_told_where() -> None:
    module = nn.Sequential(nn.Linear(8, 8), Judged())
    with pytest.raises(TaskError, match="mul_ in 1 writes into a tensor that is used") as found:
        trace(module, torch.randn(5, 8))
    assert "h = h.relu() for h.relu_()" in str(found.value)
    assert "\n" not in str(found.value)


# --- models that cannot be followed


class OfValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if float(x[0, 0]) > 100 else x


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Counting(nn.Module):
    """`len` is a plain number to whoever traces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), 2, 2)


class Several(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"out": x}


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (OfValues(), "cannot be followed"),
        (Counting(), r"x.shape\[0\] for len\(x\)"),
        (Mixing(), "depends on the other rows"),
        (Several(), "gives dict for 2 rows"),
        (nn.Linear(9, 2), "fails on rows of 4"),
        (nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), r"gives shape \(4,\) for 2 rows"),
    ],
)
def test_models_that_cannot_be_cut(module: nn.Module, said: str) -> None:
    with pytest.raises(TaskError, match=said) as found:
        trace(module, torch.randn(5, 4))
    assert "\n" not in str(found.value)


def test_a_model_without_operations_has_no_time_on_a_device() -> None:
    with pytest.raises(TaskError, match="can be counted"):
        study(nn.ReLU(), torch.randn(5, 4))


# --- the halves as modules


def test_halves_learn_as_the_whole_does() -> None:
    """Gradients of a loss on back(front(x)) are those of the model, to the bit: one code."""
    module, graph = model("residual")
    x, y = rows("residual", 4), torch.tensor([0, 1, 2, 0])
    whole = nn.functional.cross_entropy(module(x), y)
    wanted = torch.autograd.grad(whole, list(module.parameters()))
    for cut in cuts(graph)[1:-1]:
        front, back = (half.eval() for half in halves(graph, cut))
        loss = nn.functional.cross_entropy(back(front(x)), y)
        found = torch.autograd.grad(loss, list(module.parameters()))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_halves_keep_what_differs_in_training() -> None:
    """Dropout is a module of the back, and draws there as it does in the model."""
    module, graph = model("residual")
    cut = next(c for c in cuts(graph) if c.name == "after 3.act ReLU #2")
    front, back = halves(graph, cut)
    x = rows("residual", 4)
    h = front.eval()(x)
    drawn = [back.train()(h) for _ in range(2)]
    assert not torch.equal(*drawn)
    assert torch.equal(back.eval()(h), back(h))
    module.eval()


def test_tracing_leaves_a_model_as_it_was() -> None:
    module = convolutions().train()
    module[1].eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    trace(module, rows("residual", 5))
    assert [m.training for m in module] == [True, False, True, True, True, True, True]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "skips"])
def test_halves_are_a_tasks_front_and_back(name: str) -> None:
    """The task's small model in two: its programs predict what the model does, and train."""
    answers, shape = {"residual": (3, (1, 6, 6)), "skips": (2, (4,))}[name]

    def small() -> nn.Module:
        module = MODELS[name][0]()
        graph = trace(module, rows(name, 5))
        front, back = halves(graph, len(graph.layers) // 2)
        whole = nn.Sequential()
        whole.add_module("front", front)
        whole.add_module("back", back)
        return whole

    base = tiny.task()
    assert isinstance(base, Task)
    task = replace(
        base, small=small, large=lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), server=None
    )
    x = rows(name, 3).numpy()
    made = programs(task, 0, x[:2])
    compute = TorchCompute(made, "sequential")
    columns = {"x": Rows(x[None], np.array([3]))}
    weights = Tree({k: v[None] for k, v in compute.initial("small").items()})
    found = compute.predict("small", weights, columns)
    front = Tree({k: v for k, v in weights.items() if k.startswith("front.")})
    h = compute.predict("front", front, columns)["h"]
    assert np.array_equal(h.values, found["h"].values)
    truth = columns | {"y": Rows(np.zeros((1, 3), np.int64), np.array([3]))}
    _, slopes, _ = compute.backward("small", weights, truth)
    assert found["out"].values.shape == (1, 3, answers)
    assert x.shape[1:] == shape
    assert any(k.startswith("front.") and np.abs(v).max() > 0 for k, v in slopes.items())
    assert any(k.startswith("back.") and np.abs(v).max() > 0 for k, v in slopes.items())


# --- the best of all


class Clock(fx.Interpreter):
    """Adds up what the nodes that really run take, by what is said of the model's nodes."""

    def __init__(self, module: nn.Module, seconds: Mapping[str, float]) -> None:
        assert isinstance(module, fx.GraphModule)
        super().__init__(module)
        self.seconds, self.spent = seconds, 0.0

    def run_node(self, n: fx.Node) -> Any:
        self.spent += self.seconds.get(n.meta.get("of", ""), 0.0)
        return super().run_node(n)


def ran(graph: Graph, cut: Cut, x: Tensor, seconds: Mapping[str, float]) -> tuple[float, float]:
    """Seconds of front and back, by running both."""
    front, back = halves(graph, cut)
    one = Clock(front, seconds)
    h = one.run(x)
    if isinstance(back, nn.Identity):
        return one.spent, 0.0
    other = Clock(back, seconds)
    other.run(h)
    return one.spent, other.spent


@pytest.mark.parametrize("name", MODELS)
def test_the_chosen_cut_is_the_best_of_all_that_were_run(name: str) -> None:
    """Each node of the model gets a time; both halves of each cut run and add up theirs. The
    cheapest sum, with the bytes that were packed, is what is chosen; on many devices and links."""
    _, graph = model(name)
    for node in graph.module.graph.nodes:
        node.meta["of"] = node.name
    dice = np.random.default_rng(5)
    nodes = [n for n in graph.module.graph.nodes if n.op not in ("output", "placeholder")]
    drawn = {n: float(dice.exponential(1e-3)) for n in nodes}
    times = Times(drawn | {graph.input: 0.0}, 1.0, 1)
    operations = 1e9 * times.layers  # so that a second here is a second at 1e9 a second
    found = cuts(graph)
    every = places(found, times, operations)
    x = rows(name, 1)
    runs = {
        cut.at: (*ran(graph, cut, x, {n.name: t for n, t in drawn.items()}), cut)
        for cut in found
        if not cut.why
    }
    where = set()
    for _ in range(200):
        device, cloud, up, down = (10.0**e for e in dice.uniform((7, 8, 3, 3), (11, 12, 8, 8)))
        trip = float(dice.uniform(0, 0.01))
        profile = Profile("drawn", device, 1, up, down, trip, 1e-7, 1e-7)
        totals = {
            at: front * 1e9 / device + back * 1e9 / cloud
            + (cut.up / up + cut.down / down + trip if cut.up else 0.0)
            for at, (front, back, cut) in runs.items()
        }  # fmt: skip
        best = fastest(every, profile, cloud)
        assert totals[best.at] == pytest.approx(min(totals.values()), rel=1e-9)
        assert cost(best, profile, cloud).total == pytest.approx(totals[best.at], rel=1e-9)
        where.add(best.at)
    assert len(where) > 1, "the best is always the same: nothing is shown"


class Bottleneck(nn.Module):
    """Much in, little in the middle, and most of the work behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.AvgPool1d(2000)
        self.wide = nn.Sequential(nn.Linear(10, 1500), nn.ReLU(), nn.Linear(1500, 1500))
        self.out = nn.Linear(1500, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.wide(self.narrow(x.unsqueeze(1)).flatten(1))))


def test_measured_layers_lead_to_the_cut_that_measured_halves_do() -> None:
    """With the clock: 80 kB in, 40 bytes after the pooling, 2.3 M multiplications behind. On a
    device a thousandth as fast as the cloud and a megabit a second the cut is behind the pooling,
    as both halves of each cut, timed, say. (80 kB take 0.64 s, the rest on the device seconds.)"""
    torch.manual_seed(0)
    module, x = Bottleneck().eval(), torch.randn(5, 20_000)
    found = study(module, x)
    device = Profile("slow", found.rate / 1000, 1, 125e3, 125e3, 0.01, 1e-7, 1e-7)
    best = fastest(found.places, device, found.rate)
    assert best.name == "after narrow AvgPool1d"
    totals = {}
    with torch.no_grad():
        for cut in found.cuts:
            front, back = halves(found.graph, cut)
            spent = []
            for half, given in ((front, x[:1]), (back, front(x[:1]))):
                tries = []
                for _ in range(9):
                    before = time.perf_counter()
                    half(given)
                    tries.append(time.perf_counter() - before)
                spent.append(min(tries))
            link = (cut.up + cut.down) / 125e3 + 0.01 if cut.up else 0.0
            totals[cut.at] = spent[0] * 1000 + link + spent[1]
    assert min(totals, key=totals.__getitem__) == best.at


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Place], Profile, float]:
    """A model of up to 9 layers with any times and sizes, a device, a link and a cloud."""
    count = draw(st.integers(1, 9))
    layers = draw(st.lists(st.floats(0, 1e12), min_size=count, max_size=count))
    sizes = draw(st.lists(st.integers(1, 10**8), min_size=count, max_size=count))
    answer = draw(st.integers(1, 10**6))
    found = [
        Place(k, f"cut {k}", sum(layers[:k]), sum(layers[k:]), *((sizes[k], answer) if k < count
              else (0, 0)))
        for k in range(count + 1)
    ]  # fmt: skip
    speed = st.floats(1e3, 1e14)
    profile = Profile(
        "drawn", draw(speed), 1, draw(st.floats(1, 1e10)), draw(st.floats(1, 1e10)),
        draw(st.floats(0, 10)), draw(st.floats(0, 1e-3)), draw(st.floats(0, 1e-3)),
    )  # fmt: skip
    return found, profile, draw(speed)


def seconds(place: Place, p: Profile, cloud: float) -> float:
    """T_device + bytes / bandwidth + T_cloud, written out once more."""
    way = place.up / p.up + place.down / p.down + p.round_trip if place.up else 0.0
    return place.device / p.flops + way + place.cloud / cloud


@given(problems())
def test_fastest_and_thriftiest_are_the_least_of_all(
    problem: tuple[list[Place], Profile, float],
) -> None:
    every, profile, cloud = problem
    best = fastest(every, profile, cloud)
    least = min(seconds(p, profile, cloud) for p in every)
    assert seconds(best, profile, cloud) == pytest.approx(least, rel=1e-12)
    for high, per in ((False, 2.3e-12), (True, 70e-12)):
        radio = {p.at: p.up * profile.joules_up + p.down * profile.joules_down for p in every}
        joules = {p.at: p.device * per + radio[p.at] for p in every}
        found = thriftiest(every, profile, high)
        assert joules[found.at] == pytest.approx(min(joules.values()), rel=1e-12)


@given(problems(), st.lists(st.floats(-1, 15), min_size=1, max_size=8))
def test_ranges_say_what_is_fastest_at_any_speed(
    problem: tuple[list[Place], Profile, float], powers: Sequence[float]
) -> None:
    """They join without a gap from 0 to infinity, and within each its place is the fastest."""
    every, profile, cloud = problem
    for ranges, what in (
        (over_bandwidth(every, profile, cloud), "up"),
        (over_device(every, profile, cloud), "flops"),
    ):
        ends = [(r.low, r.high) for r in ranges]
        assert ends[0][0] == 0
        assert math.isinf(ends[-1][1])
        assert all(a[1] == b[0] for a, b in pairwise(ends))
        assert all(low < high for low, high in ends)
        for speed in (10.0**power for power in powers):
            (within,) = (r for r in ranges if r.low < speed <= r.high)
            changed = replace(profile, **{what: speed})
            if what == "up":
                changed = replace(changed, down=profile.down * speed / profile.up)
            assume(math.isfinite(changed.down) and changed.down > 0)
            least = min(seconds(p, changed, cloud) for p in every)
            assert seconds(within.place, changed, cloud) == pytest.approx(least, rel=1e-6)


def test_ranges_by_hand() -> None:
    """1 s on the device or 100 bytes up and nothing to compute: at 100 bytes a second as fast."""
    every = [Place(0, "cloud", 0.0, 0.0, 100, 0), Place(1, "device", 10.0, 0.0, 0, 0)]
    profile = Profile("hand", 10.0, 1, 50.0, 50.0, 0.0, 0.0, 0.0)
    low, high = over_bandwidth(every, profile, 1.0)
    assert (low.place.name, high.place.name) == ("device", "cloud")
    assert low.high == high.low == pytest.approx(100)
    slow, quick = over_device(every, profile, 1.0)
    assert (slow.place.name, quick.place.name) == ("cloud", "device")
    assert slow.high == pytest.approx(5)  # 100 bytes at 50 a second take 2 s, as 10 / 5 do


# --- the command


@pytest.mark.parametrize(
    ("text", "up", "trip"),
    [("10Mbit,50ms", 1.25e6, 0.05), ("1.5 gbit/s", 187.5e6, 0.05), ("64kbit, 2s", 8e3, 2.0)],
)
def test_links(text: str, up: float, trip: float) -> None:
    found = linked(PHONE, text)
    assert (found.up, found.down, found.round_trip) == (up, up, pytest.approx(trip))
    assert linked(PHONE, None) is PHONE


@pytest.mark.parametrize("text", ["", "fast", "10", "0Mbit", "10Mbit,", "1.2.3Mbit", "10MB"])
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(SettingError, match="10Mbit,50ms"):
        linked(PHONE, text)


def cut(*words: str | Path) -> None:
    top = argparse.ArgumentParser()
    command.add(top.add_subparsers(dest="command", required=True))
    command.run(top.parse_args(["cut", *map(str, words)]), " ".join(map(str, words)))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of somebody's own, with a model that is best cut in the middle on a slow link."""
    monkeypatch.delitem(sys.modules, "own_net", raising=False)
    file = tmp_path / "own_net.py"
    file.write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.AvgPool1d(1000), "
        "nn.Flatten(), nn.Linear(20, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.Linear(2000, 5))\n"
    )
    return file


def test_the_command(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = source.parent / "out"
    cut(
        f"{source}:net", "--input", "1x20000", "--device", "microcontroller", "--cloud", "pc",
        "--link", "1Mbit,10ms", "--out", out,
    )  # fmt: skip
    said = capsys.readouterr().out
    found = json.loads((out / "cuts.json").read_text())
    costs = {c["at"]: c["modelled"] for c in found["cuts"]}
    totals = {at: c["total_s"] for at, c in costs.items()}
    assert found["fastest"] == min(totals, key=totals.__getitem__)
    # 80 kB up take 0.64 s; 8 million operations on a microcontroller of 50 million a second 0.16;
    # 80 bytes after the pooling a round trip, and the pooling 20,000 additions.
    assert found["cuts"][found["fastest"]]["name"] in ("after 0 AvgPool1d", "after 1 Flatten")
    assert costs[0]["link_s"] == pytest.approx((80_017 + 38) / 125e3 + 0.01)
    assert costs[6]["device_s"] == pytest.approx(found["operations"] / 50e6)
    assert costs[0]["cloud_s"] == pytest.approx(found["operations"] / 20e9)
    assert found["operations"] == 2 * (20 * 2000 + 2000 * 2000 + 2000 * 5)
    for c in costs.values():
        assert c["total_s"] == pytest.approx(c["device_s"] + c["link_s"] + c["cloud_s"])
    assert "all in the cloud" in said
    assert "all on the device" in said
    assert "Fastest: after" in said
    assert "By uplink (now 1 Mbit/s): " in said
    assert max(map(len, said.splitlines()[:9])) <= 80
    assert "…" not in said.split("* fastest")[0]
    tree = ElementTree.parse(out / "cuts.svg")
    texts = [t.text for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert sum("fastest" in (t or "") for t in texts) == 1
    assert {"device", "link", "cloud"} <= set(texts)
    assert (out / "cuts.png").read_bytes()[:4] == b"\x89PNG"


def test_the_drawing_has_a_bar_for_each_part(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lengths are the figures that the table has."""
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    out = source.parent / "out"
    cut(f"{source}:net", "--input", "1x20000", "--out", out)
    costs = [c["modelled"] for c in json.loads((out / "cuts.json").read_text())["cuts"]]
    (axes,) = drawn[0].axes
    wide = [bar.get_width() for bar in axes.patches]
    parts = [c[f"{part}_s"] for part in ("device", "link", "cloud") for c in costs]
    assert wide == pytest.approx(parts)


def test_a_built_in_tasks_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cut("digits:small", "--out", tmp_path)
    found = json.loads((tmp_path / "cuts.json").read_text())
    # x is uint8 [1, 16, 16]: 4 + 1 + 4 * 4 and 256 bytes; 256 inputs, 16 between, 10 classes.
    assert found["cuts"][0]["up_bytes"] == 21 + 256
    assert found["operations"] == 2 * (256 * 16 + 16 * 10)
    assert "assumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("digits",), "Name digits:small or digits:large"),
        (("digits:huge",), "Name digits:small or digits:large"),
        (("nothing",), "no model named"),
        (("digits:large", "--input", "3x3"), "brings its own rows"),
        (("digits:large", "--device", "toaster"), "unknown device profile"),
        (("digits:large", "--cloud", "toaster"), "unknown device profile"),
        (("digits:large", "--link", "quick"), "is no link"),
        (("OWN:net",), "--input"),
        (("OWN:net", "--input", "3y3"), "is no shape"),
        (("OWN:net", "--input", "6:int64:0"), "--input '6:int64:0'"),
        (("OWN:net", "--input", f"6:int64:{2**64}"), "--input '6:int64:"),
        (("OWN:net", "--input", "3x3"), "the model fails on rows of 3x3"),
        (("OWN:other", "--input", "3x3"), "no 'other'"),
        (("nofile.py:net", "--input", "3"), "no such file"),
    ],
)
def test_what_is_wrong_is_one_line(words: tuple[str, ...], said: str, source: Path) -> None:
    given = [word.replace("OWN", str(source)) for word in words]
    with pytest.raises(KitestringError) as found:
        cut(*given)
    assert said in str(found.value)
    assert "\n" not in str(found.value)
