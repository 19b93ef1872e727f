"""Advantages, KL and losses against slow loops and torch.distributions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from sigmix.train import objectives as losses
from sigmix.train.objectives import TokenStats, advantages, reinforce_loss, sft_loss, token_stats

NAN = float("nan")


def slow_advantages(rewards: list[float], group: int, baseline: str) -> list[float]:
    found = []
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
        found.append(0.0 if alone else reward - sum(others) / len(others))
    return found


@pytest.mark.parametrize("baseline", ["none", "mean", "leave-one-out"])
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("unscorable", [0, 3, 11, 12])
def test_advantages(baseline, group, unscorable):
    draw = torch.Generator().manual_seed(unscorable)
    rewards = torch.randint(0, 2, (12,), generator=draw) * 2.0 - 1
    rewards[torch.randperm(12, generator=draw)[:unscorable]] = NAN
    found = advantages(rewards, group, baseline)
    assert found.tolist() == pytest.approx(slow_advantages(rewards.tolist(), group, baseline), abs=1e-6)


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

    (slow,) = torch.autograd.grad(oracle(logits, base.double(), ids, mask, advantage.double(), 0.3), logits)
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
        monkeypatch.setattr(losses, "CHUNK_BYTES", size)
        (found,) = torch.autograd.grad(fast(logits), logits)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_at_the_base_the_kl_has_no_gradient_at_all(drawn):
    # Adam would make steps of any rounding that is left
    logits, _, ids, mask = drawn
    for dtype in (torch.float32, torch.bfloat16):
        policy = logits.to(dtype).requires_grad_()
        (grad,) = torch.autograd.grad(token_stats(policy, policy.detach(), ids, mask).kl.sum(), policy)
        assert float(grad.abs().max()) == 0


def oracle(logits, base, ids, mask, advantage, weight):
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
