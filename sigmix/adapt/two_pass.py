"""Two-pass inference (Transformer², section 3.2): choose a mixture for each request, then answer all in one batch.

The second pass reads each request again: the KV cache of the first pass belongs to other weights.

    runner = TwoPass(engine)                                          # the strategy that fits the engine's bank
    runner.generate(["What is 17 + 25?"], max_new_tokens=16)[0].text
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sigmix.adapt.base import DISPATCH, OTHER, Decision, Strategy, skills
from sigmix.adapt.classifier import ClassifierDispatch
from sigmix.adapt.prompt import PromptDispatch
from sigmix.adapt.router import RouterDispatch, unrouted
from sigmix.engine.base import InferenceEngine
from sigmix.engine.generation import Generation
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.experts.mix import Mix

AUTO = "auto"

STRATEGIES: dict[str, tuple[str, Callable[..., Strategy]]] = {
    "A": ("prompt", PromptDispatch),
    "B": ("classifier", ClassifierDispatch),
    "D": ("router", RouterDispatch),
}
"""{letter: (name, class)} of the strategies that need nothing but an engine and its bank."""

LETTERS = {letter: name for letter, (name, _) in STRATEGIES.items()}


@dataclass(frozen=True)
class Answer:
    """Generation with the decision that chose its mixture."""

    decision: Decision
    generation: Generation

    @property
    def text(self) -> str:
        """Generated text."""
        return self.generation.text


class TwoPass:
    """Decide on a mixture for each request and generate with it.

    Args:
        engine: inference engine with a bank of experts.
        strategy: a strategy, or a letter or name for `open_strategy`, which is opened when first needed.

    Attributes:
        seconds: duration of the first and the second pass of the last `generate`.

    Raises:
        UnknownNameError: unknown letter or name.
    """

    def __init__(self, engine: InferenceEngine, strategy: Strategy | str = AUTO) -> None:
        self.engine = engine
        self._strategy = letter_of(strategy) if isinstance(strategy, str) else strategy
        self.seconds = (0.0, 0.0)

    @property
    def strategy(self) -> Strategy:
        """Strategy of the first pass."""
        if isinstance(self._strategy, str):
            self._strategy = open_strategy(self.engine, self._strategy)
        return self._strategy

    def decide(self, prompts: Sequence[str], mix: Mix | str | Sequence[Mix | str] = AUTO) -> list[Decision]:
        """Return one decision per request.

        Args:
            prompts: user turns. An empty one gets the base model.
            mix: "auto" for the strategy's choice, or a mixture or its expression; one for all or one per prompt.

        Raises:
            ConfigError: a number of mixtures other than that of prompts, or an expression that cannot be parsed.
        """
        mixes = [mix] * len(prompts) if isinstance(mix, (Mix, str)) else list(mix)
        if len(mixes) != len(prompts):
            raise ConfigError(f"{len(mixes)} mixes for {len(prompts)} prompts", remedy="give one, or one per prompt")
        chosen = [text for text, given in zip(prompts, mixes, strict=True) if given == AUTO and text.strip()]
        decisions = iter(self.strategy.decide(chosen) if chosen else [])
        return [
            _given(given) if given != AUTO
            else next(decisions) if text.strip()
            else Decision(Mix.base(), OTHER, "the request is empty")
            for text, given in zip(prompts, mixes, strict=True)
        ]  # fmt: skip

    def generate(
        self,
        prompts: Sequence[str],
        mix: Mix | str | Sequence[Mix | str] = AUTO,
        *,
        inputs: Sequence[str | Sequence[int]] | None = None,
        **options: Any,
    ) -> list[Answer]:
        """Answer requests, each with its own mixture.

        Args:
            prompts, mix: see `decide`.
            inputs: prompts of the second pass where they differ, e.g. token ids with a system prompt or images.
            options: keyword arguments of the engine's ``generate``.
        """
        started = time.perf_counter()
        decisions = self.decide(prompts, mix)
        decided = time.perf_counter()
        generations = self.engine.generate(
            prompts if inputs is None else inputs, [decision.mix for decision in decisions], **options
        )
        self.seconds = decided - started, time.perf_counter() - decided
        return [Answer(*pair) for pair in zip(decisions, generations, strict=True)]


def _given(mix: Mix | str) -> Decision:
    parsed = Mix.parse(mix) if isinstance(mix, str) else mix
    return Decision(parsed, parsed.id, "given")


def letter_of(choice: str) -> str:
    """Return the letter of a strategy, or "auto", from a letter or a name in any case.

    Raises:
        UnknownNameError: unknown strategy.
    """
    for letter, name in LETTERS.items():
        if choice.lower() in (letter.lower(), name):
            return letter
    if choice.lower() != AUTO:
        raise UnknownNameError("strategy", choice, [*LETTERS, *LETTERS.values(), AUTO])
    return AUTO


def open_strategy(engine: InferenceEngine, choice: str = AUTO) -> Strategy:
    """Return a strategy for the engine's bank.

    Args:
        choice: letter or name. "auto" is the router (D) if an expert has request statistics and the engine returns
            hidden states, else the classifier (B) if the bank has exactly one, else the prompt (A).

    Raises:
        UnknownNameError: unknown strategy. ConfigError, ExpertError, FingerprintError: see the strategies.
    """
    letter, bank = letter_of(choice), engine.bank
    if letter == AUTO:
        routed = set(skills(bank)) - set(unrouted(bank, engine.base_fingerprint))
        classifiers = [name for name in bank if bank[name].meta.get("domain") == DISPATCH]
        letter = "D" if routed and hasattr(engine, "hidden_states") else "B" if len(classifiers) == 1 else "A"
    return STRATEGIES[letter][1](engine)
