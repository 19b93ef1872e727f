"""What a base needs, from its config alone: memory, disk, trainable numbers. Nothing is downloaded or allocated.

For an adapted matrix W (m×n, r = min(m, n)) the decomposition cache holds the square side (r×r: V if m >= n, else U)
and s (r) in float32; the factored form needs both sides in memory, U (m×r), s and V (n×r). An expert holds z (r) in
float32. Adapted are all linear layers but the output head, as PEFT's ``all-linear`` means it; of a vision-language
model those of its language backbone.

Counts only; what decomposing, training and serving take at their peak, and for how long, is in `sigmix.budget`.
"""

from __future__ import annotations

from typing import Any

from sigmix.errors import BaseModelError

FLOAT32 = 4
BF16 = 2
HEADER_PER_TENSOR = 110  # bytes of JSON that a safetensors file spends on one tensor, beside its name
ENTRY_HEADER = 250  # of one decomposition's file: lengths, names, method and checksum; up to 20 more or less


def model_plan(config: Any) -> dict[str, Any]:
    """Count what SVF needs for the model that a transformers ``config`` describes.

    Args:
        config: a transformers config of a causal language model; see `transformers.AutoConfig`.

    Returns:
        A dict for JSON, sizes in bytes: ``model_type``, ``parameters``, ``weights_bf16_bytes``, ``matrices`` (number
        adapted), ``z_parameters``, ``expert_bytes`` (the numbers of one expert on disk), ``cache_bytes`` (the numbers
        of the decomposition, on disk, and in memory for the gain form), ``disk_bytes`` (the same with the files'
        headers), ``factored_bytes`` (in memory for the factored form, beside the weights), ``by_shape`` (list of
        ``out``, ``in``, ``count``), ``not_adapted`` (list of ``name``, ``shape``, ``count``, ``parameters``, ``why``),
        ``lookup_parameters`` (of an input embedding that is not the output head too: read by row, never multiplied).

    Raises:
        BaseModelError: the config is of no causal language model, or has values that no model can be built from.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from sigmix.vision import backbone

    kind = getattr(config, "model_type", type(config).__name__)
    model = empty_model(config)
    head, inside = model.get_output_embeddings(), backbone(model)
    root = f"{inside[0]}." if inside is not None else ""
    shapes: dict[tuple[int, int], int] = {}
    z_count = factored = cached = header = disk = 0
    for name, module in model.named_modules():
        if module is head or not name.startswith(root) or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        m, n = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        r = min(m, n)
        shapes[m, n] = shapes.get((m, n), 0) + 1
        z_count += r
        factored += FLOAT32 * r * (m + n + 1)
        cached += FLOAT32 * r * (r + 1)
        disk += entry_bytes(r)
        header += HEADER_PER_TENSOR + len(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    return {
        "model_type": kind,
        "parameters": parameters,
        "weights_bf16_bytes": BF16 * parameters,
        "matrices": sum(shapes.values()),
        "z_parameters": z_count,
        "expert_bytes": FLOAT32 * z_count + header,
        "cache_bytes": cached,
        "disk_bytes": disk,
        "factored_bytes": factored,
        "by_shape": [{"out": m, "in": n, "count": count} for (m, n), count in sorted(shapes.items())],
        "not_adapted": _not_adapted(model, root),
        "lookup_parameters": _lookup(model.get_input_embeddings(), head),
    }


def entry_bytes(r: int) -> int:
    """Size of one decomposition in the cache, within some 20 bytes."""
    return FLOAT32 * r * (r + 1) + ENTRY_HEADER


def empty_model(config: Any) -> Any:
    """The causal language model, or vision-language model, that a config describes, on the meta device.

    Raises:
        BaseModelError: the config is of neither, or has values that no model can be built from.
    """
    import torch

    from sigmix.gguf import quiet
    from sigmix.vision import auto_class

    kind = getattr(config, "model_type", type(config).__name__)
    try:
        with torch.device("meta"), quiet():
            return auto_class(config.to_dict()).from_config(config)
    except Exception as error:
        raise BaseModelError(
            f"no causal language model can be built from this config (model_type {kind!r}): {error}",
            remedy="choose a decoder-only text model, or a vision-language model, that transformers knows",
        ) from error


def _lookup(embedding: Any, head: Any) -> int:
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return 0
    return embedding.weight.numel()


def _not_adapted(model: Any, root: str) -> list[dict[str, Any]]:
    """The large parameters that SVF leaves alone, grouped by the last part of their name, with the reason."""
    groups: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    embeddings = {id(part.weight): "embedding" for part in (model.get_input_embeddings(),) if part is not None}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.setdefault(id(head.weight), "output head")
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            why = f"{embeddings[id(parameter)]}: not among the linear layers that are adapted"
        elif not name.startswith(root):
            if parameter.dim() < 2:
                continue
            why = "vision tower or projector: outside the language backbone"
        elif parameter.dim() >= 3:
            why = "fused experts or a convolution: one tensor of several matrices, which is not a linear layer"
        else:
            continue
        key = (".".join(name.split(".")[-2:]), tuple(parameter.shape))
        entry = groups.setdefault(key, {"name": key[0], "shape": list(key[1]), "count": 0, "parameters": 0, "why": why})
        entry["count"] += 1
        entry["parameters"] += parameter.numel()
    return list(groups.values())
