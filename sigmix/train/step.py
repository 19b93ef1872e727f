"""One step of training: rollouts, the base's logits, loss and gradient in micro-batches, update."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from sigmix.engine.cpu import short_attention
from sigmix.engine.decode import Sampling
from sigmix.engine.prefix import answer_logits, prefill
from sigmix.tasks.base import Sample
from sigmix.train.config import TrainConfig
from sigmix.train.losses import TokenStats, advantages, reinforce_loss, sft_loss, token_stats
from sigmix.train.policy import PeftPolicy, SVFPolicy
from sigmix.train.processes import Processes
from sigmix.train.rollout import Actor, Rollouts, row_seed


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step (from 0): cosine from `lr` to zero over `steps`, or constant."""
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / config.steps))


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
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.lr, weight_decay=0.0)

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
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
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
        prompts_at_once = max(config.micro // group, 1)
        mine = self.processes.share(len(rollouts.prompts))
        for start in range(mine.start, mine.stop, prompts_at_once):
            stop = min(start + prompts_at_once, mine.stop)
            part = slice(start * group, stop * group)
            prompts = rollouts.prompts[start:stop]
            ids, mask = rollouts.padded(part, self.actor.pad_id, rollouts.width if self.policy.sharded else None)
            stats = self._stats(prompts, ids, mask, group)
            usable = ~rollouts.rewards[part].isnan()
            if config.objective == "sft":
                loss = sft_loss(stats, mask.sum(1), config.kl_weight, max(known, 1))
            else:
                stats.kl = stats.kl * usable
                loss = reinforce_loss(stats, advantage[part], config.kl_weight, max(known, 1))
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
        rows = range(mine.start * config.group, mine.stop * config.group)
        seeds = [row_seed(config.seed, number, row) for row in rows]
        sampling = Sampling(self.max_new_tokens, config.temperature, 1.0, seeds)
        return self.actor.roll(samples[mine], sampling, config.group, config.form_reward)

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
            if self.config.kl_weight > 0:
                with torch.no_grad(), self.policy.reference():
                    reference = logits()
            with self.policy.learning():
                learnt = logits()
        stats = token_stats(learnt, reference, ids, mask, self.config.kl)
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
