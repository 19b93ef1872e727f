"""What a linear layer's weight is, wherever and however it is kept.

    plain        a float tensor: the weight itself, no copy
    quantised    torchao's tensor subclasses, bitsandbytes' 4-bit layers: the dequantised weight W_q, a copy
    offloaded    left on disk or on the CPU by accelerate, on the meta device between passes: a copy, read when asked

A quantised or offloaded weight is never kept: whoever asks for its values gets them once and lets them go. What is
asked in every pass (shape, dtype, device) is known without them.

What it does not do: checkpoints whose layers are no `torch.nn.Linear` (GPTQ's and AWQ's own classes), and bitsandbytes'
LLM.int8(), which rounds activations too, see `sigmix.models.quantization`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError

PLAIN, QUANTISED, OFFLOADED, META = "plain", "quantised", "offloaded", "meta"


Tensor = torch.Tensor


def kind(layer: nn.Module) -> str:
    """`PLAIN`, `QUANTISED`, `OFFLOADED`, or `META` where there are no values at all (yet)."""
    weight: Any = layer.weight
    if weight.is_meta:
        return OFFLOADED if _map(layer) is not None else META
    return QUANTISED if is_quantised(weight) else PLAIN


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is kept in fewer bits than it computes in."""
    # bitsandbytes keeps integers; torchao's subclasses say the dtype that they compute in
    return not weight.is_floating_point() or (type(weight) not in (Tensor, nn.Parameter) and _subclass(weight))


def _subclass(weight: Any) -> bool:
    # every tensor has a dequantize; only a subclass that keeps other numbers, unlike DTensor, has one of its own
    return hasattr(weight, "__tensor_flatten__") and type(weight).dequantize is not Tensor.dequantize


def shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a `torch.nn.Linear`, one of its quantised kin, or a `Conv1D`."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    found: Any = layer
    return found.out_features, found.in_features


def device(layer: nn.Module) -> torch.device:
    """Where the layer computes; for an offloaded one not where its weight lies."""
    weight: Any = layer.weight
    if weight.is_meta and _map(layer) is not None:
        return torch.device(_hook(layer).execution_device)
    return weight.device


def dtype(layer: nn.Module) -> torch.dtype:
    """What the layer computes in."""
    weight: Any = layer.weight
    if weight.is_floating_point():
        return weight.dtype
    return getattr(layer, "compute_dtype", None) or weight.quant_state.dtype


def value(layer: nn.Module) -> Tensor:
    """The weight's values, as the layer stores them ([out, in]; `Conv1D` [in, out]), in a float dtype.

    Raises:
        BaseModelError: quantised in a way that is not known here.
    """
    what, weight = kind(layer), _data(layer.weight)
    if what == OFFLOADED:
        weight = _map(layer)["weight"].to(device(layer))
    if what in (PLAIN, META) or (what == OFFLOADED and not is_quantised(weight)):
        return weight
    return dequantised(layer, weight)


@torch.no_grad()
def dequantised(layer: nn.Module, weight: Any) -> Tensor:
    """W_q [out, in]: what ``layer`` computes is W_q x up to rounding."""
    if _subclass(weight):
        return weight.dequantize()
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, state).to(dtype(layer))
    raise BaseModelError(
        f"a weight of {type(layer).__name__} in {weight.dtype} cannot be dequantised"
        + (", because bitsandbytes has repacked it for this CPU" if state is not None else ""),
        remedy="load it with load_base(…, quantization_config=…), which keeps such weights as they are",
    )


def bias(layer: nn.Module) -> Tensor | None:
    """The bias [out] on the device where the layer computes, or None."""
    found: Any = layer.bias
    if found is not None and found.is_meta and _map(layer) is not None:
        return _map(layer)["bias"].to(device(layer))
    return found


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's own parameters elsewhere between passes; nothing is read to tell."""
    return _map(module) is not None


def offloaded(module: nn.Module, name: str) -> Tensor | None:
    """A copy of a direct parameter of ``module`` that accelerate has offloaded; None if it is not offloaded."""
    held = _map(module)
    return None if held is None else held[name]


def _data(weight: Any) -> Tensor:
    # .data of torchao's subclasses is the same object without its parameter's class
    return weight.data


def _hook(layer: nn.Module) -> Any:
    hook = getattr(layer, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None), None)


def _map(layer: nn.Module) -> Any:
    hook = _hook(layer)
    return None if hook is None else hook.weights_map
