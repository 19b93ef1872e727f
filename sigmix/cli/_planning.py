"""What `sigmix doctor --base X --plan` says of a base, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sigmix.cli._console import size

SMOLLM2_CONFIG: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
"""The embedded default's sizes, for when it has not been fetched."""


_LLAMA3: dict[str, Any] = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}


_SMALL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


_LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": {**_LLAMA3, **_SMALL},
    "meta-llama/Meta-Llama-3-70B-Instruct": {**_LLAMA3, **_LARGE},
    "mistralai/Mistral-7B-Instruct-v0.3": {**_LLAMA3, **_SMALL, "model_type": "mistral", "vocab_size": 32768},
}
"""Sizes of the paper's bases, as their makers published them: the hub wants a licence accepted for some of them."""


def needs(
    name: str, read: tuple[Any, str], has: dict[str, Any], dtype: str = "bfloat16", quantization: str | None = None,
    cuda: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`sigmix.models.memory.model_plan` of a base, from its config alone, and whether this machine has that much.

    ``config`` says where its sizes came from; ``read`` is from `read_config`. Memory is weights and factors as
    `sigmix.models.memory` counts them, in ``dtype``.

    Raises:
        BaseModelError: the config is of no causal language model. ConfigError: see `sigmix.models.memory.sizes`.
    """
    from sigmix.models.memory import serving_forms, sizes

    config, told = read
    size_of = sizes(config, dtype, quantization, cuda)
    found: Any = size_of.plan
    weights, memory, disk = found["weights_bf16_bytes"], has["memory_available_bytes"], has["disk_free_bytes"]
    forms = {form: size_of.weights + extra for form, extra in serving_forms(size_of).items() if form != "base"}
    return {
        "name": name,
        "config": told,
        "plan": found,
        "dtype": dtype,
        "memory_bytes": forms,
        "fits_memory": {form: None if memory is None else wanted < memory for form, wanted in forms.items()},
        "disk_bytes": weights + found["cache_bytes"],
        "fits_disk": weights + found["cache_bytes"] < disk,
    }


def budget_of(
    config: Any, has: dict[str, Any], kind: str, gpus: int, gpu_memory: float | None, load: Any,
    quantization: str | None, cuda: bool,
) -> dict[str, Any]:
    """`sigmix.models.memory.budget` of a base at rates measured on this machine, and what fits.

    Args:
        has: from `diagnose.machine`. kind: dtype of the weights. cuda: whether they lie on GPUs.
        gpu_memory: GB of each device; None: of the one that is here, if there is one.

    Raises:
        ConfigError: see `sigmix.models.memory.budget`.
    """
    import torch

    from sigmix.models.memory import budget, measure_rates

    device = "cuda" if torch.cuda.is_available() else "cpu"
    budget(config, None, kind, load, gpus, quantization, cuda)  # bad input, before seconds of measuring
    found = budget(config, measure_rates(device, kind), kind, load, gpus, quantization, cuda)
    each = int(gpu_memory * 1e9) if gpu_memory is not None else (has["gpu"] or {}).get("memory_bytes")
    found["gpu_memory_bytes"] = each
    wanted = {"train": found["train"]["per_gpu_bytes"]}
    wanted |= {f"serve, {form}": count for form, count in found["serve"]["per_gpu_bytes"].items()}
    found["fits_gpus"] = {name: None if each is None else count <= each for name, count in wanted.items()}
    free = has["memory_available_bytes"]
    found["decompose"]["fits_memory"] = None if free is None else found["decompose"]["peak_bytes"] < free
    found["decompose"]["fits_disk"] = found["decompose"]["disk_bytes"] < has["disk_free_bytes"]
    return found


def read_config(name: str) -> tuple[Any, str]:
    """A base's config, and where it came from.

    Args:
        name: as `load_base` takes it, a folder with only a config.json in it, or such a file.

    Raises:
        BaseModelError: it cannot be had.
    """
    from sigmix.errors import BaseModelError

    path = Path(name).expanduser()
    if path.suffix == ".json" and path.is_file():
        from transformers import AutoConfig

        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(data.pop("model_type"), **data), f"the file {path}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(
                f"{path} is no config of a model that transformers knows: {error}",
                remedy="give a model's config.json, with its model_type",
            ) from error
    known = next((key for key in PUBLISHED if key.lower() == name.lower()), None)
    if known is not None and not path.exists():
        from huggingface_hub import try_to_load_from_cache
        from transformers import AutoConfig

        if not isinstance(try_to_load_from_cache(known, "config.json"), str):
            data = dict(PUBLISHED[known])
            made = AutoConfig.for_model(data.pop("model_type"), **data)
            return made, "the sizes that its makers published, as sigmix has them; the hub was not asked"
    return _config(name), "the base's own"


def _config(name: str) -> Any:
    from transformers import AutoConfig, LlamaConfig

    from sigmix.errors import BaseModelError
    from sigmix.models.default import DEFAULT, SMOLLM2, offline
    from sigmix.models.gguf import models_dir
    from sigmix.models.hub import base_names, hub_errors, near_paths
    from sigmix.models.loading import HUB_NAME
    from sigmix.utils.logging import quiet

    path = Path(name).expanduser()
    options: dict[str, Any] = {}
    where: Any = name
    if name.lower() == DEFAULT:
        where = models_dir() / SMOLLM2.member_sha256
        if not (where / "config.json").is_file():
            return LlamaConfig(**SMOLLM2_CONFIG)
    elif path.is_dir():
        where = path
        if not (path / "config.json").is_file():
            raise BaseModelError(f"{name} is no model folder: config.json is missing", remedy=base_names())
    elif path.is_file() and path.suffix.lower() == ".gguf":
        where, options = path.parent, {"gguf_file": path.name}
    elif path.exists() or name.startswith((".", "/", "~")) or not HUB_NAME.fullmatch(name):
        raise BaseModelError(f"there is no base at {name!r}{near_paths(path)}", remedy=base_names())
    with hub_errors(name, BaseModelError, action="read the config of", instead=base_names()), quiet():
        return AutoConfig.from_pretrained(where, local_files_only=offline() or where is not name, **options)


def text(base: dict[str, Any], plan: bool) -> list[str]:
    """Lines for a person; of all matrices and of the budget with ``plan``."""
    if "plan" not in base:
        return [f"base: {base['problem']}"]
    found = base["plan"]
    forms = ", ".join(f"{form} {size(count)}" for form, count in base["memory_bytes"].items())
    expert = f"{found['z_parameters']:,} numbers in an expert ({size(found['expert_bytes'])})"
    lines = [
        f"base {base['name']}: {found['parameters']:,} parameters, {found['matrices']} matrices adapted, {expert}",
        f"  memory by form in {base['dtype']}, weights and factors alone: {forms}",
        f"  disk: {size(found['weights_bf16_bytes'])} of weights, {size(found['cache_bytes'])} of decompositions",
    ]
    if base["config"] != "the base's own":
        lines.append(f"  config: {base['config']}")
    short = [form for form, fits in base["fits_memory"].items() if fits is False]
    if short:
        lines.append(f"  more than is available now: {', '.join(short)}")
    if plan:
        lines += [f"  {one['count']:>4} × [{one['out']}, {one['in']}]" for one in found["by_shape"]]
        lines += [f"  not adapted: {one['count']} × {one['name']} {one['shape']}: {one['why']}"
                  for one in found["not_adapted"]]  # fmt: skip
    return lines + (_budget_text(base["budget"]) if "budget" in base else [])


def _budget_text(found: dict[str, Any]) -> list[str]:
    rates, load, gpus = found["rates"], found["load"], found["gpus"]
    one, learn, serve = found["decompose"], found["train"], found["serve"]
    kept = f" in {found['quantization']}" if found["quantization"] else ""
    m, n = one["largest"]
    speed = f"{rates['matmul'] / 1e9:.0f} GFLOP/s in {rates['dtype']}, {rates['matmul64'] / 1e9:.0f} in float64"
    over = "" if one["fits_disk"] else "; MORE DISK THAN IS FREE"
    over += "" if one["fits_memory"] is not False else "; MORE MEMORY THAN IS AVAILABLE"
    step = f"{load['batch']} answers a step, {load['group']} of each prompt, {load['prompt']} + {load['answer']} tokens"
    lines = [
        f"plan, {found['dtype']}{kept}: memory is counted, beside the process itself; times are estimates",
        f"  rates measured here just now on {rates['device']}: {speed}, {rates['copy'] / 1e9:.1f} GB/s",
        f"  decompose, streamed: {size(one['peak_bytes'])} of memory, for the largest matrix {m}×{n} alone",
        f"    the whole model would be {size(one['whole_model_bytes'])}",
        f"    {size(one['disk_bytes'])} of disk, about {_time(one['seconds'])}{over}",
        f"  train, {step}: {size(learn['peak_bytes'])}, about {_time(learn['seconds_per_step'])} a step",
        f"    {_parts(learn['parts'])}",
        f"  serve, {load['requests']} requests of {load['context']} tokens: {_parts(serve['parts'])}",
        f"    keys and values take {size(serve['kv_bytes_per_1000_tokens'])} for 1,000 tokens; in all, by form:",
    ]
    for form, count in serve["peak_bytes"].items():
        read, write = serve["prefill_tokens_per_second"][form], serve["decode_tokens_per_second"][form]
        lines.append(f"    {form:<8} {size(count):>8}, about {read:.3g} tokens/s read, {write:.3g} written")
    each = found["gpu_memory_bytes"]
    if gpus > 1 or each is not None:
        amounts = {"train": learn["per_gpu_bytes"]} | {f"serve, {f}": c for f, c in serve["per_gpu_bytes"].items()}
        shown = [
            f"{name} {size(count)}" + {True: " (fits)", False: " (TOO MUCH)", None: ""}[found["fits_gpus"][name]]
            for name, count in amounts.items()
        ]
        have = f" of {size(each)}" if each is not None else ""
        lines.append(f"  on each of {gpus} devices{have}: {', '.join(shown)}")
    return lines


def _parts(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items())


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
