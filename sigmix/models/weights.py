"""The weight of a linear layer, however it is stored.

    plain        a float tensor: returned as it is, without a copy
    quantized    torchao's tensor subclasses, bitsandbytes' 4-bit layers: the dequantized weight W_q, a copy
    offloaded    on disk or CPU between passes (accelerate), on the meta device meanwhile: a copy

Copies are never cached. Shape, dtype and device are read without the values. Not supported: checkpoints with layer
classes of their own (GPTQ, AWQ), and bitsandbytes' LLM.int8(), see `sigmix.models.quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sigmix.errors import BaseModelError

PLAIN, QUANTIZED, OFFLOADED, META = "plain", "quantized", "offloaded", "meta"


def kind(layer: nn.Module) -> str:
    """Return `PLAIN`, `QUANTIZED`, `OFFLOADED`, or `META` for a layer without values."""
    weight: Any = layer.weight
    if weight.is_meta:
        return OFFLOADED if is_offloaded(layer) else META
    return QUANTIZED if is_quantized(weight) else PLAIN


def is_quantized(weight: Tensor) -> bool:
    """Return True for a weight stored in fewer bits than it computes in."""
    # bitsandbytes stores integers, or bytes in any dtype; torchao's subclasses have the dtype that they compute in
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        return True
    return type(weight) not in (Tensor, nn.Parameter) and _is_subclass(weight)


def _is_subclass(weight: Any) -> bool:
    # every tensor has a dequantize method; only quantized subclasses (not DTensor) override it
    return hasattr(weight, "__tensor_flatten__") and type(weight).dequantize is not Tensor.dequantize


def prevent_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes' 4-bit weights as they are stored.

    On CPUs with avx512_bf16 bitsandbytes would repack them in the first pass, which rounds their scales to bfloat16
    (another base than before) and loses gradients.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def shape(layer: nn.Module) -> tuple[int, int]:
    """Return (out, in) of a `torch.nn.Linear`, a quantized linear layer, or a `Conv1D`."""
    if isinstance(layer, Conv1D):
        return layer.weight.shape[1], layer.weight.shape[0]
    linear: Any = layer
    return linear.out_features, linear.in_features


def device(layer: nn.Module) -> torch.device:
    """Return the device that the layer computes on, also for an offloaded one."""
    weight: Any = layer.weight
    if weight.is_meta and (hook := _offload_hook(layer)) is not None:
        return torch.device(hook.execution_device)
    return weight.device


def dtype(layer: nn.Module) -> torch.dtype:
    """Return the dtype that the layer computes in."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        return getattr(layer, "compute_dtype", None) or weight.quant_state.dtype
    return weight.dtype


def value(layer: nn.Module) -> Tensor:
    """Return the weight in a float dtype, laid out as in the layer: [out, in], for a `Conv1D` [in, out].

    Raises:
        BaseModelError: unsupported quantization.
    """
    what = kind(layer)
    weight: Any = layer.weight.data  # a quantized subclass, too, without the class of a parameter
    if what == OFFLOADED:
        weight = offloaded_parameter(layer, "weight").to(device(layer))  # type: ignore[union-attr]
    if what in (PLAIN, META) or (what == OFFLOADED and not is_quantized(weight)):
        return weight
    return _dequantize(layer, weight)


@torch.no_grad()
def _dequantize(layer: nn.Module, weight: Any) -> Tensor:
    """Return W_q [out, in]; the layer computes W_q x up to rounding."""
    if _is_subclass(weight):
        return weight.dequantize()
    state = getattr(layer.weight, "quant_state", None)
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight, state).to(dtype(layer))
    raise BaseModelError(
        f"a weight of {type(layer).__name__} in {weight.dtype} cannot be dequantized"
        + (", because bitsandbytes has repacked it for this CPU" if state is not None else ""),
        remedy="load it with load_base(…, quantization_config=…), which prevents that",
    )


def bias(layer: nn.Module) -> Tensor | None:
    """Return the bias [out] on the device that the layer computes on, or None."""
    stored: Any = layer.bias
    if stored is not None and stored.is_meta and is_offloaded(layer):
        return offloaded_parameter(layer, "bias").to(device(layer))  # type: ignore[union-attr]
    return stored


def is_offloaded(module: nn.Module) -> bool:
    """Return True if accelerate stores the module's own parameters elsewhere between passes. Reads no values."""
    return _offload_hook(module) is not None


def offloaded_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a copy of an offloaded parameter of ``module`` itself, or None if it is not offloaded."""
    hook = _offload_hook(module)
    return None if hook is None else hook.weights_map[name]


def _offload_hook(layer: nn.Module) -> Any:
    hook = getattr(layer, "_hf_hook", None)
    return next((one for one in getattr(hook, "hooks", [hook]) if getattr(one, "weights_map", None) is not None), None)


def weights_key(weights: Iterable[Tensor]) -> tuple[tuple[int, torch.dtype, int], ...]:
    """Return a key of tensors that changes when one is replaced, cast, moved or edited in place."""
    return tuple((weight.data_ptr(), weight.dtype, weight._version) for weight in weights)
