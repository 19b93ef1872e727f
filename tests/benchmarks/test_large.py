"""The benchmarks of large and quantised bases: what is measured is what is said, and the report has its figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks import quantised, run, stream
from sigmix.errors import ConfigError, SigmixError
from sigmix.models.quantization import load_weights
from sigmix.svf.checkpoint import Checkpoint

pytest_plugins = ["helpers_cli"]


def test_random_bases_differ_in_depth_alone_and_load(tmp_path, cache):
    few, many = (stream.random_base(tmp_path / str(depth), depth, 64, 96) for depth in (1, 3))
    opened = [Checkpoint(folder, "bfloat16") for folder in (few, many)]
    assert [len(one.matrices()) for one in opened] == [7, 21]
    assert {m.shape for m in opened[0].matrices()} == {m.shape for m in opened[1].matrices()}
    assert len(opened[1].shards.files) == 4
    model = load_weights(many, "random", torch.bfloat16, torch.device("cpu"))
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
def test_a_process_of_its_own_is_measured_with_a_cache_of_its_own(tmp_path, cache):
    folder = stream.random_base(tmp_path / "one", 1, 64, 96)
    found = stream.measured("stream", folder, "bfloat16")
    assert found["peak"] >= found["imported"] > 50e6
    assert found["seconds"] > 0
    assert found["files"] == pytest.approx(7 * 4 * 64 * 65, rel=0.03)
    assert not cache.exists() or not list(cache.rglob("*.safetensors"))
    with pytest.raises(SigmixError, match="cannot be measured"):
        stream.measured("stream", tmp_path, "bfloat16")


def test_the_report_of_streaming(model_folder, monkeypatch):
    calls = []

    def measured(how, folder, dtype):
        calls.append((how, folder.name))
        return {"imported": 100, "peak": 110 if how == "stream" else 200, "seconds": 2.0, "files": 150_000}

    monkeypatch.setattr(stream, "measured", measured)
    result = run("decompose", stream=True, base=str(model_folder), depths=(1, 2), width=64, inside=96, repeats=2)
    assert len(calls) == 2 * 6
    ratios = {name: one["median"] for name, one in result["ratios"].items()}
    assert ratios["peak_against_whole_default"] == ratios["peak_against_whole_2_layers"] == pytest.approx(0.1)
    assert ratios["stream_peak_2_against_1_layers"] == 1
    planned = result["raw"]["plans"]["default"]["disk_bytes"]
    assert ratios["plan_disk_against_measured"] == pytest.approx(planned / 150_000)


def test_only_decompose_streams():
    with pytest.raises(ConfigError, match="--stream"):
        run("engine", stream=True)


def test_the_report_of_quantised_bases(home, monkeypatch):
    from sigmix import Bank

    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    monkeypatch.setattr(quantised, "QUANTIZATIONS", {"int8": "torchao", "nf4": "bitsandbytes"})
    result = quantised.run(base=str(home.base), bank=Bank(home.bank), n=3, experts=("arithmetic",))
    found = result["raw"]["found"]
    # against float32: a byte of four, half a byte of four, and their scales
    assert 0.25 <= found["int8"]["bytes"] < 0.3
    assert 0.125 < found["nf4"]["bytes"] < 0.2
    int8, nf4 = found["int8"]["arithmetic"], found["nf4"]["arithmetic"]
    assert 0 < int8["arithmetic"]["kl"] < nf4["arithmetic"]["kl"]
    assert int8["arithmetic"]["kl"] < nf4["own basis"]["kl"], "z in another basis is another expert"
    assert int8["arithmetic"]["n"] == 3
