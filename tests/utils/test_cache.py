"""The cache folder: listing, clearing, and finding damage."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sigmix.errors import UnknownNameError
from sigmix.utils import cache as caching
from sigmix.utils.cache import write_manifest


def add_model(cache: Path, name: str = "abc") -> Path:
    folder = cache / "models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    write_manifest(folder, {"kind": "gguf", "file": f"{name}.gguf"})
    return folder


def add_svd(cache: Path, name: str = "ab/abcd.safetensors") -> Path:
    file = cache / "svd" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"s": np.ones(10, np.float32)}, file)
    return file


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", "~/mine")
    assert caching.cache_dir() == Path.home() / "mine"
    monkeypatch.delenv("SIGMIX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert caching.cache_dir() == Path("/xdg/sigmix")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caching.cache_dir() == Path.home() / ".cache" / "sigmix"


def test_an_empty_cache_has_no_entries_and_is_not_created(cache):
    assert caching.entries() == []
    assert caching.total() == 0
    assert caching.clear() == []
    assert caching.clear_damaged() == []
    assert not cache.exists()


def test_entries_name_kind_size_and_use_the_latest_first(cache):
    model, svd = add_model(cache), add_svd(cache)
    for file in model.iterdir():
        os.utime(file, (1_000, 1_000))
    os.utime(svd, (2_000, 2_000))
    first, second = caching.entries()
    assert (first.kind, first.path, first.bytes, first.last_used) == ("svd", svd, svd.stat().st_size, 2_000)
    assert (second.kind, second.name, second.path, second.last_used) == ("models", "abc.gguf", model, 1_000)
    assert second.bytes == sum(file.stat().st_size for file in model.iterdir())
    assert caching.total() == first.bytes + second.bytes
    assert caching.total("svd") == first.bytes


def test_clear_removes_one_kind_or_all(cache):
    model, svd = add_model(cache), add_svd(cache)
    part = cache / "downloads" / "wheel.whl.part"
    part.parent.mkdir()
    part.write_bytes(b"abc")
    assert [entry.path for entry in caching.clear("svd")] == [svd]
    assert not svd.exists()
    assert model.exists()
    assert {entry.path for entry in caching.clear()} == {model, part}
    assert caching.entries() == []


def test_an_unknown_kind_names_those_there_are(cache):
    with pytest.raises(UnknownNameError, match="models"):
        caching.clear("model")


def test_clear_damaged_removes_only_what_is_damaged(cache):
    good_model, bad_model = add_model(cache, "good"), add_model(cache, "bad")
    good_svd, bad_svd = add_svd(cache, "aa/good.safetensors"), add_svd(cache, "bb/bad.safetensors")
    (bad_model / "model.safetensors").write_bytes(b"y" * 1000)  # same size, other bytes
    bad_svd.write_bytes(bad_svd.read_bytes()[:-8])
    removed = {entry.path: why for entry, why in caching.clear_damaged()}
    assert set(removed) == {bad_model, bad_svd}
    assert str(bad_model / "model.safetensors") in removed[bad_model]
    assert good_model.exists()
    assert good_svd.exists()
    assert not bad_model.exists()
    assert not bad_svd.exists()


def test_a_model_folder_that_is_a_link_is_cleared_without_its_target(cache, tmp_path):
    model = add_model(cache)
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    assert [entry.path for entry in caching.clear("models")] == [model]
    assert not model.is_symlink()
    assert (tmp_path / "elsewhere" / "config.json").exists()


@pytest.mark.parametrize("lost", ["model.safetensors", "sigmix-cache.json"])
def test_a_model_that_lost_a_file_is_damaged(cache, lost):
    folder = add_model(cache)
    (folder / lost).unlink()
    (entry,) = caching.entries("models")
    assert lost in caching.damage(entry)


def test_stale_temporary_files_go_and_those_of_a_running_writer_stay(cache):
    add_svd(cache)
    old, young = cache / "svd" / "ab" / ".x.safetensors.1.tmp", cache / "svd" / "ab" / ".y.safetensors.2.tmp"
    old.write_bytes(b"")
    young.write_bytes(b"")
    past = time.time() - 2 * caching.STALE
    os.utime(old, (past, past))
    assert caching.clear_damaged() == []
    assert not old.exists()
    assert young.exists()
    assert len(caching.entries()) == 1
