"""Downloads against a web server on this machine, and the folder of KITESTRING_DATA."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from kitestring.errors import DataError, RunError
from kitestring.tasks.fetch import Source, digest, fetch, read, read_all

CONTENT = b"one row\nanother row\n" * 500
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    missing: ClassVar[int] = 0  # bytes that are announced but never sent
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        body = self.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - self.missing])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("KITESTRING_DATA", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KITESTRING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Handler, "files", {})
    monkeypatch.setattr(Handler, "asked", [])
    monkeypatch.setattr(Handler, "missing", 0)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def source(server: str, file: str = "/a/rows.txt.gz", sha256: str = SHA256) -> Source:
    return Source("Rows", server + file, sha256, "rows/rows.txt.gz")


def left(tmp_path: Path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("level", [1, 9])
def test_any_compression_of_the_right_bytes_passes(
    server: str, tmp_path: Path, level: int, capfd: pytest.CaptureFixture[str]
) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT, level)
    assert read(source(server)) == CONTENT
    assert left(tmp_path) == ["rows.txt.gz"]
    assert capfd.readouterr().out == ""  # progress goes to stderr


def test_uncompressed_file_passes_too(server: str) -> None:
    Handler.files["/a/rows.txt"] = CONTENT
    assert read(source(server, "/a/rows.txt")) == CONTENT


def test_cache_is_reused(server: str) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT)
    path = fetch(source(server))
    assert fetch(source(server)) == path
    assert Handler.asked == ["/a/rows.txt.gz"]


def test_damaged_cache_is_replaced(server: str) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT)
    path = fetch(source(server))
    path.write_bytes(path.read_bytes()[:50])
    assert read(source(server)) == CONTENT
    assert len(Handler.asked) == 2
    assert gzip.decompress(path.read_bytes()) == CONTENT


def test_wrong_digest(server: str, tmp_path: Path) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT + b"a made-up row\n")
    with pytest.raises(DataError, match="not the file it should be") as error:
        fetch(source(server))
    assert error.value.where == server + "/a/rows.txt.gz"
    assert left(tmp_path) == []


def test_not_found(server: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="HTTP 404") as error:
        fetch(source(server))
    assert "\n" not in str(error.value)
    assert "KITESTRING_DATA" in error.value.mend
    assert left(tmp_path) == []


def test_connection_that_ends_early(server: str, tmp_path: Path) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT)
    Handler.missing = 10
    with pytest.raises(DataError, match="cut short"):
        fetch(source(server))
    assert left(tmp_path) == []


def test_official_file_that_is_itself_cut_short(server: str, tmp_path: Path) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT)[:-10]
    with pytest.raises(DataError, match="damaged or cut short"):
        fetch(source(server))
    assert left(tmp_path) == []


def test_no_server(server: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="cannot download Rows"):
        fetch(source(f"http://127.0.0.1:{port}"))
    assert left(tmp_path) == []


def test_only_http(server: str) -> None:
    with pytest.raises(DataError, match="no http address"):
        fetch(Source("Rows", "file:///etc/hostname", SHA256, "rows/never-there"))


def test_cache_that_cannot_be_written(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KITESTRING_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="KITESTRING_CACHE"):
        fetch(source(server))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Handler.files["/a/rows.txt.gz"] = gzip.compress(CONTENT)
    (tmp_path / "cache/rows").mkdir(parents=True)
    (tmp_path / f"cache/rows/rows.txt.gz.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(RunError, match="Make room"):
        fetch(source(server))
    assert left(tmp_path) == []


def archives() -> dict[str, bytes]:
    files = {"top-1/texts/b.txt": b"b", "top-1/texts/a.txt": b"a", "top-1/README": b"other"}
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with tarfile.open(fileobj=tarred, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return {"/texts.zip": zipped.getvalue(), "/texts.tar.gz": tarred.getvalue()}


@pytest.mark.parametrize("file", ["/texts.zip", "/texts.tar.gz"])
def test_archives_are_checked_by_the_files_that_are_read(server: str, file: str) -> None:
    Handler.files |= archives()
    files = {"a.txt": b"a", "b.txt": b"b"}
    texts = Source("Texts", server + file, digest(files), "texts/x", "*texts/*.txt")
    assert read_all(texts) == files
    other = {"a.txt": b"a", "b.txt": b"changed"}
    with pytest.raises(DataError, match="SHA-256"):
        fetch(Source("Texts", server + file, digest(other), "other/x", "*texts/*.txt"))


def test_digest_of_several_files_is_that_of_sha256sum() -> None:
    # printf a > a.txt; printf b > b.txt; sha256sum a.txt b.txt | sha256sum
    lines = "".join(
        f"{hashlib.sha256(c).hexdigest()}  {n}\n" for n, c in (("a.txt", b"a"), ("b.txt", b"b"))
    )
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert digest({"b.txt": b"b", "a.txt": b"a"}) == expected


def test_folder(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITESTRING_DATA", str(tmp_path))
    path = tmp_path / "rows/rows.txt.gz"
    with pytest.raises(DataError, match="not in KITESTRING_DATA") as error:
        fetch(source(server))
    assert error.value.where == str(path)
    path.parent.mkdir()
    path.write_bytes(gzip.compress(CONTENT, 2))
    assert fetch(source(server)) == path
    assert read(source(server)) == CONTENT
    path.write_bytes(gzip.compress(CONTENT[:-1]))
    with pytest.raises(DataError, match="not the file it should be"):
        fetch(source(server))
    path.write_bytes(gzip.compress(CONTENT)[:40])
    with pytest.raises(DataError, match="damaged or cut short"):
        fetch(source(server))
    assert Handler.asked == []  # a folder that is named is never gone around
