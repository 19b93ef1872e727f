"""A server's parts and how they are put together, without HTTP."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sigmix.adapt import OTHER, ClassifierDispatch, Decision, ProbeDispatch, PromptDispatch, Strategy
from sigmix.adapt.base import skills
from sigmix.engine.tokenization import context_length, encode_turns, has_template
from sigmix.engine.truncation import bank_truncation
from sigmix.errors import ConfigError, ContextError, ExpertError
from sigmix.experts.fingerprint import fingerprint, short
from sigmix.experts.mix import Mix
from sigmix.serve.adaptation import BANDIT, Adaptations, Bandit, Decider, Judge
from sigmix.serve.auth import Keyring
from sigmix.serve.observability import Metrics
from sigmix.serve.registry import Catalogue
from sigmix.serve.scheduler import Batcher, Limits, SharedEngine
from sigmix.serve.settings import Settings
from sigmix.serve.store import State

log = logging.getLogger("sigmix.serve")


PREFIXES = 512 << 20
"""Bytes of keys and values kept of templates and conversations."""


class Service:
    """All that a server needs but HTTP.

    Args:
        model, tokenizer: of a base. bank: {name: Expert}. settings: see `Settings`.
        judges: {name: (reply, right answer) -> [0, 1]}, for adaptations.

    Raises:
        ConfigError: settings that cannot work with this bank. Others: experts or fitted files that do not fit the base.
    """

    def __init__(
        self, model: Any, tokenizer: Any, bank: Mapping[str, Any], settings: Settings, judges: Mapping[str, Judge]
    ) -> None:
        self.settings = settings
        self.keyring = Keyring(settings.keys_file)
        if not settings.loopback and not self.keyring.keys():
            raise ConfigError(
                f"{settings.host} can be reached from other machines, and there are no API keys",
                remedy="make one: sigmix keys add NAME --admin, or listen on 127.0.0.1",
            )
        self.state = State(settings.state)
        self.catalogue = Catalogue(bank, self.state, settings.expert_folders)
        self.engine = SharedEngine(model, tokenizer, self.catalogue, keep_prefixes=PREFIXES)
        self._encoder = copy.deepcopy(tokenizer)  # the batcher's thread decodes with the other one
        self._encoding = threading.Lock()
        self.context = context_length(model)
        self.form = self.engine.states.mixed
        if settings.form == "truncated":
            self.engine.truncation = bank_truncation(self.engine)
            self.form = "truncated"
        self.decider = Decider(*self._strategies(), self.catalogue)
        limits = Limits(settings.rows, settings.batch_tokens, waiting=settings.waiting, each=settings.waiting_each)
        self.batcher = Batcher(self.engine, self.decider, limits, self.form)
        self.metrics = Metrics(self.batcher.load)
        self.batcher.watch = self.metrics
        self.adaptations = Adaptations(self.engine, self.catalogue, judges)
        self.fingerprint = f"fp_{short(fingerprint(model))}"
        self.created = int(time.time())
        self.closing = False
        self.warm = False

    def _strategies(self) -> tuple[dict[str, Strategy], str]:
        """All that can be opened, and what "auto" is."""
        found: dict[str, Strategy] = {}
        if skills(self.catalogue):
            found["A"] = PromptDispatch(self.engine)
        for letter, kind in (("B", ClassifierDispatch), ("D", ProbeDispatch)):
            try:
                found[letter] = kind(self.engine)
            except (ConfigError, ExpertError) as error:  # the bank has no such thing
                log.info("strategy %s is not there: %s", letter, error.message)
        if isinstance(probe := found.get("D"), ProbeDispatch):
            found[BANDIT] = Bandit(probe, self.catalogue, self.state)
        found = found or {"none": _Base()}
        wanted = self.settings.policy
        default = next(name for name in ("D", "B", "A", "none") if name in found) if wanted == "auto" else wanted
        return found, default

    @property
    def bandit(self) -> Bandit | None:
        """What learns from feedback, if the bank has a probe."""
        found = self.decider.strategies.get(BANDIT)
        return found if isinstance(found, Bandit) else None

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Warm up and take work."""
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        every = [Mix.base(), *(Mix.one(name) for name in self.catalogue)]
        mixes = [mix for mix in every if self.form != "truncated" or self.engine.states.truncates(mix)]
        self.engine.generate(["Hello"], "base", max_new_tokens=2)
        self.engine.generate(["Hello"] * len(mixes), mixes, max_new_tokens=2, form=self.form)
        self.decider.strategies[self.decider.default].decide(["Hello"])
        self.batcher.start()
        self.adaptations.start()
        self.warm = True

    def close(self) -> None:
        """Take no more work, finish what there is within the grace, and close the files. A second call does nothing."""
        if self.closing:
            return
        self.closing = True
        if self.warm:
            self.adaptations.close()
            if not self.batcher.close(self.settings.grace_seconds):
                log.warning("some answers were given up")
        self.state.close()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.warm and not self.closing and self.batcher.alive

    # ------------------------------------------------------------------ prompts

    def encode_chat(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, or as bare lines where it has none.

        Raises:
            ContextError: the template refuses these turns.
        """
        with self._encoding:
            if not has_template(self._encoder):
                return list(self._encoder("\n".join(turn["content"] for turn in turns))["input_ids"])
            try:
                return encode_turns(self._encoder, turns)
            except Exception as error:  # jinja's, from inside the template
                raise ContextError(f"the model's chat template refuses these messages: {error}") from error

    def encode_text(self, text: str) -> list[int]:
        """Token ids of bare text."""
        with self._encoding:
            return list(self._encoder(text)["input_ids"])

    def check_length(self, ids: Sequence[int], wanted: int | None) -> int:
        """How many tokens an answer may have.

        Args:
            wanted: as the request says; None: the server's default, less where the context ends before.

        Raises:
            ContextError: the prompt is empty or too long.
        """
        if not ids:
            raise ContextError("the prompt is empty", remedy="give some text")
        if self.settings.max_prompt_tokens is not None and len(ids) > self.settings.max_prompt_tokens:
            raise ContextError(
                f"the prompt has {len(ids)} tokens; this server takes {self.settings.max_prompt_tokens}",
                remedy="shorten it",
            )
        room = None if self.context is None else self.context - len(ids)
        if room is not None and room < (wanted or 1):
            raise ContextError(
                f"the prompt has {len(ids)} tokens; with {wanted or 1} to answer it exceeds the model's context of "
                f"{self.context}",
                remedy="shorten it, or ask for fewer tokens",
            )
        if wanted is not None:
            return min(wanted, self.settings.max_new_tokens)
        most = min(self.settings.default_new_tokens, self.settings.max_new_tokens)
        return most if room is None else min(most, room)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        with self._encoding:
            return self._encoder.decode(list(ids), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token as text."""
        with self._encoding:
            return self._encoder.decode([token])

    # ------------------------------------------------------------------ experts

    def load_expert(self, given: str) -> str:
        """Load an expert from an allowed folder; returns its name. May be called in any thread.

        Raises:
            ConfigError, ExpertError, FingerprintError: it cannot be.
        """
        expert = self.catalogue.read(given)

        def take_in() -> None:
            self.engine.check(expert)
            self.catalogue.add(expert)

        self.batcher.call(take_in).result(timeout=120)
        return expert.name

    def unload_expert(self, name: str) -> None:
        """Unload an expert that no request is using. May be called in any thread.

        Raises:
            UnknownNameError: there is none of that name. ConfigError: it is in use.
        """

        def take_out() -> None:
            if used := self.batcher.using(name):
                raise ConfigError(f"{name} is answering {used} requests", remedy="try again when they have ended")
            self.catalogue.remove(name)

        self.batcher.call(take_out).result(timeout=120)


class _Base:
    """Pass one where there is nothing to choose from."""

    name = "none"

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        return [Decision(Mix.base(), OTHER, "there are no experts") for _ in prompts]
