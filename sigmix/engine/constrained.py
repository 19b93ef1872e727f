"""Constrained decoding over a list of allowed replies, for scoring, sampling and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sigmix.engine.tokenization import reply_ids
from sigmix.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASKED = -1e9
"""Logit of a masked token; finite, so that differences of log-probabilities stay finite."""


class TokenTrie:
    """Trie of the allowed replies.

    Args:
        replies: token ids of each, the end token included, so that none is a prefix of another.
    """

    def __init__(self, replies: Sequence[Sequence[int]]) -> None:
        self.replies = [tuple(ids) for ids in replies]
        self._children: dict[tuple[int, ...], set[int]] = {}
        for ids in self.replies:
            for place in range(len(ids)):
                self._children.setdefault(ids[:place], set()).add(ids[place])

    @classmethod
    def from_texts(
        cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], eos_token_ids: Sequence[int]
    ) -> TokenTrie:
        """Tokenize the replies, each with its end token; see `reply_ids`.

        Raises:
            ConfigError: two texts have the same tokens, or one has none.
        """
        replies = [reply_ids(tokenizer, text, eos_token_ids) for text in texts]
        empty = reply_ids(tokenizer, "", eos_token_ids)
        if len({tuple(ids) for ids in replies}) < len(replies) or empty in replies:
            raise ConfigError(
                f"the labels {', '.join(texts)} need distinct, non-empty token ids",
                remedy="rename the experts or their domains",
            )
        return cls(replies)

    def allowed(self, prefix: Sequence[int]) -> list[int]:
        """Tokens that may follow a prefix, sorted; none after a complete reply."""
        return sorted(self._children.get(tuple(prefix), ()))

    def branches(self) -> list[tuple[int, ...]]:
        """Prefixes that several tokens may follow, shortest first."""
        return sorted((prefix for prefix, tokens in self._children.items() if len(tokens) > 1), key=len)

    def constrain(self, logits: torch.Tensor, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Mask logits [N, V] of all tokens that may not follow ``prefixes`` [N]; gradients flow to the others.

        A row with a prefix that is not in the trie is unchanged.
        """
        masked = torch.zeros(logits.shape, dtype=torch.bool)
        for row, prefix in enumerate(prefixes):
            if tokens := self.allowed(prefix):
                masked[row] = True
                masked[row, tokens] = False
        return logits.masked_fill(masked.to(logits.device), MASKED)

    def constrain_answers(self, logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """Mask logits [N, C, V] that predict each token of answers [N, C]."""
        prefixes = [row[:place] for row in answers.tolist() for place in range(answers.shape[1])]
        return self.constrain(logits.flatten(0, 1), prefixes).view(logits.shape)
