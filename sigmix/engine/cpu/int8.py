"""8-bit copies of weights: int8 numbers and a scale per output feature (symmetric), for decoding on a CPU.

    y = scale · (x qᵀ) + bias,  scale = max |W| / 127 of each row of W,  q = round(W / scale)

Inputs are not rounded to 8 bits: per row that was measured at four to seven times the KL of rounding the weights.
The kernel in `int8_linear.cpp` is compiled in seconds, once for a machine. torch's own kernels were measured at up to
three times its time: `_weight_int8pack_mm` (which torchao's 8-bit weights use), `_int_mm`, oneDNN's and FBGEMM's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import pad

from sigmix.errors import ConfigError
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file

DECODE_WEIGHTS = ("int8",)
"""Formats of decode weights, besides those of the base."""

WITHOUT = "leave out decode_weights (--decode-weights)"

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

BLOCK = 16
"""Output features in a block of the kernel's layout."""

MAX_IN_FEATURES = 1 << 16
"""Largest number of input features for which the kernel's 32-bit sums cannot overflow."""


def check_decode_weights(value: object, quantization: str | None = None) -> None:
    """Raise `ConfigError` unless ``value`` is None, or one of `DECODE_WEIGHTS` and this machine can compute with it.

    Args:
        quantization: of the base model.
    """
    if value is None:
        return
    if value not in DECODE_WEIGHTS:
        raise ConfigError(
            f"decode weights must be {', '.join(DECODE_WEIGHTS)}, not {value!r}", remedy="leave them out for the base's"
        )
    if quantization is not None:
        raise ConfigError(
            f"{value} decode weights cannot be made of a base in {quantization}",
            remedy=f"leave out the quantization, or {WITHOUT}",
        )
    kernel()


@dataclass(frozen=True)
class Int8Weight:
    """8-bit copy of a weight [out, in], and the layer's bias.

    Attributes:
        numbers: uint8 [out / 16, in / 4, 16, 4], padded, with 128 added.
        scales, bias: float32 [out], padded; without a bias zeros.
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor
    out_features: int

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.numbers.nbytes + self.scales.nbytes + self.bias.nbytes


def quantize(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Int8Weight:
    """Return the 8-bit copy of a weight [out, in] and its bias [out].

    Raises:
        ConfigError: a row is so long that the kernel's 32-bit sums might overflow.
    """
    out, size = weight.shape
    if size > MAX_IN_FEATURES:
        raise ConfigError(f"8-bit weights can have {MAX_IN_FEATURES} input features, not {size}")
    values = weight.detach().float()
    scales = values.abs().amax(1) / 127
    numbers = (values / scales.where(scales > 0, 1)[:, None]).round_() + 128
    blocks = pad(numbers.to(torch.uint8), (0, -size % BLOCK, 0, -out % BLOCK), value=128)
    blocks = blocks.reshape(blocks.shape[0] // BLOCK, BLOCK, -1, 4).transpose(1, 2).contiguous()
    shift = torch.zeros(out) if bias is None else bias.detach().float()
    return Int8Weight(blocks, pad(scales, (0, -out % BLOCK)), pad(shift, (0, -out % BLOCK)), out)


def int8_linear(x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    """Compute a linear layer, x [..., in] -> [..., out] in x's dtype, without gradients.

    A row's result does not depend on the other rows, bit for bit.
    """
    if x.dtype not in (torch.bfloat16, torch.float32):
        return int8_linear(x.float(), weight).to(x.dtype)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    size = x.shape[-1]
    kernel()(
        x.dtype == torch.bfloat16, x.data_ptr(), x.numel() // size, size, weight.numbers.data_ptr(),
        weight.scales.data_ptr(), weight.bias.data_ptr(), y.data_ptr(), weight.out_features, torch.get_num_threads(),
    )  # fmt: skip
    return y


@functools.cache
def kernel() -> Callable[..., None]:
    """Return the kernel, compiled for this machine.

    Raises:
        ConfigError: this machine cannot run or compile it.
    """
    cpu = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, (bool, str))}
    if sys.platform != "linux" or not cpu.get("avx512_vnni"):
        raise ConfigError("8-bit decode weights need Linux on a CPU with AVX-512 VNNI", remedy=WITHOUT)
    source = Path(__file__).with_name("int8_linear.cpp")
    command = [os.environ.get("CXX", "c++"), *FLAGS]
    try:
        version = subprocess.run([command[0], "--version"], check=True, capture_output=True).stdout
        content = repr([source.read_bytes(), command, version, sorted(cpu.items())])
        path = cache_dir() / "compiled" / f"int8-{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
        if not path.is_file():
            with atomic_file(path) as temporary:
                subprocess.run([*command, "-o", temporary, source], check=True, capture_output=True)
        function = ctypes.CDLL(str(path)).int8_linear
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").split("\n")
        raise ConfigError(
            f"8-bit decode weights need a C++ compiler with OpenMP, and {command[0]} fails: {lines[0] or error}",
            remedy=f"install g++, set CXX, or {WITHOUT}",
        ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, size, size, pointer, pointer, pointer, pointer, size, ctypes.c_int]
    function.restype = None
    return function
