"""`sigmix cache` and `sigmix doctor`."""

from __future__ import annotations

import shutil

import pytest

from sigmix.cli import doctor as diagnose

pytest_plugins = ["helpers_cli"]


@pytest.fixture
def copied(home, tmp_path, monkeypatch, run):
    """A copy of the cache with one model entry and an unfinished download, to be cleared at will."""
    cache = tmp_path / "cache"
    shutil.copytree(home.cache, cache)
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
    assert "nothing there" in run("cache", "list").out
    assert run("cache", "list", "--json").json["entries"] == []
    assert run("cache", "clear", "--yes", "--json").json == {"removed": [], "bytes": 0}


def test_clear_one_kind(run, copied):
    freed = run("cache", "clear", "--kind", "downloads", "--yes", "--json").json
    assert freed["bytes"] == 100
    assert {entry["kind"] for entry in run("cache", "list", "--json").json["entries"]} == {"models", "svd"}
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
    assert "unknown kind of cache 'svds'; nearest: svd" in refused("cache", "list", "--kind", "svds")
    assert "--damaged" in refused("cache", "clear", "--kind", "svd", "--damaged")
    assert run("cache", "list", "--json").json["entries"]


# ---------------------------------------------------------------------- doctor


def test_doctor(run, home):
    figures = run("doctor", "--base", home.base, "--json").json
    assert figures["problems"] == []
    assert figures["packages"]["core"]["torch"]["version"]
    assert figures["machine"]["cores"] >= 1
    assert figures["machine"]["disk_free_bytes"] > 0
    assert figures["dtype"]["chosen"] in ("float32", "bfloat16")
    assert figures["base"]["plan"]["matrices"] == 14
    assert set(figures["base"]["memory_bytes"]) == {"merged", "gain", "factored"}
    text = run("doctor", "--base", home.base, "--plan").out
    assert "4 × [64, 64]" in text
    assert "not adapted" in text


def test_doctor_knows_the_default_without_its_weights(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "empty"))
    figures = run("doctor", "--json").json
    assert figures["base"]["name"] == "smollm2-135m"
    assert figures["base"]["plan"]["parameters"] == 134_515_008
    assert figures["base"]["plan"]["z_parameters"] == 97_920
    assert figures["cache"]["models"] == []


def test_doctor_on_a_base_that_is_none(refused, run, tmp_path):
    line = refused("doctor", "--base", tmp_path / "none", silent=False)
    assert "no base at" in line
    assert "machine:" in run("doctor", "--base", tmp_path / "none").out  # the rest is shown all the same
    assert "config.json is missing" in refused("doctor", "--base", tmp_path, silent=False)
    assert "cannot be had" in refused("doctor", "--base", "nobody/nothing", silent=False)


def test_doctor_gives_the_command_for_what_is_missing(run, home, monkeypatch):
    wanted = ["torch>=2.8", "numpy>=999", "no-such-package>=1", "sigmix[tasks]; extra == 'train'",
              'no-such-other>=2; extra == "tasks"', "rich>=13; extra == 'serve'"]  # fmt: skip
    real = diagnose.metadata.version
    monkeypatch.setattr(diagnose.metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(diagnose.metadata, "version", lambda name: "1" if name == "sigmix" else real(name))
    done = run("doctor", "--base", home.base)
    assert done.code == 1
    assert len(done.err) == 1
    assert "numpy" in done.err[0]
    assert "is too old -> pip install 'numpy>=999'" in done.out
    assert "no-such-package is not installed -> pip install 'no-such-package>=1'" in done.out
    assert "extra tasks: missing or too old: no-such-other -> pip install 'sigmix[tasks]'" in done.out
    assert "extra serve: installed" in done.out


def test_doctor_warns_of_a_full_disk_and_an_unwritable_cache(home):
    figures = {
        "packages": {"python": "3.11", "core": {}},
        "machine": {"disk_free_bytes": 1000},
        "cache": {"folder": "/x", "writable": False},
        "base": {"name": "b", "fits_disk": False, "disk_bytes": 5000},
    }
    first, second = diagnose.problems(figures)
    assert "set SIGMIX_CACHE" in first
    assert "needs 5.0 kB of disk" in second
