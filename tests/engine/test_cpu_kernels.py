"""Ways around what a CPU is slow at change nothing but rounding."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import alone, rows
from peft import get_peft_model

from sigmix.engine.cpu_kernels import SCORES_BYTES, contiguous_head, short_attention
from sigmix.svf.config import SVFConfig

pytestmark = pytest.mark.usefixtures("cache")


@torch.no_grad()
def test_the_head_gets_contiguous_rows_and_answers_the_same(tiny_llama):
    row = rows([14])[0]
    before = alone(tiny_llama, row)
    contiguous_head(tiny_llama)
    contiguous_head(tiny_llama)  # twice is once
    assert len(tiny_llama.lm_head._forward_pre_hooks) == 1
    seen = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    assert torch.equal(alone(tiny_llama, row), before)
    tiny_llama(input_ids=torch.tensor(rows([9, 9])), logits_to_keep=1)
    assert seen == [True, True]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"])
@torch.no_grad()
def test_short_attention_computes_the_same(tiny, arch, wrapped):
    model = tiny(arch).bfloat16()
    if wrapped:
        model = get_peft_model(model, SVFConfig()).eval()
    ids, mask = torch.tensor(rows([20, 20])), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    fused = model(input_ids=ids, attention_mask=mask).logits
    with short_attention(model, 2 * 4 * 20 * 20):
        assert model.config._attn_implementation == "eager"
        plain = model(input_ids=ids, attention_mask=mask).logits
    assert model.config._attn_implementation == "sdpa"
    # two bfloat16 roundings of attention, carried through the layers; the logits' spread is about 10
    real = mask.bool()
    assert float((plain - fused)[real].abs().mean()) < 0.02 * float(fused[real].std())


def test_long_sequences_and_float32_stay_fused(tiny):
    model = tiny("llama")
    with short_attention(model, 10):
        assert model.config._attn_implementation == "sdpa"  # float32 has a fast backward pass
    half = model.bfloat16()
    with short_attention(half, SCORES_BYTES // 4 + 1):
        assert half.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), short_attention(half, 10):
        raise KeyError
    assert half.config._attn_implementation == "sdpa"
    half.set_attn_implementation("eager")
    with short_attention(half, 10):
        pass
    assert half.config._attn_implementation == "eager"  # what the user chose
