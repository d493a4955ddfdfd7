"""Who may say what a device runs: Ed25519 keys (Bernstein et al. 2012; RFC 8032).

A private key is a PEM file (PKCS #8) that only its owner can read; beside it lies the public key,
`NAME.pub`, 32 bytes as hexadecimal digits, which devices are given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kitestring.errors import PackageError, SettingError


def create(path: Path) -> str:
    """Write a new private key to `path` and its public key to `path`.pub; the public key.

    Raises `SettingError` where there is either file already: a lost key signs nothing more."""
    beside = Path(f"{path}.pub")
    for file in (path, beside):
        if os.path.lexists(file):
            mend = "Choose another name, or keep that key"
            raise SettingError(f"{file} is there already", mend=mend)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = _hex(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as private:
            private.write(pem)
        beside.write_text(public + "\n")
    except OSError as problem:
        what = f"cannot be written ({problem.strerror})"
        raise SettingError(what, str(path), "Give a file in a folder of yours") from None
    return public


def load(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except OSError as problem:
        mend = f"Make one: kitestring keys {path}"
        raise SettingError(f"no key can be read ({problem.strerror})", str(path), mend) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SettingError("not an Ed25519 private key", str(path), "Make one: kitestring keys")
    return key


def _hex(key: Ed25519PrivateKey) -> str:
    form = serialization.Encoding.Raw, serialization.PublicFormat.Raw
    return key.public_key().public_bytes(*form).hex()


def trusted(paths: Iterable[Path]) -> frozenset[str]:
    """The public keys in these files, or in the *.pub files of these folders."""
    found = set()
    for path in paths:
        files = sorted(path.glob("*.pub")) if path.is_dir() else [path]
        if not files:
            raise SettingError("there is no *.pub in it", str(path), "Name a public key")
        for file in files:
            try:
                public = bytes.fromhex(file.read_text())
                Ed25519PublicKey.from_public_bytes(public)
            except OSError as problem:
                raise SettingError(f"cannot be read ({problem.strerror})", str(file)) from None
            except ValueError:
                what = "not a public key: 64 hexadecimal digits"
                raise SettingError(what, str(file), "Name the .pub file") from None
            found.add(public.hex())
    return frozenset(found)


def sign(key: Ed25519PrivateKey, blob: bytes) -> dict[str, str]:
    return {"algorithm": "ed25519", "key": _hex(key), "signature": key.sign(blob).hex()}


def verify(signature: object, blob: bytes, known: frozenset[str], where: str) -> str:
    """The public key that signed `blob`. Raises `PackageError` unless it is one of `known`."""
    try:
        if not isinstance(signature, dict) or signature["algorithm"] != "ed25519":
            raise ValueError
        raw, mark = (bytes.fromhex(signature[part]) for part in ("key", "signature"))
        key, public = Ed25519PublicKey.from_public_bytes(raw), raw.hex()
    except (KeyError, ValueError, TypeError):
        raise PackageError("its signature cannot be read", where, "Fetch it again") from None
    try:
        key.verify(mark, blob)
    except InvalidSignature:
        what = "its manifest is not what was signed"
        raise PackageError(what, where, "It was changed or damaged: fetch it again") from None
    if public not in known:
        mend = "Give that key with --trust if you know whose it is"
        raise PackageError(f"signed by {public[:16]}..., which is not trusted here", where, mend)
    return public
