"""The fingerprint of a base: SHA-256 over the path, shape and values of every parameter.

It answers one question: is this the base that the expert was made on? Values are hashed as float32, so an exact upcast
(bfloat16 loaded as float32) is the same base, and a rounding (float32 loaded as bfloat16) is another one. A quantised
weight counts as its dequantised values, so a quantised base is another base than the one that it was made of, and an
offloaded weight as what lies on the disk.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from sigmix.errors import FingerprintError
from sigmix.experts.base import dtype_and_quantization, parameters, readers
from sigmix.svf.decompose import weight_digest
from sigmix.svf.weights import is_quantised

SAMPLES = 64

# id of a tensor -> (the tensor, weakly, so that a reused id is noticed; its state when it was hashed; its digest)
_KNOWN: dict[int, tuple[weakref.ref, tuple, str]] = {}


def fingerprint(model: nn.Module, fresh: bool = False) -> str:
    """Hex SHA-256 of a base, the same whether it is plain, PEFT-wrapped, adapted or merged.

    Digests are remembered per parameter until it changes: an in-place operation, another storage, or other values at
    64 places spread over it (edits through ``.data`` leave no other trace; PEFT's merging of a LoRA is such an edit).

    Args:
        model: the base, in any of these states. Adapter parameters (z too) do not count; tied weights count once.
        fresh: read all values again, whatever is remembered.

    Raises:
        ExpertError: weights on the meta device.
    """
    found, elsewhere = parameters(model), readers(model)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        digests = pool.map(lambda one: _digest(one, fresh, elsewhere.get(id(one))), found.values())
        pairs = zip(found.items(), digests, strict=True)
        return combined((name, tuple(parameter.shape), digest) for (name, parameter), digest in pairs)


def combined(parts: Iterable[tuple[str, tuple[int, ...], str]]) -> str:
    """The fingerprint of (name, shape, digest) of every parameter, sorted by name, tied ones once."""
    total = hashlib.sha256(b"sigmix-base-v1\n")
    for name, shape, digest in parts:
        total.update(f"{name} {shape} {digest}\n".encode())
    return total.hexdigest()


def short(full: str | None) -> str:
    """The first twelve digits of a fingerprint, for messages."""
    return full[:12] if full else "unknown"


def _digest(parameter: torch.Tensor, fresh: bool, read: Callable[[], torch.Tensor] | None) -> str:
    state = _state(parameter)
    known = _KNOWN.get(id(parameter))
    if not fresh and known is not None and known[0]() is parameter and known[1] == state:
        return known[2]
    digest = weight_digest(parameter if read is None else read())
    key = id(parameter)
    _KNOWN[key] = (weakref.ref(parameter, lambda _: _KNOWN.pop(key, None)), state, digest)
    return digest


def _state(parameter: torch.Tensor) -> tuple:
    about = parameter._version, parameter.dtype, tuple(parameter.shape)
    if parameter.is_meta:
        return about
    if is_quantised(parameter) and parameter.is_floating_point():  # torchao's: the numbers lie in tensors inside
        return *about, *(getattr(parameter, name).data_ptr() for name in parameter.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    flat = parameter.detach().reshape(-1) if parameter.is_contiguous() else parameter.detach().flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLES)][: SAMPLES + 1].float().cpu().numpy().tobytes()
    return *about, parameter.data_ptr(), sample


def foreign(name: str, mine: Mapping[str, Any], found: Mapping[str, Any]) -> FingerprintError:
    """The error for an expert that was made on another base, with what to do about it.

    Args:
        name: the expert's. mine, found: its base and the one at hand: name, dtype, fingerprint.
    """

    def shown(base: Mapping[str, Any]) -> str:
        dtype = f" in {base['dtype']}" if base.get("dtype") else ""
        return f"{base.get('name', 'an unnamed base')}{dtype} (fingerprint {short(base.get('fingerprint'))})"

    remedy = f"load the base that it was made on: load_base({mine.get('name')!r})"
    if mine.get("name") == found["name"]:
        remedy = "the name is the same, but the weights are not: "
        dtype, quantization = dtype_and_quantization(mine.get("dtype"))
        if quantization is not None and mine["dtype"] != found["dtype"]:
            remedy += f"load it as the expert had it, with dtype={dtype!r}, quantization={quantization!r}"
        elif " in " in found["dtype"]:
            remedy += (
                "this one is quantised; to use the expert in its own basis here, call "
                "sigmix.experts.original.use_original_basis(model), or on the command line add --basis original"
            )
        elif mine.get("dtype") not in (None, found["dtype"]):
            remedy += f"load it with dtype={mine['dtype']!r}, in which the expert was made, or wider"
        else:
            remedy += "another revision, or weights changed after loading; load the base afresh"
    what = f"expert {name!r} was made on {shown(mine)}, but this base is {shown(found)}"
    return FingerprintError(what, remedy=remedy)
