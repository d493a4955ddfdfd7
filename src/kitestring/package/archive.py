"""A package: one file with everything that a device runs, and a signature over all of it.

It is a ZIP with a manifest (JSON) that names every other file with its SHA-256 and length, and an
Ed25519 signature over the manifest's bytes. Nothing in it is read before the signature has been
found good and by a known key, and no more of a file than the manifest says is there. Nothing is
unpacked to disk.

    manifest.json signature.json     what it is; who says so
    plans.json                       what the device half does (package.plan)
    graphs/*.onnx                    the primitives that the plans call
    weights.safetensors              what programs start with, and what is deployed
    golden.json golden.safetensors   what the graphs must give here
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kitestring.errors import PackageError
from kitestring.package import keys

SCHEMA = 1
_LONGEST = 4 * 2**20  # bytes of a manifest or a signature
_MANIFEST, _SIGNATURE = "manifest.json", "signature.json"
# What a ZIP that somebody or something changed may raise, and JSON that is not what it should be.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, EOFError),
    *(RuntimeError, LookupError, TypeError, ValueError),
)
_WHEN = (1980, 1, 1, 0, 0, 0)  # the same package has the same bytes


@dataclass(frozen=True)
class Package:
    """Verified: `manifest`, `files` as the manifest names them, and the public key that signed."""

    manifest: Mapping[str, Any]
    files: Mapping[str, bytes]
    key: str
    name: str

    def json(self, name: str) -> Any:
        return json.loads(self.files[name])


def write(
    path: Path, manifest: Mapping[str, Any], files: Mapping[str, bytes], key: Ed25519PrivateKey
) -> None:
    """Atomically: a reader finds the whole package or none."""
    listed = {n: {"sha256": _digest(b), "bytes": len(b)} for n, b in sorted(files.items())}
    whole = {"schema": SCHEMA, **manifest, "files": listed}
    head = json.dumps(whole, indent=1, sort_keys=True).encode()
    mark = json.dumps(keys.sign(key, head), indent=1).encode()
    partial = path.with_name(path.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, blob in {_MANIFEST: head, _SIGNATURE: mark, **files}.items():
                archive.writestr(zipfile.ZipInfo(name, _WHEN), blob, zipfile.ZIP_DEFLATED)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, known: frozenset[str]) -> Package:
    """Raises `PackageError` for a file that is no package, is damaged or tampered with, is of a
    newer schema, or is not signed by one of the `known` keys."""
    where = path.name
    with _opened(path) as archive:
        head = _read(archive, _MANIFEST, _LONGEST)
        mark = json.loads(_read(archive, _SIGNATURE, _LONGEST))
        key = keys.verify(mark, head, known, where)
        manifest = json.loads(head)
        _check_schema(manifest, where)
        files = {n: _file(archive, n, said, where) for n, said in manifest["files"].items()}
    return Package(manifest, files, key, where)


def unsigned(path: Path) -> Mapping[str, Any]:
    """The manifest of a package of whoever's, to look at. Nothing in it may be relied on."""
    with _opened(path) as archive:
        found = json.loads(_read(archive, _MANIFEST, _LONGEST))
        mark = json.loads(_read(archive, _SIGNATURE, _LONGEST))
        return {**found, "signed by": str(mark["key"])}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Whatever the bytes are, what is wrong with them is a `PackageError`."""
    try:
        _check_list(path)
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as problem:
        if problem.strerror:
            raise PackageError(f"cannot be read ({problem.strerror})", str(path)) from None
        raise _damaged(path, problem) from None
    except _DAMAGED as problem:
        raise _damaged(path, problem) from None


def _check_list(path: Path) -> None:
    """A ZIP ends with how long its list of entries is, which is read whole before anything else:
    APPNOTE 6.3.10, section 4.3.16, without a comment."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 22))
        last = file.read(22)
    if not last.startswith(b"PK\x05\x06") or int.from_bytes(last[12:16], "little") > _LONGEST:
        raise zipfile.BadZipFile("File is not a zip file")


def _damaged(path: Path, problem: Exception) -> PackageError:
    why = f" ({problem})" if str(problem) else ""
    return PackageError(f"not a package, or a damaged one{why}", path.name, "Fetch it again")


def _check_schema(manifest: Mapping[str, Any], where: str) -> None:
    schema = manifest["schema"]
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        mend = "Update Kitestring on the device" if newer else "Pack it anew"
        raise PackageError(f"of schema {schema}; this device reads {SCHEMA}", where, mend)


def _file(archive: zipfile.ZipFile, name: str, said: Mapping[str, Any], where: str) -> bytes:
    blob = _read(archive, name, said["bytes"])
    if len(blob) != said["bytes"] or _digest(blob) != said["sha256"]:
        what = f"{name} is not what the manifest says"
        raise PackageError(what, where, "It was changed or damaged: fetch it again")
    return blob


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """At most one byte more than `most`, whatever the ZIP says. No decoder but zlib's is fed what
    nobody has vouched for."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile("another kind of compression")
    with archive.open(name) as file:
        return file.read(most + 1)


def _digest(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
