"""Peer of `train-step`: a REINFORCE step on z as in the public reference implementation.

Reimplements SakanaAI/self-adaptive-llms (``utils.forward``, ``utils.backward``, ``optim_modules.Reinforce``): W'(z) =
U diag(s·z) Vᵀ is composed densely, with a diagonal matrix, and copied into the model; answers come from a generation
engine (there vLLM, here transformers' ``generate``); log-probabilities come from whole sequences, prompt and answer,
with logits at every position; the reference's from the base weights, copied in and replaced by a second composition;
autograd computes the dense gradient of every W', and a third composition propagates it to z.

In the peer's favour, so that methods are compared: sequences run in batches (there one by one), sampled ids are kept,
and U, s and V come from the same decomposition as sigmix's. z is direct (there a sigmoid with the sum of singular
values restored); loss and optimizer are those of `TrainConfig`, the reward is the reference's ±1.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from sigmix.engine.prefix_cache import left_pad
from sigmix.engine.tokenization import encode
from sigmix.svf.decomposition import cached_decompose
from sigmix.svf.tuner import target_layers
from sigmix.tasks.base import Sample, Task
from sigmix.train.config import TrainConfig
from sigmix.train.objectives import advantages, learning_rate
from sigmix.train.rollout import Rollouts, row_seed

ROWS = 16
"""Sequences in one pass: logits at every position of more take memory and save no time."""


class Dense:
    """Takes training steps; all answers have the same length.

    Attributes:
        z: {module path: float32 parameter [r]}.
        phases: seconds of each part of the last step.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, config: TrainConfig, new_tokens: int) -> None:
        self.model, self.tokenizer, self.task, self.config = model, tokenizer, task, config
        self.modules = target_layers(model)
        self.base: dict[str, torch.Tensor] = {}
        self.factors: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.z: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            weight = module.weight.detach()
            u, s, v = cached_decompose(weight).usv(weight)
            self.base[name] = weight.clone()
            self.factors[name] = (u.to(weight.dtype), s, v.to(weight.dtype))
            self.z[name] = nn.Parameter(torch.ones_like(s))
            module.weight.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.z.values(), lr=config.learning_rate, weight_decay=0.0)
        self.pad = tokenizer.pad_token_id
        # no end ids: every answer has the same length
        model.generation_config = GenerationConfig(
            do_sample=config.temperature > 0, temperature=config.temperature or None, top_k=0, top_p=1.0,
            max_new_tokens=new_tokens, pad_token_id=self.pad,
        )  # fmt: skip
        self.phases: defaultdict[str, float] = defaultdict(float)

    def compose(self, name: str) -> torch.Tensor:
        """W'(z) [out, in] in the weight's dtype, with a gradient for z."""
        u, s, v = self.factors[name]
        return u @ torch.diag_embed((s * self.z[name]).to(u.dtype)) @ v.T

    def step(self, number: int, samples: Sequence[Sample], rollouts: Rollouts | None = None) -> dict[str, float]:
        """One step, on given rollouts or on its own; z's gradient stays in ``z[...].grad``."""
        self.phases = defaultdict(float)
        self._load(composed=True)
        with self._timed("rollout"):
            prompts, answers, rewards = self._roll(number, samples) if rollouts is None else self._given(rollouts)
        group = len(answers) // len(prompts)
        advantage = advantages(rewards, group, self.config.baseline)
        prompts = [prompt for prompt in prompts for _ in range(group)]
        ids, mask = left_pad([a + b for a, b in zip(prompts, answers, strict=True)], self.pad, torch.device("cpu"))
        width = len(answers[0])
        parts = [slice(start, start + ROWS) for start in range(0, len(ids), ROWS)]
        self._load(composed=False)
        with self._timed("reference"), torch.no_grad():
            reference = [self._logp(ids[part], mask[part], width) for part in parts]
        self._load(composed=True)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        with self._timed("loss and dense gradient"):
            for part, base in zip(parts, reference, strict=True):
                logp = self._logp(ids[part], mask[part], width)
                chosen = logp.gather(-1, ids[part][:, -width:, None])[..., 0].sum(1)
                kl = (logp.exp() * (logp - base)).sum((1, 2))
                loss = -(advantage[part] * chosen - self.config.beta * kl).sum() / len(ids)
                loss.backward()
                total += float(loss.detach())
        with self._timed("gradient of z"):
            for name, module in self.modules.items():
                self.compose(name).backward(module.weight.grad)
                module.weight.grad = None
        norm = nn.utils.clip_grad_norm_(self.z.values(), self.config.max_grad_norm)
        for options in self.optimizer.param_groups:
            options["lr"] = learning_rate(self.config, number)
        self.optimizer.step()
        return {"loss": total, "grad_norm": float(norm), "completion_tokens": float(width)}

    def _load(self, composed: bool) -> None:
        with self._timed("compose and load"), torch.no_grad():
            for name, module in self.modules.items():
                module.weight.copy_(self.compose(name) if composed else self.base[name])

    def _roll(self, number: int, samples: Sequence[Sample]) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
        prompts = [encode(self.tokenizer, sample.prompt, sample.system) for sample in samples]
        group = self.config.num_generations
        rows = [prompt for prompt in prompts for _ in range(group)]
        ids, mask = left_pad(rows, self.pad, torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(row_seed(self.config.seed, number, 0))
            out = self.model.generate(input_ids=ids, attention_mask=mask.long())
        answers = out[:, ids.shape[1] :].tolist()
        texts = [self.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
        values = [self.task.score(samples[i // group], text).value for i, text in enumerate(texts)]
        rewards = [float("nan") if value is None else 2 * value - 1 for value in values]
        return prompts, answers, torch.tensor(rewards)

    @staticmethod
    def _given(rollouts: Rollouts) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
        return rollouts.prompts, rollouts.completions, rollouts.rewards

    def _logp(self, ids: torch.Tensor, mask: torch.Tensor, width: int) -> torch.Tensor:
        """Log-probabilities [n, width, V] that predict the last ``width`` tokens, float32."""
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return out.logits[:, -width - 1 : -1].float().log_softmax(-1)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[phase] += time.perf_counter() - start
