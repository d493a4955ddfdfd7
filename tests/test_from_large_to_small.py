"""The collaborations that bring what a large model knows to the devices, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch.nn import functional

import tiny
from kitestring.collaborate.baselines.distilled import Distilled, EightBits, restored, rounded
from kitestring.collaborate.baselines.pool_trained import PoolTrained
from kitestring.collaborate.features.learn_back import LearnBack, counted
from kitestring.collaborate.parameters.personal import Personal
from kitestring.collaborate.request.bottleneck import BITS, Bottleneck, packed, unpacked
from kitestring.collaborate.services import OnDevice
from kitestring.core import Devices, Message, Recipe, Rows, Tree
from kitestring.devices.session import broadcast
from kitestring.engines.local import LocalEngine
from kitestring.errors import SettingError

# --- distilled


def test_distilled_is_a_fit_of_the_program_small_distill_on_the_large_ones_answers() -> None:
    """One round by hand: the same primitive, the same rows, the large model's outputs beside
    them."""
    engine = tiny.engine()
    state = tiny.learn(Distilled(rounds=1, epochs=1, batch=8, lr=0.05), engine)
    by_hand = tiny.engine()
    by_hand.open(Distilled(rounds=1), 0)
    cloud: Any = by_hand.cloud
    cloud.serial = 1
    taught = cloud.predict("large", cloud.initial("large"), {"x": cloud.data["x"]})["out"]
    recipe = Recipe(0.05, 1, 8, "adam")
    rows = {**cloud.data, "teacher": taught}
    wanted = cloud.fit("small.distill", cloud.initial("small"), rows, recipe).parameters
    assert tiny.apart(state.weights, wanted) < 1e-6
    plain = cloud.fit("small", cloud.initial("small"), cloud.data, recipe).parameters
    assert tiny.apart(state.weights, plain) > 1e-3, "the teacher matters"
    assert not engine.ledger.bytes, "nothing crosses before it is served"


@given(
    arrays.arrays(
        np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=5),
        elements=st.floats(-100, 100, width=32),
    ),
    st.integers(2, 8),
)  # fmt: skip
def test_rounding_is_off_by_half_a_step_at_most(leaf: Any, bits: int) -> None:
    sent = rounded(Tree(w=leaf, b=leaf.reshape(-1)), bits)
    assert sent["w"].dtype == np.int8
    assert np.abs(sent["w"].astype(int)).max() <= 2 ** (bits - 1) - 1
    back = restored(broadcast(sent, 3))
    assert np.array_equal(back["b"][1], leaf.reshape(-1)), "what has one axis is not rounded"
    assert back["w"].dtype == np.float32
    half = sent["scale.w"].reshape(-1, *[1] * (leaf.ndim - 1)) / 2
    assert (np.abs(back["w"][2] - leaf) <= half * (1 + 1e-4) + 1e-30).all()


def test_in_eight_bits_a_quarter_goes_down_and_answers_hardly_change() -> None:
    """Tiny model: 8 x 6 and 6 x 3 weights, of which 4 bytes become one and 9 rows get a scale."""
    engine = tiny.engine()
    state = tiny.learn(EightBits(), engine)
    found = tiny.answers(EightBits(), state, engine)
    down = _deployed(engine)
    whole = PoolTrained("small", rounds=0)
    plain = tiny.engine()
    wanted = tiny.answers(whole, tiny.learn(whole, plain), plain)
    saved = _deployed(plain) - down
    weights, rows, names = 8 * 6 + 6 * 3, 6 + 3, 2
    assert saved < tiny.DEVICES * (3 * weights - 4 * rows)
    assert saved > tiny.DEVICES * (3 * weights - 4 * rows - 60 * names)
    size = max(np.abs(a).max() for a in wanted)
    assert all(np.abs(a - b).max() < 0.02 * size for a, b in zip(found, wanted, strict=True))


def _deployed(engine: LocalEngine) -> float:
    return sum(v for key, v in engine.ledger.bytes.items() if key[0].endswith(".deploy"))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_make_no_sense(bits: int) -> None:
    with pytest.raises(SettingError, match=f"bits {bits}"):
        EightBits(bits)


# --- personal


def _losses(engine: LocalEngine, weights: Any, split: str, every: int = 0) -> list[float]:
    """By device, of the rows of a split; of each `every`-th only, if given."""
    found = []
    for d in range(tiny.DEVICES):
        rows = tiny.population().rows([d], split)
        part = slice(every - 1, None, every) if every else slice(None)
        x, y = (torch.from_numpy(rows[k].values[0, : rows[k].n[0]][part]) for k in ("x", "y"))
        module = engine.compute.program("small").module
        own = {k: torch.from_numpy(np.array(v)) for k, v in weights(d).items()}
        with torch.no_grad():
            out = torch.func.functional_call(module, own, ({"x": x},))["out"]
        found.append(float(functional.cross_entropy(out, y)) if len(y) else 0.0)
    return found


def _best(engine: LocalEngine, device: int) -> dict[str, Any]:
    return {k: v[0] for k, v in tiny.private(engine, device).below("best.").items()}


@pytest.mark.parametrize("lr", [0.05, 50.0])
def test_personal_is_never_worse_on_the_rows_that_a_device_held_out(lr: float) -> None:
    """With a rate that ruins every model, devices keep what they were sent."""
    engine = tiny.engine()
    tiny.learn(Personal(rounds=3, epochs=2, batch=2, lr=lr, held=0.5), engine)
    start = engine.compute.initial("small")
    before = _losses(engine, lambda d: start, "train", every=2)
    after = _losses(engine, lambda d: _best(engine, d), "train", every=2)
    assert all(a <= b + 1e-6 for a, b in zip(after, before, strict=True))
    if lr < 1:
        assert sum(after) < sum(before)
    else:
        same = [tiny.apart(Tree(_best(engine, d)), start) for d in range(tiny.DEVICES)]
        assert min(same) == 0


def test_personal_trains_the_last_layer_alone_and_sends_nothing() -> None:
    engine = tiny.engine()
    tiny.learn(Personal(rounds=2, epochs=1, batch=4, lr=0.1, held=0.0), engine)
    start = engine.compute.initial("small")
    for d in range(tiny.DEVICES):
        own = Tree(_best(engine, d))
        assert tiny.apart(own.pick("front."), start.pick("front.")) == 0
        assert tiny.apart(own.pick("back."), start.pick("back.")) > 1e-3
    assert not sum(engine.ledger.kinds("learn", "up").values())


def test_personal_without_held_rows_is_plain_training_of_the_last_layer() -> None:
    """Full batches in order: the same steps as a plain torch loop."""
    engine = tiny.engine()
    tiny.learn(Personal(rounds=3, epochs=1, batch=50, lr=0.1, held=0.0), engine)
    start = engine.compute.initial("small")
    for d in range(tiny.DEVICES):
        rows = tiny.population().rows([d], "train")
        x, y = (torch.from_numpy(rows[k].values[0, : rows[k].n[0]]) for k in ("x", "y"))
        w = {k: torch.tensor(v) for k, v in start.items()}
        module = engine.compute.program("small").module
        for _ in range(3):
            back = {k: v.requires_grad_() for k, v in w.items() if k.startswith("back")}
            loss = functional.cross_entropy(
                torch.func.functional_call(module, {**w, **back}, ({"x": x},))["out"], y
            )
            slopes = torch.autograd.grad(loss, list(back.values()))
            stepped = {
                k: (v - 0.1 * s).detach() for (k, v), s in zip(back.items(), slopes, strict=True)
            }
            w = {**w, **stepped}
        wanted = Tree({k: v.detach().numpy() for k, v in w.items()})
        assert tiny.apart(Tree(_best(engine, d)), wanted) < 1e-5


@pytest.mark.parametrize("held", [-0.1, 0.7, 1.0])  # of 0.7 each row is held out, none is learnt
def test_a_share_held_out_that_makes_no_sense(held: float) -> None:
    with pytest.raises(SettingError, match=f"held {held}"):
        Personal(held=held)


# --- learn back


class Noted(LearnBack):
    """Says what crossed."""

    seen: list[tuple[str, Message, Message]] = []  # noqa: RUF012

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        up, private = super().reply(verb, message, devices)
        self.seen.append((verb, message, up))
        return up, private


def test_learn_back_sends_features_once_answers_each_round_and_neither_rows_nor_labels() -> None:
    Noted.seen.clear()
    tiny.learn(Noted(rounds=3, epochs=1, batch=4, lr=0.05), tiny.engine(chunk=8))
    assert [verb for verb, _, _ in Noted.seen] == ["start", "again", "again"]
    for verb, down, up in Noted.seen:
        assert not up.data
        assert not up.parameters
        assert set(up.features) == ({"h", "logits", "counted"} if verb == "start" else {"logits"})
        assert bool(down.parameters) == (verb == "start")
    (_, _, first), *_ = Noted.seen
    assert not first.features["counted"].values[first.features["counted"].mask()].any()


def test_what_counts_says_where_there_is_a_truth_and_not_which() -> None:
    """Classes 3, 0 and none (-1); values tell nothing at all."""
    n = np.array([3])
    assert counted(Rows(np.array([[3, 0, -1]]), n)).values.tolist() == [[0, 0, -1]]
    values = Rows(np.array([[3.5, -2.0, 0.0]], np.float32), n)
    assert counted(values).values.tolist() == [[0, 0, 0]]


def test_learn_back_leaves_the_front_as_it_was_sent_and_moves_both_backs() -> None:
    engine = tiny.engine()
    start = engine.compute.initial("joint")
    state = tiny.learn(LearnBack(rounds=2, epochs=1, batch=4, lr=0.1, server_lr=0.01), engine)
    assert tiny.apart(state.weights.pick("front."), start.pick("front.")) == 0
    assert tiny.apart(state.weights.pick("server."), start.pick("server.")) > 1e-3
    for d in range(tiny.DEVICES):
        own = Tree({k: v[0] for k, v in tiny.private(engine, d).items()})
        assert tiny.apart(own.pick("front."), start.pick("front.")) == 0
        assert tiny.apart(own.pick("back."), start.pick("back.")) > 1e-3


def test_the_large_back_comes_to_agree_with_its_devices() -> None:
    """Nobody tells it a label and there is no pool: what it learns is the devices' answers."""

    def apart(state: Any, engine: LocalEngine) -> float:
        far, of = 0.0, 0
        for d in range(tiny.DEVICES):
            own = {k: torch.from_numpy(v[0].copy()) for k, v in tiny.private(engine, d).items()}
            x = torch.from_numpy(tiny.population().rows([d], "train")["x"].values[0])
            front, back, server = (
                {k.removeprefix(p): v for k, v in w.items() if k.startswith(p)}
                for p, w in (
                    ("front.", own), ("back.", own),
                    ("server.", {k: torch.from_numpy(v) for k, v in state.weights.items()}),
                )
            )  # fmt: skip
            made = {k: engine.compute.program("joint").module.get_submodule(k)
                    for k in ("front", "back", "server")}  # fmt: skip
            h = torch.func.functional_call(made["front"], front, (x,))
            small = torch.func.functional_call(made["back"], back, (h,)).argmax(-1)
            large = torch.func.functional_call(made["server"], server, (h,)).argmax(-1)
            far, of = far + float((small != large).sum()), of + len(x)
        return far / of

    collaboration = LearnBack(rounds=1, epochs=10, batch=4, lr=0.1, server_lr=0.02)
    many = replace(collaboration, server_epochs=150)
    engines = [tiny.engine(), tiny.engine()]
    for engine in engines:
        engine.setting = replace(engine.setting, pool=None)
    little, much = (
        apart(tiny.learn(c, e), e)
        for c, e in zip((replace(collaboration, server_lr=1e-6), many), engines, strict=True)
    )
    assert much < 0.15 < 0.3 < little


# --- bottleneck


@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=1, max_dims=2, max_side=4).map(
            lambda s: (2, 3, *s[:-1], 2 * s[-1])
        ),
        elements=st.floats(0, 1, width=32),
    )
)  # fmt: skip
def test_features_cross_in_four_bits_each(code: Any) -> None:
    sent = packed(Rows(code, np.array([3, 1])))
    assert sent.values.dtype == np.uint8
    assert sent.values.nbytes * 2 == code.size, "two to a byte"
    back = unpacked(sent)
    assert back.n.tolist() == [3, 1]
    assert np.abs(back.values - code).max() <= 0.5 / (2**BITS - 1) + 1e-6
    assert np.array_equal(packed(back).values, sent.values), "what was rounded stays"


def test_a_request_is_answered_as_the_model_was_trained() -> None:
    """The whole program rounds as the wire does: the cloud's answers from the bytes that crossed
    are those of the program `bottleneck` on the row."""
    collaboration = Bottleneck(rounds=2, epochs=1, batch=8, lr=0.01)
    engine = tiny.engine()
    state = tiny.learn(collaboration, engine)
    found = tiny.answers(collaboration, state, engine)
    for d in range(tiny.DEVICES):
        rows = tiny.population().rows([d], "test")
        weights = broadcast(state.weights, 1)
        out = engine.compute.predict("bottleneck", weights, {"x": rows["x"]})["out"]
        np.testing.assert_allclose(found[d], out.values[0, : out.n[0]], rtol=1e-4, atol=1e-5)


def test_a_request_sends_half_a_byte_a_feature() -> None:
    """Six features before, six of four bits after: 3 bytes instead of 24 for each of 4 requests."""
    collaboration = Bottleneck(rounds=1, epochs=1)
    engine = tiny.engine()
    tiny.answers(collaboration, tiny.learn(collaboration, engine), engine)
    requests = engine.ledger.amounts["serve", "requests"]
    sent = engine.ledger.leaves("serve", "up")
    narrow = sum(sent.values())
    split = tiny.engine()
    whole = PoolTrained("joint", rounds=1, epochs=1)
    tiny.answers(whole, tiny.learn(whole, split), split)
    wide = sum(split.ledger.leaves("serve", "up").values())
    assert requests == split.ledger.amounts["serve", "requests"]
    names = (len("code") - len("h")) * (split.ledger.amounts["serve", "calls"])
    assert wide - narrow == pytest.approx(21 * requests, abs=names)


def test_the_encoder_passes_gradients_through_rounding() -> None:
    """Straight through: the encoder's gradient is what it would be without rounding, taken at the
    rounded code."""
    engine = tiny.engine()
    start = engine.compute.initial("bottleneck")
    rows = tiny.population().rows([0], "train")
    _, slope, _ = engine.compute.backward("bottleneck", broadcast(start, 1), dict(rows))
    assert np.abs(slope["encoder.weight"]).max() > 1e-4
    assert np.abs(slope["front.0.weight"]).max() > 1e-5


def test_on_device_is_what_the_others_are_held_against() -> None:
    """Distilled serves exactly as Shipped does, from other weights."""
    assert Distilled().serve() == OnDevice() == PoolTrained("small").serve()
