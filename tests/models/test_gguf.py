"""GGUF files as bases: the model that they were made of, as llama.cpp computes it, or a refusal by name."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from helpers_engine import expert
from helpers_gguf import split_gguf
from helpers_gguf import write_gguf as write_plain
from helpers_tiny import build_tiny

from sigmix import load_base
from sigmix.errors import BaseModelError, OutputError
from sigmix.experts.fingerprint import fingerprint
from sigmix.experts.mix import Mix
from sigmix.export.base import BaseCheckpoint
from sigmix.export.gguf import export_gguf
from sigmix.export.low_rank import LowRank
from sigmix.export.verify import LlamaCpp, llama_cpp_installed
from sigmix.models.gguf import models_dir

pytestmark = pytest.mark.usefixtures("cache")
write_gguf = partial(write_plain, rope_scaling=True)
needs_llama_cpp = pytest.mark.skipif(not llama_cpp_installed(), reason="llama-cpp-python is not installed")
IDS = torch.randint(4, 250, (1, 100), generator=torch.Generator().manual_seed(1))

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 64,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)],
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16, "final_logit_softcapping": 10.0}

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-llama3": ("LlamaConfig", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama-linear": ("LlamaConfig", {"rope_scaling": LINEAR}),
    "llama-yarn": ("LlamaConfig", {"rope_scaling": YARN}),
    "llama-theta": ("LlamaConfig", {"rope_theta": 500000.0, "head_dim": 32, "tie_word_embeddings": False}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-yarn": ("Qwen2Config", {"rope_scaling": YARN, "tie_word_embeddings": False}),
    "qwen2moe": (
        "Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 32, "tie_word_embeddings": False}
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-yarn": ("Qwen3Config", {"head_dim": 32, "rope_scaling": YARN}),
    "qwen3moe": ("Qwen3MoeConfig", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 512, "sliding_window": None}),
    "phi3-partial": (
        "Phi3Config",
        {"original_max_position_embeddings": 512, "sliding_window": None, "partial_rotary_factor": 0.5},
    ),
    "phi3-longrope": (
        "Phi3Config", {"original_max_position_embeddings": 64, "sliding_window": None, "rope_scaling": LONG}
    ),
    "gemma2": ("Gemma2Config", {**GEMMA, "attn_logit_softcapping": 30.0}),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    "stablelm-parallel": (
        "StableLmConfig", {"use_qkv_bias": True, "use_parallel_residual": True, "tie_word_embeddings": False}
    ),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}  # fmt: skip


def build(case, **changes):
    """A model with bfloat16 values, so that the conversion rounds nothing."""
    config_class, own = CASES[case]
    sizes = {
        "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    if config_class == "GPT2Config":
        sizes = {key: sizes[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, config_class)(**{**sizes, **own, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            random = torch.empty_like(parameter).normal_(0, 0.15, generator=draw)
            value = random if parameter.dim() > 1 or name.endswith("bias") else parameter + random
            parameter.copy_(value.bfloat16())
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_that_it_was_made_of(tmp_path, case):
    model = build(case)
    file = write_gguf(tmp_path / "tiny.gguf", model, case.split("-")[0])
    assert torch.equal(logits(load_base(file, "float32")[0]), logits(model))


@needs_llama_cpp
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(tmp_path, case):
    file = write_gguf(tmp_path / "tiny.gguf", build(case), case.split("-")[0])
    with LlamaCpp(file, 512, threads=1) as llama:
        theirs = llama.logits(IDS[0].tolist())
    # its KV cache is float16, and its GELU a table of float16
    torch.testing.assert_close(logits(load_base(file, "float32")[0]), theirs, rtol=0, atol=0.03)


SCALED = [case for case, (_, own) in CASES.items() if {"rope_scaling", "partial_rotary_factor"} & own.keys()]


@pytest.mark.parametrize("case", SCALED)
def test_the_cases_differ_from_a_plain_rotary_embedding(case):
    model = build(case)
    values = {key: value for key, value in model.config.to_dict().items() if not key.startswith(("rope", "partial"))}
    plain = transformers.AutoModelForCausalLM.from_config(type(model.config)(**values)).eval()
    plain.load_state_dict(model.state_dict())
    assert float((logits(model) - logits(plain)).abs().max()) > 0.5


def test_llama3s_scaling_is_recovered_and_other_factors_are_kept(tmp_path):
    base, _ = load_base(write_gguf(tmp_path / "a.gguf", build("llama-llama3")), "float32")
    assert base.config.rope_parameters == {**LLAMA3, "rope_theta": 500000.0}
    factors = np.array([1.0, 1.5, 2.0, 9.0, 3.0, 1.0, 7.0, 2.5], dtype=np.float32)
    file = write_gguf(
        tmp_path / "b.gguf", build("llama"), extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors)
    )
    base, _ = load_base(file, "float32")
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(base.model.rotary_emb.inv_freq, plain / torch.from_numpy(factors))
    if llama_cpp_installed():
        with LlamaCpp(file, 512, threads=1) as llama:
            torch.testing.assert_close(logits(base), llama.logits(IDS[0].tolist()), rtol=0, atol=0.03)


# --- files that are not the whole model


@pytest.mark.parametrize("prefix", ["blk.1.", "blk.0.ffn_norm", "output_norm", "token_embd"])
def test_missing_tensors_are_never_random_numbers(tmp_path, prefix):
    file = write_gguf(tmp_path / "tiny.gguf", build("llama"), drop=lambda name: name.startswith(prefix))
    with pytest.raises(BaseModelError, match=r"tiny\.gguf.* tensors are missing, such as (lm_head|model)\."):
        load_base(file)
    assert not [entry for entry in models_dir().iterdir() if entry.is_dir()]


def test_tensors_without_a_place_and_other_shapes_are_named(tmp_path):
    def scale(writer):
        writer.add_tensor("blk.0.attn_output.scale", np.ones(1, np.float32))

    with pytest.raises(BaseModelError, match=r"blk\.0\.attn_output\.scale"):
        load_base(write_gguf(tmp_path / "a.gguf", build("llama"), extra=scale))
    file = write_gguf(tmp_path / "b.gguf", build("llama"), extra=lambda writer: writer.add_feed_forward_length(64))
    with pytest.raises(BaseModelError, match=r"mlp\..*shape \(64, 96\), expected \(64, 64\)"):
        load_base(file)


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_parts_of_a_split_file_are_read_whichever_is_given(tmp_path, given):
    model = build("llama-llama3")
    files = split_gguf(write_gguf(tmp_path / "tiny.gguf", model), 3)
    base, tokenizer = load_base(files[given], "float32")
    assert torch.equal(logits(base), logits(model))
    assert base.sigmix_base["name"] == str(files[0])
    assert len(tokenizer) == 260
    assert not list(models_dir().glob("*.tmp"))
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for number, file in enumerate(files):  # as in the hub's cache: names lead to files named by their digests
        (linked / file.name).symlink_to(shutil.copy(file, tmp_path / f"blob{number}"))
    again, _ = load_base(linked / files[given].name, "float32")
    assert again.sigmix_base["source"] == base.sigmix_base["source"]


def test_other_bytes_in_a_later_part_are_another_base(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    prints = set()
    for folder, seed in ((first, 0), (second, 1)):
        folder.mkdir()
        model = build("llama")
        model.model.norm.weight.data += 0.5 * seed
        files = split_gguf(write_gguf(folder / "tiny.gguf", model), 2)
        prints.add(fingerprint(load_base(files[0], "float32")[0]))
    assert (first / files[0].name).read_bytes() == (second / files[0].name).read_bytes()
    assert len(prints) == 2


def test_a_split_file_with_a_missing_or_a_foreign_part(tmp_path):
    files = split_gguf(write_gguf(tmp_path / "tiny.gguf", build("llama")), 3)
    whole = files[1].read_bytes()
    files[1].unlink()
    for file in (files[0], files[2]):
        with pytest.raises(BaseModelError, match=f"{files[1].name} -> download all parts"):
            load_base(file)
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(BaseModelError, match="split model of .* tensors, and 3 files hold"):
        load_base(files[0])
    files[1].write_bytes(whole[:-64])
    with pytest.raises(BaseModelError, match=f"{files[1].name} is no GGUF file of version 2 or 3, or truncated"):
        load_base(files[0])
    files[1].write_bytes(whole)
    renamed = files[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(BaseModelError, match="split model of .* tensors, and 1 files hold.* -> .*00001-of-0000"):
        load_base(renamed)
    assert not [entry for entry in models_dir().iterdir() if entry.is_dir()]


@pytest.mark.parametrize("rename", [str.upper, lambda name: name.replace("1-of", "1-Of").replace("gguf", "Gguf")])
def test_names_of_parts_may_differ_in_case(tmp_path, rename):
    model = build("llama")
    files = split_gguf(write_gguf(tmp_path / "tiny.gguf", model), 2)
    renamed = [file.rename(file.with_name(rename(file.name))) for file in files]
    assert torch.equal(logits(load_base(renamed[1], "float32")[0]), logits(model))


@pytest.mark.parametrize("name", ["model.gguf", "tiny-00001-of-00002.gguf"])
def test_a_link_to_one_part_leads_to_the_others(tmp_path, name):
    model = build("llama")
    files = split_gguf(write_gguf(tmp_path / "tiny.gguf", model), 2)
    link = tmp_path / "links" / name
    link.parent.mkdir()
    link.symlink_to(files[0])
    assert torch.equal(logits(load_base(link, "float32")[0]), logits(model))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1], lambda data: data[:4], lambda data: data[:4] + b"\x09" + data[5:],
        lambda data: b"version https://git-lfs.github.com/spec/v1", lambda data: b"",
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, damage):
    file = write_gguf(tmp_path / "tiny.gguf", build("llama"))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BaseModelError, match=r"tiny\.gguf is no GGUF file .* -> .*git lfs pull"):
        load_base(file)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SIGMIX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match=" -> set SIGMIX_CACHE"):
        load_base(write_gguf(tmp_path / "tiny.gguf", build("llama")))


# --- files that are no model


def write_other(path, kind=None, architecture="llama", keys=(), tensor="blk.0.attn_q.weight"):
    writer = gguf.GGUFWriter(path, architecture)
    if kind is not None:
        writer.add_type(kind)
    for key in keys:
        writer.add_string(key, "lora")
    if tensor is not None:
        writer.add_tensor(tensor, np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "adapter", "keys": ["adapter.type"]}, "is an adapter .*--lora other.gguf"),
        ({"tensor": "blk.0.attn_q.weight.lora_a"}, "is an adapter"),
        ({"kind": "mmproj", "architecture": "clip"}, "projector .*beside it"),
        ({"architecture": "clip"}, "projector"),
        ({"keys": ["clip.projector_type"]}, "projector"),
        ({"kind": "imatrix", "architecture": "imatrix"}, "'imatrix', not a model"),
        ({"architecture": "controlvector"}, "'control vector', not a model"),
        ({"kind": "vocab"}, "'vocab', not a model"),
        ({"tensor": None}, "no weights"),
    ],
)
def test_what_is_not_a_model_is_refused_before_weights_are_built(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("built"))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", lambda *_, **__: pytest.fail("built"))
    with pytest.raises(BaseModelError, match=message):
        load_base(write_other(tmp_path / "other.gguf", **options))


def test_an_exported_adapter_names_its_base_and_the_way_to_use_it(tmp_path):
    base = write_gguf(tmp_path / "base.gguf", build("llama"))
    bank = {"math": expert(load_base(base, "float32")[0], "math", 0)}
    export_gguf(LowRank.from_mix(BaseCheckpoint(base), Mix.one("math"), bank), tmp_path / "math.gguf")
    with pytest.raises(BaseModelError, match=r"adapter for base\.gguf.* -> .*--mix math.*--lora math\.gguf"):
        load_base(tmp_path / "math.gguf")


# --- keys of the header


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 4), ("rope.dimension_count", 8), ("attention.sliding_window", 32), ("attention.scale", 0.5),
        ("logit_scale", 2.0), ("attn_logit_softcapping", 30.0), ("attention.causal", False), ("pooling_type", 3),
        ("rope.scaling.type", "longrope"), ("rope.scaling.attn_factor", 1.2), ("rope.freq_base_swa", 5000.0),
        ("attention.value_length", 8), ("residual_scale", 0.2), ("attention.head_count_kv", [2, 4]), ("novel", 1),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_logits_is_carried_or_refused_by_name(tmp_path, key, value):
    def add(writer):
        kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        kinds |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
        writer.kv_data[0].pop(f"llama.{key}", None)
        writer.add_key_value(f"llama.{key}", value, kinds[type(value)])

    file = write_gguf(tmp_path / "tiny.gguf", build("llama"), extra=add)
    with pytest.raises(BaseModelError, match=rf"llama\.{key} = .* -> .*safetensors"):
        load_base(file)


def test_keys_without_effect_change_nothing(tmp_path):
    def add(writer):
        writer.add_tensor_data_layout("Meta AI original pth")
        writer.add_bool("llama.rope.scaling.finetuned", False)
        writer.add_causal_attention(True)
        writer.add_expert_count(0)
        writer.add_rope_scaling_factor(1.0)
        writer.kv_data[0].pop("llama.attention.head_count_kv")
        writer.add_array("llama.attention.head_count_kv", [2, 2])
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
        writer.add_string("quantize.imatrix.file", "calibration.dat")

    model = build("llama")
    base, _ = load_base(write_gguf(tmp_path / "tiny.gguf", model, extra=add), "float32")
    assert torch.equal(logits(base), logits(model))
    assert base.config.rope_parameters["rope_type"] == "default"


def test_without_a_number_of_key_value_heads_every_head_has_its_own(tmp_path):
    model = build("llama", num_key_value_heads=4)
    key = "llama.attention.head_count_kv"
    file = write_gguf(tmp_path / "tiny.gguf", model, extra=lambda writer: writer.kv_data[0].pop(key))
    assert torch.equal(logits(load_base(file, "float32")[0]), logits(model))


def test_the_tokenizer_has_no_token_beyond_the_embedding(tmp_path):
    _, tokenizer = load_base(write_gguf(tmp_path / "tiny.gguf", build("llama")))
    assert len(tokenizer) == 260
    assert max(tokenizer("a <|endoftext|> b<eos>").input_ids) < 260
    assert tokenizer.decode(tokenizer("a <|endoftext|> b").input_ids) == "a <|endoftext|> b"


def test_an_output_matrix_equal_to_the_embedding_is_tied_and_another_one_is_not(tmp_path):
    for file, factor in ((tmp_path / "a.gguf", 1.0), (tmp_path / "b.gguf", 2.0)):
        model = build("llama")
        weight = (factor * model.lm_head.weight.detach()).numpy()
        write_gguf(file, model, extra=partial(gguf.GGUFWriter.add_tensor, name="output.weight", tensor=weight))
        base, _ = load_base(file, "float32")
        assert base.config.tie_word_embeddings == (factor == 1.0)
        torch.testing.assert_close(logits(base), factor * logits(model))


def test_a_conversion_by_an_earlier_version_is_not_used(tmp_path):
    model = build("llama-linear")
    file = write_gguf(tmp_path / "tiny.gguf", model)
    stale = models_dir() / hashlib.sha256(file.read_bytes()).hexdigest()
    build_tiny(vocab_size=260).save_pretrained(stale)
    assert torch.equal(logits(load_base(file, "float32")[0]), logits(model))


# --- the tokenizer

TEXTS = ["a  1 b", "12 345 6789", "  12", "a !! b!", "x\n\n  y", "don't  1.5 (x)", "é ü  22"]


def set_tokenizer(writer, pre, merge):
    tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
    tokens[-1] = merge.replace(" ", "")
    writer.kv_data[0].pop("tokenizer.ggml.merges")
    writer.add_token_merges([merge])
    writer.kv_data[0].pop("tokenizer.ggml.pre")
    writer.add_tokenizer_pre(pre)


@needs_llama_cpp
@pytest.mark.parametrize("merge", ["Ġ Ġ", "Ġ 1", "1 2", "! !", "Ċ Ċ"])
@pytest.mark.parametrize(
    "pre", ["gpt-2", "qwen2", "llama-bpe", "starcoder", "falcon", "bloom", "stablelm2", "deepseek-coder", "refact"]
)
def test_texts_are_cut_as_llama_cpp_cuts_them(tmp_path, pre, merge):
    file = write_gguf(tmp_path / "tiny.gguf", build("llama"), extra=lambda writer: set_tokenizer(writer, pre, merge))
    tokenizer = load_base(file)[1]
    with LlamaCpp(file, 32, threads=1) as llama:
        theirs = [llama.llama.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == theirs


def test_an_unsupported_way_to_cut_texts_is_refused_by_name(tmp_path):
    file = write_gguf(
        tmp_path / "tiny.gguf", build("llama"), extra=lambda writer: set_tokenizer(writer, "youtu", "! !")
    )
    with pytest.raises(BaseModelError, match="tokenizer.ggml.pre = 'youtu'"):
        load_base(file)
