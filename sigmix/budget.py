"""Memory, disk and time for decomposing, training and serving a base, from its config: estimates, before anything runs.

Memory is counted, tensor by tensor, from the same arithmetic that the code does; what is counted is written beside each
figure. Time is FLOPs and bytes over rates that are measured here on small matrices (`measure_rates`), so it is of this
machine and dtype, and an estimate: kernels reach other shares of their peak at other sizes.

For W [m, n], r = min(m, n), in b bytes a number:

    decompose   the largest matrix alone: b·mn as read, 8·mn in float64, and `EIGH` arrays of 8·r² (Gram matrix,
                eigenvectors, LAPACK's workspace); one matrix at a time, so the number of layers does not matter
    train       weights, factors b·r(m+n), and the larger of merged copies (while it acts) and what the backward pass
                keeps (while it learns): activations of every token read, and four times the answers' logits
    serve       weights and, by form, nothing more, merged copies (b·mn for each mix kept), the short side (b·r²; the
                gain form), or both sides (the factored form); keys and values for each token of each request;
                one layer's activations while all requests are read at once

A device map spreads layers evenly: N devices hold an N-th of all that belongs to layers (weights, factors, z, what a
pass keeps, keys and values), and one of them the logits and the layer that is at work as well. Not counted: the process
itself (its libraries), fragmentation, the copies that loading makes for a moment, and a tokenizer.

A token written reads the weights once for all requests: in the base and the merged form W, in the gain form the short
sides too, in the factored form both sides in place of W. FLOPs are of the weights that a token meets: of fused experts
those that it is routed to, and no input embedding that is a table of its own.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sigmix.errors import ConfigError
from sigmix.plan import model_plan
from sigmix.sizes import BITS, BYTES, Sizes

EIGH = 5
"""Arrays of r² float64 at the peak of one decomposition: LAPACK's divide and conquer takes 2 r² of workspace beside the
Gram matrix, the eigenvectors and a reordered copy. Measured 4.2 to 5.0."""
SCORES = 8 << 20
"""Bytes of float32 attention scores of one layer up to which a pass keeps them."""


@dataclass(frozen=True)
class Rates:
    """What a device does in a second.

    Attributes:
        matmul: FLOPs in the base's dtype. matmul64: in float64. copy: bytes read and written. hashed: bytes of SHA-256.
        eigh: {r: seconds of a symmetric eigenproblem in float64}.
    """

    device: str
    dtype: str
    matmul: float
    matmul64: float
    copy: float
    hashed: float
    eigh: Mapping[int, float]

    def eigh_seconds(self, r: int) -> float:
        """For r×r: between the measured sizes on a log scale, beyond them as r³."""
        sizes = sorted(self.eigh)
        small, large = sizes[0], sizes[-1]
        if r <= small or r >= large:
            near = small if r <= small else large
            return self.eigh[near] * (r / near) ** 3
        power = math.log(self.eigh[large] / self.eigh[small]) / math.log(large / small)
        return self.eigh[small] * (r / small) ** power


def measure_rates(device: Any = "cpu", dtype: str = "bfloat16", sizes: tuple[int, int] = (256, 1024)) -> Rates:
    """Rates of a device, in a few seconds.

    Args:
        sizes: of the eigenproblems that are timed.
    """
    import torch

    where, kind = torch.device(device), getattr(torch, dtype)
    draw = torch.Generator().manual_seed(0)

    def seconds(work: Callable[[], Any], repeats: int) -> float:
        best = float("inf")
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            work()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            best = min(best, time.perf_counter() - begun)
        return best

    m, k, n = 512, 2048, 2048
    x, w = (torch.randn(*shape, generator=draw).to(where, kind) for shape in ((m, k), (n, k)))
    matmul = 2 * m * k * n / seconds(lambda: torch.nn.functional.linear(x, w), 4)
    wide = torch.randn(768, 1536, generator=draw).to(where, torch.float64)
    matmul64 = 2 * 768 * 768 * 1536 / seconds(lambda: wide @ wide.T, 3)
    block = torch.zeros(1 << 25, dtype=torch.uint8, device=where)
    copy = 2 * block.numel() / seconds(lambda: block.clone(), 4)
    host = bytes(1 << 24)
    hashed = len(host) / seconds(lambda: hashlib.sha256(host), 2)
    eigh = {}
    for r in sizes:
        square = torch.randn(r, 2 * r, generator=draw).to(where, torch.float64)
        gram = square @ square.T
        eigh[r] = seconds(lambda gram=gram: torch.linalg.eigh(gram), 1)  # type: ignore[misc]
    return Rates(str(where), dtype, matmul, matmul64, copy, hashed, eigh)


@dataclass(frozen=True)
class Load:
    """What is to be run.

    Attributes:
        batch: answers of a training step. group: of them per prompt. prompt, answer: tokens of each.
        requests: answers that are decoded together when serving. context: tokens of each. mixes: merged mixes kept.
    """

    batch: int = 64
    group: int = 4
    prompt: int = 64
    answer: int = 16
    requests: int = 32
    context: int = 1000
    mixes: int = 1

    def __post_init__(self) -> None:
        if any(value < 1 for value in asdict(self).values()):
            raise ConfigError(f"a load's numbers are at least 1: {asdict(self)}")


def budget(
    config: Any,
    rates: Rates | None = None,
    dtype: str = "bfloat16",
    load: Load | None = None,
    gpus: int = 1,
    quantization: str | None = None,
    cuda: bool | None = None,
) -> dict[str, Any]:
    """Memory, disk and time for a model that a transformers ``config`` describes.

    Args:
        rates: of the machine that is asked about; None: no times.
        dtype: of the weights. load: what is run; default: `Load`. gpus: devices that layers are spread over.
        quantization: of the linear layers, see `sigmix.placement`; then there is no merged and no factored form.
        cuda: whether the weights lie on GPUs, where int4 is packed; None: with several devices, or a GPU's rates.

    Returns:
        A dict for JSON, bytes and seconds: ``decompose``, ``train`` and ``serve``, each with ``parts`` (what the peak
        is made of), ``peak_bytes`` and, for the latter two, ``per_gpu_bytes``; ``dtype``, ``gpus``, ``load``,
        ``rates``.

    Raises:
        BaseModelError: see `model_plan`; or a kind of model whose layers are not counted here.
        ConfigError: a dtype, a quantisation or a number of devices that cannot be.
    """
    if gpus < 1:
        raise ConfigError(f"at least one device, not {gpus}")
    load = load or Load()
    if cuda is None:
        cuda = gpus > 1 or (rates is not None and rates.device.startswith("cuda"))
    size = sizes(config, dtype, quantization, cuda)
    made: dict[str, Any] = {"dtype": dtype, "gpus": gpus, "quantization": quantization, "load": asdict(load)}
    made["rates"] = None if rates is None else asdict(rates)
    made |= {"decompose": _decompose(size, rates), "train": _train(size, load, rates, gpus)}
    return made | {"serve": _serve(size, load, rates, gpus)}


def sizes(config: Any, dtype: str = "bfloat16", quantization: str | None = None, cuda: bool = False) -> Sizes:
    """The counts of a model that all of this is made of; see `budget`.

    Raises:
        BaseModelError: see `model_plan`. ConfigError: a dtype or a quantisation that cannot be.
    """
    if dtype not in BYTES:
        raise ConfigError(f"weights have no dtype {dtype!r}", remedy=f"one of {', '.join(BYTES)}")
    if quantization is not None and quantization not in BITS:
        raise ConfigError(f"unknown quantization {quantization!r}", remedy=f"one of {', '.join(BITS)}")
    return Sizes(config, model_plan(config), BYTES[dtype], quantization, cuda)


def serving_forms(size: Sizes, mixes: int = 1) -> dict[str, int]:
    """{form: bytes beside the weights}, with ``mixes`` merged mixes kept; a quantised base has base and gain only."""
    forms = {"base": 0, "gain": size.b * size.short + 4 * size.ranks}
    if not size.quantised:
        forms["merged"] = mixes * size.b * size.adapted + size.b * size.short
        forms["factored"] = size.b * size.both + 4 * size.ranks
    return forms


def _decompose(size: Sizes, rates: Rates | None) -> dict[str, Any]:
    def peak(m: int, n: int) -> int:
        return size.b * m * n + 8 * m * n + EIGH * 8 * min(m, n) ** 2

    m, n, _ = max(size.shapes, key=lambda shape: peak(*shape[:2]), default=(0, 0, 0))
    parts = {"weight": size.b * m * n, "float64": 8 * m * n, "eigenproblem": EIGH * 8 * min(m, n) ** 2}
    made: dict[str, Any] = {"largest": [m, n], "parts": parts, "peak_bytes": sum(parts.values())}
    made["whole_model_bytes"] = size.b * size.parameters
    made["disk_bytes"] = size.plan["disk_bytes"]
    made["flops"] = sum(_gram_flops(m, n) * c for m, n, c in size.shapes)
    if rates is not None:
        each = [(_decompose_seconds(size.b, m, n, rates), c) for m, n, c in size.shapes]
        made["seconds"] = sum(seconds * count for seconds, count in each)
    return made


def _gram_flops(m: int, n: int) -> float:
    # the upper triangle of eight blocks a side: 36 of 64
    r = min(m, n)
    return 2 * r * r * max(m, n) * 36 / 64


def _decompose_seconds(b: int, m: int, n: int, rates: Rates) -> float:
    r = min(m, n)
    read = (2 * b + 4) * m * n / rates.copy + 4 * m * n / rates.hashed
    copies = (2 * 8 * m * n + 6 * 8 * r * r) / rates.copy
    return read + copies + _gram_flops(m, n) / rates.matmul64 + rates.eigh_seconds(r)


def _train(size: Sizes, load: Load, rates: Rates | None, gpus: int) -> dict[str, Any]:
    prompts = max(load.batch // load.group, 1)
    answers = load.batch * load.answer
    read = prompts * load.prompt + answers
    logits = 4 * size.b * answers * size.vocab
    acting = (0 if size.quantised else size.b * size.adapted) + size.kv_token * load.batch * (load.prompt + load.answer)
    keys = load.prompt + load.answer
    # short passes in half precision keep their scores, see `sigmix.engine.cpu.short_attention`
    kept = size.b == 2 and 4 * size.heads * load.batch * load.answer * keys <= SCORES
    activations = read * size.kept(keys if kept else 0)
    # every answer's attention also keeps the keys and values of its prompt, spread over the heads where it is plain
    spread = 2 * size.head * (size.heads if kept else size.kv_heads)
    activations += load.batch * keys * size.layers * size.b * spread
    # z, its gradient and AdamW's two moments, in float32; one best z is kept too
    numbers = 5 * 4 * size.ranks
    parts = {"weights": size.weights, "factors": size.factors, "z and optimiser": numbers}
    parts |= {"activations": activations, "logits": logits}
    if acting > activations + logits:
        parts = {"weights": size.weights, "factors": size.factors, "z and optimiser": numbers}
        parts |= {"merged copies, keys and values": acting}
    made: dict[str, Any] = {"parts": parts, "peak_bytes": sum(parts.values())}
    each = (size.weights + size.factors + numbers) / gpus
    made["per_gpu_bytes"] = int(each + max(activations / gpus + logits, acting / gpus))
    if rates is not None:
        forward = 2 * (size.met - size.adapted)
        plain, form = forward + 2 * size.adapted, forward + 2 * (size.adapted + 2 * size.short)
        form = form if size.quantised else forward + 2 * size.both
        token = load.batch * (form if size.quantised else plain) / rates.matmul
        act = prompts * load.prompt * plain / rates.matmul + load.answer * max(token, size.read / rates.copy)
        merge = 0 if size.quantised else sum(2 * m * n * min(m, n) * c for m, n, c in size.shapes) / rates.matmul
        learn = read * (plain + 3 * form) / rates.matmul  # the reference, then forward and twice as much backward
        made["seconds_per_step"] = act + merge + learn
    return made


def _serve(size: Sizes, load: Load, rates: Rates | None, gpus: int) -> dict[str, Any]:
    kv = size.kv_token * load.requests * load.context
    logits = (size.b + 4) * load.requests * size.vocab
    # one layer's at a time, while all requests are read together: its input, queries, keys, values, gate, up, product
    row = 2 * size.hidden + (size.heads + 2 * size.kv_heads) * size.head + 3 * size.inner
    reading = size.b * load.requests * load.context * row
    forms = serving_forms(size, load.mixes)
    common = size.weights + kv + logits + reading
    made: dict[str, Any] = {
        "parts": {"weights": size.weights, "keys and values": kv, "logits": logits, "reading": reading},
        "forms": forms,
        "peak_bytes": {name: common + extra for name, extra in forms.items()},
        "per_gpu_bytes": {n: int((size.weights + extra + kv) / gpus + logits + reading) for n, extra in forms.items()},
        "kv_bytes_per_1000_tokens": 1000 * size.kv_token,
    }
    if rates is not None:
        plain = 2 * size.met
        work = {"base": plain, "merged": plain, "gain": plain + 4 * size.short}
        work["factored"] = plain + 2 * (size.both - size.adapted)
        traffic = {"base": size.read, "merged": size.read, "gain": size.read + forms["gain"]}
        traffic["factored"] = size.read + forms.get("factored", 0) - size.b * size.adapted
        made["prefill_tokens_per_second"] = {n: rates.matmul / work[n] for n in forms}
        made["decode_tokens_per_second"] = {
            n: load.requests / max(load.requests * work[n] / rates.matmul, (traffic[n] + kv) / rates.copy)
            for n in forms
        }
    return made
