"""Variants of training: z on the first answer tokens, answers trained both ways, an L1 penalty."""

from __future__ import annotations

import pytest
import torch
from helpers_train import Letter, config, shake

from reproduction.scale import Kind
from reproduction.variants import VariantTrainer, first_answer_tokens, halves, shrink, surviving
from sigmix.engine.prefix_cache import completion_logits
from sigmix.experts.expert import Expert
from sigmix.train.rollout import row_seed

pytestmark = pytest.mark.usefixtures("cache")

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [5, 6, 7, 8, 9, 10, 11, 12, 13, 15, 16]]
ANSWERS = torch.tensor([[20, 21, 22, 23, 24, 25], [30, 31, 32, 33, 34, 35]])
MASK = torch.ones_like(ANSWERS, dtype=torch.bool)


def trainer(kind: Kind, model, tokenizer, folder, **changes) -> VariantTrainer:
    settings = config(**{"positions": "prompt", **changes})
    variant = VariantTrainer(kind, model.double(), tokenizer, Letter(), settings, folder, "letter")
    shake(variant.policy)
    return variant


def logits(policy) -> torch.Tensor:
    with torch.no_grad(), policy.learning():
        return completion_logits(policy.model, PROMPTS, ANSWERS, MASK, 0, prompt_only=policy.prompt_only)


def test_z_acts_on_the_first_answer_tokens(tiny, tiny_tokenizer, tmp_path):
    variant = trainer(Kind("", {}, answer_tokens=2), tiny("llama"), tiny_tokenizer, tmp_path / "run")
    policy = variant.policy
    ours = logits(policy)
    # the slow way: every token in a pass of its own, over the cache of those before it
    from transformers import DynamicCache

    for row, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS.tolist(), strict=True)):
        cache = DynamicCache(config=policy.model.config)
        with torch.no_grad():
            with policy.learning():
                out = policy.model(input_ids=torch.tensor([prompt]), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[0, -1], ours[row, 0])
            for place, token in enumerate(answer[:-1]):
                with policy.learning() if place < 2 else policy.reference():
                    out = policy.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
                torch.testing.assert_close(out.logits[0, -1], ours[row, place + 1])


def test_all_answer_tokens_are_positions_all_and_none_is_prompt(tiny, tiny_tokenizer, tmp_path):
    variant = trainer(Kind("", {}), tiny("llama"), tiny_tokenizer, tmp_path / "run")
    policy = variant.policy
    prompt = logits(policy)
    with policy.acting_on("all"):
        every = logits(policy)
    assert not torch.allclose(prompt[:, 1:], every[:, 1:])
    policy.answer_tokens = 1
    first = logits(policy)
    torch.testing.assert_close(first[:, :2], every[:, :2])
    assert not torch.allclose(first[:, 2:], every[:, 2:])
    policy.answer_tokens = 99
    torch.testing.assert_close(logits(policy), every)
    layers = policy.layers
    with policy.learning(), first_answer_tokens(policy.model, layers, 0), torch.no_grad():
        policy.model(input_ids=ANSWERS)
        assert all(layer.prompt_mask is False for layer in layers.values())
    assert all(layer.prompt_mask is None for layer in layers.values())


def test_rollouts_are_of_the_policy_that_the_loss_reads(tiny, tiny_tokenizer, tmp_path):
    variant = trainer(Kind("", {}, answer_tokens=1), tiny("llama"), tiny_tokenizer, tmp_path / "run")
    policy, actor = variant.policy, variant.actor
    samples = variant.task.samples("train", 4)
    with policy.acting():
        rows = actor.generate(samples, 6)
    for sample, row in zip(samples, rows, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad(), policy.learning():
            raw = completion_logits(
                policy.model, [actor.encode(sample)], ids, torch.ones_like(ids, dtype=torch.bool), 0,
                prompt_only=policy.prompt_only,
            )  # fmt: skip
        assert raw[0].argmax(-1).tolist() == row.ids


def test_both_ways_average_their_gradients(tiny, tiny_tokenizer, tmp_path):
    variant = trainer(Kind("", {}, both=True), tiny("llama"), tiny_tokenizer, tmp_path / "run", beta=0.1)
    learner, parameters = variant.learner, variant.learner.parameters
    samples = variant.stream.step(0)
    rollouts = learner.rollouts(0, samples)
    assert len(rollouts.prompts) == len(samples)
    sums = learner._backward(0, rollouts)
    ours = {path: p.grad.clone() for path, p in parameters.items()}
    expected = {path: torch.zeros_like(p) for path, p in parameters.items()}
    loss = 0.0
    for place, (positions, half) in enumerate(halves(samples)):
        plain = trainer(
            Kind("", {}), tiny("llama"), tiny_tokenizer, tmp_path / positions, positions=positions, beta=0.1
        )
        part = plain.learner.rollouts(2 * 0 + place, half)
        first = place * len(rollouts.completions) // 2
        assert part.completions == rollouts.completions[first : first + len(part.completions)]
        loss += plain.learner._backward(0, part)["loss"] / 2
        for path, parameter in plain.learner.parameters.items():
            expected[path] += parameter.grad / 2
    assert sums["loss"] == pytest.approx(loss, rel=1e-6)
    for path in ours:
        torch.testing.assert_close(ours[path], expected[path], rtol=1e-4, atol=1e-7)
    assert row_seed(0, 0, 0) != row_seed(0, 1, 0)
    items = variant.evaluate(variant.validation).items
    assert [item.id for item in items] == [sample.id for sample in variant.validation]


def test_the_proximal_step_removes_small_gains():
    z = torch.tensor([1.0, 1.05, 0.98, 0.7, 1.5])
    shrink([z], 0.1)
    torch.testing.assert_close(z, torch.tensor([1.0, 1.0, 1.0, 0.8, 1.4]))
    assert surviving(Expert("it", {"model.layers.0.up": z})) == pytest.approx(0.4)


def test_a_penalty_leaves_fewer_components(tiny, tiny_tokenizer, tmp_path):
    shares = []
    for strength in (0.0, 0.9):
        kind = Kind("", {}, l1=strength)
        settings = config(positions="prompt", max_steps=3)
        variant = VariantTrainer(kind, tiny("llama"), tiny_tokenizer, Letter(), settings, tmp_path / f"{strength}", "x")
        for step in range(3):
            variant.learner.step(step, variant.stream.step(step))
        shares.append(surviving(variant.policy.expert("it", {})))
    assert shares[0] > 0.9
    assert shares[1] < shares[0] - 0.2
