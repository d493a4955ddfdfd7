"""Structured pruning: the smaller model computes exactly what the whole one does where nothing that
was removed is summed into anything. Which weights those sums are over is written down by hand."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from drawn_modules import draw
from exported import PLAIN, case, fits, numbers, predicts
from kitestring.compress.distil.batches import rows
from kitestring.compress.distil.response import Response, response
from kitestring.compress.distil.train import Settings, distil
from kitestring.compress.prune.coupled.cut import silent
from kitestring.compress.prune.coupled.groups import groups_of
from kitestring.compress.prune.coupled.trace import trace
from kitestring.compress.prune.structured import (
    Group,
    groups,
    magnitude,
    reshape,
    shape_of,
    slim,
    taylor,
)
from kitestring.devices.fit.compute import TorchCompute
from kitestring.errors import SettingError, TaskError
from kitestring.tasks import digits
from kitestring.tasks.layers import Past, Transformer
from kitestring.tasks.llama import Llama, LlamaConfig

CLOSE = 1e-5
ALL = ("channels", "heads", "neurons", "width")


class Residual(nn.Module):
    def __init__(self, wide: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(out)
        self.two = nn.Conv2d(out, out, 3, 1, 1)
        self.norm_two = nn.BatchNorm2d(out)
        down = nn.Sequential(nn.Conv2d(wide, out, 1, stride), nn.BatchNorm2d(out))
        self.down = down if wide != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_two(self.two(F.relu(self.norm(self.one(x)))))
        h += self.down(x)
        return F.relu_(h)


class Dense(nn.Module):
    def __init__(self, wide: int, more: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(wide), nn.Conv2d(wide, more, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class Gated(nn.Module):
    """Halves of one convolution: the first by what the second lets through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 12, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.conv(x).chunk(2, 1)
        return self.out((u * v.sigmoid()).mean(2))


class Turned(nn.Module):
    """Queries and keys that a norm over each head and a table of positions change."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.into, self.q_norm = nn.Linear(5, 32), nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32) for _ in range(4))
        self.register_buffer("table", torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        q, k, v = (
            p(x).reshape(len(x), -1, self.num_heads, 8).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q) * self.table, k * self.table
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o_proj(mixed.flatten(2)).mean((1, 2))


class Raw(nn.Module):
    """Parameters without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.bias = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(8))
        self.out = nn.Parameter(torch.randn(8, 3))
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.into + self.bias) * self.scale @ self.out


class Twice(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight, self.out = self.a.weight, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.relu(self.a(F.relu(self.into(x))))))


class OwnWay(nn.Module):
    """`left` can be made smaller. What comes of `right` goes through `inside`, which cannot."""

    def __init__(self, inside: Callable[[Tensor], Tensor], wide: int = 8) -> None:
        super().__init__()
        self.left, self.left_out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.right, self.right_out = nn.Linear(4, 8), nn.Linear(wide, 3)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        left = self.left_out(F.relu(self.left(x)))
        return left + self.right_out(self.inside(F.relu(self.right(x))))


def config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "head_dim": 4,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """With weights and statistics that are all different, in evaluation."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and not name.endswith(("cos", "sin")):
                noise = torch.randn(t.shape, generator=dice) * 0.3
                t.add_(noise.abs() if "var" in name else noise)
    return model.eval()


IMAGE, TOKENS, SIGNAL = torch.randn(3, 3, 8, 8), torch.randint(0, 20, (3, 6)), torch.randn(3, 6, 5)
Sums = Mapping[str, Mapping[str, Callable[[int], Iterable[int]]]]
"""Of each group, the weights that sum over it, along their axis 1 (or another, "@0"): by the number
of a part its positions there."""


def same(a: int) -> Iterable[int]:
    return (a,)


def run(size: int) -> Callable[[int], Iterable[int]]:
    return lambda a: range(a * size, (a + 1) * size)


def after(start: int) -> Callable[[int], Iterable[int]]:
    return lambda a: (start + a,)


def llama_sums(heads: Callable[[int], Iterable[int]]) -> Sums:
    layers = [f"model.layers.{i}." for i in range(2)]
    return {
        **{f"{x}self_attn.q_proj": {f"{x}self_attn.o_proj": heads} for x in layers},
        **{f"{x}mlp.gate_proj": {f"{x}mlp.down_proj": same} for x in layers},
    }


CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Sums]] = {
    "digits' large model": (
        digits._large, torch.randint(0, 256, (3, 1, 16, 16)),
        {"1": {"4": same}, "4": {"9": run(16)}, "9": {"11": same}},
    ),
    "residual": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), Residual(8, 8), Residual(8, 12, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        ), IMAGE,
        {
            "0": {"2.one": same, "3.one": same, "3.down.0": same}, "2.one": {"2.two": same},
            "3.one": {"3.two": same}, "3.two": {"6": same},
        },
    ),
    "concatenated": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), Dense(8, 4), Dense(12, 6), nn.Conv2d(18, 4, 1), nn.AvgPool2d(6),
            nn.Flatten(), nn.Linear(4, 3),
        ), IMAGE,
        {
            "0": {"1.conv": same, "2.conv": same, "3": same},
            "1.conv": {"2.conv": after(8), "3": after(8)}, "2.conv": {"3": after(12)},
            "3": {"6": same},
        },
    ),
    "depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8), nn.InstanceNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 6, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 3),
        ), IMAGE,
        {"0": {"4": run(2)}, "4": {"7": run(9)}},
    ),
    "in groups": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.GroupNorm(6, 12), nn.ReLU(), nn.Conv2d(12, 16, 1, groups=2),
            nn.ReLU(), nn.Conv2d(16, 16, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 3),
        ), IMAGE,
        # Pairs of the norm, the same in both groups of the convolution: 0, 1 and 6, 7.
        {"0": {"3": run(2)}, "3": {"8": lambda a: (*run(2)(a), *run(2)(a + 4))}},
    ),
    "MLP": (
        lambda: nn.Sequential(
            nn.Linear(5, 9), nn.BatchNorm1d(9), nn.PReLU(9), nn.Linear(9, 7, bias=False),
            nn.Softplus(), nn.Linear(7, 2),
        ), SIGNAL[:, 0],
        {"0": {"3": same}, "3": {"5": same}},
    ),
    "past": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Past(3), nn.Linear(18, 4)), SIGNAL,
        {"0": {"3": lambda a: (a, a + 6, a + 12)}},
    ),
    "gated": (Gated, SIGNAL.transpose(1, 2)[:, :3], {"conv": {"out": same}}),
    "upwards": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ELU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.ReLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(6, 8, 1), nn.PixelShuffle(2),
            nn.ZeroPad2d(1), nn.Conv2d(2, 1, 3),
        ), IMAGE,
        {"0": {"2@0": same}, "2": {"5": same}, "5": {"8": same}},
    ),
    "one weight twice": (Twice, SIGNAL[:, 0], {"into": {"a": same, "out": same}}),
    "parameters": (Raw, SIGNAL[:, 0], {"into": {"out@0": same}}),
    "heads": (
        Turned, SIGNAL,
        {
            "into": {"q_proj": same, "k_proj": same, "v_proj": same},
            "q_proj": {"o_proj": run(8)},
        },
    ),
    "Llama": (lambda: Llama(config(num_key_value_heads=4)), TOKENS, llama_sums(run(4))),
    "Llama, shared": (lambda: Llama(config()), TOKENS, llama_sums(run(8))),
    "Llama, all shared": (lambda: Llama(config(num_key_value_heads=1)), TOKENS, llama_sums(run(4))),
    "Llama, tied": (lambda: Llama(config(tie_word_embeddings=True)), TOKENS, llama_sums(run(8))),
    "transformer": (
        lambda: Transformer(20, 8, 16, 4, 2, past=3, tied=True, padding=True), TOKENS,
        {
            **{f"blocks.{i}.qkv": {f"blocks.{i}.out": run(4)} for i in range(2)},
            **{f"blocks.{i}.feed.1": {f"blocks.{i}.feed.3": same} for i in range(2)},
        },
    ),
}  # fmt: skip
everywhere = pytest.mark.parametrize("name", CASES)


def made(name: str) -> tuple[nn.Module, Tensor, Sums]:
    torch.manual_seed(0)
    make, x, sums = CASES[name]
    return stirred(make()), x, sums


def drawn_scores(found: Iterable[Group], seed: int = 0) -> dict[str, Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=dice) for g in found}


def without(model: nn.Module, sums: Sums, gone: Mapping[str, Iterable[int]]) -> nn.Module:
    """The whole model, in which weights on what is gone are zero."""
    new = copy.deepcopy(model)
    with torch.no_grad():
        for group, parts in gone.items():
            for name, positions in sums[group].items():
                name, _, axis = name.partition("@")
                found = new.get_parameter(name) if hasattr(new, name) and isinstance(
                    getattr(new, name), nn.Parameter
                ) else new.get_submodule(name).weight  # fmt: skip
                index = torch.tensor([p for a in parts for p in positions(a)], dtype=torch.long)
                found.index_fill_(int(axis or 1), index, 0)
    return new


def near(one: Tensor, other: Tensor, close: float = CLOSE) -> None:
    assert one.shape == other.shape
    with torch.no_grad():
        assert float((one - other).abs().max()) <= close * float(other.abs().max())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def kept(model: nn.Module, small: nn.Module, x: Tensor) -> dict[str, float]:
    """How many of each group, from the first layer's outputs."""
    found = {}
    for group in groups(model, x):
        one, other = (
            getattr(m, group.name, None) if "." not in group.name and hasattr(m, group.name)
            else m.get_submodule(group.name) for m in (model, small)
        )  # fmt: skip
        whole, less = (getattr(part, "weight", part) for part in (one, other))
        axis = 1 if isinstance(one, nn.ConvTranspose2d | nn.Parameter) else 0
        found[group.name] = group.size * less.shape[axis] / whole.shape[axis]
    return found


def flops(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


@everywhere
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_it_computes_what_the_whole_does_without_what_is_gone(name: str, keep: float) -> None:
    model, x, sums = made(name)
    found = groups(model, x)
    assert {g.name for g in found} == set(sums)
    scores = drawn_scores(found)
    small = slim(model, x, keep, scores=scores)
    stay = {g.name: max(1, int(keep * g.size + 0.5)) for g in found}
    gone = {k: scores[k].argsort(descending=True)[n:].tolist() for k, n in stay.items()}
    assert all(gone.values())
    with torch.no_grad():
        wanted = without(model, sums, gone)(x)
        assert float((wanted - model(x)).abs().max()) > 1e-3
        near(small(x), wanted)
    assert count(small) < 0.9 * count(model)
    assert flops(small, x) < 0.9 * flops(model, x)


@everywhere
def test_it_is_stored_and_built_again(name: str) -> None:
    """From JSON, the original architecture and the weights."""
    model, x, _ = made(name)
    small = slim(model, x, 0.5)
    shape = json.loads(json.dumps(shape_of(model, small)))
    again = reshape(CASES[name][0](), shape)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(x), small(x))
    assert str(again) == str(small)
    assert count(again) == count(small)
    assert shape_of(small, again) == {}
    # And it is a model like any other.
    assert torch.equal(pickle.loads(pickle.dumps(copy.deepcopy(small)))(x), small(x))
    assert count(slim(small, x, 0.5)) < count(small)


@everywhere
def test_the_original_stays_as_it_was(name: str) -> None:
    model, x, _ = made(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    next(model.parameters()).requires_grad_(False)
    small = slim(model, x, 0.5)
    assert not small.training
    assert not next(small.parameters()).requires_grad
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


@everywhere
def test_to_keep_all_is_the_model(name: str) -> None:
    model, x, _ = made(name)
    for keep in (1.0, 1, {}, {g.name: 1.0 for g in groups(model, x)}):
        whole = slim(model, x, keep)
        assert whole is not model
        assert shape_of(model, whole) == {}
        assert torch.equal(whole(x), model(x))


@everywhere
def test_one_of_each_stays(name: str) -> None:
    model, x, _ = made(name)
    small = slim(model, x, 1e-6)
    assert all(p.numel() for p in small.parameters())
    assert small(x).shape == model(x).shape
    assert all(n == 1 for n in kept(model, small, x).values())


@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.2, 0.5, 0.8]))
@examples(max_examples=10)
def test_modules_that_nobody_chose(seed: int, keep: float) -> None:
    """No group is left whole for safety, so what couples is found and not guessed."""
    drawn = draw(seed)
    x = {"x": torch.from_numpy(drawn.columns(3, np.random.default_rng(seed))["x"])}
    model = stirred(copy.deepcopy(drawn.module), seed)
    what = ALL if seed % 2 else ALL[:3]
    found = trace(model, x)
    every = {g.name: g for g in groups_of(found) if g.kind in what}
    fine = {g.name for g in groups(model, x, what)}
    assert {k for k, g in every.items() if g.exact or g.size > 3} <= fine
    if not fine:
        return
    small = slim(model, x, keep, what=what)
    whole = reshape(drawn.module, shape_of(model, small))
    whole.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert small(x)["out"].shape == model(x)["out"].shape
        assert torch.equal(whole(x)["out"], small(x)["out"])
        exact = {k: 0.5 for k in fine if every[k].exact}
        if exact:
            ranks = magnitude(model, x)
            gone = {
                k: every[k].atoms[ranks[k].argsort(descending=True, stable=True).numpy()][
                    int(every[k].size / 2 + 0.5) :
                ] for k in exact
            }  # fmt: skip
            near(slim(model, x, exact, what=ALL)(x)["out"], silent(model, found, gone)(x)["out"])


def test_width_is_a_llama_of_that_width() -> None:
    """Weights sliced by hand, in a model built narrower."""
    model, x, _ = made("Llama, tied")
    scores = {"model.embed_tokens": torch.rand(16, generator=torch.Generator().manual_seed(3))}
    small = slim(model, x, {"model.embed_tokens": 6}, scores=scores, what=("width",))
    stay = scores["model.embed_tokens"].argsort(descending=True)[:6].sort().values
    wanted = Llama(config(tie_word_embeddings=True, hidden_size=6)).eval()
    weights = {}
    for name, t in model.state_dict().items():
        axis = 0 if name.endswith(("o_proj.weight", "down_proj.weight")) or t.ndim == 1 else 1
        weights[name] = t.index_select(axis, stay)
    wanted.load_state_dict(weights)
    near(small(x), wanted(x))
    assert small.config == wanted.config
    assert small.lm_head is None


def test_queries_that_share_keys_and_values_go_evenly() -> None:
    """Of heads 0, 1 that share one and 2, 3 that share another, the same of both."""
    model, x, _ = made("Llama, shared")
    sums = llama_sums(lambda a: (*run(4)(a), *run(4)(a + 2)))
    scores = {f"model.layers.{i}.self_attn.q_proj": torch.tensor([0.0, 1.0]) for i in range(2)}
    small = slim(model, x, 0.5, scores=scores, what=("queries",))
    near(small(x), without(model, sums, {k: [0] for k in scores})(x))
    attention = small.model.layers[0].self_attn
    assert (attention.heads, attention.shared) == (2, 2)
    assert attention.k_proj.weight.shape == (8, 16)
    changed = config(num_attention_heads=2)
    assert small.config == changed


def test_settings_follow_where_layers_stay_alike() -> None:
    model, x, _ = made("Llama, shared")
    small = slim(model, x, 0.5, what=ALL)
    assert small.config == config(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1
    )
    again = Llama(small.config)
    again.load_state_dict(small.state_dict())
    near(again.eval()(x), small(x))
    uneven = slim(model, x, {"model.layers.0.mlp.gate_proj": 6})
    assert uneven.config == config()


def test_kinds_and_names_of_groups() -> None:
    model, x, _ = made("transformer")
    found = [(g.name, g.kind, g.size, g.exact) for g in groups(model, x, ALL)]
    assert found == [
        ("tokens", "width", 16, False), ("blocks.0.qkv", "heads", 4, True),
        ("blocks.0.feed.1", "neurons", 64, True), ("blocks.1.qkv", "heads", 4, True),
        ("blocks.1.feed.1", "neurons", 64, True),
    ]  # fmt: skip
    model, x, _ = made("residual")
    joined = groups(model, x)[-1]
    assert (joined.kind, joined.layers) == ("channels", ("3.two", "3.down.0"))
    embedded = nn.Sequential(nn.Embedding(20, 8), Past(2), nn.Linear(16, 3))
    (width,) = groups(embedded, TOKENS, ("width",))
    assert (width.kind, width.size, width.exact) == ("width", 8, True)


def test_what_is_left_alone() -> None:
    """By default the width, by `skip` what it names."""
    model, x, _ = made("transformer")
    small = slim(model, x, 0.5, skip=("blocks.1.*",))
    assert set(shape_of(model, small)) == {
        "blocks.0", "blocks.0.qkv", "blocks.0.out", "blocks.0.feed.1", "blocks.0.feed.3",
    }  # fmt: skip
    assert small.blocks[0].heads == 2
    heads = slim(model, x, 0.5, what=("heads",))
    assert heads.blocks[0].feed[1].out_features == 64
    assert heads.blocks[1].qkv.out_features == 24


def test_counts_are_rounded() -> None:
    """7 of 14 are 8, 7 of 15 are 8, 2 of 4 are all 4 there are; heads are not rounded."""
    model = nn.Sequential(
        nn.Linear(4, 14), nn.ReLU(), nn.Linear(14, 4), nn.ReLU(), nn.Linear(4, 40), nn.ReLU(),
        nn.Linear(40, 2),
    )  # fmt: skip
    small = slim(model, torch.randn(2, 4), 0.5, round_to=8)
    assert [small[i].out_features for i in (0, 2, 4, 6)] == [8, 4, 24, 2]
    model, x, _ = made("transformer")
    small = slim(model, x, 0.5, round_to=8)
    assert (small.blocks[0].heads, small.blocks[0].feed[1].out_features) == (2, 32)


def test_shares_and_counts_by_name() -> None:
    model, x, _ = made("digits' large model")
    small = slim(model, x, {"1": 5, "9": 0.25})
    assert (small[1].out_channels, small[4].out_channels, small[9].out_features) == (5, 64, 48)
    assert small[4].in_channels == 5
    assert small[9].in_features == 1024


@pytest.mark.parametrize(
    "inside",
    [
        lambda h: h.topk(8).values,  # an operation of which nothing is known
        lambda h: h.reshape(-1, 8),  # a size that code relies on
        lambda h: torch.cat([h[:, 4:], h[:, :4]], 1),  # positions that it relies on
        lambda h: h[:, [3, 1, 0, 2, 4, 5, 7, 6]],
        lambda h: h.softmax(-1),
        lambda h: h * torch.arange(8.0),
        lambda h: h.cumsum(1),
        lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    ],
)
def test_what_is_not_understood_stays(inside: Callable[[Tensor], Tensor]) -> None:
    model, x = stirred(OwnWay(inside)), SIGNAL[:, 0, :4]
    assert [g.name for g in groups(model, x)] == ["left"]
    small = slim(model, x, 0.5)
    assert (small.left.out_features, small.right.out_features) == (3, 8)
    ranks = magnitude(model, x)["left"].argsort(descending=True)
    near(small(x), without(model, {"left": {"left_out": same}}, {"left": ranks[3:].tolist()})(x))
    with pytest.raises((TaskError, SettingError), match="right"):
        slim(model, x, {"right": 0.5})


@pytest.mark.parametrize(
    ("inside", "wide", "left"),
    [
        (lambda h: h.topk(8).values, 8, 0),
        (lambda h: h.softmax(-1), 8, 0),
        (lambda h: h.cumsum(1), 8, 0),
        (lambda h: h * torch.arange(8.0), 8, 0),
        (lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0], 8, 0),
        (lambda h: (h[:, None] @ h[:, :, None])[:, 0], 1, 0),  # nothing weighs what is summed
        (lambda h: h.sum(1, keepdim=True), 1, 0),
        (lambda h: h[:, 3][:, None], 1, 7),
        (lambda h: h[:, 3:4].expand(-1, 8), 8, 7),
        (lambda h: F.pad(h, (0, 2)), 10, 8),
        (lambda h: h.repeat(1, 2), 16, 8),
        (lambda h: h.flip(1) + h, 8, 4),
        (lambda h: torch.stack([h, h.tanh()], 2).flatten(1), 16, 8),
        (lambda h: h.reshape(-1, 2, 4).transpose(1, 2).flatten(1), 8, 8),
        (lambda h: h.reshape(-1, 2, 4).amax(2), 2, 2),
        (lambda h: F.normalize(h.reshape(-1, 2, 4), dim=2).flatten(1), 8, 2),
        (lambda h: h.reshape(-1, 2, 4) @ torch.ones(4, 3), None, 2),
    ],
)
def test_what_is_joined_is_found_in_the_run_itself(
    inside: Callable[[Tensor], Tensor], wide: int | None, left: int
) -> None:
    """Without a trial: of the 8, how many can go, each by itself or with others."""
    through = (lambda h: inside(h).flatten(1)) if wide is None else inside
    model = OwnWay(through, wide or 6).eval()
    found = {g.name: g.size for g in groups_of(trace(model, SIGNAL[:, 0, :4]))}
    assert found == {"left": 6, **({"right": left} if left else {})}


def test_code_that_relies_on_positions_of_a_width() -> None:
    """What a norm makes of fewer is not what it was, so what is coupled has to be the same."""

    def normed(h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[1:])

    fine = OwnWay(normed)
    odd = OwnWay(lambda h: torch.cat([normed(h)[:, 4:], h[:, :4]], 1))
    x = SIGNAL[:, 0, :4]
    assert [(g.name, g.kind) for g in groups(fine, x, ALL)][1] == ("right", "width")
    assert [g.name for g in groups(odd, x, ALL)] == ["left"]


def test_no_layer_goes_altogether() -> None:
    """The group's worst are all of one layer's: the best of them stays."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 12)
            self.out = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.cat([self.a(x), self.b(x)], 1) + self.c(x))

    model, x = Joined(), SIGNAL[:, 0, :4]
    scores = torch.cat([torch.ones(8), torch.tensor([0.1, 0.3, 0.2, 0.0])])
    small = slim(model, x, 0.5, scores={"a": scores})
    assert (small.a.out_features, small.b.out_features, small.c.out_features) == (6, 1, 7)
    assert torch.equal(small.b.weight, model.b.weight[1:2])
    model.b, model.c, model.out = nn.Linear(4, 1), nn.Linear(4, 9), nn.Linear(9, 2)
    assert [g.size for g in groups(model, x)] == [8]  # what b makes cannot go


def test_inputs_that_noise_would_spoil() -> None:
    """The trial of the smaller model is on other numbers than the example's, where it can be."""

    class Logs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.two(self.one(x.log()).tanh())
            return out.masked_fill(torch.tensor([True, False, False]), -torch.inf)

    small = slim(Logs(), torch.rand(2, 4) + 0.1, 0.5)
    assert small.one.out_features == 4


def test_positions_from_a_table() -> None:
    """A bias for each head by how far positions are apart, looked up by whole numbers."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.table = nn.Parameter(torch.randn(11, 4))
            self.register_buffer("apart", torch.arange(6)[:, None] - torch.arange(6) + 5)
            self.qkv, self.out = nn.Linear(5, 24), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 2)).permute(2, 0, 3, 1, 4)
            bias = self.table[self.apart].permute(2, 0, 1)
            mixed = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
            return self.out(mixed.transpose(1, 2).flatten(2))

    model = stirred(Windows())
    small = slim(model, SIGNAL, 0.5)
    assert small.table.shape == (11, 2)
    assert small.apart.shape == (6, 6)
    assert small.heads == 2


def test_attention_of_torch_itself_keeps_its_heads() -> None:
    """Its code wants as many as there are; its other layers can be smaller."""
    layer = stirred(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    x = torch.randn(2, 5, 8)
    assert [(g.name, g.kind) for g in groups(layer, x)] == [("linear1", "neurons")]
    small = slim(layer, x, 0.5)
    assert small.linear1.out_features == 8
    near(small(x), small.train()(x), 1e-4)  # with gradients it takes another way


def test_mappings_and_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            h = F.relu(self.a(x)) + F.relu(self.b(y))
            return {"out": self.out(h), "more": [h.sum(0)], "none": None}

    x = (torch.randn(2, 3), torch.randn(2, 4))
    model = Two()
    assert groups(model, x) == ()  # h is part of what the model gives
    with pytest.raises(TaskError, match="no channels, heads, neurons to remove"):
        slim(model, x)


def test_it_is_exported_and_trained_as_any_other() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip
    small = slim(model, torch.randn(2, 1, 8, 8), 0.5)

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small

        def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {"out": self.inner(batch["x"])}

    made = case(Columns(), {"x": numbers(1, 8, 8)})
    predicts(made)
    fits(made)
    compute = TorchCompute({"p": made.program}, "compiled")
    found = compute.fit("p", made.weights, made.rows, PLAIN, key=_keys(made.devices))
    plain = TorchCompute({"p": made.program}, "sequential")
    wanted = plain.fit("p", made.weights, made.rows, PLAIN, key=_keys(made.devices))
    assert compute.explain("p") == "compiled"
    for name, leaf in wanted.parameters.items():
        np.testing.assert_allclose(found.parameters[name], leaf, rtol=1e-4, atol=1e-5)


def _keys(count: int) -> Any:
    from modules import keys

    return keys(count)


def test_training_with_the_whole_as_teacher_recovers_what_was_lost() -> None:
    model, x = made("MLP")[0], torch.randn(256, 5, generator=torch.Generator().manual_seed(0))
    small = slim(model, x, 0.5)

    def lost(m: nn.Module) -> float:
        with torch.no_grad():
            return float(response(m(x), model(x), 1.0).mean())

    train = Settings(steps=150, lr=0.02, patience=None)
    batches = rows(x, batch=32, seed=0)
    found = distil(small, model, batches, Response(1.0, share=1.0), train).module
    assert lost(small) > 0.05
    assert lost(found) < 0.1 * lost(small)
    assert count(found) == count(small)


# --- scores


def test_magnitude_by_hand() -> None:
    """sqrt(3² + 4² + 12²) = 13 and sqrt(1 + 4 + 4) = 3; biases do not count."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model.load_state_dict({
        "0.weight": torch.tensor([[3.0, 4.0], [1.0, 2.0]]), "0.bias": torch.tensor([0.0, 99.0]),
        "2.weight": torch.tensor([[12.0, -2.0]]), "2.bias": torch.zeros(1),
    })  # fmt: skip
    assert magnitude(model, torch.ones(1, 2))["0"].tolist() == [13.0, 3.0]
    small = slim(model, torch.ones(1, 2), 0.5)
    assert small[0].weight.tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    "name", ["residual", "concatenated", "depthwise", "in groups", "MLP", "past", "gated",
             "upwards", "parameters", "heads"],
)  # fmt: skip
def test_taylor_is_how_a_linear_loss_changes(name: str) -> None:
    """Where the loss is linear in what is summed into last, the first order is all there is: the
    scores of the last group are what the loss changes by, exactly."""
    model, x, sums = made(name)
    last = groups(model, x)[-1].name

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        out = m(batch)
        return (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum()

    batches = [x, x[:2]]
    scores = taylor(model, x, batches, loss)
    with torch.no_grad():
        for a in range(len(scores[last])):
            less = without(model, sums, {last: [a]})
            each = [abs(float(loss(model, b) - loss(less, b))) for b in batches]
            assert float(scores[last][a]) == pytest.approx(np.mean(each), rel=1e-3, abs=1e-4)
    assert not any(p.grad is not None for p in model.parameters())


def test_taylor_finds_what_a_loss_needs() -> None:
    """Neurons that the target does not depend on go first, though their weights are larger."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.abs_()
        model[2].weight[:] = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0]])
    x = torch.rand(16, 3)
    scores = taylor(model, x, [x], lambda m, b: m(b)[:, 0].square().mean())
    assert scores["0"][2:].tolist() == [0.0, 0.0]
    small = slim(model, x, 0.5, scores=scores)
    near(small(x)[:, 0], model(x)[:, 0])
    assert not torch.allclose(small(x)[:, 1], model(x)[:, 1])


# --- nonsense


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.0}, "keep is 0.0. Give a share above 0"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"keep": 2}, "keep is 2"),
        ({"keep": True}, "keep is True"),
        ({"keep": float("nan")}, "keep is nan"),
        ({"keep": {"0": 0}}, "keep is 0. Give 1 to 6"),
        ({"keep": {"0": 7}}, "keep is 7. Give 1 to 6"),
        ({"keep": {"0": 0.0}}, "group '0': keep is 0.0"),
        ({"keep": {"1": 3}}, "unknown group '1'"),
        ({"keep": {"4": 2}}, "group '4': is of kind 'width'. Add 'width' to what"),
        ({"round_to": 0}, "round_to is 0"),
        ({"round_to": 2.0}, "round_to is 2.0"),
        ({"skip": ("seven",)}, "unknown layer to skip 'seven'"),
        ({"what": ("head",)}, "unknown kind 'head'. Did you mean 'heads'?"),
        ({"what": "heads"}, "what is 'heads'"),
        ({"what": ()}, "what is ()"),
        ({"what": ("heads",)}, "no heads to remove. It has neurons, width"),
        ({"scores": {}}, "group '0': has no scores"),
        ({"scores": {"0": torch.ones(5)}}, "its scores are [5]"),
        ({"scores": {"0": torch.full((6,), np.nan)}}, "not finite"),
        ({"example": torch.ones(2, 3)}, "the model fails on the example: RuntimeError"),
    ],
)
def test_nonsense_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3),
        nn.LayerNorm(3), nn.Linear(3, 2),
    )  # fmt: skip
    options = {"example": torch.ones(2, 4), **options}
    with pytest.raises((SettingError, TaskError)) as refused:
        slim(model, **options)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_shapes_of_another_model_are_refused() -> None:
    model, x, _ = made("MLP")
    shape = shape_of(model, slim(model, x, 0.5))
    for bad, said in (
        ({"9": {}}, "unknown layer '9'"),
        ({"0": {"weight": [20, 5]}}, "weight of [20, 5] does not fit a model with [9, 5]"),
        ({"0": {"weight": [5]}}, "does not fit"),
        ({"0": {"weight": [0, 5]}}, "does not fit"),
        ({"0": {"out_features": "many"}}, "does not fit"),
        ({"0": {"colour": 3}}, "colour of 3 does not fit a model with None"),
    ):
        with pytest.raises(SettingError) as refused:
            reshape(model, {**shape, **bad})
        assert said in str(refused.value)
    with pytest.raises(SettingError, match="only one of the two models has the layer"):
        shape_of(model, nn.Linear(2, 2))


def test_scores_need_batches_and_a_number() -> None:
    model, x, _ = made("MLP")
    with pytest.raises(TaskError, match="no batches"):
        taylor(model, x, [], lambda m, b: m(b).sum())
    with pytest.raises(TaskError, match="the loss of batch 0 is"):
        taylor(model, x, [x], lambda m, b: m(b))
    with pytest.raises(TaskError, match=r"the loss of batch 0 is 1\.5"):
        taylor(model, x, [x], lambda m, b: 1.5)  # type: ignore[arg-type, return-value]
    with pytest.raises(TaskError, match="the loss of batch 0 does not depend"):
        taylor(model, x, [x], lambda m, b: m(b).sum().detach())
    with pytest.raises(TaskError, match="the loss of batch 1 is nan"):
        taylor(model, x, [x, x * np.nan], lambda m, b: m(b).sum())


def test_what_a_model_returns_has_to_be_known() -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return object()

    with pytest.raises(TaskError, match="the model returns object"):
        groups(Odd(2, 2), torch.ones(1, 2))
