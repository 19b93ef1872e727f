"""The export benchmark on a tiny base: what it measures, not how much."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import export as bench
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint

pytest_plugins = ["helpers_cli"]
MIX = "arithmetic:0.7+reading:0.3"


@pytest.fixture
def bank(home, monkeypatch):
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    return Bank(home.bank)


def peaks(way, base, mix, bank, out):
    return {"peak": 100 if way == "stream" else 400, "imported": 50}


def test_both_ways_write_a_checkpoint_and_tell_their_memory(home, bank, tmp_path, capsys):
    for way in ("stream", "whole"):
        given = {"way": way, "base": str(home.base), "mix": MIX, "bank": str(home.bank), "out": str(tmp_path / way)}
        bench._main(json.dumps(given))
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["peak"] >= found["imported"] > 50e6
        assert (tmp_path / way / "model.safetensors").is_file()
    stream, whole = BaseCheckpoint(tmp_path / "stream"), BaseCheckpoint(tmp_path / "whole")
    assert sorted(stream.shards) == sorted(whole.shards)
    assert stream.fingerprint() != whole.fingerprint() == BaseCheckpoint(home.base).fingerprint()


def test_memory_ratios(home, bank, monkeypatch):
    monkeypatch.setattr(bench, "_child", peaks)
    result = bench.run(base=str(home.base), bank=bank, mix=MIX, times=3)
    assert result["ratios"]["memory_1"]["median"] == 0.25
    assert result["ratios"]["memory_above_imports_deep"]["median"] == pytest.approx(50 / 350)
    assert result["met"] == {"memory_above_imports_deep": True}


def test_the_deep_base_is_the_base_with_its_layers_repeated(home, bank, tmp_path):
    source = BaseCheckpoint(home.base)
    repeated = bench._deepen(source, Mix.parse(MIX), bank, tmp_path / "deep", 3)
    deep = BaseCheckpoint(tmp_path / "deep")
    assert deep.config.num_hidden_layers == 6
    name = "model.layers.{}.mlp.up_proj"
    for layer, other in ((0, 2), (1, 5)):
        first, copy = (shards.tensor(f"{name.format(n)}.weight") for shards, n in
                       ((source.shards, layer), (deep.shards, other)))  # fmt: skip
        assert torch.equal(first, copy)
        assert torch.equal(bank["reading"].z[name.format(layer)], repeated["reading"].z[name.format(other)])
    assert set(deep.z(Mix.parse(MIX), repeated)) == {
        path for path in deep.linears if path != "lm_head"
    }  # every copy is adapted
