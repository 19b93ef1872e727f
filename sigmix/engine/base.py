"""Protocols of an inference engine; `sigmix.engine.Engine` is the implementation on transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from sigmix.engine.generation import Generation
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert
    from sigmix.experts.mix import Mix

ENGINES = ("own", "vllm")
"""Engines that commands open: `sigmix.engine.Engine` and `sigmix.integrations.vllm.engine.VllmEngine`."""

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A user turn, token ids as `Engine.encode` returns them, or the messages {"role", "content"} of a conversation."""

Mixes: TypeAlias = "Mix | str | Sequence[Mix | str] | None"
"""One mixture for all prompts, or one for each; None: the base."""


class InferenceEngine(Protocol):
    """Generation and scoring under mixtures of experts, one mixture per prompt."""

    @property
    def bank(self) -> Bank | Mapping[str, Any]:
        """Experts by name."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the base model."""

    @property
    def base_name(self) -> str | None:
        """Name of the base model, if `load_base` loaded it."""

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the base model, see `sigmix.experts.fingerprint`."""

    @property
    def layers(self) -> Mapping[str, Any]:
        """Matrices that mixtures act on, by path in the base model."""

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a completion; the first one ends a reply."""

    @property
    def context_length(self) -> int | None:
        """Context length in tokens; None if unlimited or unknown."""

    def encode(
        self, prompt: Prompt, system: str | None = None, chat: bool | None = None, images: Any = ()
    ) -> list[int]:
        """Return token ids of a prompt; ids pass through."""

    def check_prompt(self, ids: Sequence[int], max_new_tokens: int, what: str = "the prompt") -> None:
        """Raise `ContextError` if a prompt is empty, or exceeds the context together with its answer."""

    def check_mix(self, mix: Mix) -> None:
        """Raise `UnknownNameError`, `FingerprintError` or `ExpertError` unless a mixture can run on this base."""

    def check_expert(self, expert: Expert) -> None:
        """Raise `FingerprintError` or `ExpertError` if an expert was made on another base."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        mix: Mixes = None,
        *,
        seeds: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        **options: Any,
    ) -> list[Generation]:
        """Generate one completion per prompt.

        Args:
            mix: one for all, or one per prompt; None: the base model.
            options: fields of `sigmix.engine.generation.SamplingParams`, such as ``max_new_tokens``.
        """

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], mix: Mixes = None
    ) -> list[list[float]]:
        """Return the natural log-probability of each token of each completion (token ids)."""

    def next_logprobs(
        self, prompts: Sequence[Prompt], tokens: Sequence[int], mix: Mixes = None, *, answer: Sequence[int] = (),
        start: Sequence[int] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return natural log-probabilities float32 [N, K] of K tokens after each prompt, normalised over these tokens.

        Args:
            answer, start: see `sigmix.engine.scoring.next_logits`.
        """

    def replies_and_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], mix: Mixes = None, *, max_new_tokens: int,
        start: Sequence[int] | None = None, batch_size: int = 64,
    ) -> tuple[list[str], list[list[float]]]:  # fmt: skip
        """Return greedy replies, and `score` of given answers, see `sigmix.engine.scoring.replies_and_logprobs`."""

    def cached_tokens(self, prefix: Sequence[int]) -> int:
        """Return how many tokens of a common prefix of prompts are computed for one of them only."""


class HiddenStatesEngine(InferenceEngine, Protocol):
    """An engine that also returns hidden states of the base model."""

    @property
    def model(self) -> Any:
        """Base model."""

    def hidden_states(self, prompts: Sequence[Prompt], layers: Sequence[int], batch_size: int = 64) -> torch.Tensor:
        """Return float32 [N, len(layers), d]: the base's hidden states after given numbers of layers, averaged over
        the tokens of each prompt, see `sigmix.engine.scoring.hidden_states`."""
