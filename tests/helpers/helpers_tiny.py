"""Builders of tiny random models of many architectures and of an offline tokenizer; `conftest` uses them."""

from __future__ import annotations

from reproduction.tiny import letter_tokenizer as build_tokenizer

__all__ = ["ARCHITECTURES", "build_tiny", "build_tokenizer"]
VOCAB = 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
# architecture -> (config class, what differs from SIZES)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2Config", {}),  # biases on q, k and v
    "qwen3": ("Qwen3Config", {"head_dim": 32}),  # heads wider than hidden / heads; norms on q and k
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "phi3": ("Phi3Config", {}),  # q, k and v in one Linear, gate and up in one Linear
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),  # Conv1D, in×out
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # experts in 3-d parameters
}


def build_tiny(arch: str = "llama", seed: int = 0, **changes):
    """A random model in eval mode: float32, about 100,000 parameters, the same for the same ``seed``.

    ``changes`` go into the config. Gradients are on, as transformers leaves them.
    """
    import torch
    import transformers

    config_class, own = ARCHITECTURES[arch]
    sizes = {**SIZES, **own, **changes}
    if arch == "gpt2":
        names = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", *own, *changes)
        sizes = {key: sizes[key] for key in names}
    config = getattr(transformers, config_class)(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # transformers' 0.02 makes all logits alike and its biases are 0: larger ones let differences show
                if parameter.dim() > 1 or name.endswith("bias"):
                    parameter.normal_(0.0, 0.15)
    return model.eval()
