"""A user's part of what a search chose: trained on the device, and what that gives whom."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from kitestring.cli import main
from kitestring.comparison.order import Order
from kitestring.core import Rows
from kitestring.devices.runtime.load import load
from kitestring.errors import TaskError
from kitestring.package import keys
from kitestring.shrink import personal, show
from kitestring.shrink.bench import Bench
from kitestring.shrink.candidates import CANDIDATES, LARGE, PRECISIONS, SMALL, Candidate
from kitestring.shrink.personal import Gained, adaptable
from kitestring.shrink.study import Study
from test_shrink import found as made_up
from test_shrink_search import HERE, TINY, Run, shrink

SHAPES = (LARGE, SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With all that is said, progress too."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["--out", folder, "--personal", "last"]
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setenv("COLUMNS", "100")
        patch.setattr("kitestring.shrink.picture.draw", lambda *given: [])
        patch.setattr("rich.console.Console._write_buffer", _kept(said))
        assert shrink(*words, shapes=SHAPES, drawn=True) == 0
    return Run(folder, json.loads((folder / "front.json").read_text()), "".join(said))


def _kept(said: list[str]) -> Any:
    def write(self: Any) -> None:
        said.append(self._render_buffer(self._buffer[:]))
        del self._buffer[:]

    return write


# What is found


WITHOUT_TORCH = """
import sys
for heavy in ("torch", "onnx", "scipy", "sklearn", "matplotlib", "rich"):
    sys.modules[heavy] = None  # importing it raises ImportError
import numpy as np
from pathlib import Path
from kitestring.core import Message, Rows, Tree
from kitestring.devices.runtime.load import load
from kitestring.devices.session import DeviceSession, broadcast
from kitestring.package import keys
found = load(Path(sys.argv[1]), keys.trusted([Path(sys.argv[2])]))
given = np.load(sys.argv[3])
settings = found.package.manifest["collaboration"]["settings"]
sent = broadcast(found.compute.initial("small"), 1)
out = {}
for user in range(int(given["users"])):
    def session(serial, data, private=Tree()):
        return DeviceSession(found.compute, np.array([user]), 0, serial, data, private)

    def column(name):
        return Rows(given[f"{name} {user}"][None], np.array([len(given[f"{name} {user}"])]))

    def answers():
        asked = session(0, {"x": column("asked")}, private)
        return found.half.decide(asked, found.deployed).answer["answer"].values[0]

    own = {"x": column("x"), "y": column("y")}
    private = found.half.install(session(0, own))
    out[f"before {user}"] = answers()
    for step in range(settings["rounds"]):
        verb, down = ("again", Message()) if step else ("start", Message(parameters=sent))
        up, private = found.half.reply(verb, down, session(step + 1, own, private))
        assert not list(up.leaves())  # nothing leaves the device
    out[f"after {user}"] = answers()
np.savez(sys.argv[4], **out)
"""


def test_a_device_without_torch_gains_what_was_said(run: Run, tmp_path: Path) -> None:
    """From the package and the user's own rows alone."""
    users = tiny.task().users
    loaded = [users.load(i) for i in range(tiny.DEVICES)]
    given: dict[str, Any] = {"users": tiny.DEVICES}
    for i, rows in enumerate(loaded):
        given |= {f"{name} {i}": rows["train"][name] for name in ("x", "y")}
        given[f"asked {i}"] = rows["test"]["x"]
    np.savez(tmp_path / "given.npz", **given)
    words = [run.folder / "personal.kite", run.folder / "kitestring.key.pub"]
    words += [tmp_path / "given.npz", tmp_path / "answers.npz"]
    env = {**os.environ, "PYTHONPATH": str(HERE.parent / "src")}
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)]
    subprocess.run(command, check=True, env=env)
    answers = np.load(tmp_path / "answers.npz")
    for when in ("before", "after"):
        right = [
            float((answers[f"{when} {i}"].argmax(-1) == rows["test"]["y"]).mean())
            for i, rows in enumerate(loaded)
        ]
        assert run.found["personal"][when]["scores"]["accuracy"] == [pytest.approx(right)], when


def test_the_figures_follow_from_the_scores(run: Run) -> None:
    """By hand: every user has 4 test rows, so who moves by two of them or more is counted."""
    own, choice = run.found["personal"], run.found["candidates"][run.found["choice"]]
    before, after = (np.array(own[when]["scores"]["accuracy"][0]) for when in ("before", "after"))
    assert before == pytest.approx(choice["test"]["scores"]["accuracy"][0])
    for when, scores in (("before", before), ("after", after)):
        assert own[when]["mean"] == pytest.approx(scores.mean())
        assert own[when]["p10"] == pytest.approx(np.percentile(scores, 10))
        assert own[when]["worst10"] == pytest.approx(scores.min())  # the tenth of six is one
    assert own["change"]["mean"] == pytest.approx(after.mean() - before.mean())
    assert own["change"]["worse"] == pytest.approx((after - before < -0.26).mean())
    assert own["change"]["better"] == pytest.approx((after - before > 0.26).mean())
    assert own["package_bytes"] == (run.folder / own["file"]).stat().st_size
    inside = 16 if run.found["choice"].startswith("large") else 6
    assert own["parameters"] == 3 * inside + 3 * tiny.CLASSES  # down and up, of rank 3
    tried = {t["lr"]: t["mean"] for t in own["validation"]["tried"]}
    assert sorted(tried) == pytest.approx([0.01, 0.1, 1.0])
    assert tried[own["lr"]] == max(tried.values())
    judged = np.array(choice["validation"]["scores"]["accuracy"][0])
    assert own["validation"]["before"] == pytest.approx(judged.mean())
    assert own["validation"]["users"] == tiny.DEVICES


def test_it_is_said_in_the_terminal_and_on_the_page(run: Run) -> None:
    own = run.found["personal"]
    said = " ".join(run.out.split())
    assert "Personal: the last layer, trained on each user's device" in said
    for when in ("before", "after"):
        assert f"{100 * own[when]['mean']:.1f}%" in said
    assert f"{own['parameters']} parameters are a user's own" in said
    assert f"{own['kept']} of 6 users keep the model as it came" in said
    assert f"Learning rate {own['lr']:g}" in said
    assert "done: test rows of 6 users, trained at rate" in said  # how far it is
    assert "personal.kite, report.html" in said
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Personal: the last layer" in page
    assert "Gain by user" in page
    assert page.count('id="personal-figure_1"') == page.count('id="users-figure_1"') == 1


class Contrary:
    """Users who have one row again and again. Every fifth, which is held out, is labelled with what
    the model says, the others with something else: what is learnt from them is wrong for it."""

    def __init__(self, people: Any, model: nn.Module) -> None:
        self._people, self._model = people, model

    def rows(self, ids: Any, split: str) -> dict[str, Rows]:
        real: dict[str, Rows] = self._people.rows(ids, split)
        if split != "train":
            return real
        x = np.repeat(real["x"].values[:, :1], real["x"].values.shape[1], axis=1)
        with torch.no_grad():
            said = self._model(torch.from_numpy(x)).argmax(-1).numpy()
        held = np.arange(1, x.shape[1] + 1) % 5 == 0
        y = np.where(held, said, (said + 1) % tiny.CLASSES)
        return {"x": Rows(x, real["x"].n), "y": Rows(y, real["y"].n)}


def test_who_does_not_gain_on_rows_held_out_keeps_what_came(run: Run) -> None:
    """Users 1, 2 and 3 have 5 to 7 rows and hold one out; the others have fewer, hold out none and
    take what training gives."""
    bench = _bench(run)
    bench.judges.people = Contrary(  # type: ignore[assignment]
        bench.judges.people, bench.model(CANDIDATES[run.found["choice"]], 0)
    )
    package = load(run.folder / "personal.kite", _known(run.folder / "kitestring.key"))
    packed = personal.Personal(**package.package.manifest["collaboration"]["settings"])
    before, after = (
        personal._served(bench, package, replace(packed, lr=lr), "test", np.arange(6), lambda _: 0)
        for lr in (0.0, packed.lr)
    )
    assert (before["kept"], after["kept"]) == (6, 3)
    for user in (1, 2, 3):
        assert before["scores"]["accuracy"][user] == after["scores"]["accuracy"][user]


def _bench(run: Run) -> Bench:
    return Bench(Order(TINY, trials=1, seeds=1), run.folder)


def _known(key: Path) -> frozenset[str]:
    return frozenset({keys.sign(keys.load(key), b"")["key"]})


def test_where_training_does_not_pay_it_is_said() -> None:
    same = {"accuracy": [[0.5, 0.5, 0.5, 0.5]]}
    gained = Gained(Path("it.kite"), 1000, "last", 0.1, 27, {0.1: 0.8}, 0.7, 4, same, same, 1)
    assert not any("DOES NOT PAY" in line for line in show.terms(made_up(), gained))
    assert "DOES NOT PAY" in show.terms(made_up(), replace(gained, untrained=0.8))[-1]


# Resuming


def test_killed_and_resumed_it_ends_with_the_same_figures(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two rates. With the same key the package has the same bytes."""
    bench, chosen = _bench(run), CANDIDATES[run.found["choice"]]
    there, known = tmp_path / "personal.kite", []
    real = Study.put

    def put(self: Study, name: str, value: Any) -> None:
        real(self, name, value)
        assert name not in known
        known.append(name)
        if len(known) == 3:
            raise KeyboardInterrupt

    def found() -> Gained:
        study = Study(tmp_path)
        try:
            return personal.personal(
                bench, chosen, "last", run.folder / "kitestring.key", there, study
            )
        finally:
            study.close()

    monkeypatch.setattr(Study, "put", put)
    with pytest.raises(KeyboardInterrupt):
        found()
    gained, own = found(), run.found["personal"]
    assert len(known) == 6  # three rates and none on validation rows, none and the best on test
    for when, scores in (("before", gained.before), ("after", gained.after)):
        assert scores == own[when]["scores"]
    assert (gained.lr, gained.kept) == (own["lr"], own["kept"])
    assert there.read_bytes() == (run.folder / "personal.kite").read_bytes()


def test_another_part_or_none_trains_nothing_else_again(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    words = ["--out", folder, "--resume"]
    assert shrink(*words, "--personal", "adapters", shapes=SHAPES) == 0
    found = json.loads((folder / "front.json").read_text())
    assert found["personal"]["how"] == "adapters"
    assert found["personal"]["before"] == run.found["personal"]["before"]
    assert found["candidates"] == run.found["candidates"]
    assert "training" not in capfd.readouterr().err
    # What is known already is packed again, and nothing is trained.
    monkeypatch.setattr(personal, "_served", None)
    assert shrink(*words, "--personal", "last", shapes=SHAPES) == 0
    assert json.loads((folder / "front.json").read_text())["personal"] == run.found["personal"]
    package = (run.folder / "personal.kite").read_bytes()
    assert (folder / "personal.kite").read_bytes() == package
    assert shrink(*words, shapes=SHAPES) == 0
    assert json.loads((folder / "front.json").read_text())["personal"] is None
    assert not (folder / "personal.kite").exists()
    assert (folder / "choice.kite").exists()


# What cannot be had


def test_a_model_without_a_linear_layer_is_packed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    (tmp_path / "only_convolutions.py").write_text(
        "from dataclasses import replace\nimport tiny\nfrom torch import nn\n\n\n"
        "def model():\n"
        "    return nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 3, 1), nn.Flatten())\n\n\n"
        "def task():\n"
        "    return replace(tiny.task(), small=model, large=model, server=None)\n"
    )
    folder = tmp_path / "run"
    words = ["--out", folder, "--personal", "adapters"]
    task = f"{tmp_path / 'only_convolutions.py'}:task"
    assert shrink(*words, task=task, shapes=SHAPES, drawn=True) == 3
    why = "the model has no linear layer to adapt. Give it one, or leave --personal out"
    assert f"Not personalised: {why}" in " ".join(capsys.readouterr().out.split())
    found = json.loads((folder / "front.json").read_text())
    assert found["personal"] == {"how": "adapters", "why_not": why}
    assert found["choice"]
    assert found["remeasured"]["file"] == "choice.kite"
    assert (folder / "choice.kite").exists()
    assert not (folder / "personal.kite").exists()
    assert why in (folder / "report.html").read_text(encoding="utf-8")


def test_without_a_choice_there_is_nothing_to_train(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run.folder, tmp_path / "run")
    words = ["--out", folder, "--resume", "--budget", "1B", "--personal", "last"]
    assert shrink(*words, shapes=SHAPES) == 3
    out = capsys.readouterr().out
    assert "Nothing meets 1 B" in out
    assert "Not personalised: nothing meets the budget" in out
    assert not (folder / "personal.kite").exists()
    found = json.loads((folder / "front.json").read_text())
    assert found["personal"] == {"how": "last", "why_not": "nothing meets the budget"}


def test_only_these_two_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["shrink", "digits", "--personal", "all"])
    assert left.value.code == 2
    assert "invalid choice: 'all' (choose from 'last', 'adapters')" in capsys.readouterr().err


# The part


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_can_be_trained_on(run: Run, precision: Any, tmp_path: Path) -> None:
    bench = _bench(run)
    study, own = Study(tmp_path), tmp_path / "key"
    keys.create(own)
    chosen = Candidate(LARGE, precision)
    gained = personal.personal(bench, chosen, "adapters", own, tmp_path / "it.kite", study)
    study.close()
    # Of rank 4, or as narrow as the layer is: 8 to 16 and 16 to 3.
    assert gained.parameters == 4 * (8 + 16) + 4 * (16 + 3)
    wanted = run.found["candidates"][chosen.slug]["validation"]["scores"]["accuracy"][0]
    assert gained.untrained == pytest.approx(np.mean(wanted))
    assert np.shape(gained.after["accuracy"]) == (1, tiny.DEVICES)


def test_the_part_is_always_the_same_and_changes_nothing_at_first() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(5, 8)
    torch.manual_seed(5)
    one, other = adaptable(model, "last"), adaptable(model, "last")
    assert [n for n, p in one.named_parameters() if p.requires_grad] == ["2.down", "2.up"]
    assert torch.equal(one.get_parameter("2.down"), other.get_parameter("2.down"))
    assert torch.equal(one(x), model(x))
    assert [p.requires_grad for p in adaptable(nn.Linear(8, 3), "last").parameters()].count(True)


def test_the_last_layer_is_the_last_that_can_be_adapted() -> None:
    """Torch's transformer layers read the weights of theirs themselves."""
    inside = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = adaptable(nn.Sequential(nn.Linear(8, 8), inside), "last")
    assert {n for n, p in found.named_parameters() if p.requires_grad} == {"0.down", "0.up"}
    with pytest.raises(TaskError, match="no linear layer to adapt"):
        adaptable(inside, "last")
