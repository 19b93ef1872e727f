"""Weights off the disk and onto devices: whole, spread by accelerate, left on disk, or quantised while they are read.

    plain          one device, all weights in memory
    device_map     accelerate spreads layers over GPUs, the CPU and the disk, as transformers' ``device_map`` says
    quantization   linear layers but the output head in 8 or 4 bits; the float weights never all exist

Quantisation, by name:

    int8       torchao, int8 weights with a float scale for each row; W_q x is a product with the dequantised weight
    int4       torchao, 4-bit weights in groups of 32. On a CUDA device packed, two to a byte (torchao then needs the
               package mslk); on a CPU torchao keeps one to a byte, so it is as large as int8 there and coarser
    nf4        bitsandbytes, 4-bit normal floats in blocks of 64, packed on every device

Not offered: bitsandbytes' LLM.int8(). It rounds activations too, and which columns it spares depends on all rows of a
batch, so that a request's answer would depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.errors import BaseModelError, UnknownNameError
from sigmix.models.gguf import quiet

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


QUANTIZATIONS = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}


GROUP = 32
"""Weights of a row that share a scale under int4; fits every width that is a multiple of 32."""


def load_weights(
    folder: Path,
    label: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    auto: Any = None,
    quantization: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """A model from a folder; see `sigmix.models.loading.load_base`.

    Args:
        auto: transformers' class that loads it; default: `AutoModelForCausalLM`.

    Raises:
        BaseModelError: incomplete or unreadable weights, a device map that does not fit, a package that is missing.
        UnknownNameError: no such quantisation.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if device_map is not None:
        options = {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
        if offload_folder is not None:
            options["offload_folder"] = str(offload_folder)
    if quantization is not None:
        config = quantization_config(quantization, dtype, device)
        # quantised on the device while it is read
        options = {"device_map": {"": str(device)}} | options | {"quantization_config": config}
    try:
        with quiet(), _hushed():
            loaded: Any = (auto or AutoModelForCausalLM).from_pretrained(
                folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
            )
            model, report = loaded
    except Exception as error:  # transformers, safetensors and missing kernels all have their own classes
        remedy = "download the model again; a quantised checkpoint needs its original safetensors weights"
        if options:
            remedy = "check the device map, the quantisation and the memory of the devices, or load it without them"
        raise BaseModelError(
            f"the weights of {label} cannot be loaded: {type(error).__name__}: {error}", remedy=remedy
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers would fill them with random numbers and go on
        raise BaseModelError(
            f"the weights of {label} are incomplete: {len(missing)} tensors are missing, such as {missing[0]}",
            remedy="download the model again",
        )
    if not options:
        model.to(device)
    if quantization is not None:
        _keep_packing(model)
    if device_map is not None and model.get_input_embeddings().weight.is_meta:
        raise BaseModelError(
            f"the device map leaves the input embedding of {label} off every device",
            remedy="give it a device: {'model.embed_tokens': 'cpu', …}",
        )
    return model


def quantization_config(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' configuration for a quantisation by name.

    Raises:
        UnknownNameError: there is no such name. BaseModelError: its package is not installed, or lacks it here.
    """
    if name not in QUANTIZATIONS:
        raise UnknownNameError("quantization", name, QUANTIZATIONS)
    package = QUANTIZATIONS[name]
    try:
        import transformers

        with _hushed():
            __import__(package)
            if package == "torchao":
                return _torchao(name, device)
    except ImportError as error:
        raise BaseModelError(
            f"quantization {name!r} needs {package}: {error}", remedy=f"pip install {package}"
        ) from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what torchao and bitsandbytes log about kernels for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _torchao(name: str, device: torch.device) -> Any:
    import torch
    from torchao import quantization as ao
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if name == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    if device.type == "cuda":
        return TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=GROUP))
    four: Any = torch.int4  # type: ignore[attr-defined]  # it is there, and torch's own stubs lack it
    return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP)))


def _keep_packing(model: Any) -> None:
    """Keep bitsandbytes' 4-bit weights as they are.

    On CPUs with avx512_bf16 the first pass would repack them and round their scales to bfloat16: another base than
    before it, and one without gradients.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
