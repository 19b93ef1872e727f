"""GGUF adapters: what is in the file, and, where they are installed, what llama.cpp and its server compute with it."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers_engine import expert
from helpers_export import base_folder, delta, experts, ids
from helpers_gguf import gguf_permute, write_gguf
from helpers_llama_server import LlamaServer, llama_server
from helpers_tiny import build_tiny

from sigmix.engine import Engine
from sigmix.errors import ConfigError, OutputError, SigmixError, UnknownNameError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.export import gguf as gguf_lora
from sigmix.export import verify as llamacpp
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.low_rank import LowRank
from sigmix.export.verify import LlamaCpp, Reference, check_figures, compare_logits, verify_gguf
from sigmix.models.default import SMOLLM2, fetch_member
from sigmix.models.loading import load_base
from sigmix.tasks.registry import get_task

MIX = Mix.parse("math:0.7+word:0.5")
needs_llama_cpp = pytest.mark.skipif(not llamacpp.llama_cpp_installed(), reason="llama-cpp-python is not installed")
needs_llama_server = pytest.mark.skipif(llama_server() is None, reason="llama-server is not installed")


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {one.name: one for one in reader.tensors}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "phi3"])
def test_the_file_holds_the_change_in_llama_cpps_layout(tmp_path, cache, arch):
    folder = base_folder(tmp_path / "base", arch)
    low = LowRank.from_mix(BaseCheckpoint(folder), MIX, experts(arch))
    figures = export_gguf(low, tmp_path / "x.gguf")
    meta, tensors = fields(tmp_path / "x.gguf")
    assert meta["general.type"] == "adapter"
    assert meta["adapter.type"] == "lora"
    assert meta["adapter.lora.alpha"] == 0
    assert meta["general.architecture"] == arch == figures["architecture"]
    assert meta["sigmix.mix"] == MIX.id
    assert len(tensors) == 2 * len(low.paths)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], 2)
    heads = {"q_proj": 4, "k_proj": 2} if arch == "llama" else {}
    for path in low.paths:
        name = table.get_name(path)
        a, b = (torch.from_numpy(tensors[f"{name}.weight.{side}"].data.copy()) for side in ("lora_a", "lora_b"))
        change = delta(low.base, low, path).float()
        if path.rsplit(".", 1)[-1] in heads:
            change = gguf_permute(change, heads[path.rsplit(".", 1)[-1]])
        torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-5)


def test_half_precision_rank_and_refusals(tmp_path, cache):
    folder = base_folder(tmp_path / "base")
    low = LowRank.from_mix(BaseCheckpoint(folder), MIX, experts())
    low.set_ranks(rank=8)
    export_gguf(low, tmp_path / "x.gguf", "f16")
    _, tensors = fields(tmp_path / "x.gguf")
    assert all(one.data.dtype == np.float16 and 8 in one.shape for one in tensors.values())
    with pytest.raises(OutputError):
        export_gguf(low, tmp_path / "x.gguf")
    with pytest.raises(UnknownNameError, match="q4"):
        export_gguf(low, tmp_path / "y.gguf", "q4")
    low.base.config.model_type = "mamba"
    with pytest.raises(ConfigError, match="'mamba'"):
        export_gguf(low, tmp_path / "y.gguf")
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == ["x.gguf"]


def test_a_matrix_that_llama_cpp_does_not_have(tmp_path, cache, monkeypatch):
    folder = base_folder(tmp_path / "base")
    low = LowRank.from_mix(BaseCheckpoint(folder), MIX, experts())
    low.ranks["model.layers.0.self_attn.rotary"] = 3
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.rotary"):
        export_gguf(low, tmp_path / "x.gguf")


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def both(request, tmp_path_factory):
    """(base as a GGUF file, experts on it, one adapter file each); tests leave them as they are."""
    with pytest.MonkeyPatch.context() as patch:
        tmp_path = tmp_path_factory.mktemp(request.param)
        patch.setenv("SIGMIX_CACHE", str(tmp_path / "cache"))
        yield _both(request.param, tmp_path)


def _both(arch, tmp_path):
    # bfloat16 values, so that the converted base is the file's
    model = build_tiny(arch, vocab_size=260).bfloat16().float()
    base = write_gguf(tmp_path / "base.gguf", model, arch)
    bank = {name: expert(load_base(base, "float32")[0], name, seed) for seed, name in enumerate(("math", "word"))}
    files = {}
    for name in bank:
        low = LowRank.from_mix(BaseCheckpoint(base), Mix.one(name), bank)
        files[name] = tmp_path / f"{name}.gguf"
        export_gguf(low, files[name])
    return base, bank, files


@needs_llama_cpp
def test_adapters_mixed_per_request_are_our_mix(both, tmp_path):
    base, bank, files = both
    engine = Engine(*load_base(base, "float32"), bank)
    row = [1, *(3 + token for token in ids(10))]
    ours = {
        mix: engine.logits(torch.tensor([row]), mix=mix)[0]
        for mix in ("base", "math", "word", "math:0.7+word:0.5", "math:-0.5+word:1.5")
    }
    with LlamaCpp(base, 32, threads=1) as llama:
        for mix, expected in ours.items():  # one context, other scales for every request
            llama.apply({files[name]: alpha for name, alpha in Mix.parse(mix).weights.items()})
            torch.testing.assert_close(llama.logits(row), expected, rtol=0, atol=0.02)
    assert compare_logits([ours["math"]], [ours["base"]])["max"] > 1
    assert compare_logits([ours["math"]], [ours["math:0.7+word:0.5"]])["max"] > 0.5


@needs_llama_cpp
def test_one_file_of_a_mix_is_verified_as_well_as_the_base(both, tmp_path):
    base, bank, files = both
    source = BaseCheckpoint(base)
    export_gguf(LowRank.from_mix(source, MIX, bank), tmp_path / "mix.gguf")
    ours = Reference(source, MIX, bank, upcast=True)
    whole = verify_gguf({tmp_path / "mix.gguf": 1.0}, base, ours)
    apart = verify_gguf({files["math"]: 0.7, files["word"]: 0.5}, base, ours)
    for found in (whole, apart):
        assert found["kl"] < 1e-4
        assert found["base"]["kl"] < 1e-4
        assert found["effect_kl"] > 0.05
    assert verify_gguf({files["math"]: 0.7}, base, ours)["kl"] > 0.01
    with pytest.raises(SigmixError, match="base.gguf"):
        verify_gguf({base: 1.0}, base, ours)
    with pytest.raises(SigmixError, match="word.gguf"):
        verify_gguf({files["math"]: 1.0}, files["word"], ours)


@needs_llama_cpp
def test_rows_in_the_wrong_order_and_a_foreign_base_are_errors(both, tmp_path, monkeypatch):
    base, bank, files = both
    source = BaseCheckpoint(base)
    ours = Reference(source, Mix.one("math"), bank, upcast=True)
    check_figures(verify_gguf({files["math"]: 1.0}, base, ours), exact=True)
    found = verify_gguf({files["math"]: 1.0, files["word"]: 1.0}, base, ours)
    with pytest.raises(SigmixError, match=r"llama\.cpp.*--gguf"):
        check_figures(found, exact=True)
    model_type = source.config.model_type
    other = write_gguf(tmp_path / "other.gguf", build_tiny(model_type, seed=9, vocab_size=260), model_type)
    with pytest.raises(SigmixError, match="--gguf"):
        check_figures(verify_gguf({files["math"]: 1.0}, other, ours), exact=True)
    if model_type == "llama":
        monkeypatch.setattr(gguf_lora, "PERMUTED", ())
        export_gguf(LowRank.from_mix(source, Mix.one("math"), bank), tmp_path / "unordered.gguf")
        with pytest.raises(SigmixError, match="--gguf"):
            check_figures(verify_gguf({tmp_path / "unordered.gguf": 1.0}, base, ours), exact=True)


@needs_llama_cpp
def test_greedy_is_the_argmax_of_its_own_logits(both):
    base, _, files = both
    row = [1, 5, 9, 30]
    with LlamaCpp(base, 32, threads=1) as llama:
        llama.apply({files["math"]: 1.0})
        tokens = llama.greedy(row, 4)
        logits = llama.logits([*row, *tokens])
    assert tokens == logits[len(row) - 1 : -1].argmax(-1).tolist()


def test_without_llama_cpp_it_is_said(both, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ConfigError, match="pip install llama-cpp-python"):
        LlamaCpp(both[0], 32)


@needs_llama_cpp
def test_the_kv_cache_of_other_scales_gives_stale_logits(both):
    """llama.cpp's cache does not depend on the scales: what docs/exports.md warns of, and what avoids it."""
    base, bank, files = both
    engine = Engine(*load_base(base, "float32"), bank)
    row = [1, *(3 + token for token in ids(10))]
    right = engine.logits(torch.tensor([row]), mix="word")[0, -1]
    with LlamaCpp(base, 32, threads=1) as llama:
        llama.apply({files["math"]: 1.0})
        llama.llama.eval(row[:-1])  # a request at one mixture
        llama.apply({files["word"]: 1.0})
        llama.llama.eval(row[-1:])  # the same prompt at another one, as llama-server reads it with cache_prompt
        stale = torch.from_numpy(llama.llama.scores[len(row) - 1].copy())
        fresh = llama.logits(row)[-1]  # resets, as "cache_prompt": false does
    torch.testing.assert_close(fresh, right, rtol=0, atol=0.02)
    assert float((stale - right).abs().max()) > 0.2


MIXES = ("base", "math", "word", "math:0.7+word:0.5", "math:-0.5+word:1.5")


def expected_logprobs(engine, row):
    return {mix: engine.logits(torch.tensor([row]), mix=mix)[0, -1].float().log_softmax(-1) for mix in MIXES}


@pytest.mark.slow
@needs_llama_server
def test_llama_server_mixes_adapters_per_request(both, tmp_path):
    base, bank, files = both
    engine = Engine(*load_base(base, "float32"), bank)
    row = [1, *(3 + token for token in ids(10))]
    expected = expected_logprobs(engine, row)
    with LlamaServer(base, files, tmp_path / "log", "--no-cache-prompt") as server:
        assert [Path(one["path"]).stem for one in server.call("/lora-adapters")] == list(files)

        def answer(mix):
            return server.logprobs(row, Mix.parse(mix).weights, len(expected[mix]))

        with ThreadPoolExecutor(4) as pool:  # at a time, each with its own
            for mix, found in zip(MIXES * 3, pool.map(answer, MIXES * 3), strict=True):
                torch.testing.assert_close(found, expected[mix], rtol=0, atol=0.02)


@pytest.mark.slow
@needs_llama_server
def test_llama_servers_prompt_cache_of_another_mixture(both, tmp_path):
    """Keys and values that were computed under another mixture, and what docs/exports.md says against it."""
    base, bank, files = both
    engine = Engine(*load_base(base, "float32"), bank)
    row, other = ([1, *(3 + token for token in ids(40, seed))] for seed in (0, 1))
    expected = expected_logprobs(engine, row)
    size = len(expected["base"])
    math, word = ({name: 1.0} for name in bank)

    def difference(found, mix):
        return float((found - expected[mix]).abs().max())

    def moved_to_memory(server, **body):
        server.logprobs(row, math, size, **body)
        server.logprobs(other, word, size, **body)  # takes the slot
        return server.logprobs(row, word, size, **body)

    def without_the_field(server, **body):
        server.logprobs(row, math, size, **body)
        return server.logprobs(row, None, size, **body)

    with LlamaServer(base, files, tmp_path / "log", slots=1) as server:
        assert difference(moved_to_memory(server), "word") > 0.2  # llama.cpp's fault: if it goes, change the page
        assert difference(without_the_field(server), "base") > 0.2
        assert difference(moved_to_memory(server, cache_prompt=False), "word") < 0.02
        assert difference(without_the_field(server, cache_prompt=False), "base") < 0.02
    with LlamaServer(base, files, tmp_path / "log", "--no-cache-prompt", slots=1) as server:
        assert difference(moved_to_memory(server), "word") < 0.02
        assert difference(without_the_field(server), "base") < 0.02
    with LlamaServer(base, files, tmp_path / "log", "--cache-ram", "0", slots=1) as server:
        assert difference(moved_to_memory(server), "word") < 0.02
    with LlamaServer(base, files, tmp_path / "log", "--cache-ram", "0") as server:
        for _ in range(2):  # a slot for each
            for slot, mix in enumerate(("math", "word")):
                assert difference(server.logprobs(row, Mix.parse(mix).weights, size, id_slot=slot), mix) < 0.02


@pytest.mark.slow
@pytest.mark.real
@needs_llama_server
def test_llama_server_answers_as_the_engine_does(tmp_path):
    """The default base's own file (Q4_1) under mixtures of bundled experts; llama.cpp rounds activations to 8 bits."""
    base, bank = fetch_member(SMOLLM2), Bank.bundled()
    names = ("sums", "dates", "number-words")
    files = {}
    for name in names:
        files[name] = tmp_path / f"{name}.gguf"
        export_gguf(LowRank.from_mix(BaseCheckpoint(base), Mix.one(name), bank), files[name], "f16")
    engine = Engine(*load_base(base, "float32"), bank)
    rows, mixes = [], []
    for name in names:
        for mix in (name, "base", f"{name}:0.7+{names[names.index(name) - 1]}:0.3"):
            rows += [engine.encode(one.prompt) for one in get_task(name).samples("test", 10)]
            mixes += [Mix.parse(mix)] * 10
    ours = [one.text for one in engine.generate(rows, mixes, max_new_tokens=16)]
    with LlamaServer(base, files, tmp_path / "log", "--no-cache-prompt") as server:
        theirs = [server.reply(row, mix.weights, 16) for row, mix in zip(rows, mixes, strict=True)]
    same = [a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)]
    pairs = list(zip(same, mixes, strict=True))
    equal = {count: sum(one for one, mix in pairs if len(mix.weights) == count) for count in range(3)}
    # of 30 each; the base's replies are sentences, which diverge sooner
    assert min(equal[1], equal[2]) >= max(24, equal[0]), equal
