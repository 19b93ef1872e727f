"""Load weights onto devices: whole, spread or offloaded by accelerate, or quantized while they are read.

Quantization by name, of all linear layers but the output head:

    int8    torchao, int8 weights with one float scale a row
    int4    torchao, 4-bit weights in groups of 32. Packed two to a byte on CUDA (torchao then needs the package mslk);
            on a CPU torchao stores one to a byte, so it is as large as int8 there
    nf4     bitsandbytes, 4-bit normal floats in blocks of 64, packed on every device

bitsandbytes' LLM.int8() is refused: it also rounds activations, and which columns it spares depends on all rows of the
batch, so the output of one request would depend on the others.

A checkpoint that is stored quantized loads as it is if bitsandbytes (4 bits) or torchao wrote it. Other formats (GPTQ,
AWQ, FP8, compressed-tensors …) have layer classes of their own and are refused.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.errors import BaseModelError, ConfigError, UnknownNameError, reraised
from sigmix.utils.logging import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

QUANTIZATIONS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}

PACKED = (".qweight", ".qzeros", ".scales", ".weight_scale", ".weight_scale_inv", ".weight_packed", ".absmax")
"""Ends of tensor names of quantized checkpoints."""

GROUP_SIZE = 32  # weights of a row that share a scale under int4; divides every width that is a multiple of 32


def load_weights(
    folder: Path,
    label: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto_class: Any = None,
    quantization_config: str | QuantizationConfigMixin | None = None,
    stored: bool = False,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """Load a model from a folder of safetensors; see `sigmix.models.loading.load_base`.

    Args:
        label: name of the model in messages.
        auto_class: transformers' class to load it with; default: `AutoModelForCausalLM`.
        stored: the checkpoint is stored quantized, so ``quantization_config`` must be None.

    Raises:
        BaseModelError: incomplete or unreadable weights, an unusable device map, or a missing package.
        UnknownNameError: unknown quantization.
    """
    from transformers import AutoModelForCausalLM

    from sigmix.models.weights import prevent_repacking

    options: dict[str, Any] = {}
    if device_map is not None:
        options = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
        if offload_folder is not None:
            options["offload_folder"] = str(offload_folder)
    if isinstance(quantization_config, str):
        quantization_config = named_config(quantization_config, dtype, device)
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if quantization_config is not None or stored:
        # a device map makes transformers quantize on the device, shard by shard
        options = {"device_map": {"": str(device)}} | options
    remedy = "download the model again; a quantized checkpoint needs its original safetensors weights"
    if options:
        remedy = "check the device map, the quantization and the memory of the devices, or load it without them"
    with reraised(BaseModelError, f"the weights of {label} cannot be loaded", remedy), quiet():
        loaded: Any = (auto_class or AutoModelForCausalLM).from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
        model, report = loaded
    if missing := sorted(report["missing_keys"]):  # transformers initializes these at random
        if packed := sorted(key for key in report["unexpected_keys"] if key.endswith(PACKED)):
            raise _unsupported(label, f"in a packed format: it holds {packed[0]}")
        raise BaseModelError(
            f"the weights of {label} are incomplete: {len(missing)} tensors are missing, such as {missing[0]}",
            remedy="download the model again",
        )
    if not options:
        model.to(device)
    prevent_repacking(model)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":  # a stored checkpoint records the dtype of who wrote it
            module.compute_dtype, module.compute_type_is_set = dtype, True
    if device_map is not None and model.get_input_embeddings().weight.is_meta:
        raise BaseModelError(
            f"the device map offloads the input embedding of {label}",
            remedy="give it a device: {'model.embed_tokens': 'cpu', …}",
        )
    return model


def named_config(name: str, dtype: torch.dtype, device: torch.device) -> QuantizationConfigMixin:
    """Return transformers' configuration for one of `QUANTIZATIONS`, with ``dtype`` to compute in.

    Raises:
        UnknownNameError: unknown name. BaseModelError: the package is missing or does not support ``device``.
    """
    if name not in QUANTIZATIONS:
        raise UnknownNameError("quantization", name, QUANTIZATIONS)
    package = QUANTIZATIONS[name]
    with _needs(package, f"quantization {name!r}"), quiet():
        import transformers

        __import__(package)
        if name == "nf4":
            return transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        return _torchao_config(name, device)


def config_name(config: str | QuantizationConfigMixin, device: torch.device) -> str:
    """Return the name that metadata records: one of `QUANTIZATIONS` if a config object is that, else what it is.

    Examples: ``fp4``, ``nf4-double`` (quantized scales), ``Float8WeightOnlyConfig``, ``gptq``.

    Raises:
        ConfigError: LLM.int8().
    """
    if isinstance(config, str):
        return config
    method, settings = str(getattr(config.quant_method, "value", config.quant_method)), config.to_dict()
    if settings.get("load_in_8bit"):
        raise ConfigError(
            "bitsandbytes' LLM.int8() makes a row's output depend on its batch", remedy="quantization_config='int8'"
        )
    if method == "bitsandbytes":
        return f"{settings['bnb_4bit_quant_type']}{'-double' if settings['bnb_4bit_use_double_quant'] else ''}"
    if method == "torchao":
        kind = config.quant_type  # type: ignore[attr-defined]  # of TorchAoConfig
        for name in [name for name, package in QUANTIZATIONS.items() if package == method]:
            if kind == _torchao_config(name, device).quant_type:  # type: ignore[attr-defined]
                return name
        return type(kind).__name__
    return method


def quantization_of(
    stored: Mapping[str, Any] | None, given: str | QuantizationConfigMixin | None, label: str, device: torch.device
) -> str | None:
    """Return the name of a base's quantization: the one that its checkpoint is stored in, or the one to apply.

    Args:
        stored: ``quantization_config`` of the checkpoint's config.json. given: see `sigmix.models.loading.load_base`.

    Raises:
        BaseModelError: stored in an unsupported format, or its package is missing.
        ConfigError: ``given`` contradicts the checkpoint; LLM.int8(). UnknownNameError: unknown quantization.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    if isinstance(given, str) and given not in QUANTIZATIONS and stored is None:
        raise UnknownNameError("quantization", given, QUANTIZATIONS)
    requested = None if given is None else config_name(given, device)
    if stored is None:
        return requested
    method = str(stored.get("quant_method") or "an unknown format")
    if stored.get("load_in_8bit"):
        raise _unsupported(label, "by bitsandbytes' LLM.int8(), which makes a row's output depend on its batch")
    if method not in QUANTIZATIONS.values():
        raise _unsupported(label, f"by {method}")
    try:
        with _needs(method, label), quiet():
            __import__(method)
            name = config_name(AutoQuantizationConfig.from_dict(dict(stored)), device)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a config of another release of the package
        raise _unsupported(label, f"by {method}, with settings that cannot be read: {error}") from error
    if requested not in (None, name):
        raise ConfigError(
            f"{label} is stored quantized to {name}, which contradicts the quantization {requested!r}",
            remedy="leave quantization_config (--quantization) out, or quantize the original checkpoint",
        )
    return name


def _needs(package: str, what: str) -> contextlib.AbstractContextManager[None]:
    return reraised(BaseModelError, f"{what} needs {package}", f"pip install {package}", ImportError)


def _unsupported(label: str, how: str) -> BaseModelError:
    return BaseModelError(
        f"{label} is stored quantized {how}, which sigmix does not support",
        remedy="load the original checkpoint with unquantized safetensors weights, quantized while it is read: "
        f"quantization_config (--quantization) {', '.join(QUANTIZATIONS)}",
    )


def _torchao_config(name: str, device: torch.device) -> QuantizationConfigMixin:
    import torch
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    if device.type == "cuda":
        return TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=GROUP_SIZE))
    int4: Any = torch.int4  # type: ignore[attr-defined]  # missing in torch's stubs
    return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=int4, granularity=PerGroup(GROUP_SIZE)))
