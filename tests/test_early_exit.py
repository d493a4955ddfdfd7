"""Early exit: what leaves on the device is the exit's answer, what goes up the cloud's."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from kitestring.collaborate.request.cascade import Cascade
from kitestring.collaborate.request.early_exit import EarlyExit, Exit, State, threshold
from kitestring.collaborate.services import OnDevice, Split
from kitestring.comparison.methods import METHODS
from kitestring.comparison.order import missing
from kitestring.compress.distil.objective import cross_entropy
from kitestring.core import Message, Rows, Tree, serve
from kitestring.engines.local import LocalEngine
from kitestring.errors import SettingError
from kitestring.exchange import wire
from kitestring.tasks.programs import entropy
from kitestring.tasks.task import Task

TOP = math.log(tiny.CLASSES)  # the most that the entropy of three classes can be
KINDS = ("classes", "binary", "sequence")


def learnt(collaboration: EarlyExit, kind: str = "classes") -> tuple[LocalEngine, State]:
    engine = tiny.engine(kind)
    state = tiny.learn(collaboration, engine)
    engine.purpose = "serve"
    return engine, state


def served(service: Any, state: Any, engine: LocalEngine, split: str = "test") -> list[Any]:
    return [
        found["answer"].values[d, : int(found["answer"].n[d])]
        for ids, found in serve(service, state, engine, split)
        for d in range(len(ids))
    ]


def on_device(state: State) -> State:
    """The device's half of the weights, as `OnDevice` deploys them."""
    return replace(state, weights=state.weights.pick("front.", "back."))


def unsure(state: State, device: int, split: str = "test", kind: str = "classes") -> Any:
    """The entropies of a device's requests, by torch and in float64: -sum p log p."""
    x = tiny.population(kind).rows([device], split)["x"].values[0]
    program = tiny.compute(kind).program("small")
    module = program.evaluating.double()
    weights = state.weights.pick("front.", "back.").items()
    module.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights})
    with torch.no_grad():
        out = module({"x": torch.from_numpy(x).double() if x.dtype.kind == "f" else x})["out"]
        log = out.log_softmax(-1)
    module.float()
    return -(log.exp() * log).sum(-1).numpy()


# --- the ends


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_threshold_of_nothing_it_is_the_split_model(kind: str) -> None:
    """No entropy is below 0, so every request goes up: to the bit what `Split` answers."""
    engine, state = learnt(EarlyExit(threshold=0.0), kind)
    mine = served(EarlyExit(threshold=0.0).serve(), state, engine)
    up = engine.ledger.kinds("serve", "up")
    again, _ = learnt(EarlyExit(threshold=0.0), kind)
    wanted = served(Split(private=False), state, again)
    assert all(np.array_equal(a, b) for a, b in zip(mine, wanted, strict=True))
    assert up == again.ledger.kinds("serve", "up"), "and the same bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_threshold_above_all_entropies_it_is_the_device(kind: str) -> None:
    """No entropy is above log(classes): to the bit what `OnDevice` answers, and nothing goes up."""
    classes = {"classes": tiny.CLASSES, "binary": 2, "sequence": tiny.TOKENS}[kind]
    above = math.log(classes) + 1e-3
    engine, state = learnt(EarlyExit(threshold=above), kind)
    mine = served(EarlyExit(threshold=above).serve(), state, engine)
    wanted = served(OnDevice(), on_device(state), engine)
    assert all(np.array_equal(a, b) for a, b in zip(mine, wanted, strict=True))
    assert not engine.ledger.kinds("serve", "up")


@pytest.mark.parametrize("personal", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("share", "calls"), [(0.0, 0.0), (1.0, 1.0)])
def test_a_budget_of_nothing_and_of_all(share: float, calls: float, personal: float) -> None:
    collaboration = EarlyExit(share, personal=personal)
    engine, state = learnt(collaboration)
    served(collaboration.serve(), state, engine)
    amounts = engine.ledger.amounts
    assert amounts["serve", "calls"] == calls * amounts["serve", "requests"]


# --- between them


def test_who_is_unsure_goes_up_and_nobody_else() -> None:
    """Row by row: the entropy by torch says whose answer it must be, the exit's or the cloud's."""
    at = 0.9 * TOP
    collaboration = EarlyExit(threshold=at)
    engine, state = learnt(collaboration)
    mine = served(collaboration.serve(), state, engine)
    calls = engine.ledger.amounts["serve", "calls"]
    everything = served(Split(private=False), state, engine)
    nothing = served(OnDevice(), on_device(state), engine)
    went = 0
    for d, found in enumerate(mine):
        sent = unsure(state, d) >= at
        went += int(sent.sum())
        assert np.array_equal(found[~sent], nothing[d][~sent])
        np.testing.assert_allclose(found[sent], everything[d][sent], rtol=1e-5, atol=1e-6)
    assert 0 < went < sum(map(len, mine)), "nothing is shown where all go one way"
    assert calls == went


def test_a_request_sends_features_and_never_its_row() -> None:
    """Bytes are those of packed features [sent, 6]; a device that sends nothing sends no byte."""
    at = 0.9 * TOP
    collaboration = EarlyExit(threshold=at)
    engine, state = learnt(collaboration)
    served(collaboration.serve(), state, engine)
    counts = [int((unsure(state, d) >= at).sum()) for d in range(tiny.DEVICES)]
    wanted = 0
    for n in filter(None, counts):
        h = Rows(np.zeros((1, n, 6), np.float32), np.array([n]))
        wanted += len(wire.pack(Message(features=Tree(h=h)), 0))
    assert engine.ledger.kinds("serve", "up") == {"features": wanted}
    assert set(engine.ledger.leaves("serve", "up")) == {"features.h"}
    deployed = Exit().deploy(state)
    assert not [name for name in deployed if name.startswith("server.")]


@pytest.mark.parametrize("personal", [0.0, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_it_sends_what_its_budget_says(share: float, personal: float) -> None:
    """On the rows that it was calibrated on, in all, within one request for each device."""
    collaboration = EarlyExit(share, personal=personal)
    engine, state = learnt(collaboration)
    sent = total = 0
    for visit in engine.visits(collaboration.serve(), state, "train"):
        decision = visit.decide()
        sent += int(decision.send.sum())
        total += int(decision.answer["answer"].n.sum())
    assert abs(sent - share * total) <= tiny.DEVICES


def test_the_threshold_is_where_the_counts_say() -> None:
    """By hand: 512 bins, even in log T from e^4 (the first) down to e^-40. Nine of ten counts lie
    in bin 256, which spans e^-18 to e^(-18 - 44/512); one in the first. Of a half, less what the
    cascade keeps for small counts ((n + 1) / 2 - 1/2 = 5 of 10), four lie in that bin's first four
    ninths."""
    counts = np.zeros((1, 512), np.float32)
    counts[0, 0], counts[0, 256] = 1, 9
    expected = math.exp(4 - 44 * (256 + 4 / 9) / 512)
    assert threshold(counts, 0.5)[0] == pytest.approx(expected, rel=1e-5)
    assert threshold(counts, 1.0)[0] < math.exp(-40)
    assert threshold(counts, 0.0)[0] > math.exp(4)


def test_rows_as_unsure_as_one_another_are_told_apart_by_dice() -> None:
    """A model that gives nothing but zeros: every entropy is log 3, and half of them go up."""
    collaboration = EarlyExit(0.5)
    engine = tiny.engine()
    nothing = Tree({k: np.zeros_like(v) for k, v in tiny.compute().initial("joint").items()})
    engine._pretrained = lambda program: nothing
    state = tiny.learn(collaboration, engine)
    sent = total = 0
    for visit in engine.visits(collaboration.serve(), state, "train"):
        decision = visit.decide()
        sent, total = sent + int(decision.send.sum()), total + int(decision.send.shape[1])
    rows = sum(len(tiny._rows("classes", d)["train"]["y"]) for d in range(tiny.DEVICES))
    # Half of 27 rows, each by its own number from [0, 1): 13.5 give or take three deviations.
    assert abs(sent - rows / 2) < 3 * math.sqrt(rows) / 2
    assert 0 < sent < rows


def test_what_is_not_a_number_is_as_unsure_as_can_be() -> None:
    """It goes up, unless nothing does; and calibrating with it warns of nothing."""
    collaboration = EarlyExit(0.2)
    engine = tiny.engine()
    broken = Tree({k: v * np.nan for k, v in tiny.compute().initial("joint").items()})
    engine._pretrained = lambda program: broken
    state = tiny.learn(collaboration, engine)
    assert math.isfinite(state.threshold)
    for service, all_up in ((Exit(given=True), True), (EarlyExit(0.0).serve(), False)):
        now = replace(state, threshold=0.5 if all_up else math.exp(30))
        for visit in engine.visits(service, now, "test"):
            decision = visit.decide()
            real = decision.answer["answer"].mask()
            assert np.array_equal(decision.send, real & all_up)


# --- what a task must have


def test_entropy_by_hand() -> None:
    """Of (1/4, 3/4): log 4 - 3/4 log 3 = 0.5623 nats; of one logit the same; of certainty 0."""
    expected = math.log(4) - 0.75 * math.log(3)
    for_classes = entropy(tiny.task("classes"))  # type: ignore[arg-type]
    for_logit = entropy(tiny.task("binary"))  # type: ignore[arg-type]
    assert for_classes is not None
    assert for_logit is not None
    logits = torch.tensor([[1.0, 3.0], [3.0, 1.0]]).log()
    torch.testing.assert_close(for_classes(logits), torch.full((2,), expected))
    one = torch.tensor([math.log(3.0), -math.log(3.0)])
    torch.testing.assert_close(for_logit(one), torch.full((2,), expected))
    sure = torch.tensor([[0.0, -math.inf], [0.0, -200.0]])
    assert for_classes(sure).tolist() == [0.0, 0.0]
    far = for_logit(torch.tensor([40.0, -40.0]))
    # Of p = e^-40: p log(1/p) + p to first order.
    torch.testing.assert_close(far, torch.full((2,), 41 * math.exp(-40)), rtol=1e-4, atol=0)


def test_what_it_needs_is_named() -> None:
    about, names = METHODS["early_exit"].about, {"small", "large", "front"}
    assert "class probabilities" in str(missing(tiny.task("values"), names, about))
    assert "models that train" in str(missing(tiny.task("recorded"), names, about))
    assert "differentiable features" in str(missing(tiny.task(), {"small", "large"}, about))
    own = tiny.task()
    assert isinstance(own, Task)
    own = replace(own, loss=lambda out, y: cross_entropy(out, y), confidence=lambda out: out[:, 0])
    assert missing(own, names, METHODS["cascade"].about) is None
    assert "class probabilities" in str(missing(own, names, about))
    for kind in KINDS:
        assert missing(tiny.task(kind), names, about) is None


@pytest.mark.parametrize("wrong", [-0.1, math.nan])
def test_a_threshold_that_is_none(wrong: float) -> None:
    with pytest.raises(SettingError, match="nats"):
        EarlyExit(threshold=wrong)


def test_it_is_tried_as_a_cascade_is() -> None:
    mine, theirs = EarlyExit.trials(tiny.BUDGET), Cascade.trials(tiny.BUDGET)
    assert [(t.share, t.personal) for t in mine] == [(t.share, t.personal) for t in theirs]


# --- the paper's network


@pytest.mark.slow
def test_lenet_with_an_exit_on_mnist(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The direction of the paper's table I after a hundredth of its training: most test images
    leave at the first exit and accuracy stays that of the base network. Over 10,000 images one
    deviation of a difference between two networks of 97 % is some 0.2 points."""
    monkeypatch.setenv("KITESTRING_DATA", str(data))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import branchynet

    t = branchynet.trained(0, 20_000, 2, 2)
    test = branchynet.outcome(t, branchynet.rows("test"))
    base = 100 * test.base.mean()
    assert base > 95
    scores, left = zip(*(test.at(at) for at in branchynet.THRESHOLDS), strict=True)
    assert left[0] == 0
    assert left[-1] == 100
    assert list(left) == sorted(left)
    most = max(share for score, share in zip(scores, left, strict=True) if score >= base - 0.6)
    assert most > 60
    at = branchynet.THRESHOLDS[left.index(most)]
    found = branchynet.served(t, EarlyExit(threshold=at))
    assert found["images"] == 10_000
    assert found["exit"] == pytest.approx(most, abs=0.05)
    assert found["accuracy"] == pytest.approx(scores[left.index(most)], abs=0.05)
    sys.modules.pop("branchynet")


@pytest.mark.parametrize("make", [EarlyExit, Cascade])
@pytest.mark.parametrize(("setting", "value"), [("share", 2.0), ("share", -0.1), ("personal", 3.0)])
def test_shares_and_blends_lie_between_none_and_all(make: Any, setting: str, value: float) -> None:
    with pytest.raises(SettingError, match=f"{setting} {value}.*from 0 to 1"):
        make(**{setting: value})
