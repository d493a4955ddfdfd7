"""Packages that are properly signed and wrongly made, and bad input to pack, show and keys.

Whoever has the key may have another version, or a fault: what a device is given it either runs or
refuses in one line."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load as tensors
from safetensors.numpy import save

import tiny
from kitestring.cli import main
from kitestring.devices.runtime.load import Loaded, load
from kitestring.errors import PackageError, SettingError
from kitestring.exchange.frames import frame
from kitestring.pack.build import Built, Source, build
from kitestring.package import archive, keys

NOT_WHOLE = "something is missing in it, or is not what it should be"


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "maker.key"
    keys.create(path)
    return path


@pytest.fixture(scope="module")
def made() -> Built:
    return build(Source(tiny.task("classes"), tiny.collaboration("fedavg")))


@pytest.fixture
def signed(made: Built, maker: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a package with other parts: `manifest` changes a copy of it, `files` replace its."""

    def write(
        manifest: Callable[[Any], Any] = lambda m: None, files: Mapping[str, bytes] | None = None
    ) -> Path:
        other = json.loads(json.dumps(made.manifest))
        manifest(other)
        path = tmp_path / "a.kite"
        archive.write(path, other, {**made.files, **(files or {})}, keys.load(maker))
        return path

    return write


@pytest.fixture
def loaded(maker: Path) -> Callable[[Path], Loaded]:
    return lambda path: load(path, keys.trusted([Path(f"{maker}.pub")]))


def test_what_was_packed_is_loaded(signed: Any, loaded: Any, made: Built) -> None:
    """So that what is refused below is refused for what was changed."""
    found = loaded(signed())
    assert len({c.label for c in found.checked}) == sum(n.startswith("graphs/") for n in made.files)


@pytest.mark.parametrize(
    ("name", "blob"),
    [
        ("weights.safetensors", b"rubbish"),
        ("golden.safetensors", b"\0" * 20),
        ("golden.json", b"{}"),
        ("golden.json", b"7"),
        ("plans.json", b"[]"),
        ("plans.json", b"[" * 100_000),
        ("plans.json", b"hello"),
        ("plans.json", b"\xff\xfe\xff"),
    ],
)
def test_a_file_that_is_another_thing_is_refused(
    signed: Any, loaded: Any, name: str, blob: bytes
) -> None:
    with pytest.raises(PackageError, match=f"a.kite: ({NOT_WHOLE}|no golden)") as caught:
        loaded(signed(files={name: blob}))
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.mend == "Pack it anew"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("collaboration"),
        lambda m: m["collaboration"].update(name=7),
        lambda m: m["crosses"].update(rounds=[]),
        lambda m: m.update(programs=[]),
        lambda m: m.update(runtime="onnxruntime"),
        lambda m: m["runtime"].update(least=1),
        lambda m: m["programs"]["small"].update({"front.weight": "nowhere"}),
        lambda m: m["programs"].pop("small"),
        lambda m: m.update(deployed=None),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    signed: Any, loaded: Any, change: Any
) -> None:
    with pytest.raises(PackageError, match=f"a.kite: {NOT_WHOLE}"):
        loaded(signed(change))


def _without_recipe(listed: Any) -> None:
    next(one for one in listed if one["primitive"] == "fit")["recipe"] = None


def _with_a_text_as_rate(listed: Any) -> None:
    next(one for one in listed if one["primitive"] == "fit")["recipe"]["lr"] = "x"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda listed: listed.clear(), "no golden outputs for fit of small"),
        (lambda listed: listed.pop(), "no golden outputs for predict of small.answer"),
        (lambda listed: listed[0].update(program="other"), "no golden outputs for fit of small"),
        (lambda listed: listed[0].update(primitive="other"), "no golden outputs for fit of small"),
        (_without_recipe, "golden 0 is a fit without a recipe"),
        (_with_a_text_as_rate, NOT_WHOLE),
        (lambda listed: listed.append(listed[0]), NOT_WHOLE),  # for which there are no arrays
    ],
)
def test_graphs_that_are_held_against_nothing_are_refused(
    signed: Any, loaded: Any, made: Built, change: Any, says: str
) -> None:
    listed = json.loads(made.files["golden.json"])
    change(listed)
    with pytest.raises(PackageError, match=says):
        loaded(signed(files={"golden.json": json.dumps(listed).encode()}))


def test_a_golden_output_that_is_gone_is_refused(signed: Any, loaded: Any, made: Built) -> None:
    arrays = tensors(made.files["golden.safetensors"])
    kept = {k: a for k, a in arrays.items() if not k.startswith("0.out.")}
    with pytest.raises(PackageError, match="fit of small differs in outputs"):
        loaded(signed(files={"golden.safetensors": save(kept)}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda step: step[1].append({"$": 999}), "uses value 999, which nothing before it makes"),
        (lambda step: step.__setitem__(2, 7), "is not given a list and a dictionary"),
        (lambda step: step.__setitem__(0, ["abs"]), "a plan is not one"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(
    signed: Any, loaded: Any, made: Built, change: Any, says: str
) -> None:
    plans = json.loads(made.files["plans.json"])
    change(plans["reply train"]["steps"][0])
    with pytest.raises(PackageError, match=says):
        loaded(signed(files={"plans.json": json.dumps(plans).encode()}))


def test_what_is_wrong_in_a_package_passes_as_it_is(signed: Any, loaded: Any) -> None:
    """An error of the package's own is not wrapped in another."""
    with pytest.raises(PackageError, match=r"^a.kite: needs onnxruntime 99.1 or newer"):
        loaded(signed(lambda m: m["runtime"].update(least="99.1")))


# --- the device process


@pytest.mark.parametrize("head", [b"hello", b'{"op": "open", "seed": 0, "parts": [-1]}'])
def test_a_device_process_ends_at_what_is_no_frame(signed: Any, maker: Path, head: bytes) -> None:
    """Where the next frame begins nobody knows then: none of those behind it is answered."""
    command = [sys.executable, "-m", "kitestring.devices.runtime.process", str(signed())]
    good = frame({"op": "open", "seed": 0}, [])
    found = subprocess.run(
        [*command, "--trust", f"{maker}.pub"],
        input=good + struct.pack("<I", len(head)) + head + good * 2,
        capture_output=True,
    )
    assert found.returncode == 2
    assert found.stdout.count(b'"parts"') == 1
    (line,) = found.stderr.splitlines()
    assert line.startswith(b"a frame: its ")


# --- show


@pytest.mark.parametrize("trust", [True, False])
def test_a_newer_package_is_one(
    maker: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, trust: bool
) -> None:
    """Of which this version knows nothing but the schema."""
    monkeypatch.setattr(archive, "SCHEMA", 2)
    archive.write(tmp_path / "new.kite", {"task": "t", "half": {}}, {"a": b"x"}, keys.load(maker))
    monkeypatch.undo()
    trusted = ["--trust", f"{maker}.pub"] if trust else []
    assert main(["show", str(tmp_path / "new.kite"), *trusted]) == 2
    told = capsys.readouterr()
    assert "Update Kitestring" in told.err
    assert "fault of Kitestring" not in told.err
    assert ("of schema 2; this device reads 1" in told.err) == trust
    assert not told.out


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("collaboration"),
        lambda m: m.update(columns=[]),
        lambda m: m["columns"]["x"].update(low="x"),
        lambda m: m["columns"]["x"].update(low=10**400),
        lambda m: m["crosses"].update(rounds=7),
    ],
)
def test_a_manifest_that_cannot_be_described_is_told(signed: Any, capsys: Any, change: Any) -> None:
    assert main(["show", str(signed(change))]) == 2
    told = capsys.readouterr().err
    assert "a.kite: its manifest is not one that this version knows" in told
    assert "fault of Kitestring" not in told


FORGED = "digits\x1b[2J\x1b]0;mine\x07\nSigned by a trusted key, whole, and runs here:\r\u202e"


def test_a_stranger_s_texts_are_printed_on_their_lines(signed: Any, capsys: Any) -> None:
    """They neither write lines of their own nor speak to the terminal."""

    def forge(m: Any) -> None:
        m["task"] = m["kitestring"] = m["runtime"]["least"] = FORGED
        m["columns"][FORGED] = m["columns"]["x"]
        m["collaboration"]["settings"][FORGED] = FORGED
        m["crosses"]["rounds"][FORGED] = {"up": {FORGED: [FORGED]}, "down": {}}

    path = signed(forge, {FORGED: b"x"})
    assert main(["show", str(path)]) == 0
    told = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in told)
    assert not [line for line in told.splitlines() if line.startswith("Signed by a trusted")]
    assert r"digits\x1b[2J\x1b]0;mine\x07\nSigned" in told


def test_what_is_not_trusted_is_not_described(signed: Any, tmp_path: Path, capsys: Any) -> None:
    keys.create(tmp_path / "other.key")
    assert main(["show", str(signed()), "--trust", str(tmp_path / "other.key.pub")]) == 2
    told = capsys.readouterr()
    assert "which is not trusted here" in told.err
    assert not told.out


# --- pack and keys


def test_a_file_that_cannot_be_written_is_told_before_the_work(
    maker: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr("kitestring.pack.source.find", never)
    for path in (tmp_path / "nowhere" / "e.kite", tmp_path):
        given = ["pack", "digits", "fedavg", "--key", str(maker), "--out", str(path)]
        assert main(given) == 2
        assert f"{path}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "setting", "says"),
    [
        ("fedavg", "lr=abc", "lr is a float. As in lr=0.1"),
        ("fedavg", "lr=null", "lr is a float"),
        ("fedavg", "lr=true", "lr is a float"),
        ("fedavg", "lr=[1]", "lr is a float"),
        ("fedavg", "epochs=true", "epochs is a int"),
        ("fedavg", "epochs=1.5", "epochs is a int"),
        ("fedavg", "shuffle=1", "shuffle is a bool"),
        ("fedavg", "cohort=many", "cohort is a int or null. As in cohort=null"),
        ("early_exit", "threshold=low", "threshold is a float or null"),
    ],
)
def test_settings_of_another_type_are_refused(name: str, setting: str, says: str) -> None:
    from kitestring.pack.source import _changed

    with pytest.raises(SettingError, match=says):
        _changed(tiny.collaboration(name), [setting])


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("fedavg", "lr=1", 1),
        ("fedavg", "lr=0.5", 0.5),
        ("fedavg", "cohort=null", None),
        ("fedavg", "cohort=3", 3),
        ("fedavg", "shuffle=false", False),
        ("fedavg", "optimiser=adam", "adam"),
        ("early_exit", "threshold=1", 1),
        ("early_exit", "threshold=null", None),
    ],
)
def test_settings_of_their_type_are_taken(name: str, setting: str, value: Any) -> None:
    from kitestring.pack.source import _changed

    found = getattr(_changed(tiny.collaboration(name), [setting]), setting.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_a_key_is_written_over_nothing(tmp_path: Path) -> None:
    """Neither over a public key whose private one lies elsewhere, nor through a link."""
    (tmp_path / "old.key.pub").write_text("precious\n")
    with pytest.raises(SettingError, match=r"old\.key\.pub is there already"):
        keys.create(tmp_path / "old.key")
    assert (tmp_path / "old.key.pub").read_text() == "precious\n"
    assert not (tmp_path / "old.key").exists()
    os.symlink(tmp_path / "nowhere", tmp_path / "link")
    with pytest.raises(SettingError, match="link is there already"):
        keys.create(tmp_path / "link")
    assert not (tmp_path / "nowhere").exists()


def test_a_key_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match=r"below/x: cannot be written \(Not a dir"):
        keys.create(tmp_path / "file" / "below" / "x")


def test_digits_of_a_key_may_stand_apart(maker: Path, signed: Any, tmp_path: Path) -> None:
    """As somebody reads them out; capitals, too."""
    digits = Path(f"{maker}.pub").read_text().strip()
    spaced = " ".join(digits[i : i + 8].upper() for i in range(0, 64, 8))
    (tmp_path / "spaced.pub").write_text(f"{spaced}\n")
    known = keys.trusted([tmp_path / "spaced.pub"])
    assert known == {digits}
    assert archive.read(signed(), known).key == digits


def test_a_signer_s_name_is_digits(signed: Any, maker: Path) -> None:
    """However it is written into the package: what is printed of it is no line of its own."""
    mark = keys.sign(keys.load(maker), b"x")
    spaced = copy.copy(mark) | {"key": f"\n\n{mark['key']}"}
    assert keys.verify(spaced, b"x", frozenset({mark["key"]}), "here") == mark["key"]
    with pytest.raises(PackageError, match=f"^here: signed by {mark['key'][:16]}"):
        keys.verify(spaced, b"x", frozenset(), "here")
