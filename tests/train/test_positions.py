"""z on prompts alone: rollouts, loss, evaluation and scoring against dense float64 weights chosen token by token."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers_architectures import build
from helpers_train import Letter, config, learner, shake, trainer
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.pytorch_utils import Conv1D

from sigmix import Engine, load_base
from sigmix.engine.generation import SamplingParams, complete
from sigmix.engine.prefix_cache import completion_logits
from sigmix.errors import ConfigError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix
from sigmix.tasks.base import Sample, Score
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


def matrix(module):
    return (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()


def scaled(weight, z):
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u * (s * z)) @ vt


@contextlib.contextmanager
def dense(model, z, prompt_tokens, adapt=scaled):
    """Compute W' x at the first tokens of a sequence and W x at the others; differentiable in z."""

    def forward(module, weight, adapted):
        def run(x):
            tokens = x.reshape(-1, x.shape[-1])
            mask = torch.arange(len(tokens))[:, None] < prompt_tokens
            y = torch.where(mask, tokens @ adapted.T, tokens @ weight.T).reshape(*x.shape[:-1], -1)
            return y if module.bias is None else y + module.bias

        return run

    modules = dict(model.named_modules())
    for path, value in z.items():
        weight = matrix(modules[path])
        modules[path].forward = forward(modules[path], weight, adapt(weight, value))
    try:
        yield
    finally:
        for path in z:
            del modules[path].forward


def oracle_logits(model, z, prompt, answer, adapt=scaled):
    """Logits [C, V] that predict each token of an answer: one sequence alone, without cache or padding."""
    ids = torch.tensor([[*prompt, *answer[:-1]]])
    with dense(model, z, len(prompt), adapt):
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]


def extended(rows):
    """Prompts with all but the last token of their answers."""
    return [[*row.prompt_ids, *row.ids[:-1]] for row in rows]


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
        everywhere = [whole[-1:].log_softmax(-1) for whole in (oracle_logits(plain, z, p, [0]) for p in extended(rows))]
        assert not any(
            torch.allclose(chosen(there, row.ids[-1:]), value[-1:], atol=1e-3)
            for there, row, value in zip(everywhere, rows, expected, strict=True)
        )  # z on all tokens is another policy
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
        per_device_train_batch_size=64 if objective == "reinforce" else 8, **options,
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


def rollouts_and_logits(ours, prompts):
    """Sampled completions of three prompts, and the logits of their tokens in the loss."""
    with torch.no_grad(), ours.policy.acting():
        params = SamplingParams(STEPS, do_sample=True, seed=3)
        rows = complete(ours.policy.model, prompts, params, [], 0, prompt_only=ours.policy.prompt_only)
    ids, mask = torch.tensor([row.ids for row in rows]), torch.ones(3, STEPS, dtype=torch.bool)
    with ours.policy.learning():
        loss = completion_logits(ours.policy.model, prompts, ids, mask, 0, prompt_only=ours.policy.prompt_only)
    return rows, loss


@pytest.mark.parametrize("policy", ["lora", "ia3"])
def test_other_adapters_at_the_same_positions(policy, tiny_tokenizer):
    task, options = Even(), {"generation_batch_size": 12, "num_generations": 4}
    ours = learner(build("llama").double(), tiny_tokenizer, task, positions="prompt", policy=policy, **options)
    shake(ours.policy)
    merged = {}
    plain = build("llama").double()
    for path, _ in plain.named_modules():
        layer = dict(ours.policy.model.base_model.model.named_modules())[path]
        if isinstance(layer, BaseTunerLayer):
            merged[path] = adapted(layer)
    prompts = [ours.actor.encode(sample) for sample in task.samples("train", 3)]
    rows, loss = rollouts_and_logits(ours, prompts)
    for number, row in enumerate(rows):
        expected = oracle_logits(plain, merged, row.prompt_ids, row.ids, adapt=lambda _, weight: weight)
        torch.testing.assert_close(loss[number], expected, rtol=1e-4, atol=1e-4)
        logprobs = torch.tensor(row.logprobs).double()
        torch.testing.assert_close(logprobs, chosen(expected, row.ids), rtol=1e-4, atol=1e-4)
    loss.sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in ours.parameters.values())
    with ours.policy.reference():
        ids = torch.tensor([rows[0].token_ids])
        assert torch.equal(ours.policy.model(ids).logits, build("llama").double()(ids).logits)


def adapted(layer):
    """W' of PEFT's layer, merged by PEFT itself."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge(safe_merge=True)
    merged = weight.detach().clone()
    layer.unmerge()
    weight.data = before
    return merged


@pytest.mark.parametrize("arch", ["lfm2", "phi3, longrope"])
def test_lora_needs_a_cache_that_can_be_continued(arch):
    with pytest.raises(ConfigError, match="positions") as caught:
        make_policy(build(arch), config(policy="lora", positions="prompt"))
    assert "svf" in str(caught.value)


class Edge(Even):
    """Prompts of one token, and gold replies that are empty or short."""

    def samples(self, split, n=None, seed=0):
        return [Sample.make("w" if i % 2 else f"{split} {i}?", "" if i % 3 else "no") for i in range(n or 16)]


@pytest.mark.parametrize("options", [{}, {"objective": "sft", "num_generations": 1}, {"max_new_tokens": 1}])
def test_prompts_of_one_token_and_empty_answers(tiny, tiny_tokenizer, tmp_path, options):
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=Edge(), positions="prompt", max_steps=2, **options)
    run.actor.encode = lambda sample: tiny_tokenizer(sample.prompt)["input_ids"]
    assert {len(run.actor.encode(sample)) for sample in run.validation} > {1}
    expert = run.fit()
    assert expert.positions == "prompt"
    norms = [entry["grad_norm"] for entry in run.run.history() if entry["kind"] == "step"]
    assert len(norms) == 2
    assert max(norms) > 0


def test_only_empty_answers(tiny, tiny_tokenizer):
    task = Edge()
    ours = learner(tiny(), tiny_tokenizer, task, positions="prompt", objective="sft", num_generations=1)
    shake(ours.policy)
    figures = ours.step(0, [Sample.make(f"train {i}?", "") for i in range(4)])
    assert figures["completion_tokens"] == 1
    assert figures["grad_norm"] > 0


def test_the_base_is_measured_bit_for_bit(tiny, tiny_tokenizer, tmp_path):
    run = trainer(tiny(), tiny_tokenizer, tmp_path, task=Even(), positions="prompt", max_steps=2)
    run.fit()
    ids = torch.arange(4, 40).reshape(2, 18)
    ones = {path: torch.ones_like(z) for path, z in run.policy.z().items()}
    with torch.no_grad(), run.policy.acting(ones):
        assert torch.equal(run.policy.model(ids).logits, tiny()(ids).logits)


def test_rollouts_and_loss_agree_on_a_quantized_base(model_folder, tiny_tokenizer):
    pytest.importorskip("torchao")
    model, _ = load_base(model_folder, "float32", quantization_config="int8")
    ours = learner(model, tiny_tokenizer, Even(), positions="prompt", generation_batch_size=12)
    shake(ours.policy)
    prompts = [ours.actor.encode(sample) for sample in Even().samples("train", 3)]
    rows, loss = rollouts_and_logits(ours, prompts)
    for number, row in enumerate(rows):
        torch.testing.assert_close(chosen(loss[number], row.ids), torch.tensor(row.logprobs), rtol=1e-3, atol=1e-3)
    assert ours.step(0, Even().samples("train", 3))["grad_norm"] > 0
