"""Replies out of a given list only: which tokens may follow which, for scoring, sampling and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sigmix.errors import ConfigError

NEVER = -1e9
"""Logit of a token that may not follow; finite, so that differences of logarithms stay numbers."""


class Choices:
    """A tree of the allowed replies.

    Args:
        replies: token ids of each, the end token included, so that none is the beginning of another.
    """

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self.replies = [tuple(ids) for ids in replies]
        self._next: dict[tuple[int, ...], set[int]] = {}
        for ids in self.replies:
            for place in range(len(ids)):
                self._next.setdefault(ids[:place], set()).add(ids[place])

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], ends: Sequence[int]) -> Choices:
        """From texts.

        Raises:
            ConfigError: the tokenizer cannot tell two of them apart, or has nothing for one.
        """
        end = list(ends[:1])
        replies = [[*tokenizer.encode(text, add_special_tokens=False), *end] for text in texts]
        if len({tuple(ids) for ids in replies}) < len(replies) or min(map(len, replies)) <= len(end):
            raise ConfigError(
                f"the tokenizer cannot tell the labels {', '.join(texts)} apart",
                remedy="rename the experts or their domains",
            )
        return cls(replies)

    def after(self, ids: Sequence[int]) -> list[int]:
        """Tokens that may follow, sorted; none after a whole reply."""
        return sorted(self._next.get(tuple(ids), ()))

    def branches(self) -> list[tuple[int, ...]]:
        """Every beginning after which several different tokens can follow, shortest first."""
        return sorted((stem for stem, options in self._next.items() if len(options) > 1), key=len)

    def constrain(self, logits: torch.Tensor, stems: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [N, V] with all but the tokens that may follow ``stems`` [N] at `NEVER`; gradients flow to the rest.

        A row whose stem is no beginning of a reply stays as it is.
        """
        blocked = torch.zeros(logits.shape, dtype=torch.bool)
        for row, stem in enumerate(stems):
            if options := self.after(stem):
                blocked[row] = True
                blocked[row, options] = False
        return logits.masked_fill(blocked.to(logits.device), NEVER)

    def constrain_answers(self, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The same for logits [N, C, V] that predict each token of answers [N, C]."""
        rows = answers.tolist()
        stems = [row[:place] for row in rows for place in range(answers.shape[1])]
        return self.constrain(logits.flatten(0, 1), stems).view(logits.shape)
