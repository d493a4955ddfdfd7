"""Every collaboration from a package, in a process that cannot import torch: as in the simulator.

Float error: ONNX Runtime adds up in another order than torch. After the up to 16 steps here the
largest difference measured on x86-64, of a leaf's largest value, was 8e-7; bytes are equal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from kitestring.cli import main
from kitestring.collaborate.parameters.fedavg import FedAvg
from kitestring.core import Devices, Message, Recipe, Tree
from kitestring.devices.runtime.half import REPLY
from kitestring.devices.runtime.load import Loaded, load
from kitestring.devices.side import DeviceSide, Opened
from kitestring.engines.local import LocalEngine
from kitestring.engines.pipe import Pipe
from kitestring.engines.strict import OtherProcess
from kitestring.errors import BadReply, PackageError, RunError, SettingError, TaskError
from kitestring.exchange import wire
from kitestring.pack.build import Built, Source, build
from kitestring.package import archive, keys
from kitestring.package.plan import decode

TOLERANCE = 1e-5
DEVICE = """
import sys
for heavy in ("torch", "onnx", "onnxscript", "scipy", "sklearn", "matplotlib", "rich", "llvmlite"):
    sys.modules[heavy] = None  # importing it raises ImportError
from kitestring.devices.runtime import process
from kitestring.engines.strict import Shown
process.DeviceSide = Shown  # what devices keep is compared
sys.exit(process.main(sys.argv[1:]))
"""
CASES = [
    pytest.param(
        kind, name, id=f"{kind}-{name}", marks=[] if kind == "classes" else pytest.mark.slow
    )
    for kind in tiny.KINDS
    for name in tiny.METHODS
    if tiny.fits(name, kind)
]


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "maker.key"
    keys.create(path)
    return path


@cache
def built(kind: str, name: str) -> Built:
    return build(Source(tiny.task(kind), tiny.collaboration(name)))


def built_of(kind: str, collaboration: Any) -> Built:
    return build(Source(tiny.task(kind), collaboration))


def packed(kind: str, name: str, maker: Path, folder: Path) -> Path:
    path = folder / f"{kind}-{name}.kite"
    made = built(kind, name)
    archive.write(path, made.manifest, made.files, keys.load(maker))
    return path


@contextmanager
def device(package: Path, maker: Path) -> Iterator[Pipe]:
    command = [sys.executable, "-c", DEVICE, package, "--trust", f"{maker}.pub"]
    with Pipe([str(word) for word in command]) as pipe:
        yield pipe


def finish(engine: LocalEngine, name: str) -> tuple[Any, list[Any], list[Tree]]:
    """The last state, the answers to requests, what devices keep."""
    collaboration = tiny.collaboration(name)
    state = tiny.learn(collaboration, engine)
    engine.purpose = "serve"
    found = tiny.answers(collaboration, state, engine)
    return state, found, [tiny.private(engine, i) for i in range(tiny.DEVICES)]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_without_torch_as_in_the_simulator(
    kind: str, name: str, maker: Path, tmp_path: Path
) -> None:
    here = tiny.engine(kind)
    wanted = finish(here, name)
    with device(packed(kind, name, maker, tmp_path), maker) as pipe:

        def hands(compute: Any, population: Any, store: Any) -> OtherProcess:
            return OtherProcess(None, {}, population, pipe)

        there = tiny.engine(kind, hands=hands)
        found = finish(there, name)
    for one, other in zip(found, wanted, strict=True):
        parts = zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]
        for a, b in parts:
            assert tiny.apart(a, b) < TOLERANCE
    assert there.ledger.bytes == here.ledger.bytes
    assert there.ledger.amounts == pytest.approx(here.ledger.amounts, rel=1e-9)
    # What was billed is what was packed.
    crossed = there.hands.crossed  # type: ignore[attr-defined]
    for purpose, way, label in (
        ("learn", "down", "learn.down"), ("learn", "up", "learn.up"),
        ("serve", "down", "request.down"), ("serve", "up", "request.up"),
    ):  # fmt: skip
        assert crossed[label] == sum(there.ledger.kinds(purpose, way).values()), label  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fedavg(maker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed("classes", "fedavg", maker, tmp_path_factory.mktemp("packages"))


def loaded(package: Path, maker: Path) -> Loaded:
    return load(package, keys.trusted([Path(f"{maker}.pub")]))


def remade(package: Path, maker: Path, made: Built) -> Path:
    """Properly signed, with other contents."""
    path = package.with_name("remade.kite")
    archive.write(path, made.manifest, made.files, keys.load(maker))
    return path


def test_what_it_starts_with_is_the_simulator_s(fedavg: Path, maker: Path) -> None:
    found = loaded(fedavg, maker)
    wanted = tiny.compute("classes").initial("small")
    assert tiny.apart(found.compute.initial("small"), wanted) == 0
    assert tiny.apart(found.deployed, wanted) == 0  # before any round it is what is sent down


def test_weights_that_are_the_same_are_there_once(fedavg: Path, maker: Path) -> None:
    """`small`, `small.answer` and what is deployed: one model of 75 numbers, some more for the
    format."""
    files = loaded(fedavg, maker).package.files
    parameters = sum(a.size for a in tiny.compute("classes").initial("small").values())
    assert parameters * 4 < len(files["weights.safetensors"]) < parameters * 4 + 1000


def test_the_manifest_says_what_may_cross(fedavg: Path, maker: Path) -> None:
    manifest = loaded(fedavg, maker).package.manifest
    rounds, requests = manifest["crosses"]["rounds"], manifest["crosses"]["requests"]
    assert rounds["train"]["up"] == {"parameters": ["*"], "scalars": ["examples"]}
    assert requests["request"] == {"down": {}, "up": {}}
    assert manifest["columns"]["x"]["dtype"] == "float32"
    assert manifest["runtime"]["name"] == "onnxruntime"
    assert {"MatMul", "Relu"} & set(manifest["runtime"]["operators"])


def test_nobody_s_rows_are_in_it() -> None:
    """Golden inputs are drawn: no row of pool or devices is among them."""
    task = tiny.task("classes")
    for name in ("fedavg", "coda", "cascade"):
        blob = built("classes", name).files["golden.safetensors"]
        for user in [*task.users.pool, *task.users.devices]:
            for columns in task.users.load(user).values():
                assert not any(row.tobytes() in blob for row in columns["x"])


def test_a_device_does_not_send_what_it_did_not_declare(maker: Path, fedavg: Path) -> None:
    """Whatever its plan gives: the manifest's declaration is held against it on the device."""
    made = built("classes", "fedavg")
    silent = {**made.manifest["crosses"]["rounds"]["train"], "up": {"scalars": ["examples"]}}
    crosses = {**made.manifest["crosses"], "rounds": {"train": silent}}
    package = remade(fedavg, maker, Built({**made.manifest, "crosses": crosses}, made.files, []))
    with device(package, maker) as pipe:
        hands = OtherProcess(None, {}, tiny.population(), pipe)
        hands.open(tiny.collaboration("fedavg"), 0)
        weights = Tree({k: a[None] for k, a in tiny.compute().initial("small").items()})
        with pytest.raises(Exception, match="crosses but is not declared"):
            hands.reply("train", np.array([0]), 1, Message(parameters=weights))


def test_nor_with_a_request(maker: Path, tmp_path: Path) -> None:
    made = built("classes", "cascade")
    crosses = {**made.manifest["crosses"], "requests": {"request": {"down": {}, "up": {}}}}
    package = tmp_path / "a.kite"
    archive.write(package, {**made.manifest, "crosses": crosses}, made.files, keys.load(maker))
    with device(package, maker) as pipe:
        hands = OtherProcess(None, {}, tiny.population(), pipe)
        hands.open(tiny.collaboration("cascade"), 0)
        service = tiny.collaboration("cascade").serve()
        weights = loaded(package, maker).deployed
        deployed = Message(parameters=Tree({k: a[None] for k, a in weights.items()}))
        with pytest.raises(Exception, match=r"data\.x crosses but is not declared"):
            hands.decide(service, np.array([0]), "test", deployed)


def opened(found: Loaded, name: str) -> DeviceSide:
    here = Opened(found.half, found.compute, name)
    side = DeviceSide(lambda header: here, lambda header: found.half)
    side.open({"seed": 0}, [])
    return side


def rows_of(device: int, split: str) -> bytes:
    rows = tiny.population().rows(np.array([device]), split)
    shown = {k: r for k, r in rows.items() if split == "train" or k != "y"}
    return wire.pack(Message(data=Tree(shown)), 0)


def test_a_reply_that_fails_loses_nothing(maker: Path, tmp_path: Path) -> None:
    """What the cloud was told is kept stays, whatever is asked before the round ends."""
    side = opened(loaded(packed("classes", "splitnn", maker, tmp_path), maker), "SplitNN")
    first = tiny.compute().initial("small").pick("front.")
    down = wire.pack(Message(parameters=Tree({k: a[None] for k, a in first.items()})), 0)
    ask = {"device": 0, "serial": 1, "verb": "start", "first": 1}
    side.reply(ask, [rows_of(0, "train"), down])
    side.settle({"ids": [0], "good": [True], "serial": 1}, [])
    with pytest.raises(PackageError, match="no plan"):
        side.reply({**ask, "serial": 2, "verb": "other", "first": 0}, [down])
    side.end({"kept": True}, [])
    assert side._private[0].keys() >= set(first)


def test_deployed_weights_are_laid_out_once(maker: Path, fedavg: Path) -> None:
    """Requests with the weights of before, packed, use the graph that has them built in."""
    found = loaded(fedavg, maker)
    side = opened(found, "FedAvg")
    for factor in (1, 2):
        weights = Tree({k: (a * factor)[None] for k, a in found.deployed.items()})
        blob = wire.pack(Message(parameters=weights), 0)
        for i in range(2):
            ask = {"device": factor, "split": "test", "first": int(i == 0)}
            _, (answer, *_) = side.decide(ask, [*[rows_of(factor, "test")] * (i == 0), blob])
            own = side._own[factor, "requests.test"]
            wanted = tiny.compute().predict("small.answer", weights, own)["answer"]
            given = wire.stack([wire.unpack(answer)]).features["answer"]
            assert tiny.apart(given, wanted) < TOLERANCE
        assert [s.session is not None for s in found.compute._settled.values()] == [True]


def test_what_a_device_keeps_is_asked_in_vain(maker: Path, tmp_path: Path) -> None:
    side = opened(loaded(packed("classes", "splitnn", maker, tmp_path), maker), "SplitNN")
    assert "private" not in side.frames


@pytest.mark.parametrize(
    ("name", "settings"),
    [("cascade", {"share": 0.005}), ("cascade", {"share": 0.0}), ("early_exit", {"threshold": 9.0}),
     ("early_exit", {"threshold": 0.0}), ("fedavg", {"rounds": 1, "cohort": 1})],
)  # fmt: skip
def test_a_plan_is_made_of_several_devices_however_rarely_they_are_asked(
    name: str, settings: dict[str, Any]
) -> None:
    """And serves devices with other numbers of rows: the rehearsal's are all held against it."""
    collaboration = replace(tiny.collaboration(name), **settings)
    made = built_of("classes", collaboration)
    plans = {n: decode(p) for n, p in json.loads(made.files["plans.json"]).items()}
    wanted = {"decide", "install"} | ({"merge"} if name != "fedavg" else {"reply train"})
    assert plans.keys() >= wanted
    constants = [g for p in plans.values() for s in p.steps for g in s.args]
    assert not any(g in ([1, 8, 1], [1, 8]) for g in constants)  # no device's number of rows


@dataclass(frozen=True)
class Alone(FedAvg):
    """Asks the same one device in every round."""

    def ask(self, state: Any, cloud: Any) -> Any:
        asks = super().ask(state, cloud)
        return asks and [replace(a, to=np.zeros(1, int)) for a in asks]


def test_what_one_device_alone_was_seen_to_do_is_no_plan() -> None:
    with pytest.raises(TaskError, match="reply train was rehearsed with 1 numbers of rows"):
        built_of("classes", Alone(rounds=1))


@dataclass(frozen=True)
class Twice(FedAvg):
    """Fits with and without a pull to where it starts: two graphs."""

    def reply(self, verb: str, message: Message, devices: Devices) -> tuple[Message, Tree]:
        up, after = super().reply(verb, message, devices)
        pulled = Recipe(self.lr, batch=self.batch, mu=0.5)
        fit = devices.fit("small", message.parameters, devices.data, pulled, tag="pulled")
        return replace(up, scalars=Tree({**up.scalars, "examples": fit.loss})), after


def test_each_form_of_a_step_has_a_graph() -> None:
    made = built_of("classes", Twice(rounds=1))
    assert sum("fit" in name for name in made.files) == 2


def test_a_frame_of_another_kind_calls_nothing(maker: Path, fedavg: Path) -> None:
    with device(fedavg, maker) as pipe:
        pipe.call("open", {"op": "open", "seed": 0})
        for op in ("_keep", "__init__", "other"):
            with pytest.raises(BadReply, match=f"no frame is called '{op}'"):
                pipe.call("somewhere", {"op": op})


@pytest.mark.parametrize("name", ["weights.safetensors", "plans.json", "golden.safetensors"])
def test_a_package_without_a_part_is_refused(fedavg: Path, maker: Path, name: str) -> None:
    made = built("classes", "fedavg")
    fewer = {k: b for k, b in made.files.items() if k != name}
    with pytest.raises(PackageError, match=f"something is missing in it.*{name}"):
        loaded(remade(fedavg, maker, Built(made.manifest, fewer, [])), maker)


@pytest.mark.parametrize(
    ("runtime", "says"),
    [
        ({"name": "executorch"}, "made for the runtime 'executorch'; here is onnxruntime"),
        ({"least": "99.1"}, "needs onnxruntime 99.1 or newer"),
    ],
)
def test_another_runtime_is_refused(
    fedavg: Path, maker: Path, runtime: dict[str, str], says: str
) -> None:
    made = built("classes", "fedavg")
    manifest = {**made.manifest, "runtime": {**made.manifest["runtime"], **runtime}}
    with pytest.raises(PackageError, match=says):
        loaded(remade(fedavg, maker, Built(manifest, made.files, [])), maker)


def test_graphs_that_do_not_give_their_golden_outputs_are_refused(
    fedavg: Path, maker: Path
) -> None:
    """By a hundredth more than the maker's change of a weight; by a millionth is float error. The
    line names graph, output and largest error: 0.02 / 1.02 of the largest."""
    from safetensors.numpy import load as tensors
    from safetensors.numpy import save

    made = built("classes", "fedavg")
    for factor, refused in ((1.02, True), (1 + 1e-6, False)):
        golden = tensors(made.files["golden.safetensors"])
        (name,) = [k for k in golden if k.endswith("out.change back.weight")]
        golden[name] = (golden[name] * factor).astype(np.float32)
        other = {**made.files, "golden.safetensors": save(golden)}
        package = remade(fedavg, maker, Built(made.manifest, other, []))
        if refused:
            with pytest.raises(PackageError) as caught:
                loaded(package, maker)
            assert "fit of small does not give its golden outputs" in str(caught.value)
            assert "change back.weight is off by 2.0e-02" in str(caught.value)
        else:
            loaded(package, maker)


def test_a_device_process_ends_with_one_line(fedavg: Path, tmp_path: Path) -> None:
    """Of a key that it does not know."""
    keys.create(tmp_path / "other.key")
    with device(fedavg, tmp_path / "other.key") as pipe:
        hands = OtherProcess(None, {}, tiny.population(), pipe)
        with pytest.raises(RunError, match="which is not trusted here"):
            hands.open(tiny.collaboration("fedavg"), 0)


def test_a_verb_that_was_never_asked_is_told(fedavg: Path, maker: Path) -> None:
    half = loaded(fedavg, maker).half
    with pytest.raises(PackageError, match=f"no plan '{REPLY}other' in it. It has"):
        half.reply("other", Message(), None)  # type: ignore[arg-type]


def test_pack_and_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the README has it, with a task of one's own."""
    monkeypatch.chdir(tmp_path)
    task = Path(__file__).parent / "examples" / "my_task.py"
    assert main(["pack", f"{task}:task", "cascade"]) == 2
    assert "Make one: kitestring keys kitestring.key" in capsys.readouterr().err
    assert main(["keys", "kitestring.key"]) == 0
    assert main(["pack", f"{task}:task", "cascade"]) == 2  # its loss has no confidence
    assert "needs a confidence" in capsys.readouterr().err
    assert main(["pack", f"{task}:task", "fedavg", "--set", "lr=0.5", "--out", "a.kite"]) == 0
    assert "a.kite: " in capsys.readouterr().out
    assert main(["show", "a.kite"]) == 0
    told = capsys.readouterr().out
    assert "lr=0.5" in told
    assert "Not verified" in told
    assert main(["show", "a.kite", "--trust", "kitestring.key.pub", "--plans"]) == 0
    told = capsys.readouterr().out
    assert "Signed by a trusted key, whole, and runs here" in told
    assert "plan reply train" in told
    assert "fit small" in told


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["lr"], "--set 'lr'. Give NAME=VALUE"),
        (["rate=1"], "unknown setting of FedAvg 'rate'"),
        (["epochs=many"], "epochs is a int"),
    ],
)
def test_settings_that_are_none(settings: list[str], says: str) -> None:
    from kitestring.pack.source import _changed

    with pytest.raises(SettingError, match=says.replace("(", r"\(")):
        _changed(tiny.collaboration("fedavg"), settings)
