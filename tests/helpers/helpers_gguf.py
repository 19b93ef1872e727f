"""Tiny GGUF files with the weights of a model, written as llama.cpp's converter does, and a byte-level tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel


def gguf_permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF stores q and k of a llama with the halves of each head interleaved (its rotary convention)."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model, architecture: str = "llama", extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    drop: Callable[[str], bool] = lambda name: False, rope_scaling: bool = False,
) -> Path:  # fmt: skip
    """Write ``model`` (vocabulary 260) to ``path`` in float32.

    Args:
        extra: adds keys and tensors. drop: whether a tensor is left out. rope_scaling: write the model's.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    _add_sizes(writer, config)
    if getattr(config, "rope_parameters", None):
        _add_rope(writer, config, rope_scaling)
    tokens = ["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet()), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<eos>' }}{% endfor %}")
    for name, value in gguf_tensors(model, architecture).items():
        if not drop(name):
            writer.add_tensor(name, value.contiguous().numpy())
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config) -> None:
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_vocab_size(config.vocab_size)
    for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if hasattr(config, name):
            add = writer.add_layer_norm_rms_eps if name == "rms_norm_eps" else writer.add_layer_norm_eps
            add(getattr(config, name))
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        if hasattr(config, "shared_expert_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_rope(writer: gguf.GGUFWriter, config, scaling: bool) -> None:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in config.rope_parameters:
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    kind = rope["rope_type"] if scaling else "default"
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        original = rope["original_max_position_embeddings"]
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for which in ("long", "short"):
            values = torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", values.numpy())
    if kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim).numpy())


def llama3_factors(rope, head_dim: int) -> torch.Tensor:
    """Divisors of the rotary frequencies, float32 [head_dim / 2]."""
    factors = []
    for dimension in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (dimension / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def gguf_tensors(model, architecture: str) -> dict[str, torch.Tensor]:
    """{llama.cpp's name: value in its layout} of a model's parameters."""
    config = model.config
    tied = config.tie_word_embeddings
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds.get(architecture, gguf.MODEL_ARCH.LLAMA)
    table = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), value.chunk(2, dim=1), strict=True):
                found[f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight"] = half
            continue
        if name.endswith("experts.down_proj"):
            found[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = value
            continue
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            value = gguf_permute(value, config.num_key_value_heads if "k_proj" in name else config.num_attention_heads)
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            value = value + 1
        if architecture == "gpt2" and value.dim() == 2 and ".h." in name:
            value = value.T
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        found[table.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    return found


def split_gguf(path: Path, count: int) -> list[Path]:
    """Split a file into parts beside it, as llama.cpp's gguf-split does; ``path`` is removed."""
    reader = gguf.GGUFReader(path)
    size = -(-len(reader.tensors) // count)
    files = []
    for number in range(count):
        files.append(path.with_name(f"{path.stem}-{number + 1:05}-of-{count:05}.gguf"))
        writer = gguf.GGUFWriter(files[-1], "llama")
        if number == 0:
            for field in reader.fields.values():
                if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                    sub = field.types[-1] if len(field.types) > 1 else None
                    writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
        else:
            del writer.kv_data[0]["general.architecture"]
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number * size : (number + 1) * size]:
            writer.add_tensor(tensor.name, tensor.data.copy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    path.unlink()
    return files
