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

    def given(shorter=0, other=0, **options):
        monkeypatch.setenv("SHORTER", str(shorter))
        monkeypatch.setenv("OTHER", str(other))
        options = {"sizes": {"base": (1, 3), "base_default": (1,), "mixed": (3,)}, "repeats": 2, **options}
        bank = Bank(home.bank)
        return run("vllm", dtype="float32", base=str(home.base), bank=bank, new_tokens=4, compile=False, **options)

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


def test_without_vllm_there_is_a_reason(home, monkeypatch, tmp_path):
    monkeypatch.setenv("SIGMIX_VLLM_PYTHON", str(tmp_path / "python"))
    result = run("vllm", base=str(home.base), bank=Bank(home.bank))
    assert result["ratios"] == {} == result["met"]
    assert "make vllm-env" in result["raw"]["skipped"]["vLLM"]
