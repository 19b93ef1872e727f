"""Training objectives: advantages, log-probabilities and KL, the losses, and one optimizer step."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from sigmix.engine.cpu.kernels import short_attention
from sigmix.engine.generation import SamplingParams
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import completion_logits, prefill
from sigmix.models.batching import batching
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.distributed import Processes
from sigmix.train.policy import Policy
from sigmix.train.rollout import Actor, Rollouts, row_seed


def advantages(rewards: Tensor, num_generations: int, baseline: str) -> Tensor:
    """Return reward minus baseline, float32 [N]. Rows with NaN rewards get 0 and enter no baseline.

    Args:
        rewards: float32 [N], completions of one prompt next to each other.
        baseline: "none", "mean" (of the batch) or "leave-one-out" (of the prompt's other completions; of the batch's if
            num_generations is 1).
    """
    scored = ~rewards.isnan()
    values = torch.where(scored, rewards, 0.0)
    if baseline == "none":
        return values
    if baseline == "mean":
        return torch.where(scored, values - values.sum() / scored.sum().clamp_min(1), 0.0)
    width = num_generations if num_generations > 1 else len(rewards)
    values, scored = values.view(-1, width), scored.view(-1, width)
    count = scored.sum(1, keepdim=True)
    others = (values.sum(1, keepdim=True) - values) / (count - 1).clamp_min(1)
    return torch.where(scored & (count > 1), values - others, 0.0).flatten()


# ---------------------------------------------------------------------- log-probability, KL and entropy


@dataclass
class TokenStats:
    """Sums over the tokens of each completion [N]: log-probability, KL to the reference, entropy of the policy."""

    logprob: Tensor
    kl: Tensor
    entropy: Tensor


CHUNK_BYTES = 1 << 21
"""Bytes of float32 logits in a chunk of tokens, small enough for a CPU's cache. No float32 [N, C, V] is created."""


def token_stats(
    logits: Tensor, reference: Tensor | None, ids: Tensor, mask: Tensor, estimator: str = "exact"
) -> TokenStats:
    """Sum log-probability, KL and entropy over each completion, in chunks of tokens (float32, or float64 logits' own).

    Args:
        logits: [N, C, V] of the policy, with gradient. reference: [N, C, V] of the base, or None for a KL of 0.
        ids: int64 [N, C], the completions. mask: bool [N, C], True on completion tokens, the end token included.
        estimator: "exact": Σᵥ π(v) log(π(v)/π₀(v)); "k3": exp(d) - d - 1 with d = log π₀(y) - log π(y) on the sampled
            token (unbiased for KL(π‖π₀) in value; http://joschu.net/blog/kl-approx.html).
    """
    rows = mask.nonzero()[:, 0]  # no softmax over padding
    base = None if reference is None else reference[mask]
    values = _PerToken.apply(logits[mask], base, ids[mask], estimator == "exact")
    zero = torch.zeros(len(logits), dtype=values[0].dtype, device=logits.device)
    return TokenStats(*(zero.index_add(0, rows, value) for value in values))


class _PerToken(torch.autograd.Function):
    """log π(y), KL and entropy [n] of n tokens from logits x and the base's x₀ [n, V]; x's gradient in closed form.

    With p = softmax(x), ℓ = log p, ℓ₀ = log softmax(x₀) and the incoming gradients a of log π(y) and b of the exact KL:
        ∂/∂x = a (onehot(y) - p) + b p (ℓ - ℓ₀ - KL)
    k3 depends on log π(y) alone, so it adds b (1 - exp(d)) to a. The entropy has no gradient.
    """

    @staticmethod
    def forward(ctx, logits, base, ids, exact):
        ctx.save_for_backward(logits, base, ids)
        ctx.exact = exact
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logprob, kl, entropy = (logits.new_zeros(len(logits), dtype=dtype) for _ in range(3))
        for part, p, logp, gap in _chunks(logits, base):
            token = ids[part, None]
            logprob[part] = logp.gather(-1, token)[:, 0]
            entropy[part] = -torch.linalg.vecdot(p, logp)
            if gap is not None and exact:
                kl[part] = torch.linalg.vecdot(p, gap)
            elif gap is not None:
                d = -gap.gather(-1, token)[:, 0]
                kl[part] = d.exp() - d - 1
        ctx.mark_non_differentiable(entropy)
        return logprob, kl, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprob, grad_kl, _):
        logits, base, ids = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for part, p, _logp, gap in _chunks(logits, base):
            token, grad_token = ids[part, None], grad_logprob[part, None]
            if gap is not None and ctx.exact:
                inner = gap.sub_(torch.linalg.vecdot(p, gap)[:, None]).mul_(grad_kl[part, None]).sub_(grad_token)
            else:
                if gap is not None:
                    grad_token = grad_token + grad_kl[part, None] * (1 - (-gap.gather(-1, token)).exp())
                inner = -grad_token
            grad[part] = p.mul_(inner).scatter_add_(-1, token, grad_token)
        return grad, None, None, None


def _chunks(logits: Tensor, base: Tensor | None) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Yield (slice, p, log p, log p - log p₀) of a few tokens at a time.

    The buffers are reused: page faults of fresh memory would cost more than the arithmetic.
    """
    size = max(min(CHUNK_BYTES // (4 * logits.shape[-1]), len(logits)), 1)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    buffers = [logits.new_empty(size, logits.shape[-1], dtype=dtype) for _ in range(3)]
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        p, logp, gap = (buffer[: len(logits[part])] for buffer in buffers)
        if base is not None:
            _log_softmax(base[part], gap, p)
        _log_softmax(logits[part], logp, p)
        yield part, p, logp, None if base is None else torch.sub(logp, gap, out=gap)


def _log_softmax(x: Tensor, logp: Tensor, p: Tensor) -> None:
    logp.copy_(x)
    logp.sub_(logp.amax(-1, keepdim=True))
    torch.exp(logp, out=p)
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    logp.sub_(total.log())


def reinforce_loss(stats: TokenStats, advantage: Tensor, beta: float, total: int) -> Tensor:
    """Return -J of the given completions (Eq. 1 of the paper), normalized by ``total`` completions; scalar."""
    return -(advantage * stats.logprob - beta * stats.kl).sum() / total


def sft_loss(stats: TokenStats, tokens: Tensor, beta: float, total: int) -> Tensor:
    """Return the mean over completions of the mean token negative log-likelihood, plus beta times KL; scalar."""
    return (-stats.logprob / tokens.clamp_min(1) + beta * stats.kl).sum() / total


# ---------------------------------------------------------------------- one optimizer step


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step (from 0)."""
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.max_steps))


class Learner:
    """Policy and optimizer: rollouts, reference log-probabilities, gradients and update of a step.

    Args:
        max_new_tokens: of a completion.
        processes: data-parallel processes that share each step's prompts. Default: this process alone.
    """

    def __init__(
        self, policy: Policy, actor: Actor, config: TrainConfig, max_new_tokens: int, processes: Processes | None = None
    ) -> None:
        self.policy, self.actor, self.config, self.max_new_tokens = policy, actor, config, max_new_tokens
        self.processes = processes or Processes()
        self.parameters = policy.parameters()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, weight_decay=0.0)

    def step(self, number: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Take optimizer step ``number`` on the samples of all processes; return its metrics, taken before the update.

        Each process generates and back-propagates its share of the prompts. Advantages, loss normalization, metrics and
        the update are those of the whole batch in every process.
        """
        rollouts, totals = self.gradients(number, samples)
        norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm))
        rate = learning_rate(self.config, number)
        metrics = self._metrics(rollouts, totals, norm, rate)
        if math.isfinite(metrics["loss"]) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.policy.after_step()
        return metrics

    def gradients(self, number: int, samples: Sequence[Sample]) -> tuple[Rollouts, Mapping[str, float]]:
        """Set the gradients of step ``number``; return the rollouts and the sums of `_backward`, of all processes."""
        processes, collective = self.processes, self.policy.sharded
        read: list[Prefilled] = []
        rollouts = Rollouts.joined(processes.gather(lambda: self.rollouts(number, samples, read), collective))
        self.optimizer.zero_grad(set_to_none=True)
        totals: defaultdict[str, float] = defaultdict(float)
        for sums in processes.gather(lambda: self._backward(number, rollouts, read), collective):
            for name, value in sums.items():
                totals[name] += value
        processes.sum_gradients(list(self.parameters.values()))
        return rollouts, totals

    def rollouts(self, number: int, samples: Sequence[Sample], read: list[Prefilled] | None = None) -> Rollouts:
        """Return the rollouts of this process's share. A row's random seed is that of its place in the whole batch.

        Args:
            read: receives the prompts with their gradients, if the loss can continue from them.
        """
        config, share = self.config, self.processes.share(len(samples))
        if config.objective == "sft":
            return self.actor.gold(samples[share])
        rows = range(share.start * config.num_generations, share.stop * config.num_generations)
        do_sample, temperature = config.temperature > 0, config.temperature
        params = [
            SamplingParams(self.max_new_tokens, do_sample, temperature, seed=row_seed(config.seed, number, row))
            for row in rows
        ]
        state = None
        if read is not None and self._reads_once(len(samples[share])):
            read.append(self._read(self.actor.prompts(samples[share], self.max_new_tokens)))
            state = read[0].detached()
        with self.policy.acting(tokens=len(params) * self.max_new_tokens):
            return self.actor.rollouts(samples[share], params, config.num_generations, config.format_reward, state)

    def _reads_once(self, prompts: int) -> bool:
        """Return True if rollouts and loss can share one pass over this number of prompts."""
        config, kind = self.config, batching(self.policy.model)
        fits = prompts * config.num_generations <= config.per_device_train_batch_size
        random = config.policy == "lora" and config.lora_dropout > 0
        return fits and not (self.policy.sharded or kind.recurrent or kind.threshold is not None or random)

    def _read(self, prompts: list[list[int]]) -> Prefilled:
        """Read prompts for both rollouts and loss."""
        model = self.policy.model
        with short_attention(model, _attention_scores(model, prompts)), self.policy.learning():
            return prefill(model, prompts, self.actor.pad_id)

    def _backward(self, number: int, rollouts: Rollouts, read: Sequence[Prefilled] = ()) -> dict[str, float]:
        """Accumulate the gradients of this process's share; return its sums of loss, KL, entropy and tokens."""
        config = self.config
        generations = len(rollouts.completions) // len(rollouts.prompts)
        advantage = advantages(rollouts.rewards, generations, config.baseline)
        scored = ~rollouts.rewards.isnan()
        total = max(int(scored.sum()), 1)
        sums: defaultdict[str, float] = defaultdict(float)
        if config.policy == "lora" and config.lora_dropout:
            torch.manual_seed(row_seed(config.seed, number, -1))  # a resumed run drops the same
        prompts_per_pass = max(config.per_device_train_batch_size // generations, 1)
        share = self.processes.share(len(rollouts.prompts))
        for start in range(share.start, share.stop, prompts_per_pass):
            stop = min(start + prompts_per_pass, share.stop)
            part = slice(start * generations, stop * generations)
            ids, mask = rollouts.padded(part, self.actor.pad_id, rollouts.width if self.policy.sharded else None)
            stats = self._stats(rollouts.prompts[start:stop], ids, mask, *read)
            if config.objective == "sft":
                loss = sft_loss(stats, mask.sum(1), config.beta, total)
            else:
                stats.kl = stats.kl * scored[part]
                loss = reinforce_loss(stats, advantage[part], config.beta, total)
            loss.backward()
            sums["loss"] += float(loss.detach())
            sums["kl"] += float(stats.kl.detach().sum())
            sums["entropy"] += float(stats.entropy.sum())
            sums["tokens"] += int(mask.sum())
        return dict(sums)

    def _stats(self, prompts: list[list[int]], ids: Tensor, mask: Tensor, read: Prefilled | None = None) -> TokenStats:
        model, choices = self.policy.model, self.actor.choices
        device = model.get_input_embeddings().weight.device
        ids, mask = ids.to(device), mask.to(device)

        def logits(state: Prefilled | None = None) -> Tensor:
            share, pad = not self.policy.sharded, self.actor.pad_id
            raw = completion_logits(model, prompts, ids, mask, pad, share, self.policy.prompt_only, state)
            return raw if choices is None else choices.constrain_answers(raw, ids)

        reference = None
        with short_attention(model, _attention_scores(model, prompts, ids)):
            if self.config.beta > 0:
                with torch.no_grad(), self.policy.reference():
                    reference = logits()
            with self.policy.learning():
                policy = logits(read)
        stats = token_stats(policy, reference, ids, mask, self.config.kl_estimator)
        return TokenStats(stats.logprob.cpu(), stats.kl.cpu(), stats.entropy.cpu())

    def _metrics(
        self, rollouts: Rollouts, totals: Mapping[str, float], grad_norm: float, rate: float
    ) -> dict[str, float]:
        rewards, tokens = rollouts.rewards, max(totals["tokens"], 1)
        scored = rewards[~rewards.isnan()]
        return {
            "reward": float(scored.mean()) if len(scored) else 0.0,
            "right": float((scored == 1).float().mean()) if len(scored) else 0.0,
            "formed": sum(answer is not None for answer in rollouts.parsed) / len(rollouts.parsed),
            "unscorable": int(rewards.isnan().sum()), "loss": totals["loss"], "kl": totals["kl"] / tokens,
            "entropy": totals["entropy"] / tokens, "grad_norm": grad_norm, "learning_rate": rate,
            "completion_tokens": tokens / len(rollouts.completions),
            "most_common": Counter(rollouts.texts).most_common(1)[0][1] / len(rollouts.texts),
        }  # fmt: skip


def _attention_scores(model: PeftModel, prompts: list[list[int]], completions: Tensor | None = None) -> int:
    """Upper bound of rows × heads × queries × keys of the larger pass, over prompts or completions [N, C]."""
    longest, (rows, width) = max(map(len, prompts)), (0, 0) if completions is None else completions.shape
    heads = model.config.get_text_config().num_attention_heads
    return heads * max(len(prompts) * longest**2, rows * width * (longest + width))
