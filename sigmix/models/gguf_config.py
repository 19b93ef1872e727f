"""The header of a GGUF file as a configuration of transformers.

transformers drops most of a header (rotary scaling, soft-capping, head sizes …), which gives another model. So every
key of the architecture's namespace is either translated here, or without effect, or refused by name. The logits of
each architecture in `MODEL_TYPES` were compared with llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sigmix.errors import BaseModelError, reraised

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedConfig

ORIGINAL = "use the model's original safetensors checkpoint (a hub name or a folder)"

MODEL_TYPES = {
    "llama": "llama", "qwen2": "qwen2", "qwen2moe": "qwen2_moe", "qwen3": "qwen3", "qwen3moe": "qwen3_moe",
    "phi3": "phi3", "gemma2": "gemma2", "gemma3": "gemma3_text", "gpt2": "gpt2", "bloom": "bloom", "falcon": "falcon",
    "stablelm": "stablelm", "starcoder2": "starcoder2", "nemotron": "nemotron", "mamba": "mamba",
    "lfm2": "lfm2", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text",
}  # fmt: skip
"""{architecture of a GGUF file: transformers' model_type}"""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
}
"""{key below the architecture's prefix: attributes of transformers' configurations; the first that exists is set}"""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "feed_forward_length": (0,), "attention.head_count": (0,), "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "logit_scale": (0.0, 1.0),
    "attention.clamp_kqv": (0.0,), "attention.causal": (True,), "pooling_type": (0,), "nextn_predict_layers": (0,),
    "expert_count": (0,), "expert_used_count": (0,), "expert_shared_count": (0,), "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1), "expert_weights_scale": (0.0, 1.0), "expert_gating_func": (0, 1),
    "ssm.dt_b_c_rms": (False,), "rope.scaling.yarn_ext_factor": (-1.0, 1.0), "rope.scaling.alpha": (0.0,),
}  # fmt: skip
"""{key: values that switch the feature off}"""

HARMLESS = (
    "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length", "context_length",
    "use_parallel_residual",  # of StableLM: its tensors decide, and the header is not reliable
)  # fmt: skip
"""Keys without effect on the logits where they are not translated."""

FLAGS = {
    "attention_bias": ("attn_q.bias", "attn_output.bias"), "mlp_bias": ("ffn_up.bias",), "bias": ("attn_qkv.bias",),
    "use_qkv_bias": ("attn_q.bias",), "qk_layernorm": ("attn_q_norm.weight",),
}  # fmt: skip
"""{switch of transformers' configurations: tensors of a layer that it adds}"""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
DIGITS, WORDS = (r"\p{N}", GPT2_SPLIT), (r" ?[^(\s|.,!?…。，、।۔،)]+",)

SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), DIGITS),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), WORDS),
    "viking": (*WORDS, r"\p{N}"),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2_SPLIT, "[0-9][0-9][0-9]"),
    "deepseek-coder": ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
"""{``tokenizer.ggml.pre``: regular expressions that cut a text in turn}, from llama.cpp; transformers lacks these."""

GPT2_SPLITS = (
    "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "gigachat", "roberta-bpe",
    "smollm",  # it also cuts digits apart; the experts of the default base were trained without that
)  # fmt: skip
"""Values of ``tokenizer.ggml.pre`` for which transformers' default is right."""

ALIASES = {"stablelm2": "qwen2", "hunyuan": "qwen2", "glm4": "llama-bpe", "chatglm-bpe": "llama-bpe"}
"""Other names of splits that transformers has."""

PARTIAL = ("phi3", "stablelm", "nemotron")  # model types that rotate a part of each head
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class Header(dict[str, Any]):
    """{key: value} of a GGUF file, which records the keys that were read."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.read: set[str] = set()
        self.prefix = f"{fields['general.architecture']}."

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def hyperparameter(self, name: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, one for all layers.

        Raises:
            BaseModelError: the layers differ.
        """
        value = self.get(self.prefix + name, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise unsupported(self.prefix + name, value)
        return value[0]


def unsupported(key: str, value: Any) -> BaseModelError:
    """Return the error for a key that changes the logits and has no counterpart in transformers."""
    return BaseModelError(
        f"its header has {key} = {value!r}, which sigmix cannot carry over to transformers", remedy=ORIGINAL
    )


def config_of(fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray], tied: bool) -> PreTrainedConfig:
    """Return transformers' configuration of a GGUF file.

    Args:
        fields: the header's keys and values.
        tensors: by name; values are read of `ROPE_TENSORS` only.
        tied: the output projection is the embedding matrix.

    Raises:
        BaseModelError: a key that changes the logits and has no counterpart in transformers.
    """
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    splits_of(fields)  # before weights are read
    header = Header(fields)
    architecture = header["general.architecture"]
    config_class = CONFIG_MAPPING[MODEL_TYPES[architecture]]
    with reraised(BaseModelError, f"its header gives no valid {config_class.__name__}", ORIGINAL):
        if architecture in GGUF_CONFIG_ARCHS:
            header["tokenizer.ggml.tokens"] = len(fields["tokenizer.ggml.tokens"])
            values = get_gguf_config(header, tuple(tensors))
            if scaling := sorted(tensors.keys() & set(ROPE_TENSORS)):
                raise unsupported(scaling[0], "…")
        else:
            values = _values(header, config_class(), tensors) | {"tie_word_embeddings": tied}
        config = config_class(**{name: value for name, value in values.items() if name != "model_type"})
    for key in sorted(header.keys() - header.read):
        name = key.removeprefix(header.prefix)
        if name != key and name not in HARMLESS and not _carried(name, header[key], config):
            raise unsupported(key, header[key])
    return config


def splits_of(fields: Mapping[str, Any]) -> PreTokenizer | None:
    """Return how a byte-level BPE cuts texts, where transformers would take GPT-2's way in place of the file's.

    Raises:
        BaseModelError: an unsupported ``tokenizer.ggml.pre``.
    """
    from tokenizers import Regex, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    name = fields.get("tokenizer.ggml.pre", "default")
    if fields.get("tokenizer.ggml.model") != "gpt2" or name in (*GGUF_PRE_TOKENIZER_SPLITS, *GPT2_SPLITS):
        return None
    if name not in SPLITS and name not in ALIASES:
        raise unsupported("tokenizer.ggml.pre", name)
    expressions = SPLITS[name] if name in SPLITS else (GGUF_PRE_TOKENIZER_SPLITS[ALIASES[name]],)
    cuts = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in expressions]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _carried(name: str, value: Any, config: Any) -> bool:
    """Return whether a key that was not read is without effect, or has its value in ``config`` already."""
    if name == "attention.recurrent_layers":
        return value == [kind != "full_attention" for kind in config.layer_types]
    if name == "attention.value_length":
        return value == config.head_dim
    equal = any(getattr(config, attribute, None) == value for attribute in ATTRIBUTES.get(name, ()))
    return equal or value in NEUTRAL.get(name, ())


def _values(header: Header, default: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the arguments of ``default``'s class, the configuration of the architecture with default values."""
    get, kind = header.hyperparameter, default.model_type
    width, heads, layers = get("embedding_length"), get("attention.head_count", 0), get("block_count")
    head_dim = get("attention.key_length", width // heads if heads else 0)
    derived = {"attention.head_count_kv": heads, "feed_forward_length": 4 * width} if heads else {}
    values: dict[str, Any] = {}
    if get("attention.value_length", head_dim) != head_dim:
        raise unsupported(header.prefix + "attention.value_length", get("attention.value_length"))
    if heads and ("head_dim" in default.to_dict() or head_dim != width // heads):
        values["head_dim"] = head_dim
    for name, attributes in ATTRIBUTES.items():
        value = get(name, derived.get(name))
        if value is None or value in NEUTRAL.get(name, ()):
            continue
        attribute = next((one for one in attributes if hasattr(default, one)), None)
        if name == "attention.sliding_window" and hasattr(default, "use_sliding_window"):
            attribute = None  # the header does not give the layers that it applies to
        if attribute is None:
            if name in HARMLESS or value == derived.get(name):
                continue
            raise unsupported(header.prefix + name, value)
        if values.setdefault(attribute, value) != value:
            raise unsupported(header.prefix + name, value)
    values.setdefault("vocab_size", len(header["tokenizer.ggml.tokens"]))
    for name, parts in FLAGS.items():
        if hasattr(default, name):
            values[name] = any(tensor.endswith(parts) for tensor in tensors)
    for token in ("bos", "eos", "unknown", "padding"):
        names = {"unknown": "unk", "padding": "pad"}
        values[f"{names.get(token, token)}_token_id"] = header.get(f"tokenizer.ggml.{token}_token_id")
    if kind in ("gemma2", "gemma3_text"):
        values |= _gemma(header, kind, width, heads, head_dim, layers)
    elif hasattr(default, "sliding_window"):
        values.setdefault("sliding_window", None)
    if kind == "stablelm":
        values["use_parallel_residual"] = not any("ffn_norm" in name for name in tensors)
    if kind == "qwen3_moe":
        values.setdefault("norm_topk_prob", True)
    if kind == "falcon" and values["num_kv_heads"] != 1:  # other layouts of q, k and v than that of Falcon-7B
        raise unsupported(header.prefix + "attention.head_count_kv", values["num_kv_heads"])
    if hasattr(default, "rope_parameters"):
        rope = _rope(header, kind, head_dim, tensors)
        values["rope_parameters"] = rope
        if hasattr(default, "original_max_position_embeddings"):
            length = rope.get("original_max_position_embeddings", get("context_length"))
            values["original_max_position_embeddings"] = length
        swa = get("rope.freq_base_swa", 10000.0 if kind == "gemma3_text" else rope["rope_theta"])
        if kind == "gemma3_text":
            local = {"rope_type": "default", "rope_theta": swa}
            values["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
        elif swa != rope["rope_theta"]:
            raise unsupported(header.prefix + "rope.freq_base_swa", swa)
    return values


def _gemma(header: Header, kind: str, width: int, heads: int, head_dim: int, layers: int) -> dict[str, Any]:
    """Return what llama.cpp derives for Gemma 2 and 3: scale of the attention, which layers have a window."""
    largest = layers == {"gemma2": 46, "gemma3_text": 62}[kind]  # the 27B models
    window = header.hyperparameter("attention.sliding_window", 4096 if kind == "gemma2" else 0)
    pattern = header.get(header.prefix + "attention.sliding_window_pattern", 2 if kind == "gemma2" else 6)
    if not isinstance(pattern, list):
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    return {
        "query_pre_attn_scalar": width // heads if largest else head_dim,
        "sliding_window": window or None,
        "layer_types": ["sliding_attention" if window and local else "full_attention" for local in pattern],
    }


def _rope(header: Header, kind: str, head_dim: int, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return ``rope_parameters`` of transformers."""
    get = header.hyperparameter
    theta, dimensions = float(get("rope.freq_base", 10000.0)), get("rope.dimension_count", head_dim)
    length = get("rope.scaling.original_context_length", get("context_length"))
    scaling = get("rope.scaling.type", "linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) or 1.0
    attention = get("rope.scaling.attn_factor", 1.0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if kind in PARTIAL:
        rope["partial_rotary_factor"] = dimensions / head_dim
    elif dimensions != head_dim:
        raise unsupported(header.prefix + "rope.dimension_count", dimensions)
    factors = {name: tensors[name].reshape(-1).astype(float).tolist() for name in ROPE_TENSORS if name in tensors}
    for name, numbers in factors.items():
        if len(numbers) != dimensions // 2:
            raise unsupported(f"the tensor {name} with {len(numbers)} factors for", f"{dimensions} dimensions")
    scaled = scaling != "none" and factor != 1.0
    if factors and scaled:
        raise unsupported(header.prefix + "rope.scaling.factor", factor)
    if "rope_freqs.weight" in factors:
        rope |= _frequencies(factors["rope_freqs.weight"], theta, length)
    elif factors:
        if len(factors) != 2:
            raise unsupported("a single tensor of LongRoPE", min(factors))
        long, short = (factors[f"rope_factors_{which}.weight"] for which in ("long", "short"))
        rope |= {"rope_type": "longrope", "long_factor": long, "short_factor": short}
        rope["original_max_position_embeddings"] = length
        if header.prefix + "rope.scaling.attn_factor" in header:
            rope["attention_factor"] = attention
        return rope
    elif scaling == "yarn" and scaled:
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        rope |= {name: get(f"rope.scaling.yarn_{name}", usual) for name, usual in YARN.items()}
        rope["attention_factor"] = attention * get("rope.scaling.yarn_attn_factor", 1.0 + 0.1 * math.log(factor))
        return rope
    elif scaling == "linear" and scaled:
        rope |= {"rope_type": "linear", "factor": factor}
    elif scaling not in ("none", "linear", "yarn"):
        raise unsupported(header.prefix + "rope.scaling.type", scaling)
    if attention != 1.0:
        raise unsupported(header.prefix + "rope.scaling.attn_factor", attention)
    return rope


def _frequencies(factors: list[float], theta: float, length: int) -> dict[str, Any]:
    """Return the scaling of a ``rope_freqs`` tensor: Llama 3's if it has that form, else the factors themselves.

    Llama 3's low and high factor are 1 and 4 in every release; a common multiple of both and of the original length
    gives the same frequencies. Other factors are LongRoPE's with the same ones for short and long prompts.
    """
    if all(factor == 1.0 for factor in factors):
        return {}
    low, high, factor = 1.0, 4.0, max(factors)
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    for original in [2**power for power in range(4, 24)]:
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-5, atol=0):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    same = {"short_factor": factors, "long_factor": factors, "attention_factor": 1.0}
    return {"rope_type": "longrope", "original_max_position_embeddings": length, **same}
