"""`sigmix cache`."""

from __future__ import annotations

import shutil

import pytest

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def copied(home, tmp_path, monkeypatch, run):
    """A cache with the base's decompositions, one model entry and an unfinished download, to be cleared at will."""
    cache = tmp_path / "cache"
    shutil.copytree(home.cache / "svd", cache / "svd")  # other entries depend on the tests that ran before
    (cache / "models" / "abc").mkdir(parents=True)
    (cache / "models" / "abc" / "config.json").write_text("{}")
    (cache / "downloads").mkdir()
    (cache / "downloads" / "wheel.part").write_bytes(b"x" * 100)
    monkeypatch.setenv("SIGMIX_CACHE", str(cache))
    return cache


def test_list(run, copied):
    figures = run("cache", "list", "--json").json
    assert figures["folder"] == str(copied)
    assert {entry["kind"] for entry in figures["entries"]} == {"models", "svd", "downloads"}
    assert figures["bytes"] == sum(entry["bytes"] for entry in figures["entries"])
    only = run("cache", "list", "--kind", "downloads", "--json").json
    assert [entry["name"] for entry in only["entries"]] == ["wheel.part"]
    assert "decompositions" in run("cache", "list").out


def test_list_of_an_empty_cache(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "none"))
    assert "no entries" in run("cache", "list").out
    assert run("cache", "list", "--json").json["entries"] == []
    assert run("cache", "clear", "--yes", "--json").json == {"removed": [], "bytes": 0}


def test_clear_one_kind(run, copied):
    freed = run("cache", "clear", "--kind", "downloads", "--yes", "--json").json
    assert freed["bytes"] == 100
    assert "downloads" not in {entry["kind"] for entry in run("cache", "list", "--json").json["entries"]}
    assert "removed" in run("cache", "clear", "--yes").out
    assert run("cache", "list", "--json").json["bytes"] == 0


def test_clear_damaged(run, copied):
    (entry,) = run("cache", "list", "--damaged", "--json").json["entries"]
    assert entry["kind"] == "models"  # it has no manifest
    assert "manifest" in entry["damage"] or "sigmix-cache.json" in entry["damage"]
    assert run("cache", "clear", "--damaged", "--yes", "--json").json["removed"][0]["path"] == entry["path"]
    assert run("cache", "list", "--damaged", "--json").json["entries"] == []


def test_cache_refuses(run, refused, copied):
    assert "--yes" in refused("cache", "clear")
    assert "nearest: svd" in refused("cache", "list", "--kind", "svds")
    assert "--damaged" in refused("cache", "clear", "--kind", "svd", "--damaged")
    assert run("cache", "list", "--json").json["entries"]
