"""`sigmix decompose`."""

from __future__ import annotations

import pytest

from sigmix.svf import decomposition as module

pytest_plugins = ["helpers_cli"]


def test_decompose_fills_the_cache_once(run, home, tmp_path, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "cache"))
    first = run("decompose", "--base", home.base, "--targets", "attention", "--json").json
    assert (first["matrices"], first["computed"], first["cached"]) == (8, 8, 0)
    assert first["bytes_written"] == sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.safetensors"))
    rest = run("decompose", "--base", home.base, "--json").json
    assert (rest["matrices"], rest["computed"], rest["cached"]) == (14, 6, 8)
    monkeypatch.setattr(module, "decompose", None)
    again = run("decompose", "--base", home.base)
    assert "0 of 14 matrices" in again.out
    assert run("generate", "hi", "--mix", "arithmetic", "--bank", home.bank, "--base", home.base).code == 0
    assert run("cache", "clear", "--kind", "svd", "--yes").code == 0
    assert not list((tmp_path / "cache").rglob("ledgers/*"))


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--layers", "first"], "--layers"),
        (["--targets", "a,b", "--layers", "0"], "'a'"),
        (["--device", "toaster"], "toaster"),
        (["--device", "meta"], "meta"),
        (["--device", "mps"], "mps"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--base", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input(refused, home, options, expected):
    assert expected in refused("decompose", *([] if "--base" in options else ["--base", home.base]), *options)
