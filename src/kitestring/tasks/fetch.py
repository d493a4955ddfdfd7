"""Datasets come from their official address, are checked, and are kept in a cache.

Nothing is bundled, as most datasets may not be passed on. The environment variable KITESTRING_DATA
names a folder that already has the files; nothing is downloaded then. Otherwise a file is
downloaded once, into KITESTRING_CACHE (~/.cache/kitestring). Either way the digest is of what is
inside: a recompressed copy of the right rows passes, and one changed row does not.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import lzma
import os
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePosixPath

from kitestring.errors import DataError, RunError

TIMEOUT = 30.0  # seconds without a byte
_DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Source:
    """A dataset's file: `url` is official, `folder_path` where it lies under KITESTRING_DATA.

    `members` is a pattern of the files to read where the file is an archive ("*/u.data").
    `sha256` is of the one file read, uncompressed, or of `sha256sum`'s lines for several."""

    name: str
    url: str
    sha256: str
    folder_path: str
    members: str = "*"


def fetch(source: Source) -> Path:
    """Where the file lies, downloaded if it must be; its content is right."""
    return _fetch(source)[0]


def read(source: Source) -> bytes:
    """The uncompressed bytes of a source that is one file."""
    (content,) = read_all(source).values()
    return content


def read_all(source: Source) -> Mapping[str, bytes]:
    """The uncompressed bytes of each file of a source, by file name."""
    return _fetch(source)[1]


def digest(files: Mapping[str, bytes]) -> str:
    """What `Source.sha256` is compared with."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    if len(sums) == 1:
        return next(iter(sums.values()))
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return hashlib.sha256(lines.encode()).hexdigest()


def _fetch(source: Source) -> tuple[Path, Mapping[str, bytes]]:
    if folder := os.environ.get("KITESTRING_DATA"):
        path = Path(folder) / source.folder_path
        if not path.is_file():
            mend = "Put the file there, or unset KITESTRING_DATA to download it"
            raise DataError(f"{source.name} is not in KITESTRING_DATA", str(path), mend)
        mend = f"Replace it by a copy of {source.url}"
        return path, _verified(source, _load(path), str(path), mend)
    path = _cached(source)
    if path.is_file():
        # A damaged file in the cache is not an error: the download below replaces it.
        with contextlib.suppress(DataError):
            return path, _verified(source, _load(path), str(path))
    return path, _download(source, path)


def _cached(source: Source) -> Path:
    cache = Path(os.environ.get("KITESTRING_CACHE") or "~/.cache/kitestring").expanduser()
    name = PurePosixPath(urllib.parse.urlsplit(source.url).path).name
    return cache / PurePosixPath(source.folder_path).parent / name


def _load(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", str(path)) from error


def _verified(source: Source, raw: bytes, where: str, mend: str = "") -> Mapping[str, bytes]:
    try:
        files = _unpack(raw, source.members)
    except _DAMAGED as error:
        raise DataError(f"{source.name} is damaged or cut short", where, mend) from error
    if digest(files) != source.sha256:
        raise DataError(f"{source.name} is not the file it should be (SHA-256)", where, mend)
    return files


def _unpack(raw: bytes, members: str) -> dict[str, bytes]:
    """Told apart by content, as a mirror may compress what the official address does not."""
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    if raw[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            names = [n for n in archive.namelist() if fnmatchcase(n, members)]
            return {PurePosixPath(n).name: archive.read(n) for n in names}
    if raw[257:262] == b"ustar":
        files = {}
        with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
            for member in tar:
                if fnmatchcase(member.name, members) and (file := tar.extractfile(member)):
                    files[PurePosixPath(member.name).name] = file.read()
        return files
    return {"": raw}


def _download(source: Source, path: Path) -> Mapping[str, bytes]:
    """Into a file beside `path`, which takes its place once it is whole and right."""
    if urllib.parse.urlsplit(source.url).scheme not in ("http", "https"):
        raise DataError(f"{source.name} has no http address", source.url)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            raw = _get(source)
            file.write(raw)
        files = _verified(source, raw, source.url, "Try again; the official file may have changed")
        part.replace(path)
    except OSError as error:
        mend = "Make room, or set KITESTRING_CACHE to another folder"
        raise RunError(f"cannot write: {error.strerror}", str(part), mend) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return files


def _get(source: Source) -> bytes:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    text = TextColumn("{task.description}", markup=False)
    bar = Progress(text, BarColumn(), DownloadColumn(), console=Console(stderr=True))
    agent = {"User-Agent": "kitestring"}
    request = urllib.request.Request(source.url, headers=agent)
    home = urllib.parse.urlsplit(source.url).hostname
    mend = "Check the network, or put the file in a folder that KITESTRING_DATA names"
    try:
        with bar, urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            size = int(reply.headers.get("Content-Length") or 0) or None
            one = bar.add_task(f"{source.name} from {home}", total=size)
            chunks = []
            for chunk in iter(partial(reply.read, 1 << 16), b""):
                chunks.append(chunk)
                bar.update(one, advance=len(chunk))
            raw = b"".join(chunks)
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"{source.name}: HTTP {error.code} {error.reason}", source.url, mend
        ) from None
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"cannot download {source.name}: {reason}", source.url, mend) from error
    if size is not None and len(raw) != size:
        raise DataError(
            f"{source.name} was cut short at {len(raw)} of {size} bytes", source.url, mend
        )
    return raw
