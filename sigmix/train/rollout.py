"""Rollouts: prompts of a training step, sampled completions and their rewards."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sigmix.engine.constrained import TokenTrie
from sigmix.engine.detokenizer import token_decoder
from sigmix.engine.generation import SamplingParams, SequenceState, complete
from sigmix.engine.kv_cache import Prefilled
from sigmix.engine.prefix_cache import PromptOnly, everywhere
from sigmix.engine.tokenization import check_context, check_tokens, encode, eos_token_ids, reply_ids
from sigmix.tasks.base import Sample, Score, Task


@dataclass
class Rollouts:
    """Completions of one step, those of a prompt next to each other.

    Attributes:
        prompts: token ids of N prompts.
        completions: token ids of N·G completions as sampled (never retokenized), end token included.
        texts: decoded completions.
        rewards: float32 [N·G] in [-1, 1], NaN where the grader gave no score.
        parsed: the answers that the grader read.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    texts: list[str]
    rewards: torch.Tensor
    parsed: list[str | None]

    @classmethod
    def joined(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Concatenate the rollouts of several processes."""
        return cls(
            [ids for part in parts for ids in part.prompts],
            [ids for part in parts for ids in part.completions],
            [text for part in parts for text in part.texts],
            torch.cat([part.rewards for part in parts]),
            [answer for part in parts for answer in part.parsed],
        )

    @property
    def width(self) -> int:
        """Length of the longest completion in tokens."""
        return max(map(len, self.completions))

    def padded(self, rows: slice, pad_id: int, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids int64 [n, C] and mask bool [n, C] of some completions, right-padded (to ``width``)."""
        part = self.completions[rows]
        width = width or max(map(len, part))
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in part])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in part])
        return ids, mask


class PromptStream:
    """Samples of each training step: epochs over the training set, each shuffled with its own seed."""

    def __init__(self, samples: Sequence[Sample], per_step: int, seed: int) -> None:
        self.samples, self.per_step, self.seed = list(samples), per_step, seed

    def step(self, number: int) -> list[Sample]:
        """Return the samples of step ``number`` (from 0), a function of the seed and the number."""
        batch: list[Sample] = []
        while len(batch) < self.per_step:
            epoch, index = divmod(number * self.per_step + len(batch), len(self.samples))
            order = list(range(len(self.samples)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            batch += [self.samples[i] for i in order[index : index + self.per_step - len(batch)]]
        return batch


def row_seed(seed: int, step: int, row: int) -> int:
    """Return the random seed of one row of one step, independent of all others."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{step}:{row}".encode()).digest()[:7], "big")


def reward(score: Score, format_reward: float = 0.0) -> float:
    """Map a score to [-1, 1]: NaN without a score; ``format_reward`` is added to -1 if an answer could be parsed."""
    if score.value is None:
        return float("nan")
    return 2 * score.value - 1 + (format_reward if score.value == 0 and score.answer is not None else 0.0)


class Actor:
    """Generates and scores completions of a task's samples with a model in its current adapted state.

    Args:
        prompt_only: see `complete`.

    Attributes:
        ends: token ids that end a completion.
        choices: the task's closed set of replies, if it has one; the policy is then a distribution over these.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, prompt_only: PromptOnly = everywhere
    ) -> None:
        self.model, self.tokenizer, self.task, self.prompt_only = model, tokenizer, task, prompt_only
        self.ends = eos_token_ids(model, tokenizer)
        self.pad_id: int = self.ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.choices = TokenTrie.from_texts(tokenizer, task.choices, self.ends) if task.choices else None
        self._encoded: dict[str, list[int]] = {}

    def encode(self, sample: Sample) -> list[int]:
        """Return the prompt's token ids, cached by sample id."""
        if sample.id not in self._encoded:
            self._encoded[sample.id] = encode(self.tokenizer, sample.turns, sample.system, images=sample.images)
        return self._encoded[sample.id]

    def prompts(self, samples: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
        """Return the token ids of prompts.

        Raises:
            ContextError: one does not fit into the context with ``max_new_tokens`` more.
        """
        prompts = [self.encode(sample) for sample in samples]
        for sample, ids in zip(samples, prompts, strict=True):
            name = f"sample {sample.id} of {self.task.name}"
            check_context(self.model, ids, max_new_tokens, name, self.tokenizer)
        return prompts

    def rollouts(
        self,
        samples: Sequence[Sample],
        params: Sequence[SamplingParams],
        num_generations: int,
        format_reward: float = 0.0,
        state: Prefilled | None = None,
    ) -> Rollouts:
        """Sample and score ``num_generations`` completions of each prompt, with sampling parameters for each.

        Args:
            state: the prompts if they were read before; consumed.
        """
        prompts = self.prompts(samples, params[0].max_new_tokens)
        rows = self._complete(prompts, params, num_generations, state)
        texts = self.decode(rows)
        scores = self.task.score_all([sample for sample in samples for _ in range(num_generations)], texts)
        rewards = torch.tensor([reward(score, format_reward) for score in scores])
        return Rollouts(prompts, [row.ids for row in rows], texts, rewards, [score.answer for score in scores])

    def gold(self, samples: Sequence[Sample]) -> Rollouts:
        """Return the samples' targets as rollouts of reward 1, for the next-token objective."""
        completions = [reply_ids(self.tokenizer, sample.target, self.ends) for sample in samples]
        for sample, ids in zip(samples, completions, strict=True):
            check_tokens(self.model, ids, f"the answer of sample {sample.id} of {self.task.name}", self.tokenizer)
        texts = [sample.target for sample in samples]
        return Rollouts([self.encode(s) for s in samples], completions, texts, torch.ones(len(texts)), list(texts))

    def generate(self, samples: Sequence[Sample], max_new_tokens: int, batch_size: int = 64) -> list[SequenceState]:
        """Generate greedy completions."""
        rows: list[SequenceState] = []
        for start in range(0, len(samples), batch_size):
            prompts = [self.encode(sample) for sample in samples[start : start + batch_size]]
            rows += self._complete(prompts, SamplingParams(max_new_tokens), 1, None)
        return rows

    def _complete(
        self, prompts: list[list[int]], params: SamplingParams | Sequence[SamplingParams], count: int,
        state: Prefilled | None,
    ) -> list[SequenceState]:  # fmt: skip
        ends, pad, trie = self.ends, self.pad_id, self.choices
        return complete(self.model, prompts, params, ends, pad, count, trie, self.prompt_only, state)

    def decode(self, rows: Sequence[SequenceState]) -> list[str]:
        """Decode completions without special tokens."""
        return [token_decoder(self.tokenizer).decode(row.ids, end=self.ends) for row in rows]
