"""Prefill with a shared prefix, and answers behind it, equal every row alone."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import TOLERANCE, alone, rows
from peft import get_peft_model

from sigmix.engine.prefix_cache import MIN_SHARED, answer_logits, common_prefix, left_pad, prefill
from sigmix.svf.config import SVFConfig
from sigmix.svf.tuner import svf_layers

pytestmark = pytest.mark.usefixtures("cache")
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2"]
RAGGED = rows([14, 22, 11, 17], shared=10)


def answers(count: int, width: int, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random answers [count, width] and a right-padded mask with lengths from `width` down to 1."""
    ids = torch.randint(4, 99, (count, width), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([width - i % width for i in range(count)])
    return ids, torch.arange(width) < lengths[:, None]


# ------------------------------------------------------------------ common_prefix, left_pad


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),  # one row shares with nobody
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # every row keeps a token of its own
        ([[1, 2, 3], [1, 2, 3, 4]], 2),
        ([[1], [1, 2]], 0),
        ([[5, 1], [6, 1]], 0),
        ([[1, 2, 3, 9], [1, 2, 3, 8], [1, 7, 3, 9]], 1),  # a row in the middle of the order decides nothing
        ([[1, 9, 9], [1, 2, 3], [1, 2, 4]], 1),
    ],
)
def test_common_prefix(given, length):
    assert common_prefix(given) == length


def test_common_prefix_against_a_slow_search():
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(2, 5, (), generator=draw))
        given = [torch.randint(0, 2, (int(torch.randint(1, 7, (), generator=draw)),), generator=draw).tolist()
                 for _ in range(count)]  # fmt: skip
        shortest = min(map(len, given))
        slow = max(n for n in range(shortest) if all(row[:n] == given[0][:n] for row in given))
        assert common_prefix(given) == slow


def test_left_pad():
    ids, mask = left_pad([[7, 8, 9], [5]], 0, torch.device("cpu"))
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_prefill_equals_each_row_alone(tiny, arch, share):
    model = tiny(arch)
    state = prefill(model, RAGGED, pad_id=0, share=share)
    for row, logits in zip(RAGGED, state.logits, strict=True):
        torch.testing.assert_close(logits, alone(model, row)[-1], **TOLERANCE)
    assert state.lengths.tolist() == [14, 22, 11, 17]
    assert state.mask.sum(1).tolist() == [14, 22, 11, 17]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@torch.no_grad()
def test_answers_equal_the_whole_sequence(tiny, arch):
    model = tiny(arch)
    ids, mask = answers(len(RAGGED) * 2, width=5)
    state = prefill(model, RAGGED, pad_id=0).repeat(2)
    logits = answer_logits(model, state, ids, mask)
    assert logits.shape == (8, 5, model.config.vocab_size)
    for i, (answer, real) in enumerate(zip(ids, mask, strict=True)):
        prompt, width = RAGGED[i // 2], int(real.sum())
        whole = alone(model, [*prompt, *answer[:width].tolist()])
        torch.testing.assert_close(logits[i, :width], whole[len(prompt) - 1 : -1], **TOLERANCE)


@pytest.mark.parametrize("lengths", [[60, 45, 70, 52], [50, 50, 50], [41, 90]])
@pytest.mark.parametrize("shared", [0, 40])
@torch.no_grad()
def test_prompts_longer_than_a_sliding_window(tiny, lengths, shared):
    model = tiny("gemma3", num_hidden_layers=7)  # window 32; the sixth layer sees everything
    assert {"sliding_attention", "full_attention"} == set(model.config.layer_types)
    prompts = rows(lengths, shared)
    state = prefill(model, prompts, pad_id=0)
    for row, logits in zip(prompts, state.logits, strict=True):
        torch.testing.assert_close(logits, alone(model, row)[-1], **TOLERANCE)
    ids, mask = answers(len(prompts), width=4)
    logits = answer_logits(model, state, ids, mask)
    for i, prompt in enumerate(prompts):
        width = int(mask[i].sum())
        whole = alone(model, [*prompt, *ids[i, :width].tolist()])[len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[i, :width], whole, **TOLERANCE)


@torch.no_grad()
def test_the_prefix_is_computed_once(tiny_llama):
    seen = []
    tiny_llama.register_forward_pre_hook(lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)),
                                         with_kwargs=True)  # fmt: skip
    prefill(tiny_llama, RAGGED, pad_id=0)
    assert seen == [(1, 10), (4, 12)]
    seen.clear()
    prefill(tiny_llama, rows([12, 12], shared=MIN_SHARED - 1), pad_id=0)
    assert seen == [(2, 12)]


@torch.no_grad()
def test_one_token_answers_need_no_second_pass(tiny_llama):
    state = prefill(tiny_llama, RAGGED, pad_id=0)
    ids, mask = answers(4, width=1)
    assert torch.equal(answer_logits(tiny_llama, state, ids, mask)[:, 0], state.logits)


@torch.no_grad()
def test_repeat_keeps_a_prompts_answers_beside_each_other(tiny_llama):
    single = prefill(tiny_llama, RAGGED, pad_id=0)
    logits, lengths = single.logits.clone(), single.lengths.clone()
    many = prefill(tiny_llama, RAGGED, pad_id=0).repeat(3)
    assert torch.equal(many.logits, logits.repeat_interleave(3, 0))
    assert many.lengths.tolist() == [n for n in lengths.tolist() for _ in range(3)]
    assert many.cache.layers[0].keys.shape[0] == len(many.mask) == 12
    assert torch.equal(many.cache.layers[0].keys[3], many.cache.layers[0].keys[5])
    assert not torch.equal(many.cache.layers[0].keys[2], many.cache.layers[0].keys[3])


@torch.no_grad()
def test_the_prefix_pass_computes_no_logits(tiny_llama):
    seen = []
    tiny_llama.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    prefill(tiny_llama, RAGGED, pad_id=0)
    assert seen == [(1, 0), (4, 1)]


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_gradients_through_the_shared_prefix(tiny, arch):
    model = get_peft_model(tiny(arch).double(), SVFConfig()).eval()
    z = {path: layer.svf_z["default"].weight for path, layer in svf_layers(model).items()}
    ids, mask = answers(len(RAGGED) * 2, width=4)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return {path: parameter.grad.clone() for path, parameter in z.items()}

    logits = answer_logits(model, prefill(model, RAGGED, pad_id=0).repeat(2), ids, mask)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fast = gradient((logits * weight)[mask].sum())
    total = 0.0
    for i in range(len(ids)):
        prompt, width = RAGGED[i // 2], int(mask[i].sum())
        whole = alone(model, [*prompt, *ids[i, :width].tolist()])[len(prompt) - 1 : -1]
        total = total + (whole * weight[i, :width]).sum()
    slow = gradient(total)
    assert fast.keys() == slow.keys()
    for path in fast:
        # the model is float64, but z and its gradient are float32, and 110 tokens are summed in another order
        scale = float(slow[path].abs().max())
        torch.testing.assert_close(fast[path], slow[path], rtol=1e-4, atol=1e-5 * scale)
        assert scale > 0
