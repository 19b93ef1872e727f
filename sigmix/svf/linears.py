"""Linear layers, parameters and description of a base model in any state.

A base is plain, wrapped by PEFT, or has `SVFLinear` layers, merged or not. All functions return the same for each of
these states: paths are those of the base, and merged layers count with their original weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import ExpertError
from sigmix.models import weights
from sigmix.models.digests import layer_digest
from sigmix.models.multimodal import bare
from sigmix.svf.decomposition import Factors, cached_decompose, read_factors
from sigmix.svf.layer import SVFLinear
from sigmix.svf.tuner import base_path, linear_layers, svf_layers


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return all linear layers by path: `nn.Linear`, `Conv1D`, or the `SVFLinear` around one."""
    adapted = svf_layers(bare(model))
    return {path: adapted.get(path, layer) for path, layer in linear_layers(model).items()}


def matrix_of(module: nn.Module) -> torch.Tensor:
    """Return the base weight [out, in] of one of `linears`, never a merged one; dequantized if quantized."""
    if isinstance(module, SVFLinear):
        return module.matrix()
    weight = weights.value(module)
    return weight.T if isinstance(module, Conv1D) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Return (out, in) of one of `linears`."""
    if isinstance(module, SVFLinear):
        return module.out_features, module.in_features
    return weights.shape(module)


def factors_of(module: nn.Module) -> Factors:
    """Return float32 factors of one of `linears`: those in use, or cached ones (computed if necessary).

    A half-precision layer has rounded factors, which are too coarse to compare bases, so its cached ones are returned.

    Raises:
        CacheError, OutputError: see `sigmix.svf.decomposition.cached_decompose`.
    """
    layer = module.get_base_layer() if isinstance(module, SVFLinear) else module
    if (digest := getattr(layer, "sigmix_basis", None)) is not None:
        return read_factors(digest, shape_of(module))
    if not isinstance(module, SVFLinear):
        return cached_decompose(matrix_of(module), layer_digest(module))
    module.ensure_factors()
    if module.svf_short is not None and module.svf_short.dtype in (torch.float32, torch.float64):
        return Factors(module.svf_short.float(), module.svf_s, module.side, module.checksum)
    digest = layer_digest(layer) if module._kept is None else None
    return cached_decompose(module.matrix(), digest, cache=module._cache)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's parameters by path, sorted, without adapters' and with tied ones once.

    Raises:
        ExpertError: weights on the meta device that are not offloaded.
    """
    model = bare(model)
    adapters: set[int] = set()
    originals: dict[int, torch.Tensor] = {}
    for module in model.modules():
        # an AuxiliaryTrainingWrapper holds PEFT's modules_to_save: trained copies of whole modules
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for attribute in module.adapter_layer_names:
                container = getattr(module, attribute, None)
                if isinstance(container, nn.Parameter):
                    adapters.add(id(container))
                elif isinstance(container, nn.Module):
                    adapters.update(map(id, container.parameters()))
        if isinstance(module, SVFLinear) and module._kept is not None:
            matrix = module.matrix()
            originals[id(module.get_base_layer().weight)] = matrix.T if module.transposed else matrix
    weights_by_path: dict[str, torch.Tensor] = {}
    elsewhere = readers(model)
    seen = set(adapters)
    named = {
        base_path(name).replace(".original_module.", "."): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in adapters
    }
    for name, parameter in sorted(named.items()):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        kept = originals.get(id(parameter))
        # the parameter itself where nothing is merged: it lives as long as the model, so its digest can be remembered
        same = kept is None or kept.data_ptr() == parameter.data_ptr()
        weights_by_path[name] = parameter if same else kept  # type: ignore[assignment]
        if weights_by_path[name].is_meta and id(parameter) not in elsewhere:
            raise ExpertError(f"the base's weight {name} is on the meta device", remedy="load the base fully")
    return weights_by_path


def readers(model: nn.Module) -> dict[int, Callable[[], torch.Tensor]]:
    """Return {id of a parameter: function that returns its values}, of quantized and offloaded parameters."""
    functions: dict[int, Callable[[], torch.Tensor]] = {}
    for module in model.modules():
        linear = isinstance(module, (nn.Linear, Conv1D))
        for name, parameter in module.named_parameters(recurse=False):
            weight = linear and name == "weight"
            if weight and weights.kind(module) in (weights.QUANTIZED, weights.OFFLOADED):
                functions[id(parameter)] = partial(weights.value, module)  # an offloaded one may be quantized too
            elif parameter.is_meta and weights.is_offloaded(module):
                functions[id(parameter)] = partial(weights.offloaded_parameter, module, name)  # type: ignore[assignment]
    return functions


def describe(model: nn.Module) -> dict[str, str]:
    """Return the base's name and dtype, such as "bfloat16", or "bfloat16 in int8" if quantized."""
    model = bare(model)
    info = getattr(model, "sigmix_base", None) or {}  # set by load_base
    config = getattr(model, "config", None)
    name = info.get("name") or getattr(config, "_name_or_path", None) or type(model).__name__
    dtypes = [p.dtype for p in parameters(model).values() if p.ndim > 1 and p.is_floating_point()] or [torch.float32]
    dtype = str(dtypes[0]).removeprefix("torch.")
    return {"name": str(name), "dtype": f"{dtype} in {info['quantization']}" if "quantization" in info else dtype}


def dtype_and_quantization(recorded: str | None) -> tuple[str | None, str | None]:
    """Split the dtype of `describe`: ("bfloat16", "int8") of "bfloat16 in int8"; None for missing parts."""
    dtype, _, quantization = (recorded or "").partition(" in ")
    return dtype or None, quantization or None
