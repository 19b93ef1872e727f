"""Advantages, log-probabilities, KL and the loss. Tensors in, tensors out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


def advantages(rewards: Tensor, group: int, baseline: str) -> Tensor:
    """r - b per answer [N]; NaN rewards (unscorable) get 0 and take no part in any baseline.

    Args:
        rewards: float [N], answers of one prompt beside each other.
        group: answers per prompt.
        baseline: "none", "mean" (of the batch), "leave-one-out" (of the group; of the batch if group is 1).
    """
    known = ~rewards.isnan()
    values = torch.where(known, rewards, 0.0)
    if baseline == "none":
        return values
    if baseline == "mean":
        return torch.where(known, values - values.sum() / known.sum().clamp_min(1), 0.0)
    width = group if group > 1 else len(rewards)
    total = values.view(-1, width).sum(1, keepdim=True)
    count = known.view(-1, width).sum(1, keepdim=True)
    others = (total - values.view(-1, width)) / (count - 1).clamp_min(1)
    # with no other scorable answer in the group there is nothing to compare with
    usable = known.view(-1, width) & (count > 1)
    return torch.where(usable, values.view(-1, width) - others, 0.0).flatten()


@dataclass
class TokenStats:
    """Per answer, sums over its tokens [N]: log-probability, KL to the reference, entropy of the policy."""

    logprob: Tensor
    kl: Tensor
    entropy: Tensor


def token_stats(logits: Tensor, reference: Tensor | None, ids: Tensor, mask: Tensor, kl: str = "exact") -> TokenStats:
    """Sums over each answer's tokens.

    Args:
        logits: [N, C, V] of the policy, with gradient. reference: [N, C, V] of the base, or None (KL is then 0).
        ids: int64 [N, C], the answers. mask: bool [N, C], True on answer tokens (the end token is one).
        kl: "exact": Σᵥ π(v) log(π(v)/π₀(v)); "k3": exp(d) - d - 1 with d = log π₀(y) - log π(y) on the sampled token
            (unbiased for KL(π‖π₀) in value; http://joschu.net/blog/kl-approx.html).
    """
    # only real answer tokens go through the softmax: answers in a batch differ in length
    rows = mask.nonzero()[:, 0]
    logp = logits[mask].float().log_softmax(-1)
    chosen = logp.gather(-1, ids[mask][:, None])[:, 0]
    if reference is None:
        divergence = torch.zeros_like(chosen)
    else:
        base = reference[mask].float().log_softmax(-1)
        if kl == "exact":
            divergence = (logp.exp() * (logp - base)).sum(-1)
        else:
            d = base.gather(-1, ids[mask][:, None])[:, 0] - chosen
            divergence = d.exp() - d - 1
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(-1)
    zero = torch.zeros(len(logits), dtype=torch.float32, device=logits.device)
    return TokenStats(*(zero.index_add(0, rows, value) for value in (chosen, divergence, entropy)))


def reinforce_loss(stats: TokenStats, advantage: Tensor, kl_weight: float, total: int) -> Tensor:
    """-J over `total` answers (Eq. 1 of the paper), for those in ``stats``; scalar."""
    return -(advantage * stats.logprob - kl_weight * stats.kl).sum() / total


def sft_loss(stats: TokenStats, tokens: Tensor, kl_weight: float, total: int) -> Tensor:
    """Next-token objective: mean over answers of the mean negative log-probability of gold tokens, plus λ KL."""
    return (-stats.logprob / tokens.clamp_min(1) + kl_weight * stats.kl).sum() / total
