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


CHUNK_BYTES = 1 << 21
"""Of float32 logits that one chunk of tokens holds: such blocks stay in or near a CPU's cache, and no float32 tensor
[N, C, V] is ever made."""


def token_stats(logits: Tensor, reference: Tensor | None, ids: Tensor, mask: Tensor, kl: str = "exact") -> TokenStats:
    """Sums over each answer's tokens, computed in chunks of tokens (float32, or double if the logits are).

    Args:
        logits: [N, C, V] of the policy, with gradient. reference: [N, C, V] of the base, or None (KL is then 0).
        ids: int64 [N, C], the answers. mask: bool [N, C], True on answer tokens (the end token is one).
        kl: "exact": Σᵥ π(v) log(π(v)/π₀(v)); "k3": exp(d) - d - 1 with d = log π₀(y) - log π(y) on the sampled token
            (unbiased for KL(π‖π₀) in value; http://joschu.net/blog/kl-approx.html).
    """
    # only real answer tokens go through the softmax: answers in a batch differ in length
    rows = mask.nonzero()[:, 0]
    base = None if reference is None else reference[mask]
    values = _PerToken.apply(logits[mask], base, ids[mask], kl == "exact")
    zero = torch.zeros(len(logits), dtype=values[0].dtype, device=logits.device)
    return TokenStats(*(zero.index_add(0, rows, value) for value in values))


class _PerToken(torch.autograd.Function):
    """log π(y), KL and entropy [n] of n tokens from logits x and the base's x₀ [n, V]; x's gradient in closed form.

    With p = softmax(x), ℓ = log p, ℓ₀ = log softmax(x₀) and the incoming gradients a of log π(y) and b of the exact KL:
        ∂/∂x = a (onehot(y) - p) + b p (ℓ - ℓ₀ - KL)
    k3 depends on log π(y) alone, so it only adds b (1 - exp(d)) to a. The entropy is a figure, without gradient.
    """

    @staticmethod
    def forward(ctx, logits, base, ids, exact):
        ctx.save_for_backward(logits, base, ids)
        ctx.exact = exact
        dtype = torch.promote_types(logits.dtype, torch.float32)
        chosen, divergence, entropy = (logits.new_zeros(len(logits), dtype=dtype) for _ in range(3))
        chunks = _Chunks(logits, base)
        for part in chunks.parts():
            p, logp, gap = chunks.load(part)
            token = ids[part, None]
            chosen[part] = logp.gather(-1, token)[:, 0]
            entropy[part] = -torch.linalg.vecdot(p, logp)
            if gap is not None and exact:
                divergence[part] = torch.linalg.vecdot(p, gap)
            elif gap is not None:
                d = -gap.gather(-1, token)[:, 0]
                divergence[part] = d.exp() - d - 1
        ctx.mark_non_differentiable(entropy)
        return chosen, divergence, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_chosen, of_kl, _):
        logits, base, ids = ctx.saved_tensors
        grad = torch.empty_like(logits)
        chunks = _Chunks(logits, base)
        for part in chunks.parts():
            p, _, gap = chunks.load(part)
            token, of_token = ids[part, None], of_chosen[part, None]
            if gap is not None and ctx.exact:
                inner = gap.sub_(torch.linalg.vecdot(p, gap)[:, None]).mul_(of_kl[part, None]).sub_(of_token)
            else:
                if gap is not None:
                    of_token = of_token + of_kl[part, None] * (1 - (-gap.gather(-1, token)).exp())
                inner = -of_token
            grad[part] = p.mul_(inner).scatter_add_(-1, token, of_token)
        return grad, None, None, None


class _Chunks:
    """A few tokens' p, log p and, with a base, log p - log p₀ at a time, in buffers that are used again.

    Fresh memory for every step of the arithmetic costs more in page faults than the arithmetic itself.
    """

    def __init__(self, logits: Tensor, base: Tensor | None) -> None:
        self.logits, self.base = logits, base
        self.size = max(min(CHUNK_BYTES // (4 * logits.shape[-1]), len(logits)), 1)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.buffers = [logits.new_empty(self.size, logits.shape[-1], dtype=dtype) for _ in range(3)]

    def parts(self) -> list[slice]:
        return [slice(start, start + self.size) for start in range(0, len(self.logits), self.size)]

    def load(self, part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        p, logp, gap = (buffer[: len(self.logits[part])] for buffer in self.buffers)
        if self.base is not None:
            self._log_softmax(self.base[part], gap, p)
        self._log_softmax(self.logits[part], logp, p)
        return p, logp, None if self.base is None else torch.sub(logp, gap, out=gap)

    @staticmethod
    def _log_softmax(x: Tensor, logp: Tensor, p: Tensor) -> None:
        logp.copy_(x)
        logp.sub_(logp.amax(-1, keepdim=True))
        torch.exp(logp, out=p)
        total = p.sum(-1, keepdim=True)
        p.div_(total)
        logp.sub_(total.log())


def reinforce_loss(stats: TokenStats, advantage: Tensor, kl_weight: float, total: int) -> Tensor:
    """-J over `total` answers (Eq. 1 of the paper), for those in ``stats``; scalar."""
    return -(advantage * stats.logprob - kl_weight * stats.kl).sum() / total


def sft_loss(stats: TokenStats, tokens: Tensor, kl_weight: float, total: int) -> Tensor:
    """Next-token objective: mean over answers of the mean negative log-probability of gold tokens, plus λ KL."""
    return (-stats.logprob / tokens.clamp_min(1) + kl_weight * stats.kl).sum() / total
