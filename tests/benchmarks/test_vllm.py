"""The vLLM benchmark on a tiny base, with a stand-in for vLLM that runs transformers."""

from __future__ import annotations

import sys

import pytest

from benchmarks import run
from sigmix.errors import SigmixError
from sigmix.experts.bank import Bank

pytest_plugins = ["helpers_cli"]

VLLM = """
import json, os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.0"


class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos):
        assert temperature == 0 and ignore_eos
        self.max_tokens = max_tokens


class LLM:
    def __init__(self, model, dtype, **options):
        print("vLLM logs to stdout")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.lora = options.get("enable_lora", False)

    def generate(self, rows, params, lora_request, use_tqdm):
        assert bool(lora_request) == self.lora
        for adapter in lora_request or ():
            if "SIGMIX_VLLM_EXPERTS" in os.environ:
                assert adapter.path.startswith("sigmix:")
            else:
                assert json.loads((Path(adapter.path) / "adapter_config.json").read_text())["r"] <= 16
        answers = [self.answer(row["prompt_token_ids"], params.max_tokens - int(os.environ["SHORTER"])) for row in rows]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in answers]

    def answer(self, ids, count):
        row = list(ids) if os.environ["OTHER"] == "0" else [1]
        for _ in range(count):
            row.append(int(self.model(torch.tensor([row])).logits[0, -1].argmax()))
        return row[-count:]
"""

REQUEST = """
class LoRARequest:
    def __init__(self, name, number, path):
        assert number >= 1
        self.path = path
"""


@pytest.fixture
def bench(home, tmp_path, monkeypatch):
    """Run the benchmark with the stand-in; it gives ``shorter`` answers, or answers ``other`` prompts."""
    if sys.version_info < (3, 11):
        pytest.skip("vLLM needs Python 3.11")
    for path, text in {"vllm": VLLM, "vllm/lora": "", "vllm/lora/request": REQUEST}.items():
        (tmp_path / path).mkdir()
        (tmp_path / path / "__init__.py").write_text(text)
    monkeypatch.setenv("SIGMIX_CACHE", str(home.cache))
    monkeypatch.setenv("SIGMIX_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def given(shorter=0, other=0, name="vllm", **options):
        monkeypatch.setenv("SHORTER", str(shorter))
        monkeypatch.setenv("OTHER", str(other))
        if name == "vllm":
            options = {"sizes": {"base": (1, 3), "base_default": (1,), "mixed": (3,)}, "compile": False, **options}
        options = {"dtype": "float32", "base": str(home.base), "new_tokens": 4, "repeats": 2, **options}
        return run(name, bank=Bank(home.bank), **options)

    return given


@pytest.mark.slow
def test_both_answer_the_same_requests_in_turn(bench):
    result = bench()
    assert set(result["ratios"]) == {"base_1", "base_3", "base_default_1", "mixed_3", "mixed_all_3"}
    assert result["aims"] == {"base_1": ">= 1.5"}
    raw = result["raw"]
    assert raw["vllm"]["version"] == "0.0"
    assert raw["equal_answers"]["base_3"] == {"requests": 9, "equal": 9, "equal_start": 4.0}
    assert raw["equal_answers"]["mixed_3"]["equal_start"] < 4.0  # our mixtures act
    assert {len(taken) for one in raw["seconds"].values() for taken in one.values()} == {2}
    first = raw["seconds"]["base_3"]
    assert result["raw"]["ratios_by_repeat"]["base_3"][0] == first["vllm"][0] / first["ours"][0]


@pytest.mark.slow
@pytest.mark.parametrize("fault, message", [({"shorter": 1}, "4 tokens"), ({"other": 1}, "begin differently")])
def test_other_work_is_no_result(bench, fault, message):
    with pytest.raises(SigmixError, match=message):
        bench(sizes={"base": (3,)}, repeats=1, **fault)


@pytest.mark.slow
def test_mixtures_in_vllm_are_compared_with_its_base_and_its_lora(bench):
    result = bench(name="vllm-mixtures", sizes=(2, 8), ranks=(8,), repeats=1)
    both = {f"{kind}_vs_base_{count}" for kind in ("exact", "prompt") for count in (2, 8)}
    assert set(result["ratios"]) == {*both, "exact_vs_lora8_8"}
    seconds = result["raw"]["seconds"]["8"]
    assert set(seconds) == {"base", "exact", "prompt", "lora8"}
    assert result["raw"]["ratios_by_repeat"]["exact_vs_lora8_8"] == [seconds["lora8"][0] / seconds["exact"][0]]
    with pytest.raises(SigmixError, match="4 tokens"):
        bench(name="vllm-mixtures", sizes=(2,), ranks=(), repeats=1, shorter=1)


@pytest.mark.parametrize("name", ["vllm", "vllm-mixtures", "vllm-serve"])
def test_without_vllm_there_is_a_reason(name, home, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGMIX_VLLM_PYTHON", str(tmp_path / "python"))
    result = run(name, base=str(home.base), bank=Bank(home.bank))
    assert result["ratios"] == {} == result["met"]
    assert "make vllm-env" in result["raw"]["skipped"]["vLLM"]
