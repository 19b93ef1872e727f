"""Rollouts: prompts of a step, answers of the acting policy, rewards of the verifier."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sigmix.engine.constrained import Choices
from sigmix.engine.generation import Row, SamplingParams, complete
from sigmix.engine.tokenization import check_context, encode, reply_ids
from sigmix.tasks.base import Sample, Score, Task


@dataclass
class Rollouts:
    """Answers of one step, `group` beside each other for each prompt.

    Attributes:
        prompts: N token-id lists. answers: N·group token-id lists, as sampled (never retokenised), end token included.
        texts: their decoded texts. rewards: float32 [N·group] in [-1, 1], NaN where unscorable. extracted: what the
            verifier read.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    rewards: torch.Tensor
    extracted: list[str | None]

    @classmethod
    def joined(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """The rollouts of several processes as those of one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            [ids for part in parts for ids in part.prompts],
            [ids for part in parts for ids in part.answers],
            [text for part in parts for text in part.texts],
            torch.cat([part.rewards for part in parts]),
            [answer for part in parts for answer in part.extracted],
        )

    @property
    def width(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))

    def padded(self, rows: slice, fill: int, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """ids int64 [n, C] and mask bool [n, C] of some answers, right-padded; to `width` if it is given."""
        part = self.answers[rows]
        width = width or max(map(len, part))
        ids = torch.tensor([row + [fill] * (width - len(row)) for row in part])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in part])
        return ids, mask


class PromptStream:
    """Which samples a step sees: epochs over the training set, each in its own seeded order; a function of the step."""

    def __init__(self, samples: Sequence[Sample], per_step: int, seed: int) -> None:
        self.samples, self.per_step, self.seed = list(samples), per_step, seed

    def step(self, number: int) -> list[Sample]:
        """The samples of step `number` (from 0)."""
        chosen = []
        for place in range(number * self.per_step, (number + 1) * self.per_step):
            epoch, index = divmod(place, len(self.samples))
            chosen.append(self.samples[self._order(epoch)[index]])
        return chosen

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, order = epoch, list(range(len(self.samples)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._indices = order
        return self._indices


def row_seed(seed: int, step: int, row: int) -> int:
    """A random stream's seed for one answer of one step, independent of everything else."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{row}".encode()).digest()[:7], "big")


def _reward(score: Score, form_reward: float) -> float:
    if score.value is None:
        return float("nan")
    return 2 * score.value - 1 + (form_reward if score.value == 0 and score.answer is not None else 0.0)


class Actor:
    """Answers and scores samples with a model in whatever state it is in.

    Attributes:
        choices: the only replies there are, if the task has such: the policy is then over these alone.
    """

    def __init__(self, model: Any, tokenizer: Any, task: Task, ends: list[int], pad_id: int) -> None:
        self.model, self.tokenizer, self.task, self.ends, self.pad_id = model, tokenizer, task, ends, pad_id
        self.choices = Choices.of(tokenizer, task.choices, ends) if task.choices else None
        self._encoded: dict[str, list[int]] = {}

    def encode(self, sample: Sample) -> list[int]:
        """Prompt ids of a sample, kept for the next time."""
        if sample.id not in self._encoded:
            self._encoded[sample.id] = encode(self.tokenizer, sample.prompt, sample.system, images=sample.images)
        return self._encoded[sample.id]

    def roll(
        self, samples: Sequence[Sample], sampling: SamplingParams, group: int, form_reward: float = 0.0
    ) -> Rollouts:
        """`group` sampled answers to each sample, scored; see `TrainConfig.form_reward`."""
        prompts = [self.encode(sample) for sample in samples]
        for sample, ids in zip(samples, prompts, strict=True):
            check_context(self.model, ids, sampling.max_new_tokens, f"sample {sample.id} of {self.task.name}")
        rows = complete(self.model, prompts, sampling, self.ends, self.pad_id, group, self.choices)
        texts = self.texts(rows)
        scores = [self.task.score(samples[i // group], text) for i, text in enumerate(texts)]
        rewards = torch.tensor([_reward(score, form_reward) for score in scores])
        return Rollouts(prompts, [row.ids for row in rows], texts, rewards, [s.answer for s in scores])

    def gold(self, samples: Sequence[Sample]) -> Rollouts:
        """The gold replies in the shape of rollouts, for the next-token objective."""
        answers = [reply_ids(self.tokenizer, sample.gold, self.ends) for sample in samples]
        texts = [sample.gold for sample in samples]
        return Rollouts([self.encode(s) for s in samples], answers, texts, torch.ones(len(texts)), list(texts))

    def rows(self, samples: Sequence[Sample], max_new_tokens: int, batch: int = 64) -> list[Row]:
        """Greedy replies as token ids."""
        found: list[Row] = []
        for start in range(0, len(samples), batch):
            part = [self.encode(sample) for sample in samples[start : start + batch]]
            found += complete(
                self.model, part, SamplingParams(max_new_tokens), self.ends, self.pad_id, choices=self.choices
            )
        return found

    def texts(self, rows: Sequence[Row]) -> list[str]:
        """Replies as texts."""
        return [self.tokenizer.decode(row.ids, skip_special_tokens=True) for row in rows]

    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """Greedy replies."""
        return self.texts(self.rows(samples, max_new_tokens))
