"""Paths and safe writing: a reader sees the old content, the new content, or nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from sigmix.errors import OutputError
from sigmix.utils import io as files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", "~/mine")
    assert files.cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("SIGMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert files.cache_dir() == Path("/xdg/sigmix")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache" / "sigmix"


def test_an_atomic_file_appears_whole_with_usual_permissions(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with files.atomic_file(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, so that the rename is atomic
    assert target.read_text() == "one"
    assert names(target.parent) == ["a.txt"]
    usual = tmp_path / "usual"
    usual.write_text("")
    assert target.stat().st_mode == usual.stat().st_mode


def test_an_error_while_writing_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError, match="half way"), files.atomic_file(target) as temporary:
        temporary.write_text("half")
        raise ValueError("half way")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_an_atomic_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "expert"
    for content in ("one", "two"):
        with files.atomic_dir(target) as temporary:
            (temporary / content).write_text("")
    assert names(target) == ["two"]
    assert names(tmp_path) == ["expert"]


def test_an_error_while_filling_a_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "expert"
    with files.atomic_dir(target) as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), files.atomic_dir(target) as temporary:
        (temporary / "new").write_text("")
        raise KeyboardInterrupt
    assert names(target) == ["old"]
    assert names(tmp_path) == ["expert"]


@pytest.mark.parametrize(("code", "words"), [
    (errno.ENOSPC, "the disk is full -> free some space"),
    (errno.EDQUOT, "the disk quota is used up"),
    (errno.EROFS, "the file system is read-only"),
    (errno.EACCES, "permission denied"),
])  # fmt: skip
def test_refusals_of_the_system_name_the_file_the_reason_and_a_remedy(tmp_path, monkeypatch, code, words):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=words) as caught:
        files.write_text(tmp_path / "a.txt", "x")
    assert str(tmp_path / "a.txt") in str(caught.value)
    assert names(tmp_path) == []


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        files.write_text(tmp_path / "file" / "a.txt", "x")


def test_json_is_readable_and_refuses_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"é": [1, 2.5]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, 2.5]}
    assert "é" in text
    assert text.endswith("\n")
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "b.json", float("nan"))
    assert names(tmp_path) == ["a.json"]


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with open(tmp_path / "a", "rb") as file:
        assert files._sha256(file) == hashlib.sha256(content).hexdigest()


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    seen = []
    real = files.shutil.disk_usage
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: seen.append(path) or real(path))
    assert files.free_bytes(tmp_path / "not" / "made" / "yet") > 0
    monkeypatch.chdir(tmp_path)
    assert files.free_bytes("not/made") > 0
    assert seen == [tmp_path, tmp_path]
