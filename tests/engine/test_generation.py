"""Decoding core: greedy decoding equals transformers, rows leave alone, each row has its own random stream."""

from __future__ import annotations

import pytest
import torch
from helpers_engine import alone, greedy, rows
from transformers import Lfm2Config, Lfm2ForCausalLM

from sigmix.engine.generation import (
    DecodingBatch,
    SamplingParams,
    SequenceState,
    choice_seed,
    complete,
    select_tokens,
    token_logprobs,
)
from sigmix.engine.prefix_cache import prefill

PROMPTS = rows([14, 22, 11, 17], shared=9)
# log-probabilities of float32 logits of size 10, batched against alone
NEAR = {"rel": 1e-4, "abs": 1e-4}


def answers(model, prompts, params, ends=(), group=1):
    return complete(model, prompts, params, ends, pad_id=0, num_generations=group)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "gemma3", "phi3", "gpt2", "mixtral"])
def test_greedy_equals_transformers(tiny, arch):
    model = tiny(arch)
    for prompt, row in zip(PROMPTS, answers(model, PROMPTS, SamplingParams(12), ends=[2]), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert row.ids == theirs[0, len(prompt) :].tolist()


@torch.no_grad()
def test_greedy_across_a_sliding_window(tiny):
    model = tiny("gemma3", num_hidden_layers=7)
    prompts = rows([44, 25, 30], shared=20)  # one beyond the window of 32, two that cross it while answering
    for prompt, row in zip(prompts, answers(model, prompts, SamplingParams(16)), strict=True):
        assert row.ids == greedy(model, prompt, 16)[0]


def test_rows_leave_at_their_end_and_change_no_other(tiny_llama):
    free = answers(tiny_llama, PROMPTS, SamplingParams(12))
    ends = [free[0].ids[2], free[1].ids[6]]
    bounded = answers(tiny_llama, PROMPTS, SamplingParams(12), ends)
    lengths = set()
    for prompt, row in zip(PROMPTS, bounded, strict=True):
        ids, logprobs = greedy(tiny_llama, prompt, 12, ends)
        assert row.ids == ids
        assert row.logprobs == pytest.approx(logprobs, **NEAR)
        assert row.finish == ("stop" if ids[-1] in ends else "length")
        lengths.add(len(ids))
    assert len(lengths) > 1  # otherwise no row left before another


def test_the_state_is_restricted_to_the_remaining_rows(tiny_llama):
    selected = []
    lengths = [2, 5, 1, 4]
    sequences = [SequenceState(row, SamplingParams(length)) for row, length in zip(PROMPTS, lengths, strict=True)]
    with torch.no_grad():
        state = prefill(tiny_llama, PROMPTS, pad_id=0)
        DecodingBatch(tiny_llama, [], lambda rows: selected.append(list(rows))).run(sequences, state)
    assert [len(one.ids) for one in sequences] == lengths
    assert [sorted(rows) for rows in selected] == [[0, 1, 3], [1, 3], [1]]
    for one in sequences:
        assert one.ids == greedy(tiny_llama, one.prompt_ids, len(one.ids))[0]
        assert one.finish == "length"


def test_linear_attention_layers():
    config = Lfm2Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_multiple_of=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config).eval()
    prompts, lengths = rows([5, 3, 4, 3]), [1, 6, 2, 5]
    for one in complete(model, prompts, [SamplingParams(length) for length in lengths], [], pad_id=0):
        assert one.ids == greedy(model, one.prompt_ids, one.params.max_new_tokens)[0]


# ------------------------------------------------------------------ sampling


def sampled(model, prompts, seeds, new=10, **changes):
    params = [SamplingParams(new, True, seed=seed, **changes) for seed in seeds]
    return answers(model, prompts, params)


def test_a_sampled_row_does_not_depend_on_its_batch_mates(tiny_llama):
    together = sampled(tiny_llama, PROMPTS, [7, 8, 9, 10])
    for prompt, seed, row in zip(PROMPTS, [7, 8, 9, 10], together, strict=True):
        (single,) = sampled(tiny_llama, [prompt], [seed])
        assert single.ids == row.ids
        assert single.logprobs == pytest.approx(row.logprobs, **NEAR)
    reordered = sampled(tiny_llama, PROMPTS[::-1], [10, 9, 8, 7])
    assert [row.ids for row in reordered[::-1]] == [row.ids for row in together]


def test_seeds_decide(tiny_llama):
    one, again, other = (sampled(tiny_llama, PROMPTS, seeds) for seeds in ([1] * 4, [1] * 4, [2] * 4))
    assert [r.ids for r in one] == [r.ids for r in again]
    assert [r.ids for r in one] != [r.ids for r in other]
    longer = sampled(tiny_llama, PROMPTS, [1] * 4, new=20)
    assert [r.ids[:10] for r in longer] == [r.ids for r in one]  # the budget does not move the stream
    assert sampled(tiny_llama, PROMPTS[:1], [2**64 + 1])[0].ids == sampled(tiny_llama, PROMPTS[:1], [1])[0].ids


def test_answers_of_one_prompt_stand_beside_each_other(tiny_llama):
    grouped = answers(tiny_llama, PROMPTS, [SamplingParams(6, True, seed=seed) for seed in range(12)], group=3)
    for i, row in enumerate(grouped):
        assert row.ids == sampled(tiny_llama, [PROMPTS[i // 3]], [i], new=6)[0].ids


def test_samples_follow_the_distribution(tiny_llama):
    count = 4000
    found = [row.ids[0] for row in sampled(tiny_llama, PROMPTS[:1] * count, list(range(count)), new=1)]
    with torch.no_grad():
        p = alone(tiny_llama, PROMPTS[0])[-1].softmax(-1)
    observed = torch.bincount(torch.tensor(found), minlength=len(p)) / count
    # 4 standard deviations for each of 256 tokens; the seeds are fixed
    assert bool(((observed - p).abs() <= 4 * (p * (1 - p) / count).sqrt() + 1 / count).all())
    assert float((observed - p).abs().sum()) < 0.25  # uniform draws would give above 0.6
    assert float((torch.full_like(p, 1 / len(p)) - p).abs().sum()) > 0.6


def test_log_probabilities_are_the_models_own(tiny_llama):
    (row,) = sampled(tiny_llama, PROMPTS[:1], [3], temperature=0.5, top_p=0.8)
    with torch.no_grad():
        logp = alone(tiny_llama, [*PROMPTS[0], *row.ids]).log_softmax(-1)
    expected = [float(logp[len(PROMPTS[0]) - 1 + i, token]) for i, token in enumerate(row.ids)]
    assert row.logprobs == pytest.approx(expected, **NEAR)


def test_more_log_probabilities_than_tokens():
    ((_, top),) = token_logprobs(torch.tensor([[0.0, 1.0]]), torch.tensor([0]), 20)
    assert [token for token, _ in top] == [1, 0]


def test_top_p_keeps_the_smallest_set(tiny_llama):
    with torch.no_grad():
        p, order = alone(tiny_llama, PROMPTS[0])[-1].softmax(-1).sort(descending=True)
    allowed = set(order[: int((p.cumsum(0) < 0.3).sum()) + 1].tolist())
    found = {row.ids[0] for row in sampled(tiny_llama, PROMPTS[:1] * 400, list(range(400)), new=1, top_p=0.3)}
    assert found <= allowed
    assert len(found) > 1
    free = {row.ids[0] for row in sampled(tiny_llama, PROMPTS[:1] * 400, list(range(400)), new=1)}
    assert not free <= allowed


def test_a_low_temperature_is_nearly_greedy(tiny_llama):
    cold = sampled(tiny_llama, PROMPTS, [1, 2, 3, 4], temperature=1e-3)
    assert [row.ids for row in cold] == [row.ids for row in answers(tiny_llama, PROMPTS, SamplingParams(10))]


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"min_p": 1.0}, {"top_k": 10**6, "top_p": 1e-6}, {"temperature": 1e-320}]
)
def test_options_that_leave_one_token_are_greedy(tiny_llama, options):
    one = sampled(tiny_llama, PROMPTS, [1, 2, 3, 4], **options)
    assert [row.ids for row in one] == [row.ids for row in answers(tiny_llama, PROMPTS, SamplingParams(10))]


@pytest.mark.parametrize("options", [{"top_k": 3}, {"min_p": 0.4}, {"top_k": 5, "min_p": 0.3, "temperature": 0.8}])
def test_top_k_and_min_p_keep_the_most_probable(tiny_llama, options):
    with torch.no_grad():
        logits = alone(tiny_llama, PROMPTS[0])[-1] / options.get("temperature", 1)
    p, order = logits.softmax(-1).sort(descending=True)
    kept = min(options.get("top_k", len(p)), int((p >= options.get("min_p", 0) * p[0]).sum()))
    assert 1 < kept < 20
    found = {row.ids[0] for row in sampled(tiny_llama, PROMPTS[:1] * 400, list(range(400)), new=1, **options)}
    assert found == set(order[:kept].tolist())


PENALTIES = [
    {},
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.7, "frequency_penalty": -0.4},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 1.5, "presence_penalty": -1.0},
    {"logit_bias": {5: -100.0, 9: 4.0, 77: 3.5}, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
]


def processed(logits, prompt, ids, options):
    """Logits with logit_bias and penalties, by their definitions in vLLM."""
    logits = logits.clone()
    for token, bias in options.get("logit_bias", {}).items():
        logits[token] += bias
    for token in {*prompt, *ids}:
        penalty = options.get("repetition_penalty", 1)
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    for token in set(ids):
        logits[token] -= ids.count(token) * options.get("frequency_penalty", 0) + options.get("presence_penalty", 0)
    return logits


@torch.no_grad()
def test_penalties_in_one_batch(tiny_llama):
    prompts = rows([14, 22, 11, 17, 9, 13], shared=7)
    params = [SamplingParams(24, **options) for options in PENALTIES]
    found = answers(tiny_llama, prompts, params)
    for prompt, options, row in zip(prompts, PENALTIES, found, strict=True):
        logits = alone(tiny_llama, [*prompt, *row.ids])
        for place, token in enumerate(row.ids):
            own = logits[len(prompt) - 1 + place]
            best = processed(own, prompt, row.ids[:place], options)
            assert best[token] >= best.max() - 1e-4
            assert row.logprobs[place] == pytest.approx(float(own.log_softmax(-1)[token]), **NEAR)
    assert len({tuple(row.ids) for row in answers(tiny_llama, prompts[:1] * 6, params)}) == 6


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 0.9, "top_k": 40, "min_p": 0.01}])
def test_a_row_with_options_does_not_depend_on_its_batch_mates(tiny_llama, sampling):
    prompts = rows([14, 22, 11, 17, 9, 13], shared=7)
    params = [SamplingParams(16, seed=row, **sampling, **options) for row, options in enumerate(PENALTIES)]
    together = answers(tiny_llama, prompts, params)
    for prompt, one, row in zip(prompts, params, together, strict=True):
        assert answers(tiny_llama, [prompt], one)[0].ids == row.ids


def test_repetition_penalty_equals_transformers(tiny_llama):
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        theirs = tiny_llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, repetition_penalty=1.3,
            eos_token_id=None,
        )  # fmt: skip
        (ours,) = answers(tiny_llama, [prompt], SamplingParams(16, repetition_penalty=1.3))
        assert ours.ids == theirs[0, len(prompt) :].tolist()


def test_a_bias_bans_and_forces_tokens(tiny_llama):
    free = answers(tiny_llama, PROMPTS[:1], SamplingParams(8))[0].ids
    banned = answers(tiny_llama, PROMPTS[:1], SamplingParams(8, logit_bias=dict.fromkeys(free, -100)))[0].ids
    assert not set(banned) & set(free)
    assert answers(tiny_llama, PROMPTS[:1], SamplingParams(8, logit_bias={42: 100}))[0].ids == [42] * 8


def test_prompt_tokens_without_a_logit_are_not_penalized(tiny_llama):
    sequences = [SequenceState([5, 300], SamplingParams(4, repetition_penalty=2.0))]
    logits = torch.full((1, 256), 1.0)
    logits[0, 5], logits[0, 7] = 1.8, 1.5
    assert select_tokens(logits, sequences).tolist() == [7]
    assert logits[0, 5] == pytest.approx(1.8)  # the model's logits stay


def test_choice_seeds():
    assert choice_seed(7, 0) == 7
    seeds = {choice_seed(seed, index) for seed in range(-50, 50) for index in range(20)}
    assert len(seeds) == 2000
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert choice_seed(1, 1) == choice_seed(1, 1)
