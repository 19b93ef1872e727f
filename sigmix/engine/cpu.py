"""Ways around what a CPU is slow at. Nothing here changes what is computed, only how, up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

SCORES_BYTES = 8 << 20
"""Of float32 attention scores in one layer, up to which they may be kept for the backward pass."""


def contiguous_head(model: Any) -> None:
    """Feed the output head contiguous rows.

    oneDNN's bf16 matmul on the strided slice that `logits_to_keep` makes was measured 40 times slower than on a copy.
    """
    head = model.get_output_embeddings()
    if head is not None and not getattr(head, "_sigmix_contiguous", False):
        head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        head._sigmix_contiguous = True


@contextmanager
def short_attention(model: Any, scores: int) -> Iterator[None]:
    """Inside, short sequences in half precision on a CPU go through transformers' "eager" attention.

    There the backward pass of torch's fused attention was measured 6 times slower than that of plain matmuls (64 rows
    of 7 queries and 53 keys, 9 heads, bf16: 23 ms against 4 ms). Long ones stay fused, which keeps no scores.

    Args:
        model: a transformers model, PEFT's wrapper around it or not.
        scores: rows × heads × queries × keys of the largest pass.
    """
    embeddings = model.get_input_embeddings().weight
    before = getattr(model.config, "_attn_implementation", None)
    half = embeddings.dtype in (torch.bfloat16, torch.float16) and embeddings.device.type == "cpu"
    if not half or before != "sdpa" or 4 * scores > SCORES_BYTES:
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
