"""An export loaded in the program that it is for, on a few prompts, and its logits compared with our engine's.

One model is in memory at a time. What is reported is measured, not derived:

    max       largest |difference| of any logit
    kl        mean over positions of KL(ours ‖ theirs), in nats
    same_top  share of positions where both rank the same token first
    effect_kl the same KL between our mix and our base: what there is to get right
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from sigmix.engine import Engine
from sigmix.errors import SigmixError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.export.casting import HALF
from sigmix.export.llamacpp import LlamaCpp
from sigmix.export.source import Source
from sigmix.gguf import quiet
from sigmix.models import load_base

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
        rows: token ids. mixed, base: float32 [T, V] for each of them.
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
        self.rows = [engine.encode(text) for text in prompts or PROMPTS]
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


def verify_merged(folder: Path, ours: Ours) -> dict[str, Any]:
    """A merged checkpoint in plain transformers, in the dtype that it has.

    Raises:
        SigmixError: transformers cannot load it, or its tokenizer gives other ids.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _loading("transformers", folder), quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
        model, report = loaded
        AutoTokenizer.from_pretrained(folder)
    if report["missing_keys"]:
        raise SigmixError(f"{folder} lacks {sorted(report['missing_keys'])[0]}, which transformers looks for")
    return {"tool": "transformers", **ours.against(_plain(model, ours.rows))}


def verify_lora(folder: Path, source: Source, ours: Ours) -> dict[str, Any]:
    """A LoRA folder in plain PEFT on the plain base, in float32; ``ours`` is wide.

    Raises:
        SigmixError: PEFT cannot load it.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with _loading("peft", folder), quiet():
        base: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=getattr(torch, source.dtype))
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
