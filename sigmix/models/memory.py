"""What a base needs, from its config alone: memory, disk, trainable numbers. Nothing is downloaded or allocated.

For an adapted matrix W (m×n, r = min(m, n)) the decomposition cache holds the square side (r×r: V if m >= n, else U)
and s (r) in float32; the factored form needs both sides in memory, U (m×r), s and V (n×r). An expert holds z (r) in
float32. Adapted are all linear layers but the output head, as PEFT's ``all-linear`` means it; of a vision-language
model those of its language backbone.

Counts only; what decomposing, training and serving take at their peak, and for how long, is in `sigmix.models.memory`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sigmix.errors import BaseModelError, ConfigError

FLOAT32 = 4


BF16 = 2


HEADER_PER_TENSOR = 110  # bytes of JSON that a safetensors file spends on one tensor, beside its name


ENTRY_HEADER = 250  # of one decomposition's file: lengths, names, method and checksum; up to 20 more or less


def model_plan(config: Any) -> dict[str, Any]:
    """Count what SVF needs for the model that a transformers ``config`` describes.

    Args:
        config: a transformers config of a causal language model; see `transformers.AutoConfig`.

    Returns:
        A dict for JSON, sizes in bytes: ``model_type``, ``parameters``, ``weights_bf16_bytes``, ``matrices`` (number
        adapted), ``z_parameters``, ``expert_bytes`` (the numbers of one expert on disk), ``cache_bytes`` (the numbers
        of the decomposition, on disk, and in memory for the gain form), ``disk_bytes`` (the same with the files'
        headers), ``factored_bytes`` (in memory for the factored form, beside the weights), ``by_shape`` (list of
        ``out``, ``in``, ``count``), ``not_adapted`` (list of ``name``, ``shape``, ``count``, ``parameters``, ``why``),
        ``lookup_parameters`` (of an input embedding that is not the output head too: read by row, never multiplied).

    Raises:
        BaseModelError: the config is of no causal language model, or has values that no model can be built from.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from sigmix.models.multimodal import backbone

    kind = getattr(config, "model_type", type(config).__name__)
    model = empty_model(config)
    head, inside = model.get_output_embeddings(), backbone(model)
    root = f"{inside[0]}." if inside is not None else ""
    shapes: dict[tuple[int, int], int] = {}
    z_count = factored = cached = header = disk = 0
    for name, module in model.named_modules():
        if module is head or not name.startswith(root) or not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        m, n = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
        r = min(m, n)
        shapes[m, n] = shapes.get((m, n), 0) + 1
        z_count += r
        factored += FLOAT32 * r * (m + n + 1)
        cached += FLOAT32 * r * (r + 1)
        disk += entry_bytes(r)
        header += HEADER_PER_TENSOR + len(name)
    parameters = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    return {
        "model_type": kind,
        "parameters": parameters,
        "weights_bf16_bytes": BF16 * parameters,
        "matrices": sum(shapes.values()),
        "z_parameters": z_count,
        "expert_bytes": FLOAT32 * z_count + header,
        "cache_bytes": cached,
        "disk_bytes": disk,
        "factored_bytes": factored,
        "by_shape": [{"out": m, "in": n, "count": count} for (m, n), count in sorted(shapes.items())],
        "not_adapted": _not_adapted(model, root),
        "lookup_parameters": _lookup(model.get_input_embeddings(), head),
    }


def entry_bytes(r: int) -> int:
    """Size of one decomposition in the cache, within some 20 bytes."""
    return FLOAT32 * r * (r + 1) + ENTRY_HEADER


def empty_model(config: Any) -> Any:
    """The causal language model, or vision-language model, that a config describes, on the meta device.

    Raises:
        BaseModelError: the config is of neither, or has values that no model can be built from.
    """
    import torch

    from sigmix.models.multimodal import auto_class
    from sigmix.utils.logging import quiet

    kind = getattr(config, "model_type", type(config).__name__)
    try:
        with torch.device("meta"), quiet():
            return auto_class(config.to_dict()).from_config(config)
    except Exception as error:
        raise BaseModelError(
            f"no causal language model can be built from this config (model_type {kind!r}): {error}",
            remedy="choose a decoder-only text model, or a vision-language model, that transformers knows",
        ) from error


def _lookup(embedding: Any, head: Any) -> int:
    if embedding is None or (head is not None and head.weight is embedding.weight):
        return 0
    return embedding.weight.numel()


def _not_adapted(model: Any, root: str) -> list[dict[str, Any]]:
    """The large parameters that SVF leaves alone, grouped by the last part of their name, with the reason."""
    groups: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    embeddings = {id(part.weight): "embedding" for part in (model.get_input_embeddings(),) if part is not None}
    head = model.get_output_embeddings()
    if head is not None:
        embeddings.setdefault(id(head.weight), "output head")
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            why = f"{embeddings[id(parameter)]}: not among the linear layers that are adapted"
        elif not name.startswith(root):
            if parameter.dim() < 2:
                continue
            why = "vision tower or projector: outside the language backbone"
        elif parameter.dim() >= 3:
            why = "fused experts or a convolution: one tensor of several matrices, which is not a linear layer"
        else:
            continue
        key = (".".join(name.split(".")[-2:]), tuple(parameter.shape))
        entry = groups.setdefault(key, {"name": key[0], "shape": list(key[1]), "count": 0, "parameters": 0, "why": why})
        entry["count"] += 1
        entry["parameters"] += parameter.numel()
    return list(groups.values())


# --- Counts of a model, from its config and its plan, that estimates of memory and time are made of (`sigmix.budget`).


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


BITS = {"int8": 8.5, "int4": 8.5, "nf4": 4.5}
"""Bits of a weight with its scales; int4 as torchao keeps it on a CPU, a byte each."""


PACKED = {**BITS, "int4": 4.5}
"""The same on a GPU, where int4 is packed."""


class Sizes:
    """Numbers of weights and of what SVF adds; bytes a number ``b``.

    Args:
        plan: from `sigmix.models.memory.model_plan`. b: bytes of a number of the weights. cuda: whether they lie on
        GPUs.

    Attributes:
        adapted, ranks, short, both: numbers in the adapted matrices, of their singular values, in their short sides and
            in both sides. weights: bytes of all weights, quantised ones with their scales. read: of them, those that
            writing a token reads. met: weights that a token is multiplied with.

    Raises:
        BaseModelError: on asking for what the config does not say of its layers, such as the number of heads.
    """

    def __init__(self, config: Any, plan: Mapping[str, Any], b: int, quantization: str | None, cuda: bool) -> None:
        self.text, self.plan, self.b, self.quantised = config.get_text_config(), plan, b, quantization is not None
        self.shapes = [(one["out"], one["in"], one["count"]) for one in plan["by_shape"]]
        self.parameters = plan["parameters"]
        self.adapted = sum(m * n * c for m, n, c in self.shapes)
        self.ranks = plan["z_parameters"]
        self.short = sum(min(m, n) ** 2 * c for m, n, c in self.shapes)
        self.both = sum(min(m, n) * (m + n) * c for m, n, c in self.shapes)
        bits = (PACKED if cuda else BITS)[quantization] / 8 if quantization is not None else b
        self.weights = int(b * (self.parameters - self.adapted) + bits * self.adapted)
        self.read = self.weights - b * plan["lookup_parameters"]
        self.met = self.parameters - plan["lookup_parameters"] - self._idle()

    def _idle(self) -> int:
        """Weights of fused experts that a token is not routed to."""
        experts = self._given("num_local_experts", "num_experts", "n_routed_experts")
        chosen = self._given("num_experts_per_tok", "num_experts_per_token", "moe_topk")
        if not isinstance(experts, int) or not isinstance(chosen, int):
            return 0
        shapes = [(one["parameters"], one["shape"]) for one in self.plan["not_adapted"]]
        fused = sum(count for count, shape in shapes if len(shape) == 3 and shape[0] == experts)
        return fused * max(experts - chosen, 0) // experts

    @cached_property
    def layers(self) -> int:
        return self._number("num_hidden_layers", "n_layer")

    @cached_property
    def hidden(self) -> int:
        return self._number("hidden_size", "n_embd")

    @cached_property
    def heads(self) -> int:
        return self._number("num_attention_heads", "n_head")

    @cached_property
    def kv_heads(self) -> int:
        return self._number("num_key_value_heads", default=self.heads)

    @cached_property
    def head(self) -> int:
        """Width of a head."""
        return self._number("head_dim", default=self.hidden // self.heads)

    @cached_property
    def inner(self) -> int:
        """Width of the feed-forward block."""
        return self._number("intermediate_size", "n_inner", default=4 * self.hidden)

    @cached_property
    def vocab(self) -> int:
        return self._number("vocab_size")

    @cached_property
    def kv_token(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * self.layers * self.kv_heads * self.head * self.b

    @property
    def factors(self) -> int:
        """Bytes of what training and mixed batches keep of the decomposition."""
        return self.b * ((self.short if self.quantised else self.both) + 2 * self.ranks)

    def kept(self, scores: int = 0) -> int:
        """Bytes that the backward pass keeps of one token; ``scores``: attention scores of it that are kept, a head.

        A frozen linear layer keeps nothing. Kept are h of every matrix before its scaling, queries, keys, values and
        what attention returns, the gate, its activation and the factor that it gates, and both norms' input in float32.
        """
        q, kv = self.heads * self.head, self.kv_heads * self.head
        numbers = self.ranks // self.layers + 2 * q + 2 * kv + 3 * self.inner
        return self.layers * (self.b * numbers + 2 * 4 * self.hidden + (self.b + 4) * self.heads * scores)

    def _given(self, *names: str) -> Any:
        return next((value for name in names if (value := getattr(self.text, name, None))), None)

    def _number(self, *names: str, default: int | None = None) -> int:
        given = self._given(*names) or default
        if isinstance(given, int):
            return given
        kind = getattr(self.text, "model_type", type(self.text).__name__)
        said = "does not say" if given is None else "has one for each layer as"
        raise BaseModelError(
            f"models of the kind {kind!r} are not planned for: the config {said} {names[0]}",
            remedy="plan for a model whose layers are all alike and attend; without --plan its matrices are counted",
        )


# --- Memory, disk and time for decomposing, training and serving a base, from its config: estimates, before anything r


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
        quantization: of the linear layers, see `sigmix.models.quantization`; then there is no merged and no factored
        form.
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
    # short passes in half precision keep their scores, see `sigmix.engine.cpu_kernels.short_attention`
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
