"""C++ kernels for decoding on a CPU: linear layers with bfloat16 or 8-bit weights, attention, and greedy choice.

`kernels.cpp` is compiled in seconds, once for a machine. On two cores with AVX-512 BF16 its bfloat16 linear layers were
timed against oneDNN's packed weights (default base): 1.7 times as fast with one row, 1.4 times with 8, 1.1 times with
32, and level with many. With AMX, which is used where the input features are a multiple of 32: 1.5, 1.4 and 1.5 times,
and 1.1 times with 1,024 rows, where AVX-512 alone takes ten times as long. Unlike oneDNN's, a row's result does not
depend on the other rows, bit for bit.

8-bit weights are int8 numbers and a scale per output feature (symmetric):

    y = scale · (x qᵀ) + bias,  scale = max |W| / 127 of each row of W,  q = round(W / scale)

Inputs are not rounded to 8 bits: per row that was measured at four to seven times the KL of rounding the weights.
torch's own kernels were measured at up to three times the time: `_weight_int8pack_mm` (which torchao's 8-bit weights
use), `_int_mm`, oneDNN's and FBGEMM's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from sigmix.errors import ConfigError
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import atomic_file

log = logging.getLogger(__name__)

DECODE_WEIGHTS = ("int8",)
"""Formats of decode weights, besides those of the base."""

WITHOUT = "leave out decode_weights (--decode-weights)"

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")

SHIMS = {
    "linear": "AOTITorchError aoti_torch_cpu_linear(AtenTensorHandle, int64_t, int64_t, AtenTensorHandle*)",
    "attention": "AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,"
    " AtenTensorHandle, double, double, AtenTensorHandle*)",
}
"""C functions of the kernels that a compiled step calls for operators."""

BLOCK = 16
"""Output features in a block of the kernels' layouts."""

MAX_IN_FEATURES = 1 << 16
"""Largest number of input features for which the 32-bit sums of 8-bit weights cannot overflow."""


class _Layer(ctypes.Structure):
    _fields_ = (
        ("in_features", ctypes.c_int64), ("out_features", ctypes.c_int64),
        ("weights", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("bias", ctypes.c_void_p),
    )  # fmt: skip


class NativeLinear:
    """Linear layer with a weight in a kernel's layout; without gradients.

    Args:
        weights: bfloat16 [out / 16, in / 2, 16, 2], or uint8 [out / 16, in / 4, 16, 4] with 128 added; padded.
        scales: float32 [out, padded] of 8-bit weights.
        bias: float32 [out, padded].
    """

    def __init__(
        self,
        size: torch.Size,
        weights: torch.Tensor,
        scales: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        self.out_features, self.in_features = size
        self._tensors = [weights, scales, bias]
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in self._tensors)
        self._layer = _Layer(self.in_features, self.out_features, *addresses)
        self.address = ctypes.addressof(self._layer)

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the layer, x [..., in] -> [..., out] in x's dtype; bfloat16 weights take bfloat16 only.

        A row's result does not depend on the other rows, bit for bit.
        """
        if x.dtype not in (torch.bfloat16, torch.float32):
            return self(x.float()).to(x.dtype)
        x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.out_features)
        half, count = x.dtype == torch.bfloat16, x.numel() // self.in_features
        if not load_kernels().sigmix_linear(
            self.address, half, x.data_ptr(), count, y.data_ptr(), torch.get_num_threads()
        ):
            raise TypeError(f"this machine cannot compute the layer in {x.dtype}")
        return y


def bfloat16_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NativeLinear:
    """Return the layer of a bfloat16 weight [out, in] with even ``in``, and a bias [out]."""
    pairs = _padded(weight.detach().contiguous().view(torch.int32), 0)  # two input features each
    blocks = pairs.reshape(-1, BLOCK, pairs.shape[1]).transpose(1, 2).contiguous()
    return NativeLinear(weight.shape, blocks, None, _bias(bias))


def int8_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> NativeLinear:
    """Return the layer of the 8-bit copy of a weight [out, in], and a bias [out].

    Raises:
        ConfigError: a row is so long that the kernel's 32-bit sums might overflow.
    """
    size = weight.shape[1]
    if size > MAX_IN_FEATURES:
        raise ConfigError(f"8-bit weights can have {MAX_IN_FEATURES} input features, not {size}")
    values = weight.detach().float()
    scales = values.abs().amax(1) / 127
    numbers = (values / scales.where(scales > 0, 1)[:, None]).round_() + 128
    padded = pad(_padded(numbers.to(torch.uint8), 128), (0, -size % BLOCK), value=128)
    blocks = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, 4).transpose(1, 2).contiguous()
    return NativeLinear(weight.shape, blocks, pad(scales, (0, -len(scales) % BLOCK)), _bias(bias))


def _padded(matrix: torch.Tensor, value: int) -> torch.Tensor:
    return pad(matrix, (0, 0, 0, -len(matrix) % BLOCK), value=value)


def _bias(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else pad(bias.detach().float(), (0, -len(bias) % BLOCK))


def can_choose(logits: torch.Tensor) -> bool:
    """Return True if `greedy` takes these logits."""
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and has_bfloat16()


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the most probable token int64 [N] and its log-probability float32 [N], from logits bfloat16 [N, V].

    torch's conversion to float32, argmax and logsumexp were measured at six times the time and more. NaN or an infinite
    logit in a row makes its log-probability NaN.
    """
    logits = logits.contiguous()
    count, size = logits.shape
    tokens, logprobs = torch.empty(count, dtype=torch.long), torch.empty(count)
    load_kernels().sigmix_greedy(
        logits.data_ptr(), count, size, tokens.data_ptr(), logprobs.data_ptr(), torch.get_num_threads()
    )
    return tokens, logprobs


Table = tuple[list[Any], Any]
"""Layers of a compiled step, and the array of their addresses."""


def set_layers(layers: list[Any], last: Table | None = None) -> Table:
    """Set the layers of the next call of a compiled step in this thread; it calls Python for those not in C++.

    Args:
        last: result of the last call, which is returned if the layers are the same.

    Returns:
        The table, which must be kept until the step has ended.
    """
    if last is None or last[0] != layers:
        addresses = [one.address if isinstance(one, NativeLinear) else None for one in layers]
        last = layers, (ctypes.c_void_p * len(layers))(*addresses)
    load_kernels().sigmix_set_layers(last[1])
    return last


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
    if not has_int8():
        raise ConfigError("8-bit decode weights need Linux on a CPU with AVX-512 VNNI", remedy=WITHOUT)
    load_kernels()


def has_int8() -> bool:
    """Return True if this CPU can compute with 8-bit weights."""
    return sys.platform == "linux" and bool(torch.cpu.get_capabilities().get("avx512_vnni"))


@functools.cache
def has_kernels() -> bool:
    """Return True if this machine can run and compile the kernels."""
    try:
        load_kernels()
    except ConfigError as error:
        log.info("%s", error)
        return False
    return True


@functools.cache
def has_bfloat16() -> bool:
    """Return True if this machine can compute with bfloat16 weights in C++."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16")) and has_kernels()


@functools.cache
def load_kernels() -> ctypes.CDLL:
    """Return the kernels, compiled for this machine.

    Raises:
        ConfigError: this machine cannot run or compile it.
    """
    cpu = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, (bool, str))}
    if sys.platform != "linux" or not cpu.get("avx512_f"):
        raise ConfigError("linear layers in C++ need Linux on a CPU with AVX-512", remedy=WITHOUT)
    source = Path(__file__).with_name("kernels.cpp")
    folder = Path(torch.__file__).parent
    command = [
        os.environ.get("CXX", "c++"), *FLAGS, str(source), f"-I{folder}/include", f"-L{folder}/lib", "-ltorch_cpu",
    ]  # fmt: skip
    try:
        version = subprocess.run([command[0], "--version"], check=True, capture_output=True).stdout
        content = repr([source.read_bytes(), command, version, torch.__version__, sorted(cpu.items())])
        path = cache_dir() / "compiled" / f"kernels-{hashlib.sha256(content.encode()).hexdigest()[:32]}.so"
        if not path.is_file():
            with atomic_file(path) as temporary:
                subprocess.run([*command, "-o", temporary], check=True, capture_output=True)
        loaded = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)  # compiled steps find `SHIMS` in it
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or b"").decode(errors="replace").split("\n")
        raise ConfigError(
            f"linear layers in C++ need a C++ compiler with OpenMP, and {command[0]} fails: {lines[0] or error}",
            remedy=f"install g++, set CXX, or {WITHOUT}",
        ) from error
    pointer = ctypes.c_void_p
    loaded.sigmix_linear.argtypes = [pointer, ctypes.c_bool, pointer, ctypes.c_int64, pointer, ctypes.c_int]
    loaded.sigmix_linear.restype = ctypes.c_bool
    loaded.sigmix_greedy.argtypes = [pointer, ctypes.c_int64, ctypes.c_int64, pointer, pointer, ctypes.c_int]
    loaded.sigmix_greedy.restype = None
    loaded.sigmix_set_layers.argtypes, loaded.sigmix_set_layers.restype = [pointer], None
    return loaded
