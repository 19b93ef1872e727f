"""What an expert needs to know of its base: its linear layers by path, its parameters, its name.

A base comes plain, wrapped by PEFT, or with `SVFLinear` layers injected and even merged; all of these are the same base
and give the same answers here, because names are normalised and a merged layer answers with its kept original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

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
from sigmix.svf.tuner import base_path

LINEAR = (nn.Linear, Conv1D, SVFLinear)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers by their path in the base: `nn.Linear`, `Conv1D` or the `SVFLinear` around one."""
    found: dict[str, nn.Module] = {}
    for name, module in bare(model).named_modules():
        if isinstance(module, LINEAR):
            # an SVFLinear comes before the layer that it wraps, whose normalised path is the same
            found.setdefault(base_path(name), module)
    return found


def matrix_of(module: nn.Module) -> torch.Tensor:
    """The base weight of one of `linears`, [out, in], never a merged one; dequantised where it is quantised."""
    if isinstance(module, SVFLinear):
        return module.matrix()
    weight = weights.value(module)
    return weight.T if isinstance(module, Conv1D) else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of one of `linears`."""
    if isinstance(module, SVFLinear):
        return module.out_features, module.in_features
    return weights.shape(module)


def factors_of(module: nn.Module) -> Factors:
    """float32 factors of one of `linears`: those in use, or those of the cache (computed once if need be).

    A bfloat16 base holds its short side rounded to bfloat16, which is too coarse to tell bases apart, so the factors
    that it was rounded from are taken from the cache.

    Raises:
        CacheError, OutputError: see `sigmix.svf.decomposition.cached_decompose`.
    """
    layer = module.get_base_layer() if isinstance(module, SVFLinear) else module
    if (named := getattr(layer, "sigmix_basis", None)) is not None:
        return read_factors(named, shape_of(module))
    if not isinstance(module, SVFLinear):
        return cached_decompose(matrix_of(module), layer_digest(module))
    module.ensure_factors()
    if module.svf_short is not None and module.svf_short.dtype in (torch.float32, torch.float64):
        return Factors(module.svf_short.float(), module.svf_s, module.side, module.checksum)
    digest = layer_digest(layer) if module._kept is None else None
    return cached_decompose(module.matrix(), digest, cache=module._cache)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own parameters by path, sorted; adapters' are left out and tied ones appear once.

    Raises:
        ExpertError: weights are on the meta device and not offloaded, so there are no values.
    """
    model = bare(model)
    adapters: set[int] = set()
    originals: dict[int, torch.Tensor] = {}
    for module in model.modules():
        # the latter are PEFT's modules_to_save: trained copies of whole modules
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for attribute in module.adapter_layer_names:
                adapters.update(_ids(getattr(module, attribute, None)))
        if isinstance(module, SVFLinear) and module._kept is not None:
            matrix = module.matrix()
            originals[id(module.get_base_layer().weight)] = matrix.T if module.transposed else matrix
    found: dict[str, torch.Tensor] = {}
    elsewhere = readers(model)
    seen: set[int] = set()
    every = [
        (base_path(name).replace(".original_module.", "."), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    for name, parameter in sorted(every, key=lambda item: item[0]):
        if id(parameter) in adapters or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        kept = originals.get(id(parameter))
        # the parameter itself where nothing is merged: it lives as long as the model, so its digest can be remembered
        same = kept is None or kept.data_ptr() == parameter.data_ptr()
        found[name] = parameter if same else kept  # type: ignore[assignment]
        if found[name].is_meta and id(parameter) not in elsewhere:
            raise ExpertError(f"the base's weight {name} has no values yet (meta device)", remedy="load the base fully")
    return found


def readers(model: nn.Module) -> dict[int, Callable[[], torch.Tensor]]:
    """By the id of a parameter, what gives the values of those that are quantised or offloaded."""
    found: dict[int, Callable[[], torch.Tensor]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "weight" and isinstance(module, LINEAR) and weights.kind(module) == weights.QUANTIZED:
                found[id(parameter)] = partial(weights.value, module)
            elif parameter.is_meta and weights.is_offloaded(module):
                found[id(parameter)] = partial(_read, module, name)
    return found


def _read(module: nn.Module, name: str) -> torch.Tensor:
    if name == "weight" and isinstance(module, LINEAR):
        return weights.value(module)  # it may be quantised too
    return weights.offloaded_parameter(module, name)  # type: ignore[return-value]


def describe(model: nn.Module) -> dict[str, str]:
    """The base's name and dtype: ``sigmix_base["name"]`` if `load_base` made it, else transformers' name of it.

    A quantised base's dtype is "bfloat16 in int8", say.
    """
    model = bare(model)
    own = getattr(model, "sigmix_base", None) or {}
    config = getattr(model, "config", None)
    name = own.get("name") or getattr(config, "_name_or_path", None) or type(model).__name__
    dtypes = [p.dtype for p in parameters(model).values() if p.ndim > 1 and p.is_floating_point()] or [torch.float32]
    dtype = str(dtypes[0]).removeprefix("torch.")
    return {"name": str(name), "dtype": f"{dtype} in {own['quantization']}" if "quantization" in own else dtype}


def dtype_and_quantization(told: str | None) -> tuple[str | None, str | None]:
    """("bfloat16", "int8") of "bfloat16 in int8", as `describe` calls the dtype of a base; None for what is not said.

    They are what `load_base` takes to load such a base again.
    """
    dtype, _, quantization = (told or "").partition(" in ")
    return dtype or None, quantization or None


def _ids(container: Any) -> Iterable[int]:
    if isinstance(container, nn.Parameter):
        return [id(container)]
    if isinstance(container, nn.Module):
        return [id(parameter) for parameter in container.parameters()]
    return []
