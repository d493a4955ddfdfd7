"""What a dropout keeps: by `dice.drawn` alone, whatever layer or operation asks, and however it is
computed. tests/test_recipe.py holds whole fits against a plain loop that drops out by hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tiny
from kitestring import dice
from kitestring.core import Recipe, Rows, Tree
from kitestring.devices.fit import dropout
from kitestring.devices.fit.compute import TorchCompute
from kitestring.devices.fit.dropout import Draws, Sources, apart, tried
from kitestring.devices.fit.programs import Program
from modules import device, devices, keys, program

KEY = keys(1)
STACKED = 5e-5  # of a leaf's largest value, as in tests/test_recipe.py


# --- the numbers


def mixed(x: int) -> int:
    """SplitMix64's next number from a state (Steele, Lea, Flood 2014; its constants are those of
    Stafford's variant 13), in whole numbers of Python, which know no overflow."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_the_keys_of_draws_are_splitmix64s() -> None:
    """By a generator of the test's own, which gives what Rosetta Code lists for seed 1234567."""
    states = [1234567 + i * 0x9E3779B97F4A7C15 for i in range(3)]
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [mixed(state % 2**64) for state in states] == known
    word = int.from_bytes(hashlib.blake2b(b"draws", digest_size=8).digest(), "big")
    for key in (0, 1, 12345, 2**63 + 11, 2**64 - 1):
        for step, place in ((0, 0), (0, 1), (1, 0), (9, 65535), (10**6, 3)):
            wanted = mixed(mixed(key ^ word) ^ (step * 65536 + place))
            found = dice.drawn(np.array([key], np.uint64), step, place)
            assert found.tolist() == [wanted]
            first = mixed((wanted + 0x9E3779B97F4A7C15) % 2**64) >> 40
            assert dice.uniform(found, 1)[0, 0] == first / 2**24


def test_the_keys_of_draws_are_what_they_always_were() -> None:
    """Computed once with BigInt in JavaScript: devices of another language must draw them too."""
    found = dice.drawn(np.array([7, 8], np.uint64), 5, 3)
    assert found.tolist() == [12190525673474404314, 13473982133167528100]
    numbers = dice.uniform(found, 2) * 2**24
    assert numbers.tolist() == [[3111206, 1351990], [1161243, 7060130]]


def test_several_steps_at_once() -> None:
    steps = np.arange(4)
    wanted = [dice.drawn(KEY, int(t), 2)[0] for t in steps]
    assert dice.drawn(KEY, steps, 2).tolist() == wanted


@pytest.mark.parametrize("n", [1, 2**14, 2**14 + 1, 3 * 2**14])
def test_the_first_numbers_do_not_depend_on_how_many_there_are(n: int) -> None:
    """Nor on being made in parts: the last of them by hand."""
    key = keys(2)
    found = dice.uniform(key, n)
    assert np.array_equal(found[:, :7], dice.uniform(key, 7)[:, :n])
    last = mixed((int(key[1]) + n * 0x9E3779B97F4A7C15) % 2**64) >> 40
    assert found[1, -1] == np.float32(last / 2**24)


def test_devices_steps_and_places_draw_unlike_each_other() -> None:
    """Of 64 streams of 2^14 numbers no two correlate by more than 6 / sqrt(2^14), six standard
    deviations of independent ones; each keeps its share within five."""
    n = 2**14
    streams = np.concatenate(
        [dice.uniform(dice.drawn(keys(4), t, place), n) for t in range(4) for place in range(4)]
    )
    apart = np.corrcoef(streams) - np.eye(len(streams))
    assert len(streams) == 64
    assert np.abs(apart).max() < 6 / n**0.5
    for p in (0.1, 0.5, 0.7, 0.999):
        share = (streams < np.float32(p)).mean(1)
        assert np.abs(share - p).max() < 5 * (p * (1 - p) / n) ** 0.5


# --- every layer and operation that draws


def mask(shape: tuple[int, ...], keep: float, step: int = 0, place: int = 0) -> Tensor:
    """What is kept, 1 or 0, written down from the dice."""
    numbers = dice.uniform(dice.drawn(KEY, step, place), int(np.prod(shape)))[0]
    return torch.from_numpy(numbers < np.float32(keep)).float().reshape(shape)


def served(forward: Callable[[], Any], step: int = 0) -> tuple[Any, int]:
    """What it gives, and how often it drew; of torch's own generator it leaves no trace."""
    before, draws = torch.get_rng_state(), Draws(KEY, step + 1)
    with draws.serving(step):
        found = forward()
    assert torch.equal(torch.get_rng_state(), before)
    return found, draws.places


FIXED = torch.Generator().manual_seed(0)
X, IMAGE = torch.randn(4, 6, 8, generator=FIXED), torch.randn(4, 3, 5, 5, generator=FIXED)
Q, K, V = torch.randn(3, 2, 4, 5, 8, generator=FIXED)  # heads of queries, keys and values
LAYERS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "Dropout": (lambda: nn.Dropout(0.3)(X), lambda: X * (mask((4, 6, 8), 0.7) / 0.7)),
    "in place": (
        lambda: nn.Dropout(0.3, inplace=True)(X.clone()), lambda: X * (mask((4, 6, 8), 0.7) / 0.7)
    ),
    "as its strides lie": (
        lambda: F.dropout(X.transpose(0, 1), 0.3),
        lambda: X.transpose(0, 1) * (mask((6, 4, 8), 0.7) / 0.7),
    ),
    "Dropout1d": (lambda: nn.Dropout1d(0.3)(X), lambda: X * (mask((4, 6, 1), 0.7) / 0.7)),
    "Dropout2d": (
        lambda: nn.Dropout2d(0.4)(IMAGE), lambda: IMAGE * (mask((4, 3, 1, 1), 0.6) / 0.6)
    ),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.2)(X), lambda: alpha(X, mask((4, 6, 8), 0.8), 0.2)),
    "FeatureAlphaDropout": (
        lambda: nn.FeatureAlphaDropout(0.2)(IMAGE),
        lambda: alpha(IMAGE, mask((4, 3, 1, 1), 0.8), 0.2),
    ),
    "native_dropout": (
        lambda: torch.native_dropout(X, 0.3, True)[0], lambda: X * (mask((4, 6, 8), 0.7) / 0.7)
    ),
    "attention": (
        lambda: F.scaled_dot_product_attention(Q, K, V, dropout_p=0.3),
        lambda: attention(Q, K, V, mask((2, 4, 5, 5), 0.7) / 0.7),
    ),
    "bernoulli, a chance": (lambda: torch.bernoulli(X, 0.3), lambda: mask((4, 6, 8), 0.3)),
    "bernoulli_, a half": (lambda: X.clone().bernoulli_(), lambda: mask((4, 6, 8), 0.5)),
    "bernoulli, chances": (lambda: torch.bernoulli(X.sigmoid()), lambda: chances(X.sigmoid())),
    "bernoulli_, chances": (
        lambda: X.clone().bernoulli_(X.sigmoid()[:, :1]),
        lambda: chances(X.sigmoid()[:, :1].expand(X.shape)),
    ),
    "bernoulli of one": (
        lambda: torch.bernoulli(torch.tensor(0.6)), lambda: chances(torch.tensor(0.6))
    ),
    "a distribution": (
        lambda: torch.distributions.Bernoulli(probs=X.sigmoid()).sample(),
        lambda: chances(X.sigmoid()),
    ),
}  # fmt: skip


def alpha(x: Tensor, kept: Tensor, p: float) -> Tensor:
    """Klambauer et al. 2017, section 4: dropped to -1.7580993408473766, mean and variance kept."""
    low = -1.7580993408473766
    a = (1 - p + low**2 * p * (1 - p)) ** -0.5
    return a * (x * kept + low * (1 - kept)) - a * low * p


def attention(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | float) -> Tensor:
    return ((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) * kept) @ v


def chances(p: Tensor) -> Tensor:
    numbers = dice.uniform(dice.drawn(KEY, 0, 0), p.numel())[0]
    return (torch.from_numpy(numbers).reshape(p.shape) < p).float()


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_drops_by_the_dice(name: str) -> None:
    """Within 1e-5: torch adds up attention and AlphaDropout in another order; the rest is equal."""
    layer, by_hand = LAYERS[name]
    found, places = served(layer)
    assert places == 1
    wanted = by_hand()
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert "lpha" in name or name == "attention" or torch.equal(found, wanted)
    again, _ = served(layer)
    assert torch.equal(found, again)
    if found.numel() > 1:
        assert not torch.equal(found, layer()), "where it is not served, it draws as torch does"


def test_steps_and_places_count_on() -> None:
    layer = nn.Dropout(0.5)
    (first, second), places = served(lambda: (layer(X), layer(X)), step=3)
    assert places == 2
    assert torch.equal(first, X * mask(X.shape, 0.5, 3, 0) / 0.5)
    assert torch.equal(second, X * mask(X.shape, 0.5, 3, 1) / 0.5)


def test_what_keeps_all_or_nothing_does_not_draw() -> None:
    (*whole, none), places = served(
        lambda: (
            F.dropout(X, 0.0),
            F.dropout(X, 0.3, training=False),
            torch.native_dropout(X, 0.3, False)[0],
            F.dropout(X, 1.0),
        )
    )
    assert places == 0
    assert all(torch.equal(x, X) for x in whole)
    assert not none.any()


def test_few_numbers_are_drawn_for_several_steps_at_once_and_are_the_same() -> None:
    """Of steps of unlike length, with one left out: by the numbers of each step alone."""
    draws = Draws(KEY, 9)
    for step, rows in enumerate([4, 2, 4, 6, 1, 6, 6, 5, 3]):
        if step != 5:
            with draws.serving(step):
                found = F.dropout(X.new_ones(rows, 8), 0.5)
            assert torch.equal(found, mask((rows, 8), 0.5, step) / 0.5)


@pytest.mark.parametrize("weights", [True, False])
def test_attention_layers(weights: bool) -> None:
    """Self-attention of two heads: by torch's own layer without dropout, and a mask."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
    (found, _), places = served(lambda: layer(X, X, X, need_weights=weights))
    assert places == 1
    q, k, v = (
        part.reshape(4, 6, 2, 4).transpose(1, 2)
        for part in F.linear(X, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    kept = mask((8, 6, 6), 0.7).reshape(4, 2, 6, 6) / 0.7
    wanted = layer.out_proj(attention(q, k, v, kept).transpose(1, 2).reshape(4, 6, 8))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_gradient_goes_where_a_value_was_kept() -> None:
    """By the one operation that dropout is on a GPU as by those that it is on the CPU."""
    slopes = []
    for layer in (F.dropout, torch.native_dropout):
        x = X.clone().requires_grad_()
        out, _ = served(lambda x=x, layer=layer: layer(x, 0.3, True))  # type: ignore[misc]
        (out if isinstance(out, Tensor) else out[0]).sum().backward()
        slopes.append(x.grad)
    assert torch.equal(*slopes)
    assert torch.equal(slopes[0], mask(X.shape, 0.7) / 0.7)


def test_attention_elsewhere_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would draw inside of one operation. Here "meta" is another device, which computes
    shapes alone."""
    taken: list[str] = []

    def seen(q: Tensor, *args: Any, **more: Any) -> Tensor:
        taken.append(q.device.type)
        return apart(q, *args, **more)

    monkeypatch.setattr(dropout, "apart", seen)
    for where in ("cpu", "meta"):
        q, k, v = (x.to(where) for x in (Q, K, V))
        found, places = served(
            lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)  # type: ignore[misc]
        )
        assert (found.shape, found.device.type, places) == (Q.shape, where, 1)
        _, places = served(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v))  # type: ignore[misc]
        assert places == 0
    assert taken == ["meta"]


@pytest.mark.parametrize("use", [
    {}, {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()}, {"is_causal": True},
    {"attn_mask": torch.randn(4, 5, 5, generator=FIXED)}, {"scale": 0.7},
])  # fmt: skip
def test_attention_taken_apart_is_the_same(use: dict[str, Any]) -> None:
    """As the CPU takes it apart, to the bit; also where queries share keys and values."""
    for k, v, shared in ((K, V, False), (K[:, :2], V[:, :2], True)):
        every = {**use, "dropout_p": 0.3, "enable_gqa": shared}
        wanted, _ = served(lambda k=k, v=v, u=every: F.scaled_dot_product_attention(Q, k, v, **u))  # type: ignore[misc]
        more = {"scale": use.get("scale"), "enable_gqa": shared}
        mask, causal = use.get("attn_mask"), use.get("is_causal", False)
        found, places = served(
            lambda k=k, v=v, m=mask, c=causal, o=more: apart(Q, k, v, m, 0.3, c, **o)  # type: ignore[misc]
        )
        assert places == 1
        assert torch.equal(found, wanted)


def again(x: Tensor) -> Tensor:
    """Computed a second time when its gradient is."""
    return checkpoint(lambda h: F.dropout(h, 0.5), x, use_reentrant=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("layer", "by_dice", "by_torch"),
    [
        (nn.Tanh(), False, False),
        (nn.Dropout(0.5), True, False),
        (nn.RReLU(), False, True),
        (nn.Sequential(nn.Dropout(0.5), nn.RReLU()), True, True),
        (lambda x: F.scaled_dot_product_attention(x, x, x), False, False),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), True, False),
        (again, False, True),
        (lambda x: F.dropout(again(x), 0.5), False, True),
    ],
)
def test_what_a_pass_draws_is_seen(
    layer: Callable[[Tensor], Tensor], by_dice: bool, by_torch: bool
) -> None:
    x = X[:, None].requires_grad_()
    assert tried(lambda: layer(x).sum()) == Sources(by_dice, by_torch)


# --- fits


def start(made: Program, count: int) -> Tree:
    return Tree({k: np.repeat(a[None], count, 0) for k, a in made.initial().items()})


def same(a: Tree, b: Tree) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


class Attended(nn.Module):
    """`whole`: torch's encoder layer; else attention alone, with the heads' weights asked for."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.front = nn.Linear(4, 8)
        self.layer = (
            nn.TransformerEncoderLayer(4, 2, 8, 0.3, batch_first=True)
            if whole
            else nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        )
        self.whole, self.back = whole, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.front(x).reshape(len(x), 2, 4)
        h = self.layer(h) if self.whole else self.layer(h, h, h)[0]
        return self.back(h.flatten(1))  # type: ignore[no-any-return]


class Unused(nn.Module):
    """Draws what nothing uses, and then what is used."""

    def forward(self, x: Tensor) -> Tensor:
        F.dropout(x, 0.5, self.training)
        return F.dropout(x, 0.3, self.training)


def layers(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 3))


COMPILED: dict[str, Callable[[], nn.Module]] = {
    "alpha": lambda: layers(nn.AlphaDropout(0.3)),
    "channels": lambda: layers(
        nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Dropout2d(0.3), nn.Flatten())
    ),
    "unused": lambda: layers(Unused()),
    "encoder": lambda: Attended(whole=True),
    "weights of attention": lambda: Attended(whole=False),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_code_drops_the_same(kind: str) -> None:
    """On ragged devices, whose last batches draw fewer numbers, in several epochs."""
    torch.manual_seed(0)
    n = [5, 3, 0, 8]
    made, (_, _, rows) = program(COMPILED[kind]()), devices("mlp", n)
    native, plain = TorchCompute({"p": made}, "compiled"), TorchCompute({"p": made}, "sequential")
    recipe = Recipe(0.05, 3, 4)
    found, wanted = (
        c.fit("p", start(made, 4), rows, recipe, key=keys(4)).parameters for c in (native, plain)
    )
    assert native.explain("p") == "compiled"
    assert tiny.apart(found, wanted) < STACKED


class Turned(nn.Module):
    """Positions first, then rows."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x.reshape(len(x), 2, 4).transpose(0, 1), 0.3, self.training)
        return h.transpose(0, 1).flatten(1)


class Chanced(nn.Module):
    """A chance of its own for each element."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(x.detach().sigmoid()) if self.training else x


@pytest.mark.parametrize(
    ("middle", "why"),
    [(Turned(), "does not begin with the rows"), (Chanced(), "has no kernel")],
)
def test_what_it_cannot_draw_is_not_compiled(middle: nn.Module, why: str) -> None:
    """Chunks do not matter then either."""
    n = [5, 3, 8]
    made, (_, _, rows) = program(layers(middle)), devices("mlp", n)
    compute, weights, recipe = TorchCompute({"p": made}), start(made, 3), Recipe(0.05, 2, 4)
    whole = compute.fit("p", weights, rows, recipe, key=keys(3)).parameters
    assert compute.explain("p").startswith("sequential")
    assert why in compute.explain("p")
    for d in (2, 0, 1):
        own, mine, key = device(weights, d), device(rows, d), keys(3)[d : d + 1]
        assert same(device(whole, d), compute.fit("p", own, mine, recipe, key=key).parameters)


@settings(max_examples=8)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=4),
    st.lists(st.sampled_from([0.1, 0.5, 0.8]), min_size=1, max_size=3),
    st.integers(1, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_chunk_and_any_way_drops_the_same(
    n: list[int], chances: list[float], batch: int, shuffle: bool, seed: int
) -> None:
    """One after the other, alone and among others: to the bit. Compiled: within float error."""
    torch.manual_seed(seed)
    hidden = [m for p in chances for m in (nn.Linear(8, 8), nn.Tanh(), nn.Dropout(p))]
    inner = nn.Sequential(nn.Dropout(chances[0]), nn.Linear(4, 8), *hidden, nn.Linear(8, 3))
    made, (_, _, rows) = program(inner), devices("mlp", n, seed)
    recipe, weights, count = Recipe(0.05, 2, batch, shuffle=shuffle), start(made, len(n)), len(n)
    native, plain, mapped = (
        TorchCompute({"p": made}, how)  # type: ignore[arg-type]
        for how in ("compiled", "sequential", "vmap")
    )
    wanted = plain.fit("p", weights, rows, recipe, key=keys(count)).parameters
    assert same(wanted, mapped.fit("p", weights, rows, recipe, key=keys(count)).parameters)
    found = native.fit("p", weights, rows, recipe, key=keys(count)).parameters
    assert not any(n) or native.explain("p") == "compiled"
    assert tiny.apart(found, wanted) < STACKED
    for d in range(count):
        own, mine, key = device(weights, d), device(rows, d), keys(count)[d : d + 1]
        assert same(device(wanted, d), plain.fit("p", own, mine, recipe, key=key).parameters)
        alone = native.fit("p", own, mine, recipe, key=key).parameters
        assert tiny.apart(device(found, d), alone) < STACKED


@pytest.mark.parametrize("how", ["compiled", "sequential"])
def test_each_exchange_drops_otherwise_and_torch_is_left_alone(how: Any) -> None:
    made, (_, _, rows) = program(layers(nn.Dropout(0.5))), devices("mlp", [6, 6])
    compute, recipe = TorchCompute({"p": made}, how), Recipe(0.05, 1, 6, shuffle=False)
    alike = {k: Rows(r.values[[0, 0]], r.n) for k, r in rows.items()}
    key = dice.keys(3, np.arange(2), 1, "fit")
    first = compute.fit("p", start(made, 2), alike, recipe, key=key).parameters
    before = torch.get_rng_state()
    again = compute.fit("p", start(made, 2), alike, recipe, key=key).parameters
    assert torch.equal(torch.get_rng_state(), before)
    assert same(first, again)
    assert not same(device(first, 0), device(first, 1)), "other devices draw other numbers"
    other = dice.keys(3, np.arange(2), 2, "fit")
    later = compute.fit("p", start(made, 2), alike, recipe, key=other).parameters
    assert not same(first, later)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.after = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(checkpoint(self.inner, x, use_reentrant=False))  # type: ignore[no-any-return]


def test_what_is_computed_again_drops_the_same_again() -> None:
    """By torch's generator, which torch sets back for it: as in a plain loop after manual_seed."""
    n, key = [4], keys(1)
    made, (_, _, rows) = program(layers(Again())), devices("mlp", n)
    compute = TorchCompute({"p": made})
    fit = compute.fit("p", start(made, 1), rows, Recipe(0.1, 2, 4, shuffle=False), key=key)
    assert compute.explain("p").startswith("sequential")
    batch = {k: torch.from_numpy(r.values[0, :4]) for k, r in rows.items()}
    module = made.module.train()
    step = torch.optim.SGD(module.parameters(), 0.1)
    torch.manual_seed(int(key[0] >> np.uint64(1)))
    for _ in range(2):
        step.zero_grad()
        F.cross_entropy(module(batch)["out"], batch["y"]).backward()  # type: ignore[no-untyped-call]
        step.step()
    for name, p in module.named_parameters():
        assert np.array_equal(fit.parameters[name][0], p.detach().numpy())
