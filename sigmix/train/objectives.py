"""Advantages, log-probabilities, KL and the loss. Tensors in, tensors out."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sigmix.engine.cpu_kernels import short_attention
from sigmix.engine.generation import SamplingParams
from sigmix.engine.prefix_cache import answer_logits, prefill
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.distributed import Processes
from sigmix.train.policy import PeftPolicy, SVFPolicy
from sigmix.train.rollout import Actor, Rollouts, row_seed

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


# --- One step of training: rollouts, the base's logits, loss and gradient in micro-batches, update.


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step (from 0): cosine from `lr` to zero over `steps`, or constant."""
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


def _scores(model: Any, prompts: list[list[int]], answers: torch.Tensor) -> int:
    """Attention scores of the larger pass over prompts or answers [N, C], upper bound."""
    longest, (rows, width) = max(map(len, prompts)), answers.shape
    heads = model.config.get_text_config().num_attention_heads
    return heads * max(len(prompts) * longest**2, rows * width * (longest + width))


class Learner:
    """Holds policy and optimiser, and takes steps.

    Args:
        policy: what is trained. actor: how it answers and is scored. config: the run.
        max_new_tokens: answer budget. processes: that share a step's prompts; default: this one alone.
    """

    def __init__(
        self,
        policy: SVFPolicy | PeftPolicy,
        actor: Actor,
        config: TrainConfig,
        max_new_tokens: int,
        processes: Processes | None = None,
    ) -> None:
        self.policy, self.actor, self.config, self.max_new_tokens = policy, actor, config, max_new_tokens
        self.processes = processes or Processes()
        self.parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, weight_decay=0.0)

    def step(self, number: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Take step `number` on some samples; returns figures of the step (before the update).

        Every process gets all samples, answers its share, and learns from its share under advantages and a mean that
        are of all; figures and update are the same everywhere.
        """
        config, meeting = self.config, self.policy.sharded

        def act() -> Rollouts:
            with self.policy.acting():
                return self._rollouts(number, samples)

        rollouts = Rollouts.joined(self.processes.gather(act, meeting))
        self.optimizer.zero_grad(set_to_none=True)
        totals = defaultdict[str, float](float)
        for found in self.processes.gather(lambda: self._gradients(number, rollouts), meeting):
            for name, value in found.items():
                totals[name] += value
        self.processes.add_up(list(self.parameters.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        rate = learning_rate(config, number)
        figures = self._figures(rollouts, totals, float(norm), rate)
        if math.isfinite(figures["loss"]) and math.isfinite(figures["grad_norm"]):
            for group_ in self.optimizer.param_groups:
                group_["lr"] = rate
            self.optimizer.step()
            self.policy.after_step()
        return figures

    def _gradients(self, number: int, rollouts: Rollouts) -> dict[str, float]:
        """Backward passes over this process's share of all rollouts; returns its part of the figures' sums."""
        config = self.config
        group = len(rollouts.answers) // len(rollouts.prompts)
        advantage = advantages(rollouts.rewards, group, config.baseline)
        known = int((~rollouts.rewards.isnan()).sum())
        totals = defaultdict[str, float](float)
        if config.policy == "lora" and config.lora_dropout:
            # so that a resumed run drops the same; of one process, see `shared_policy`
            torch.manual_seed(row_seed(config.seed, number, -1))
        prompts_at_once = max(config.per_device_train_batch_size // group, 1)
        mine = self.processes.share(len(rollouts.prompts))
        for start in range(mine.start, mine.stop, prompts_at_once):
            stop = min(start + prompts_at_once, mine.stop)
            part = slice(start * group, stop * group)
            prompts = rollouts.prompts[start:stop]
            ids, mask = rollouts.padded(part, self.actor.pad_id, rollouts.width if self.policy.sharded else None)
            stats = self._stats(prompts, ids, mask, group)
            usable = ~rollouts.rewards[part].isnan()
            if config.objective == "sft":
                loss = sft_loss(stats, mask.sum(1), config.beta, max(known, 1))
            else:
                stats.kl = stats.kl * usable
                loss = reinforce_loss(stats, advantage[part], config.beta, max(known, 1))
            loss.backward()
            totals["loss"] += float(loss.detach())
            totals["kl"] += float(stats.kl.detach().sum())
            totals["entropy"] += float(stats.entropy.sum())
            totals["tokens"] += int(mask.sum())
        return totals

    def _rollouts(self, number: int, samples: Sequence[Sample]) -> Rollouts:
        """Answers to this process's share; a row's random stream is of its place among all."""
        config, mine = self.config, self.processes.share(len(samples))
        if config.objective == "sft":
            return self.actor.gold(samples[mine])
        rows = range(mine.start * config.num_generations, mine.stop * config.num_generations)
        seeds = [row_seed(config.seed, number, row) for row in rows]
        sampling = SamplingParams(self.max_new_tokens, config.temperature > 0, config.temperature, 1.0, seeds)
        return self.actor.roll(samples[mine], sampling, config.num_generations, config.format_reward)

    def _stats(self, prompts: list[list[int]], ids: torch.Tensor, mask: torch.Tensor, group: int) -> TokenStats:
        model, pad = self.policy.model, self.actor.pad_id
        device = model.get_input_embeddings().weight.device
        ids, mask = ids.to(device), mask.to(device)

        def logits() -> torch.Tensor:
            read = prefill(model, prompts, pad, share=not self.policy.sharded)
            found = answer_logits(model, read.repeat(group), ids, mask)
            choices = self.actor.choices
            return found if choices is None else choices.constrain_answers(found, ids)

        reference = None
        with short_attention(model, _scores(model, prompts, ids)):
            if self.config.beta > 0:
                with torch.no_grad(), self.policy.reference():
                    reference = logits()
            with self.policy.learning():
                learnt = logits()
        stats = token_stats(learnt, reference, ids, mask, self.config.kl_estimator)
        return TokenStats(stats.logprob.cpu(), stats.kl.cpu(), stats.entropy.cpu())

    def _figures(self, rollouts: Rollouts, totals: Any, norm: float, rate: float) -> dict[str, float]:
        rewards, tokens = rollouts.rewards, max(totals["tokens"], 1)
        known = rewards[~rewards.isnan()]
        common = Counter(rollouts.texts).most_common(1)[0][1] / len(rollouts.texts)
        return {
            "reward": float(known.mean()) if len(known) else 0.0,
            "right": float((known == 1).float().mean()) if len(known) else 0.0,
            "formed": sum(answer is not None for answer in rollouts.extracted) / len(rollouts.extracted),
            "unscorable": int(rewards.isnan().sum()),
            "loss": totals["loss"],
            "kl": totals["kl"] / tokens,
            "entropy": totals["entropy"] / tokens,
            "grad_norm": norm,
            "lr": rate,
            "answer_tokens": tokens / len(rollouts.answers),
            "most_common": common,
        }
