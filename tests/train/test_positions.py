"""z on prompts alone: rollouts, loss, evaluation and scoring against dense float64 weights chosen token by token."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers_architectures import build
from helpers_train import Letter, config, learner, shake, trainer
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from sigmix import Engine
from sigmix.engine.generation import SamplingParams, complete
from sigmix.engine.prefix_cache import completion_logits
from sigmix.errors import ConfigError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.tasks.base import Score
from sigmix.train.objectives import advantages
from sigmix.train.policy import make_policy

pytestmark = pytest.mark.usefixtures("cache")
ARCHITECTURES = ["llama", "gpt2", "gemma3_text", "phi3, longrope", "lfm2", "qwen3_5_text"]
STEPS = 5


class Even(Letter):
    """Right is every reply whose first character has an even code: about half of a random model's replies."""

    max_new_tokens = STEPS

    def score(self, sample, reply):
        return Score.of(bool(reply) and ord(reply[0]) % 2 == 0, reply[:1] or None)


@contextlib.contextmanager
def dense(model, z, prompt_tokens):
    """Compute W'(z) x at the first tokens of every row and W x at the others; differentiable in z."""

    def forward(module, scale):
        transposed = isinstance(module, Conv1D)
        weight = (module.weight.T if transposed else module.weight).detach()
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        adapted = (u * (s * scale)) @ vt
        bias = module.bias

        def run(x):
            tokens = x.reshape(-1, x.shape[-1])
            mask = torch.arange(len(tokens))[:, None] < prompt_tokens
            return torch.where(mask, F.linear(tokens, adapted, bias), F.linear(tokens, weight, bias)).reshape(
                *x.shape[:-1], -1
            )

        return run

    modules = dict(model.named_modules())
    for path, scale in z.items():
        modules[path].forward = forward(modules[path], scale)
    try:
        yield
    finally:
        for path in z:
            del modules[path].forward


def oracle_logits(model, z, prompt, answer):
    """Logits [C, V] that predict each token of an answer: one sequence alone, without cache or padding."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with dense(model, z, len(prompt)):
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]


def chosen(logits, answer):
    return logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_rollouts_loss_evaluation_and_the_expert_agree(arch, tiny_tokenizer, tmp_path):
    task, options = Even(), {"generation_batch_size": 12, "num_generations": 4, "beta": 0.2}
    ours = learner(build(arch).double(), tiny_tokenizer, task, positions="prompt", **options)
    shake(ours.policy)
    z = ours.policy.z()
    samples = task.samples("train", 3)
    prompts = [ours.actor.encode(sample) for sample in samples]
    plain = build(arch).double()
    with torch.no_grad():
        params = SamplingParams(STEPS, do_sample=True, seed=3)
        with ours.policy.acting():
            rows = complete(ours.policy.model, prompts, params, [], 0, prompt_only=ours.policy.prompt_only)
            greedy = ours.actor.generate(samples, STEPS)
        expected = [chosen(oracle_logits(plain, z, row.prompt_ids, row.ids), row.ids) for row in rows]
        elsewhere = [chosen(oracle_logits(plain, z, [*row.prompt_ids, *row.ids], [0]), [0]) for row in rows]
        ids, mask = torch.tensor([row.ids for row in rows]), torch.ones(3, STEPS, dtype=torch.bool)
        with ours.policy.learning():
            loss = completion_logits(ours.policy.model, prompts, ids, mask, 0, prompt_only=ours.policy.prompt_only)
        for number, row in enumerate(rows):
            near = {"rtol": 1e-4, "atol": 1e-4}  # z, factors and log-probabilities are float32
            torch.testing.assert_close(torch.tensor(row.logprobs).double(), expected[number], **near)
            torch.testing.assert_close(chosen(loss[number], row.ids), expected[number], **near)
        for row in greedy:
            best = oracle_logits(plain, z, row.prompt_ids, row.ids).argmax(-1)
            assert row.ids == best.tolist()
    assert all(len(value) == 1 for value in elsewhere)
    expert = ours.policy.expert("letter", {})
    assert expert.positions == "prompt"
    expert.save_pretrained(tmp_path / "bank/letter")
    engine = Engine(build(arch).double(), tiny_tokenizer, bank=Bank(tmp_path / "bank"))
    scores = engine.score(prompts, [row.ids for row in rows], mix=Mix.parse("letter"))
    for found, value in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found).double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("objective", ["reinforce", "sft"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_gradient_of_a_step_is_the_oracles(arch, objective, tiny_tokenizer):
    task = Even()
    options = {"generation_batch_size": 12, "num_generations": 4 if objective == "reinforce" else 1, "beta": 0.2}
    ours = learner(
        build(arch).double(), tiny_tokenizer, task, positions="prompt", objective=objective,
        per_device_train_batch_size=8, **options,
    )  # fmt: skip
    shake(ours.policy)
    z = {path: value.double().requires_grad_() for path, value in ours.policy.z().items()}
    samples = task.samples("train", 12 // options["num_generations"])
    rollouts = ours.rollouts(0, samples)
    gain = advantages(rollouts.rewards, options["num_generations"], "leave-one-out").double()
    plain, total = build(arch).double(), torch.zeros((), dtype=torch.float64)
    for number, answer in enumerate(rollouts.completions):
        prompt = rollouts.prompts[number // options["num_generations"]]
        policy = oracle_logits(plain, z, prompt, answer)
        with torch.no_grad():
            base = oracle_logits(plain, {}, prompt, answer)
        logp = policy.log_softmax(-1)
        kl = (logp.exp() * (logp - base.log_softmax(-1))).sum()
        value = chosen(policy, answer)
        term = value.mean() if objective == "sft" else gain[number] * value.sum()
        total = total - (term - 0.2 * kl) / len(rollouts.completions)
    total.backward()
    figures = ours.step(0, samples)
    assert figures["loss"] == pytest.approx(float(total), rel=1e-4, abs=1e-5)
    scale = max(float(value.grad.abs().max()) for value in z.values())
    assert scale > 1e-3
    for path, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter.grad.double(), z[path].grad, rtol=1e-3, atol=1e-4 * scale)
