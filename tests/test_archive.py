"""Packages and keys: what was signed by a known key is read, and nothing else."""

from __future__ import annotations

import json
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitestring.errors import PackageError, SettingError
from kitestring.package import archive, keys

FILES = {"plans.json": b"[1, 2]", "graphs/a b.onnx": bytes(range(256)) * 9, "empty": b""}
MANIFEST = {"task": "digits", "note": "è"}


@pytest.fixture
def key(tmp_path: Path) -> Path:
    keys.create(tmp_path / "maker.key")
    return tmp_path / "maker.key"


@pytest.fixture
def known(key: Path) -> frozenset[str]:
    return keys.trusted([key.with_name("maker.key.pub")])


@pytest.fixture
def package(tmp_path: Path, key: Path) -> Path:
    path = tmp_path / "a.kite"
    archive.write(path, MANIFEST, FILES, keys.load(key))
    return path


def rewritten(package: Path, change: Any) -> Path:
    """The same ZIP with other contents: `change` takes and gives name -> bytes."""
    with zipfile.ZipFile(package) as old:
        parts = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(package, "w") as new:
        for name, blob in change(parts).items():
            new.writestr(name, blob)
    return package


def resigned(package: Path, key: Path, **changes: Any) -> Path:
    """With other entries in the manifest, properly signed."""

    def change(parts: dict[str, bytes]) -> dict[str, bytes]:
        head = json.dumps({**json.loads(parts["manifest.json"]), **changes}).encode()
        mark = json.dumps(keys.sign(keys.load(key), head)).encode()
        return {**parts, "manifest.json": head, "signature.json": mark}

    return rewritten(package, change)


def test_what_was_packed_is_read(package: Path, known: frozenset[str]) -> None:
    found = archive.read(package, known)
    assert found.files == FILES
    assert {k: found.manifest[k] for k in MANIFEST} == MANIFEST
    assert found.key in known
    assert found.json("plans.json") == [1, 2]


def test_the_same_package_has_the_same_bytes(package: Path, key: Path, tmp_path: Path) -> None:
    """Ed25519 signs without dice (RFC 8032), and no time is written down."""
    again = tmp_path / "again.kite"
    archive.write(again, MANIFEST, dict(reversed(FILES.items())), keys.load(key))
    with zipfile.ZipFile(package) as a, zipfile.ZipFile(again) as b:
        assert {n: a.read(n) for n in a.namelist()} == {n: b.read(n) for n in b.namelist()}
    first = package.read_bytes()
    archive.write(package, MANIFEST, FILES, keys.load(key))
    assert package.read_bytes() == first


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_byte_that_changes_is_found(
    package: Path, known: frozenset[str], place: float, bits: int
) -> None:
    """Or it was one that means nothing, such as a ZIP's notes on the file system."""
    blob = bytearray(package.read_bytes())
    blob[int(place * len(blob))] ^= bits
    other = package.with_name("other.kite")
    other.write_bytes(blob)
    try:
        found = archive.read(other, known)
    except PackageError:
        return
    assert found.files == FILES
    assert found.manifest == archive.read(package, known).manifest


@pytest.mark.parametrize(
    ("at", "field"),
    [(8, b"\1"), (8, b"\x20"), (10, b"\x0c"), (10, b"\x0e"), (10, b"\x63"), (20, b"\5\0\0\0"),
     (42, b"\7")],
    ids=["encrypted", "patched", "bzip2", "lzma", "unknown method", "shorter", "elsewhere"],
)  # fmt: skip
def test_other_words_about_the_manifest(
    package: Path, known: frozenset[str], at: int, field: bytes
) -> None:
    """In fields of the ZIP's central directory: APPNOTE 6.3.10, section 4.3.12."""
    blob = bytearray(package.read_bytes())
    start = blob.index(b"PK\1\2") + at
    blob[start : start + len(field)] = field
    package.write_bytes(blob)
    for look in (lambda: archive.read(package, known), lambda: archive.unsigned(package)):
        with pytest.raises(PackageError, match="damaged one") as found:
            look()
        assert found.value.mend


@pytest.mark.parametrize("length", [0, 1, 100, -1, -30])
def test_half_a_file_is_refused(package: Path, known: frozenset[str], length: int) -> None:
    package.write_bytes(package.read_bytes()[:length])
    with pytest.raises(PackageError, match=r"not a package, or a damaged one.*Fetch it again"):
        archive.read(package, known)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_was_exchanged_is_refused(
    package: Path, known: frozenset[str], name: str
) -> None:
    rewritten(package, lambda parts: {**parts, name: parts[name][:-1] + b"x"})
    with pytest.raises(PackageError, match=f"{name} is not what the manifest says"):
        archive.read(package, known)


def test_a_file_that_is_gone_is_refused(package: Path, known: frozenset[str]) -> None:
    rewritten(package, lambda parts: {k: v for k, v in parts.items() if k != "empty"})
    with pytest.raises(PackageError, match="not a package, or a damaged one"):
        archive.read(package, known)


def test_a_file_that_nobody_signed_is_not_there(package: Path, known: frozenset[str]) -> None:
    rewritten(package, lambda parts: {**parts, "evil.py": b"import os"})
    assert archive.read(package, known).files == FILES


def test_a_manifest_that_was_changed_is_refused(package: Path, known: frozenset[str]) -> None:
    rewritten(
        package,
        lambda p: {**p, "manifest.json": p["manifest.json"].replace(b"digits", b"widget")},
    )
    with pytest.raises(PackageError, match="its manifest is not what was signed"):
        archive.read(package, known)


def test_a_file_longer_than_it_says_is_not_unpacked(
    package: Path, known: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand megabytes of zeros fit a megabyte of ZIP: no more is read than was promised."""
    with zipfile.ZipFile(package, "a", zipfile.ZIP_DEFLATED) as more:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            more.writestr("empty", b"\0" * 2**28)
    import tracemalloc

    tracemalloc.start()
    with pytest.raises(PackageError, match="empty is not what the manifest says"):
        archive.read(package, known)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22


def test_a_stranger_s_signature_is_refused(package: Path, tmp_path: Path) -> None:
    keys.create(tmp_path / "other.key")
    others = keys.trusted([tmp_path / "other.key.pub"])
    with pytest.raises(PackageError, match=r"signed by .*which is not trusted here.*--trust"):
        archive.read(package, others)


@pytest.mark.parametrize(
    "mark",
    [b"{}", b"[]", b'{"algorithm": "none", "key": "", "signature": ""}',
     b'{"algorithm": "ed25519", "key": "zz", "signature": "00"}'],
)  # fmt: skip
def test_a_signature_that_is_none_is_refused(
    package: Path, known: frozenset[str], mark: bytes
) -> None:
    rewritten(package, lambda parts: {**parts, "signature.json": mark})
    with pytest.raises(PackageError, match="its signature cannot be read"):
        archive.read(package, known)


@pytest.mark.parametrize(("schema", "mend"), [(2, "Update Kitestring"), (0, "Pack it anew")])
def test_another_schema_is_refused(
    package: Path, key: Path, known: frozenset[str], schema: int, mend: str
) -> None:
    resigned(package, key, schema=schema)
    with pytest.raises(PackageError, match=f"of schema {schema}; this device reads 1. {mend}"):
        archive.read(package, known)


def test_what_is_not_there_or_no_package_is_told(tmp_path: Path, known: frozenset[str]) -> None:
    with pytest.raises(PackageError, match="No such file"):
        archive.read(tmp_path / "none.kite", known)
    (tmp_path / "text").write_text("hello")
    for read in (lambda p: archive.read(p, known), archive.unsigned):
        with pytest.raises(PackageError, match="not a package"):
            read(tmp_path / "text")


def test_anyone_may_look_at_a_manifest(package: Path, known: frozenset[str]) -> None:
    found = archive.unsigned(package)
    assert found["task"] == "digits"
    assert found["signed by"] in known


def test_nothing_half_written_stays(tmp_path: Path, key: Path, package: Path) -> None:
    before = package.read_bytes()
    with pytest.raises(TypeError):
        archive.write(package, MANIFEST, {"a": "text"}, keys.load(key))  # type: ignore[dict-item]
    assert package.read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_a_private_key_is_its_owner_s(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(SettingError, match="is there already"):
        keys.create(key)


@pytest.mark.parametrize("text", ["", "hello", "-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_bad_keys_are_told(tmp_path: Path, text: str) -> None:
    bad = tmp_path / "bad"
    bad.write_text(text)
    with pytest.raises(SettingError, match="not an Ed25519 private key"):
        keys.load(bad)
    with pytest.raises(SettingError, match=r"not a public key.*\.pub"):
        keys.trusted([bad])
    with pytest.raises(SettingError, match="kitestring keys"):
        keys.load(tmp_path / "none")


def test_a_folder_of_keys(tmp_path: Path) -> None:
    made = {keys.create(tmp_path / "all" / name) for name in ("a", "b")}
    assert keys.trusted([tmp_path / "all"]) == made
    (tmp_path / "nobody").mkdir()
    with pytest.raises(SettingError, match=r"no \*\.pub in it"):
        keys.trusted([tmp_path / "nobody"])


def test_no_decoder_but_zlib_s_is_fed(package: Path, known: frozenset[str]) -> None:
    """LZMA takes as much memory as its header asks for."""
    with zipfile.ZipFile(package) as old:
        parts = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(package, "w", zipfile.ZIP_LZMA) as new:
        for name, blob in parts.items():
            new.writestr(name, blob)
    with pytest.raises(PackageError, match="another kind of compression"):
        archive.read(package, known)


def test_a_list_of_entries_without_end_is_not_read(package: Path, known: frozenset[str]) -> None:
    """It is read whole before the signature is; ours is some hundred bytes long."""
    with zipfile.ZipFile(package, "a") as file:
        for i in range(70_000):
            file.writestr(f"{i:>50}", b"")
    with pytest.raises(PackageError, match="not a zip file"):
        archive.read(package, known)
