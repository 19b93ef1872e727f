"""Advantages, KL and losses against slow loops; the gradient of a step against dense float64 weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_train import Letter, learner, shake
from torch.distributions import Categorical, kl_divergence
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from sigmix.tasks.base import Score
from sigmix.train import objectives
from sigmix.train.objectives import TokenStats, advantages, reinforce_loss, sft_loss, token_stats

pytestmark = pytest.mark.usefixtures("cache")
NAN = float("nan")


def slow_advantages(rewards: list[float], group: int, baseline: str) -> list[float]:
    result = []
    for i, reward in enumerate(rewards):
        width = group if group > 1 else len(rewards)
        start = i // width * width
        if baseline == "none":
            others = [0.0]
        elif baseline == "mean":
            others = [r for r in rewards if not math.isnan(r)]
        else:
            others = [r for j, r in enumerate(rewards) if start <= j < start + width and j != i and not math.isnan(r)]
        alone = not others or math.isnan(reward)
        result.append(0.0 if alone else reward - sum(others) / len(others))
    return result


@pytest.mark.parametrize("baseline", ["none", "mean", "leave-one-out"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("unscorable", [0, 3, 11, 12])
def test_advantages(baseline, group, unscorable):
    draw = torch.Generator().manual_seed(unscorable)
    rewards = torch.randint(0, 2, (12,), generator=draw) * 2.0 - 1
    rewards[torch.randperm(12, generator=draw)[:unscorable]] = NAN
    result = advantages(rewards, group, baseline)
    assert result.tolist() == pytest.approx(slow_advantages(rewards.tolist(), group, baseline), abs=1e-6)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, -1.0, NAN, 1.0, NAN, NAN])
    assert advantages(rewards, 3, "none").tolist() == [1, -1, 0, 1, 0, 0]
    assert advantages(rewards, 3, "leave-one-out").tolist() == [2, -2, 0, 0, 0, 0]
    third = pytest.approx([2 / 3, -4 / 3, 0, 2 / 3, 0, 0])
    assert advantages(rewards, 3, "mean").tolist() == third
    assert advantages(torch.tensor([1.0, -1.0, -1.0]), 1, "leave-one-out").tolist() == [2, -1, -1]


@pytest.fixture
def drawn():
    draw = torch.Generator().manual_seed(0)
    logits, base = (2 * torch.randn(3, 4, 7, generator=draw) for _ in range(2))
    ids = torch.randint(0, 7, (3, 4), generator=draw)
    mask = torch.arange(4) < torch.tensor([4, 1, 3])[:, None]
    return logits, base, ids, mask


def near(value, expected):
    torch.testing.assert_close(value, torch.tensor(expected), rtol=1e-5, atol=1e-5)  # float32 softmax of 7


@pytest.mark.parametrize("kl", ["exact", "k3"])
def test_token_stats(drawn, kl):
    logits, base, ids, mask = drawn
    stats = token_stats(logits, base, ids, mask, kl)
    logprob, divergence, entropy = [0.0] * 3, [0.0] * 3, [0.0] * 3
    for n in range(3):
        for t in range(4):
            if mask[n, t]:
                policy, reference = Categorical(logits=logits[n, t]), Categorical(logits=base[n, t])
                logprob[n] += float(policy.log_prob(ids[n, t]))
                entropy[n] += float(policy.entropy())
                ratio = float(reference.log_prob(ids[n, t]) - policy.log_prob(ids[n, t]))
                exact = float(kl_divergence(policy, reference))
                divergence[n] += exact if kl == "exact" else math.exp(ratio) - ratio - 1
    near(stats.logprob, logprob)
    near(stats.kl, divergence)
    near(stats.entropy, entropy)
    assert bool((stats.kl > 0).all())


def test_what_is_masked_does_not_count(drawn):
    logits, base, ids, mask = drawn
    before = token_stats(logits, base, ids, mask)
    logits, base, ids = logits.clone(), base.clone(), ids.clone()
    logits[~mask], base[~mask], ids[~mask] = NAN, NAN, 0
    after = token_stats(logits, base, ids, mask)
    assert all(torch.equal(getattr(before, k), getattr(after, k)) for k in ("logprob", "kl", "entropy"))


def test_no_reference_is_no_kl_and_the_base_is_zero(drawn):
    logits, _, ids, mask = drawn
    assert token_stats(logits, None, ids, mask).kl.tolist() == [0, 0, 0]
    for kl in ("exact", "k3"):
        assert token_stats(logits, logits, ids, mask, kl).kl.tolist() == [0, 0, 0]


def test_k3_is_unbiased_for_the_exact_kl():
    policy, base = torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([0.0, 0.5, 0.0, -1.0])
    p = policy.softmax(-1)
    # the mean over all tokens, each at its probability, with no sampling
    ids = torch.arange(4)[:, None]
    values = token_stats(policy.expand(4, 1, 4), base.expand(4, 1, 4), ids, torch.ones(4, 1, dtype=torch.bool), "k3").kl
    exact = kl_divergence(Categorical(logits=policy), Categorical(logits=base))
    torch.testing.assert_close((p * values).sum(), exact, rtol=1e-5, atol=1e-6)


def test_gradient_of_the_loss(drawn):
    logits, base, ids, mask = drawn
    logits = logits.double().requires_grad_()
    advantage = torch.tensor([1.0, -0.5, 0.0])

    def loss(x):
        return reinforce_loss(token_stats(x, base, ids, mask), advantage, 0.3, 3)

    (slow,) = torch.autograd.grad(slow_loss(logits, base.double(), ids, mask, advantage.double(), 0.3), logits)
    (fast,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)  # token_stats works in float32
    assert float(fast[~mask].abs().max()) == 0
    assert float(fast[2].abs().max()) > 0  # no advantage, but KL


@pytest.mark.parametrize("kl", ["exact", "k3"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_gradient_in_double_and_in_chunks(drawn, kl, weight, monkeypatch):
    logits, base, ids, mask = drawn
    logits, base = logits.double().requires_grad_(), base.double()

    def slow(x):
        logp, reference = x.log_softmax(-1), base.log_softmax(-1)
        chosen, d = (t.gather(-1, ids[..., None])[..., 0] for t in (logp, reference - logp))
        divergence = (logp.exp() * (logp - reference)).sum(-1) if kl == "exact" else d.exp() - d - 1
        return chosen[mask].sum() - weight * divergence[mask].sum()

    def fast(x):
        stats = token_stats(x, base, ids, mask, kl)
        return stats.logprob.sum() - weight * stats.kl.sum()

    (expected,) = torch.autograd.grad(slow(logits), logits)
    for size in (1, 3 * 4 * 7, 1 << 24):  # bytes: a token, three tokens, all at once
        monkeypatch.setattr(objectives, "CHUNK_BYTES", size)
        (result,) = torch.autograd.grad(fast(logits), logits)
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_at_the_base_the_kl_has_no_gradient_at_all(drawn):
    # Adam would make steps of any rounding that is left
    logits, _, ids, mask = drawn
    for dtype in (torch.float32, torch.bfloat16):
        policy = logits.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(token_stats(policy, policy.detach(), ids, mask).kl.sum(), policy)
        assert float(grad.abs().max()) == 0


def slow_loss(logits, base, ids, mask, advantage, weight):
    total = 0.0
    for n in range(len(logits)):
        for t in range(int(mask[n].sum())):
            policy, reference = Categorical(logits=logits[n, t]), Categorical(logits=base[n, t])
            total = total + advantage[n] * policy.log_prob(ids[n, t]) - weight * kl_divergence(policy, reference)
    return -total / len(logits)


def test_losses_by_hand():
    stats = TokenStats(torch.tensor([-1.0, -6.0]), torch.tensor([0.5, 0.25]), torch.zeros(2))
    assert float(reinforce_loss(stats, torch.tensor([2.0, -1.0]), 0.1, 4)) == pytest.approx(-(-2 + 6 - 0.075) / 4)
    assert float(sft_loss(stats, torch.tensor([2, 3]), 0.1, 2)) == pytest.approx((0.5 + 2 + 0.075) / 2)


# ------------------------------------------------------------------ one step


def dense(model, z):
    """{parameter: W'(z)} of a plain float64 model, differentiable in z."""
    result = {}
    for name, module in model.named_modules():
        if name in z:
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
            adapted = (u * (s * z[name])) @ vt
            result[f"{name}.weight"] = adapted.T if isinstance(module, Conv1D) else adapted
    return result


def oracle(model, z, rollouts, options, replies=None):
    """(loss, gradient by path): a sum over answers, each a forward pass of its own without cache or padding.

    With replies, token ids of the only ones there are, a token is chosen among those that can still lead to one.
    """
    z = {path: value.double().requires_grad_() for path, value in z.items()}
    weights = dense(model, z)
    scored = (~rollouts.rewards.isnan()).tolist()
    group = len(rollouts.completions) // len(rollouts.prompts)
    advantage = advantages(rollouts.rewards, group, options.baseline).double()
    total = torch.zeros((), dtype=torch.float64)
    for i, answer in enumerate(rollouts.completions):
        if not scored[i]:
            continue
        prompt = rollouts.prompts[i // group]
        ids = torch.tensor([[*prompt, *answer]])
        part = slice(len(prompt) - 1, -1)
        policy = functional_call(model, weights, (ids,), {"use_cache": False}).logits[0, part]
        with torch.no_grad():
            base = model(ids, use_cache=False).logits[0, part]
        logprob = kl = 0.0
        for place, token in enumerate(answer):
            options_ = list(range(policy.shape[1]))
            if replies is not None:
                options_ = sorted({ids[place] for ids in replies if list(ids[:place]) == answer[:place]})
            mine, theirs = (Categorical(logits=logits[place, options_]) for logits in (policy, base))
            logprob = logprob + mine.log_prob(torch.tensor(options_.index(token)))
            kl = kl + kl_divergence(mine, theirs)
        gain = logprob / len(answer) if options.objective == "sft" else advantage[i] * logprob
        total = total - (gain - options.beta * kl) / sum(scored)
    total.backward()
    return float(total), {path: value.grad for path, value in z.items()}


def same(figures, ours, loss, slow, least=1e-3):
    """A step's loss and gradient are the oracle's, which is not all but zero."""
    # the model is float64; z, the decomposition and token_stats are float32
    assert figures["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in slow.values())
    assert scale > least
    for path, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter.grad.double(), slow[path], rtol=1e-3, atol=1e-4 * scale)


class AnyLetter(Letter):
    """Right: begins with a letter or digit, which a third of the tiny models' answers do; a few cannot be judged."""

    def score(self, sample, reply):
        return Score(None if reply[:1] and reply[0] in "-.|*" else float(reply[:1].isalnum()), reply)


class Unscorable(Letter):
    def score(self, sample, reply):
        return Score(None)


CASES = [
    ("llama", {"baseline": "none", "beta": 0.0}),
    ("llama", {"baseline": "mean", "beta": 0.3, "per_device_train_batch_size": 4}),
    ("llama", {"baseline": "leave-one-out", "num_generations": 1, "generation_batch_size": 12}),
    ("gpt2", {"baseline": "leave-one-out", "beta": 2.0}),
    ("qwen3", {"baseline": "leave-one-out", "per_device_train_batch_size": 1}),
    (
        "llama",
        {
            "objective": "sft",
            "num_generations": 1,
            "generation_batch_size": 6,
            "beta": 0.2,
            "per_device_train_batch_size": 4,
        },
    ),
]


@pytest.mark.parametrize(("arch", "options"), CASES)
def test_gradient_equals_the_oracles(tiny, tiny_tokenizer, arch, options):
    task = AnyLetter()
    options = {"generation_batch_size": 12, "num_generations": 4, **options}
    ours = learner(tiny(arch).double(), tiny_tokenizer, task, **options)
    shake(ours.policy)
    samples = task.samples("train", ours.config.generation_batch_size // ours.config.num_generations)
    z = ours.policy.z()
    rollouts = ours.rollouts(0, samples)
    loss, slow = oracle(tiny(arch).double(), z, rollouts, ours.config)
    figures = ours.step(0, samples)
    same(figures, ours, loss, slow)


class Chosen(AnyLetter):
    """There are only four replies."""

    choices = ("ab", "ac", "b", "-")


def test_a_policy_over_given_replies_has_the_oracles_gradient(tiny, tiny_tokenizer):
    task = Chosen()
    ours = learner(
        tiny("llama").double(),
        tiny_tokenizer,
        task,
        generation_batch_size=24,
        num_generations=4,
        per_device_train_batch_size=8,
        beta=0.3,
    )
    ours.max_new_tokens = 4
    shake(ours.policy)
    samples = task.samples("train", 6)
    z = ours.policy.z()
    rollouts = ours.rollouts(0, samples)
    with ours.policy.acting():
        assert set(ours.actor.decode(ours.actor.generate(samples, 4))) <= set(task.choices)
    assert set(rollouts.texts) <= set(task.choices)
    assert len(set(rollouts.texts)) > 1
    loss, slow = oracle(tiny("llama").double(), z, rollouts, ours.config, ours.actor.choices.replies)
    figures = ours.step(0, samples)
    same(figures, ours, loss, slow, least=1e-4)


def test_unscorable_answers_take_no_part(tiny, tiny_tokenizer):
    options = {"generation_batch_size": 24, "num_generations": 4, "baseline": "none", "beta": 0.5}
    task = Letter("w")
    ours = learner(tiny(), tiny_tokenizer, task, **options)
    shake(ours.policy)
    samples = task.samples("train", 6)
    rollouts = ours.rollouts(0, samples)
    hidden = {text[0] for text in rollouts.texts[::3] if text}
    task.unscorable = "".join(hidden)
    figures = ours.step(0, samples)
    unscorable = sum(bool(text) and text[0] in hidden for text in rollouts.texts)
    assert 0 < unscorable < len(rollouts.texts)
    assert figures["unscorable"] == unscorable
    right = [text.startswith("w") for text in rollouts.texts if not (text and text[0] in hidden)]
    assert figures["right"] == pytest.approx(sum(right) / len(right))
    assert figures["reward"] == pytest.approx(2 * sum(right) / len(right) - 1)


def test_nothing_scorable_is_no_gradient(tiny, tiny_tokenizer):
    task = Unscorable()
    ours = learner(tiny(), tiny_tokenizer, task, beta=1.0)
    shake(ours.policy)
    before = ours.policy.z()
    figures = ours.step(0, task.samples("train", 8))
    assert (figures["loss"], figures["grad_norm"], figures["unscorable"]) == (0.0, 0.0, 32)
    assert all(torch.equal(before[path], z) for path, z in ours.policy.z().items())


def gradients(tiny, tokenizer, **options):
    ours = learner(tiny(), tokenizer, Letter("w"), format_reward=0.5, **options)
    shake(ours.policy)
    figures = ours.step(0, Letter().samples("train", 8))
    return {path: p.grad.clone() for path, p in ours.parameters.items()}, figures


@pytest.mark.parametrize("objective", ["reinforce", "sft"])
def test_micro_batches_change_nothing(tiny, tiny_tokenizer, objective):
    whole, figures = gradients(tiny, tiny_tokenizer, objective=objective, per_device_train_batch_size=32)
    for micro in (1, 4, 12):
        parts, others = gradients(tiny, tiny_tokenizer, objective=objective, per_device_train_batch_size=micro)
        for path, gradient in whole.items():
            scale = float(gradient.abs().max())
            # float32 sums in another order
            torch.testing.assert_close(parts[path], gradient, rtol=1e-3, atol=1e-4 * scale)
        for key in figures:
            assert others[key] == pytest.approx(figures[key], rel=1e-3, abs=1e-5), key


def test_the_kl_weight_pulls_towards_the_base(tiny, tiny_tokenizer):
    zero, _ = gradients(tiny, tiny_tokenizer, beta=0.0, baseline="none")
    one, _ = gradients(tiny, tiny_tokenizer, beta=1.0, baseline="none")
    two, _ = gradients(tiny, tiny_tokenizer, beta=2.0, baseline="none")
    ours = learner(tiny(), tiny_tokenizer)
    shake(ours.policy)
    away = {path: z - 1 for path, z in ours.policy.z().items()}
    for path in zero:
        pull = one[path] - zero[path]
        scale = float(pull.abs().max())
        assert scale > 0
        torch.testing.assert_close(two[path] - zero[path], 2 * pull, rtol=1e-2, atol=1e-3 * scale)  # linear in λ
    # downhill in KL is downhill in the distance from the base, over all matrices together
    assert sum(float(((one[p] - zero[p]) * away[p]).sum()) for p in zero) > 0


def test_the_first_step_from_the_base_has_no_kl(tiny, tiny_tokenizer):
    ours = learner(tiny(), tiny_tokenizer, beta=1.0)
    assert ours.step(0, Letter().samples("train", 8))["kl"] == pytest.approx(0, abs=1e-6)
    assert ours.step(1, Letter().samples("train", 8))["kl"] > 1e-4


def test_clip_and_learning_rate_reach_the_update(tiny, tiny_tokenizer):
    ours = learner(tiny(), tiny_tokenizer, max_grad_norm=1e-3, learning_rate=0.01, max_steps=4)
    samples = Letter().samples("train", 8)
    for step in range(4):
        before = ours.policy.z()
        figures = ours.step(step, samples)
        norm = torch.stack([p.grad.norm() for p in ours.parameters.values()]).norm()
        assert float(norm) <= 1e-3 * (1 + 1e-5)
        assert figures["learning_rate"] == pytest.approx(0.005 * (1 + math.cos(math.pi * step / 4)))
        moved = max(float((z - before[path]).abs().max()) for path, z in ours.policy.z().items())
        assert 0 < moved < 3 * figures["learning_rate"]  # AdamW's steps are about the learning rate in size


def test_steps_are_deterministic(tiny, tiny_tokenizer):
    runs = []
    for _ in range(2):
        ours = learner(tiny(), tiny_tokenizer)
        runs.append(([ours.step(i, Letter().samples("train", 8)) for i in range(3)], ours.policy.z()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(z, runs[1][1][path]) for path, z in runs[0][1].items())


def test_greedy_rollouts_and_the_budget(tiny, tiny_tokenizer):
    ours = learner(tiny(), tiny_tokenizer, temperature=0.0, num_generations=4)
    rollouts = ours.rollouts(0, Letter().samples("train", 8))
    for start in range(0, 32, 4):
        assert len({tuple(answer) for answer in rollouts.completions[start : start + 4]}) == 1
    assert max(map(len, rollouts.completions)) == Letter.max_new_tokens


def test_gold_replies_end_with_the_end_token(tiny, tiny_tokenizer):
    ours = learner(tiny(), tiny_tokenizer, objective="sft")
    gold = ours.rollouts(0, Letter("w").samples("train", 3))
    assert gold.completions == [[tiny_tokenizer("w")["input_ids"][0], 2]] * 3
    ids, mask = gold.padded(slice(0, 2), 0)
    assert ids.tolist() == gold.completions[:2]
    assert bool(mask.all())
