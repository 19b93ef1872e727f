"""Memory and disk space that a base model needs, counted from its config; no weights are read or allocated.

For an adapted matrix W (m×n, r = min(m, n)) the decomposition cache holds the square side (r×r: V if m >= n, else U)
and s (r) in float32. The gain form keeps that side in memory beside W, the factored form keeps both sides, U (m×r) and
V (n×r). An expert holds z (r) in float32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from sigmix.errors import BaseModelError, ConfigError, reraised
from sigmix.models.weights import shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}

BITS = {"int8": 8.5, "int4": 8.5, "nf4": 4.5}
"""Bits of a quantized weight with its scales. On a CPU torchao stores int4 in a byte each."""

BITS_CUDA = {**BITS, "int4": 4.5}

FLOAT32 = 4
ENTRY_HEADER = 250  # bytes of lengths, names, method and checksum in the file of one decomposition, within 20
TENSOR_HEADER = 110  # bytes of JSON that a safetensors file spends on one tensor, beside its name

EIGH = 5
"""Arrays of r² float64 at the peak of a decomposition, measured 4.2 to 5.0: the Gram matrix, LAPACK's workspace of
2 r², the eigenvectors and their reordered copy."""

ACTIVATIONS = 18
"""Bytes that a training step adds per token and layer, in units of the hidden size in the weights' dtype. Measured on
smollm2-135m in bfloat16: 32 completions of 8 tokens on prompts of 46."""


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model or vision-language model of a config on the meta device.

    Raises:
        BaseModelError: another kind of model, or a config from which no model can be built.
    """
    import torch

    from sigmix.models.multimodal import auto_class
    from sigmix.utils.logging import quiet

    kind = getattr(config, "model_type", type(config).__name__)
    message = f"no causal language model can be built from this config (model_type {kind!r})"
    remedy = "choose a decoder-only text model or a vision-language model of transformers"
    with reraised(BaseModelError, message, remedy), torch.device("meta"), quiet():
        return auto_class(config.to_dict()).from_config(config)


def entry_bytes(r: int) -> int:
    """Return the size of one decomposition in the cache, within some 20 bytes."""
    return FLOAT32 * r * (r + 1) + ENTRY_HEADER


def model_plan(
    model: PreTrainedModel,
    layers: Mapping[str, nn.Module],
    dtype: str = "bfloat16",
    quantization: str | None = None,
    cuda: bool = False,
) -> dict[str, Any]:
    """Count what SVF needs for a model.

    Args:
        model: loaded or on the meta device. layers: {path: adapted layer}, see `sigmix.svf.tuner.target_layers`.
        dtype: of the weights. quantization: of the adapted layers: int8, int4, nf4 or None.
        cuda: the weights are on a GPU, where int4 is packed.

    Returns:
        A dict for JSON, sizes in bytes.

        Exact: ``model_type``, ``parameters``, ``weights_bytes`` (in memory), ``weights_bf16_bytes`` (on disk, not
        quantized), ``matrices``, ``z_parameters`` (trainable numbers), ``expert_bytes`` (of an expert on disk),
        ``cache_bytes`` and ``disk_bytes`` (of the decompositions, without and with the files' headers),
        ``form_bytes`` ({form: memory beside the weights}), ``train_bytes`` (weights, factors, and z with its gradient,
        optimizer state and best copy), ``kv_bytes_per_1000_tokens`` (None if the config does not say), ``by_shape``
        (``out``, ``in``, ``count``), ``not_adapted`` (``name``, ``shape``, ``count``, ``parameters``, ``why``).

        From one measured factor each: ``decompose_bytes`` (peak of the largest matrix, which is read alone) and
        ``activation_bytes_per_1000_tokens`` (of a training step).

    Raises:
        ConfigError: unknown dtype or quantization.
    """
    if dtype not in BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}", remedy=f"give one of {', '.join(BYTES)}")
    if quantization is not None and quantization not in BITS:
        raise ConfigError(f"unknown quantization {quantization!r}", remedy=f"give one of {', '.join(BITS)}")
    b = BYTES[dtype]
    shapes = Counter(shape(layer) for layer in layers.values())
    ranks = {path: min(shape(layer)) for path, layer in layers.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())  # tied ones count once
    adapted = sum(m * n * count for (m, n), count in shapes.items())
    z = sum(ranks.values())
    short = sum(r * r for r in ranks.values())
    both = sum(min(m, n) * (m + n) * count for (m, n), count in shapes.items())
    bits = 8 * b if quantization is None else (BITS_CUDA if cuda else BITS)[quantization]
    weights = int(b * (parameters - adapted) + bits / 8 * adapted)
    forms = {"base": 0, "gain": b * short + FLOAT32 * z}
    if quantization is None:  # a quantized base model has neither a merged nor a factored form
        forms |= {"merged": b * (adapted + short), "factored": b * both + FLOAT32 * z}
    tokens = _token_bytes(model.config, b)
    return {
        "model_type": getattr(model.config, "model_type", type(model.config).__name__), "dtype": dtype,
        "quantization": quantization, "parameters": parameters, "weights_bytes": weights,
        "weights_bf16_bytes": BYTES["bfloat16"] * parameters, "matrices": len(layers), "z_parameters": z,
        "expert_bytes": FLOAT32 * z + sum(TENSOR_HEADER + len(path) for path in layers),
        "cache_bytes": FLOAT32 * (short + z), "disk_bytes": sum(map(entry_bytes, ranks.values())),
        "form_bytes": forms,
        "train_bytes": weights + b * (short if quantization else both) + 2 * b * z + 5 * FLOAT32 * z,
        "kv_bytes_per_1000_tokens": tokens and 1000 * tokens[0],
        "activation_bytes_per_1000_tokens": tokens and 1000 * tokens[1],
        "decompose_bytes": max(((b + 8) * m * n + EIGH * 8 * min(m, n) ** 2 for m, n in shapes), default=0),
        "by_shape": [{"out": m, "in": n, "count": count} for (m, n), count in sorted(shapes.items())],
        "not_adapted": _not_adapted(model, layers),
    }  # fmt: skip


def _token_bytes(config: PretrainedConfig, b: int) -> tuple[int, int] | None:
    """Bytes of a token's keys and values, and of its activations in a training step; None for an unusual config."""
    text = config.get_text_config()
    layers, hidden, heads = (
        getattr(text, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(heads, int)):
        return None
    every = zip(DynamicCache(config=config).layers, text.per_layer_config, strict=True)
    numbers = [_cached_numbers(own, hidden // heads, heads) for layer, own in every if isinstance(layer, DynamicLayer)]
    if not all(isinstance(number, int) for number in numbers):
        return None
    return sum(numbers) * b, ACTIVATIONS * layers * hidden * b


def _cached_numbers(layer: PretrainedConfig, width: int, heads: int) -> int:
    """Return how many numbers a layer caches for a token, given the usual width of a head."""
    if latent := getattr(layer, "kv_lora_rank", None):
        return latent + layer.qk_rope_head_dim
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    if getattr(layer, "multi_query", False) and not getattr(layer, "new_decoder_architecture", False):
        kv_heads = 1
    return 2 * kv_heads * (getattr(layer, "head_dim", None) or width)


def _not_adapted(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Group the large parameters that SVF leaves alone by the end of their name and their shape, with the reason."""
    from sigmix.models.multimodal import backbone

    inside = backbone(model)
    root = "" if inside is None else f"{inside[0]}."
    embedding, head = (
        getattr(part, "weight", None) for part in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    adapted = {id(layer.weight) for layer in layers.values()}
    groups: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in adapted:
            continue
        if parameter is embedding or parameter is head:
            why = "embedding" if parameter is embedding else "output head"
        elif not name.startswith(root):
            why = "vision tower or projector: outside the language backbone"
        elif parameter.dim() > 2:
            why = "fused experts or a convolution: one tensor of several matrices"
        else:
            why = "no linear layer"
        key = (".".join(name.split(".")[-2:]), tuple(parameter.shape))
        entry = groups.setdefault(key, {"name": key[0], "shape": list(key[1]), "count": 0, "parameters": 0, "why": why})
        entry["count"] += 1
        entry["parameters"] += parameter.numel()
    return list(groups.values())
