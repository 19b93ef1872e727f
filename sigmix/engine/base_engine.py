"""Prompts, mixtures and sampling options of an inference engine, and `generate` around its decoding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from sigmix.engine.base import Mixes, Prompt
from sigmix.engine.detokenizer import StreamingDetokenizer
from sigmix.engine.generation import Generation, SamplingParams, SequenceState, choice_seed
from sigmix.engine.structured_output import GrammarCompiler, StructuredOutput
from sigmix.engine.tokenization import check_context, context_length, encode, eos_token_ids, has_template
from sigmix.errors import ConfigError, ContextError
from sigmix.experts.mix import Mix
from sigmix.models.multimodal import as_token_ids
from sigmix.utils.images import Shown

if TYPE_CHECKING:
    from llguidance import LLMatcher

T = TypeVar("T")


class BaseEngine(ABC):
    """The part of an engine that does not depend on how it computes.

    Args:
        model: base model; of one on the meta device only its configs and shapes are used. tokenizer: its tokenizer.

    Attributes:
        eos_token_ids: tokens that end a completion.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.eos_token_ids = eos_token_ids(model, tokenizer)

    def encode(
        self,
        prompt: Prompt,
        system: str | None = None,
        chat: bool | None = None,
        images: Shown | Sequence[Shown] | None = (),
        **template_options: Any,
    ) -> list[int]:
        """Return token ids of a prompt; ids pass through. See `sigmix.engine.tokenization.encode`."""
        if isinstance(prompt, Mapping) or not hasattr(prompt, "__len__"):
            raise ConfigError(
                f"a prompt is a text, a list of messages or a list of token ids, not {prompt!r}",
                remedy="give a list of prompts: generate([prompt])",
            )
        if isinstance(prompt, str) or (len(prompt) and isinstance(prompt[0], Mapping)):
            return encode(self.tokenizer, cast(Any, prompt), system, chat, images, **template_options)
        return as_token_ids(cast(Sequence[int], prompt))

    @property
    def base_name(self) -> str | None:
        """Name of the base model, if `load_base` loaded it."""
        return (getattr(self.model, "sigmix_base", None) or {}).get("name")

    @property
    def context_length(self) -> int | None:
        """Context length in tokens; None if the config does not state one."""
        return context_length(self.model)

    def check_prompt(self, ids: Sequence[int], max_new_tokens: int, what: str = "the prompt") -> None:
        """Raise `ContextError` unless the model can read a prompt and answer it, see `check_context`."""
        check_context(self.model, ids, max_new_tokens, what, self.tokenizer, limit=self.context_length)

    def check_params(self, params: SamplingParams) -> None:
        """Raise `ConfigError` for a sampling option out of range."""
        params.check(min(len(self.tokenizer), self.model.config.get_text_config().vocab_size))

    def compile_grammar(self, output: StructuredOutput | None) -> LLMatcher | None:
        """Return a structured output's matcher for one sequence; for any thread, see `GrammarCompiler`."""
        if output is None:
            return None
        if not isinstance(output, StructuredOutput):
            raise ConfigError(
                f"a structured output is a StructuredOutput, not {output!r}", remedy="StructuredOutput(json=schema)"
            )
        return self._grammars.compile(output)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self.tokenizer, self.eos_token_ids)

    def mixes(self, mix: Mixes, count: int) -> list[Mix]:
        """Return a `Mix` for each of ``count`` prompts, from one for all or one for each; None is the base."""
        each: list[Any] = _for_each("mixes", mix, count)
        return [Mix.base() if one is None else Mix.parse(one) if isinstance(one, str) else one for one in each]

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        mix: Mixes = None,
        *,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        seeds: Sequence[int] | None = None,
        num_return_sequences: int = 1,
        structured_output: StructuredOutput | Sequence[StructuredOutput | None] | None = None,
        stop_strings: Sequence[str] = (),
        form: str | None = None,
        chat: bool | None = None,
        batch_size: int = 64,
        keep_errors: bool = False,
        **options: Any,
    ) -> list[Generation]:
        """Generate completions of prompts.

        Args:
            prompts: B user turns, or token-id lists.
            mix: one for all, or one for each; None is the base.
            params: sampling options, one for all or one for each prompt; default: ``options``.
            seeds: random seeds, one per completion; default: see `choice_seed`, or the completion's index if there are
                no ``params``.
            num_return_sequences: completions per prompt; those of one prompt are side by side.
            structured_output: constraint on the completions, one for all or one for each prompt.
            stop_strings: strings that end a completion; they are cut off its text. They may contain special tokens.
            form: see `Execution.choose`.
            chat: apply the chat template; None: if there is one.
            keep_errors: return a `Generation` with finish "error" for a prompt that fails, in place of raising.
            options: fields of `SamplingParams`, except the seed.

        Raises:
            ContextError: a prompt that does not fit the context. UnknownNameError, ExpertError: see `z`; also logits
            that are not finite. ConfigError: invalid options.
        """
        if isinstance(prompts, str):
            raise ConfigError("prompts must be a list, not one string", remedy="generate([prompt])[0]")
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        if num_return_sequences < 1:
            raise ConfigError(f"num_return_sequences must be at least 1, not {num_return_sequences}")
        count = len(prompts) * num_return_sequences
        if seeds is not None and len(seeds) != count:
            raise ConfigError(
                f"{len(seeds)} seeds for {len(prompts)} prompts with num_return_sequences={num_return_sequences}",
                remedy=f"give {count} seeds, one for each completion",
            )
        if params is not None and options:
            raise ConfigError("params and single sampling options are both given", remedy="give one of them")
        if "seed" in options:
            raise ConfigError("seed is an option of one completion", remedy="give seeds, one for each completion")
        each = _for_each("params", SamplingParams(**options) if params is None else params, len(prompts))
        for given in each:
            self.check_params(given)
        check_stop_strings(stop_strings)
        mixes = self.mixes(mix, len(prompts))
        outputs = _for_each("structured outputs", structured_output, len(prompts))
        sequences: list[SequenceState] = []
        for number, prompt in enumerate(prompts):
            ids = self.encode(prompt, chat=chat)
            for index in range(num_return_sequences):
                row = len(sequences)
                default = row if params is None else choice_seed(each[number].seed, index)
                own = replace(each[number], seed=default if seeds is None else seeds[row])
                sequences.append(self._sequence(ids, own, mixes[number], chat, stop_strings, outputs[number]))
        for row, one in enumerate(sequences):
            try:
                what = f"prompt {row // num_return_sequences}"
                self.check_prompt(one.prompt_ids, one.params.max_new_tokens, what)
            except ContextError as error:
                if not keep_errors:
                    raise
                one.fail(error)
        self.decode([one for one in sequences if not one.finish], form, batch_size, keep_errors)
        return [self._generation(one) for one in sequences]

    @abstractmethod
    def decode(self, sequences: Sequence[SequenceState], form: str | None, batch_size: int, keep_errors: bool) -> None:
        """Run sequences to their end: set ``ids``, ``logprobs``, ``finish`` and ``error``.

        Args:
            form, batch_size: see `generate`. keep_errors: else the first sequence that fails may raise its error.
        """

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], mix: Mixes = None
    ) -> list[list[float]]:
        """Return the natural log-probability of each token of given completions.

        Args:
            completions: token ids, one completion per prompt, none empty.

        Raises:
            ConfigError: an empty completion, or another number of them than of prompts. ContextError: both do not fit.
        """
        return self.replies_and_logprobs(prompts, completions, mix, max_new_tokens=0)[1]

    @abstractmethod
    def replies_and_logprobs(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], mix: Mixes = None, *, max_new_tokens: int,
        start: Sequence[int] | None = None, batch_size: int = 64,
    ) -> tuple[list[str], list[list[float]]]:  # fmt: skip
        """Return greedy replies and scores of answers, see `sigmix.engine.scoring.replies_and_logprobs`."""

    def _generation(self, one: SequenceState) -> Generation:
        if one.error is not None:
            return Generation("", [], [], one.mix, len(one.prompt_ids), one.finish, one.error)
        assert one.detokenizer is not None
        one.detokenizer.flush()
        return Generation(one.detokenizer.text, one.ids, one.logprobs, one.mix, len(one.prompt_ids), one.finish)

    def _sequence(
        self, ids: list[int], params: SamplingParams, mix: Mix, chat: bool | None, stop_strings: Sequence[str],
        output: StructuredOutput | None,
    ) -> SequenceState:  # fmt: skip
        # a chat reply is a text of its own; without a chat template the text continues the prompt
        reply = has_template(self.tokenizer) if chat is None else chat
        # a constraint holds for the bytes of the tokens, so all of them are kept
        detokenizer = StreamingDetokenizer(self.tokenizer, stop_strings, () if reply and output is None else ids)
        return SequenceState(ids, params, mix, detokenizer, matcher=self.compile_grammar(output))


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    if isinstance(stop_strings, str) or not all(isinstance(stop, str) and stop for stop in stop_strings):
        raise ConfigError(
            f"stop_strings must be a list of strings that are not empty, not {stop_strings!r}",
            remedy="stop_strings=['END']",
        )


def _for_each(what: str, given: T | Sequence[T], count: int) -> list[T]:
    """Return one value for each prompt, from one for all or one for each."""
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ConfigError(f"{len(given)} {what} for {count} prompts", remedy="give one for all, or one for each prompt")
    return list(given)
