"""The llama.cpp benchmark on a tiny base: what it compares, not how fast."""

from __future__ import annotations

import pytest
from helpers_engine import expert
from helpers_gguf import write_gguf
from helpers_tiny import build_tiny

from benchmarks import run
from sigmix.experts.bank import Bank
from sigmix.export.verify import llama_cpp_installed
from sigmix.models.loading import load_base

pytest_plugins = ["helpers_cli"]

MIX = "arithmetic:0.7+reading:0.3"


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp_installed(), reason="llama-cpp-python is not installed")
def test_both_answer_the_same_request(cache, tmp_path):
    base = write_gguf(tmp_path / "base.gguf", build_tiny(vocab_size=260).bfloat16().float())
    bank = Bank(tmp_path / "bank", create=True)
    for seed, name in enumerate(("arithmetic", "reading")):
        bank.add(expert(load_base(base, "float32")[0], name, seed).with_meta(task="addition?digits=1"))
    tiny = {"base": str(base), "bank": bank, "mix": MIX, "new_tokens": 5, "compile": False}
    result = run("llamacpp", repeats=2, dtype="float32", **tiny)
    assert {"base", "mixture"} <= set(result["ratios"])
    raw = result["raw"]
    assert {len(taken) for taken in raw["seconds"].values()} == {2}
    same = raw["same_tokens"]
    assert same["base"] == 5
    assert 0 <= same["mixture"] <= 5
    first = raw["seconds"]
    assert raw["ratios_by_repeat"]["mixture"][1] == first["llamacpp_adapter"][1] / first["ours_mixture"][1]


def test_without_a_gguf_file_there_is_a_reason(home):
    result = run("llamacpp", base=str(home.base), bank=Bank(home.bank), mix=MIX)
    assert result["ratios"] == {} == result["met"]
    assert "llama" in result["raw"]["skipped"]["llama.cpp"] or "GGUF" in result["raw"]["skipped"]["llama.cpp"]
