"""Machine code that is kept for the next process that wants the same, in KITESTRING_CACHE
(~/.cache/kitestring).

Code is found by the digest of the text that it was made from, of the processor and of the
compiler's version, and only used if it is whole and in a folder that nobody else may write to.
Where there is no such folder nothing is kept, and all works as well, only later.
"""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

_MOST = 2000  # files; then the older half goes
_DIGEST = 32  # bytes of it before the code


def key(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def load(name: str) -> bytes | None:
    with suppress(OSError):
        kept = (_folder() / name).read_bytes()
        if hashlib.sha256(kept[_DIGEST:]).digest() == kept[:_DIGEST]:
            return kept[_DIGEST:]
    return None


def keep(name: str, code: bytes) -> None:
    with suppress(OSError):
        folder = _folder()
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_bytes(hashlib.sha256(code).digest() + code)
        os.replace(part, folder / name)
        files = list(folder.iterdir())
        if len(files) > _MOST:
            for old in sorted(files, key=_age)[: len(files) // 2]:
                old.unlink(missing_ok=True)


def _age(file: Path) -> float:
    with suppress(OSError):
        return file.stat().st_mtime
    return 0.0


def _folder() -> Path:
    """Raises OSError where it cannot be made, or belongs to or is open to somebody else."""
    home = Path(os.environ.get("KITESTRING_CACHE") or "~/.cache/kitestring").expanduser()
    folder = home / "code"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        about = folder.stat()
        if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"{folder} is not ours alone")
    return folder
