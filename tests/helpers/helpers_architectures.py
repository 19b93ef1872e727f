"""Tiny random models of every architecture that the documentation lists, with small windows and thresholds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from helpers_tiny import SIZES

WINDOW, THRESHOLD = 8, 16
WIDE = {"head_dim": 16}
LAYERS = {"num_hidden_layers": 4}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "num_key_value_heads": 4}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
          "first_k_dense_replace": 1}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
SLIDING = {"sliding_window": WINDOW}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": THRESHOLD}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": THRESHOLD}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": THRESHOLD}  # fmt: skip

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, rope llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, rope dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {**SLIDING, **LAYERS, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", WIDE),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, **WIDE}),
    "mistral": ("mistral", {**SLIDING, **WIDE}),
    "mixtral": ("mixtral", {**SLIDING, **EXPERTS}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", {**SLIDING, **WIDE, "query_pre_attn_scalar": 16}),
    "gemma3_text": ("gemma3_text", {**SLIDING, **WIDE, "num_hidden_layers": 6, "query_pre_attn_scalar": 16}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3, windows": ("phi3", SLIDING),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": THRESHOLD}),
    "phi3, longrope, windows": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": THRESHOLD, **SLIDING},
    ),
    "phi3, longrope, partial": (
        "phi3",
        {
            "rope_parameters": LONGROPE
            | {"partial_rotary_factor": 0.75, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
            "original_max_position_embeddings": THRESHOLD,
        },
    ),
    "phimoe, longrope": (
        "phimoe",
        {
            **EXPERTS,
            "rope_parameters": LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.3},
            "original_max_position_embeddings": THRESHOLD,
        },
    ),
    "minicpm3, longrope": (
        "minicpm3",
        {**LATENT, "rope_parameters": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}},
    ),
    "deepseek_v3, yarn": ("deepseek_v3", {**LATENT, **ROUTED, "rope_parameters": YARN}),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                            "window_size": WINDOW}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "gptj": ("gptj", {**GPT, "rotary_dim": 8}),
    "codegen": ("codegen", {**GPT, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "falcon": ("falcon", {}),
    "falcon, alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", SLIDING),
    "persimmon": ("persimmon", {}),
    "cohere": ("cohere", {"logit_scale": 1.0}),
    "cohere2": ("cohere2", {**SLIDING, **LAYERS, "logit_scale": 1.0}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {**SLIDING, **LAYERS}),
    "olmoe": ("olmoe", {**EXPERTS}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", EXPERTS),
    "smollm3": ("smollm3", LAYERS),
    "glm": ("glm", WIDE),
    "glm4": ("glm4", WIDE),
    "exaone4": ("exaone4", {**SLIDING, **LAYERS, **WIDE}),
    "ernie4_5": ("ernie4_5", WIDE),
    "nemotron": ("nemotron", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", WIDE),
    "gpt_oss": ("gpt_oss", {**SLIDING, **EXPERTS, **WIDE}),
    "llama4_text": ("llama4_text", {**LAYERS, **EXPERTS, **WIDE, "num_experts_per_tok": 1,
                                    "attention_chunk_size": WINDOW, "intermediate_size_mlp": 96}),
    "minicpm3": ("minicpm3", LATENT),
    "deepseek_v2": ("deepseek_v2", {**LATENT, **ROUTED}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **ROUTED}),
    "gemma3n_text": ("gemma3n_text", {**SLIDING, **LAYERS, **WIDE, "hidden_size_per_layer_input": 8,
                                      "vocab_size_per_layer_input": 256, "num_kv_shared_layers": 2,
                                      "layer_types": ["sliding_attention", "full_attention"] * 2,
                                      "activation_sparsity_pattern": None}),
    "gemma4_text": ("gemma4_text", {**SLIDING, **LAYERS, **WIDE, "hidden_size_per_layer_input": 8,
                                    "vocab_size_per_layer_input": 256,
                                    "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "biogpt": ("biogpt", {}),
    "bitnet": ("bitnet", {}),
    "dots1": ("dots1", {**ROUTED, **WIDE, "n_shared_experts": 1}),
    "doge": ("doge", SLIDING),
    "diffllama": ("diffllama", {}),
    "flex_olmo": ("flex_olmo", EXPERTS),
    "glm4_moe": ("glm4_moe", {**ROUTED, **WIDE, "n_shared_experts": 1}),
    "granitemoeshared": ("granitemoeshared", {**EXPERTS, "shared_intermediate_size": 32}),
    "helium": ("helium", WIDE),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**EXPERTS, **WIDE, "moe_topk": 2}),
    "internlm3": ("internlm3", WIDE),
    "jetmoe": ("jetmoe", {**EXPERTS, "kv_channels": 16, "num_key_value_heads": 2}),
    "mimo_v2_flash": ("mimo_v2_flash", {**SLIDING, **LAYERS, **ROUTED, **WIDE, "v_head_dim": 16}),
    "minimax_m2": ("minimax_m2", {**EXPERTS, **WIDE}),
    "ministral": ("ministral", {**SLIDING, **WIDE}),
    "ministral3": ("ministral3", {**SLIDING, **WIDE}),
    "modernbert-decoder": ("modernbert-decoder", {**LAYERS, "local_attention": WINDOW}),
    "nanochat": ("nanochat", {}),
    "phimoe": ("phimoe", {**SLIDING, **EXPERTS}),
    "seed_oss": ("seed_oss", WIDE),
    "vaultgemma": ("vaultgemma", {**SLIDING, **LAYERS, **WIDE, "query_pre_attn_scalar": 16}),
    "youtu": ("youtu", LATENT),
    "xglm": ("xglm", {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4}),
}  # fmt: skip
"""Keys and values in every layer that has a cache: {case: (model_type, config)}."""

RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "jamba": ("jamba", {**LAYERS, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
                        "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4}),
    "bamba": ("bamba", {**MAMBA, **LAYERS, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 128}),
    "zamba": ("zamba", {**LAYERS, "n_mamba_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "num_key_value_heads": 4, "use_mamba_kernels": False}),
    "zamba2": ("zamba2", {**LAYERS, "layers_block_type": ["mamba", "hybrid"] * 2, "mamba_ngroups": 1,
                          "n_mamba_heads": 8, "mamba_d_state": 8, "chunk_size": 8, "num_key_value_heads": 4}),
    "nemotron_h": ("nemotron_h", {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 8,
                                  "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}),
    "granitemoehybrid": ("granitemoehybrid", {**MAMBA, **LAYERS, **EXPERTS, "layer_types": ["mamba", "attention"] * 2,
                                              "shared_intermediate_size": 32}),
    "lfm2": ("lfm2", {**LAYERS, "layer_types": ["conv", "full_attention"] * 2}),
    "lfm2_moe": ("lfm2_moe", {**LAYERS, **EXPERTS, "num_dense_layers": 1,
                              "layer_types": ["conv", "full_attention"] * 2}),
    "qwen3_next": ("qwen3_next", {**LAYERS, **DELTA, **EXPERTS, **WIDE, "shared_expert_intermediate_size": 32}),
    "qwen3_5_text": ("qwen3_5_text", {**LAYERS, **DELTA, **WIDE}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**LAYERS, **DELTA, **EXPERTS, **WIDE,
                                              "shared_expert_intermediate_size": 32}),
    "olmo_hybrid": ("olmo_hybrid", {**LAYERS, **DELTA, "layer_types": ["linear_attention", "full_attention"] * 2}),
    "zaya": ("zaya", {**LAYERS, **EXPERTS, "num_experts_per_tok": 1}),
}  # fmt: skip
"""States of a fixed size in some layers."""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "rwkv": ("rwkv", {"attention_hidden_size": 64}),
    "xlstm": ("xlstm", {"num_heads": 4}),
    "minimax": ("minimax", {**LAYERS, **EXPERTS}),
    "deepseek_v4": ("deepseek_v4", {}),
    "deepseek_v32": ("deepseek_v32", {}),
    "openai-gpt": ("openai-gpt", {}),
    "xlnet": ("xlnet", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_head": 16}),
    "bart": ("bart", {}),
    "cpmant": ("cpmant", {}),
    "recurrent_gemma": ("recurrent_gemma", {"num_hidden_layers": 3}),
    "bert": ("bert", {}),
}


def config_of(kind: str, own: dict[str, Any]) -> Any:
    """A small config; sizes that this class does not have are left out."""
    config_class = transformers.CONFIG_MAPPING[kind]
    fields = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    mapped = {config_class.attribute_map.get(name, name) for name in own}
    sizes = {
        name: size
        for name, size in {**SIZES, "tie_word_embeddings": False}.items()
        if name in fields and config_class.attribute_map.get(name, name) not in mapped
    }
    return config_class(**{**sizes, **own})


def load_config(case: str) -> Any:
    """The config of a case of any table."""
    return config_of(*{**PLAIN, **RECURRENT, **REFUSED}[case])


def build(case: str, seed: int = 0) -> Any:
    """A random model of a case in eval mode, float32, with weights so large that differences show."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(load_config(case), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and not name.endswith(("A_log", "conv1d.weight", "D")):
                    parameter.normal_(0.0, 0.12)
                elif name.endswith("bias") and "dt" not in name:
                    parameter.normal_(0.0, 0.1)
    return model.eval()
