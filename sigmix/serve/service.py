"""Composition of a server's parts, without HTTP."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from sigmix.adapt import ClassifierDispatch, PromptDispatch, RouterDispatch, Strategy, TwoPass
from sigmix.adapt.bandit import BanditDispatch
from sigmix.adapt.router import REMEDY, unrouted
from sigmix.engine.cpu.openmp import release_thread_pool
from sigmix.engine.detokenizer import text_offsets, token_decoder
from sigmix.engine.tokenization import chat_template, check_context, check_unicode, encode_turns
from sigmix.errors import ConfigError, ContextError, ExpertError, UnknownNameError
from sigmix.experts.expert import Expert
from sigmix.experts.fingerprint import short
from sigmix.experts.mix import Mix
from sigmix.serve.adaptation import AdaptationWorker, Grader
from sigmix.serve.auth import ApiKeys
from sigmix.serve.fine_tuning.manager import FineTuning
from sigmix.serve.registry import ModelRegistry
from sigmix.serve.scheduler import Scheduler, SharedEngine
from sigmix.serve.settings import Settings
from sigmix.serve.store import Store
from sigmix.serve.tool_parser import ToolCallParser, tool_call_parser
from sigmix.serve.upstream import Upstreams

log = logging.getLogger("sigmix.serve")

PREFIX_BYTES = 512 << 20  # budget of the prefix cache: templates and conversations

CALL_TIMEOUT = 120.0  # seconds to wait for the scheduler's thread when an expert is loaded or unloaded


class Service:
    """Engine, scheduler, registry, store and API keys of one server.

    With upstreams, the engine only decides on the mixtures of completions.

    Args:
        model, tokenizer: base model and its tokenizer.
        bank: experts by name.
        settings: see `Settings`.
        graders: {name: (reply, reference answer) -> [0, 1]} for adaptations.

    Raises:
        ConfigError: settings that do not fit the bank, or a public address without API keys.
        ExpertError, FingerprintError: experts or fitted files of another base model.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, bank: Mapping[str, Expert],
        settings: Settings, graders: Mapping[str, Grader],
    ) -> None:  # fmt: skip
        self.settings = settings
        self.keys = ApiKeys(settings.keys_file)
        if not settings.loopback and not self.keys.keys():
            raise ConfigError(
                f"{settings.host} can be reached from other machines, but there are no API keys",
                remedy="run `sigmix keys add NAME --admin`, or listen on 127.0.0.1",
            )
        self.store = Store(settings.state)
        self.registry = ModelRegistry(bank, self.store, settings.expert_folders)
        self.engine = SharedEngine(
            model, tokenizer, self.registry, keep_prefixes=PREFIX_BYTES, decode_weights=settings.decode_weights,
            compile=settings.compile and not settings.upstream,
        )  # fmt: skip
        self.fine_tuning = FineTuning(self)
        if not settings.upstream:  # which lack these experts
            self.fine_tuning.load_models()
        self._tokenizer = copy.deepcopy(tokenizer)  # not thread-safe; the scheduler uses the original
        self._tokenizer_lock = threading.Lock()
        self._embeddings_lock = asyncio.Lock()
        self.bandit: BanditDispatch | None = None
        self.strategies: dict[str, TwoPass] = {}
        self._open_strategies()
        self.check_strategy(self.default_strategy)
        self.scheduler = Scheduler(self.engine, self.strategies, settings)
        self.metrics = self.scheduler.metrics
        self.upstreams = Upstreams(settings, self.metrics) if settings.upstream else None
        self.adaptations = AdaptationWorker(self.engine, self.registry, graders)
        self.fingerprint = f"fp_{short(self.engine.base_fingerprint)}"
        self.created = int(time.time())
        self.started = self.closing = self._closed = False
        self._close_lock = threading.Lock()

    @property
    def default_strategy(self) -> str:
        """Strategy of requests that name none."""
        if self.settings.strategy != "auto":
            return self.settings.strategy
        return next(name for name in ("D", "B", "A") if name in self.strategies)

    def _open_strategies(self) -> None:
        """Open the strategies that the bank supports; one that it no longer supports stays with its earlier labels.

        Raises:
            ConfigError: two experts with the same label.
        """
        opened: dict[str, Strategy] = {"A": PromptDispatch(self.engine)}
        for letter, strategy in (("B", ClassifierDispatch), ("D", RouterDispatch)):
            try:
                opened[letter] = strategy(self.engine)
            except (ConfigError, ExpertError) as error:
                log.info("strategy %s is not available: %s", letter, error.message)
        if isinstance(router := opened.get("D"), RouterDispatch):
            opened["bandit"] = self.bandit = BanditDispatch(router, self.registry, self.store)
            if names := unrouted(self.registry, self.engine.base_fingerprint):
                log.warning("strategy D never chooses %s, without request statistics -> %s", ", ".join(names), REMEDY)
        # in place: the scheduler has this dictionary too
        self.strategies.update((name, TwoPass(self.engine, strategy)) for name, strategy in opened.items())

    def check_strategy(self, name: str) -> str:
        """Return the name of a strategy; "" and "auto" mean the default.

        Raises:
            UnknownNameError: the strategy is unknown, or the bank does not support it.
        """
        name = self.default_strategy if name in ("", "auto") else name
        if name not in self.strategies:
            raise UnknownNameError("strategy", name, [*self.strategies, "auto"])
        return name

    # Life cycle

    def start(self) -> None:
        """Warm up, then accept requests."""
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        if self.upstreams is None:
            mixes = [Mix.base(), *map(Mix.one, self.registry)]
            self.engine.generate(["Hello"], max_new_tokens=2)
            self.engine.generate(["Hello"] * len(mixes), mixes, max_new_tokens=2)
        self.strategies[self.default_strategy].decide(["Hello"])
        release_thread_pool()  # from now on the scheduler's thread computes
        self.scheduler.start()
        self.fine_tuning.start()
        self.started = True

    def close(self) -> None:
        """Stop accepting requests, finish the running ones, and close the store; a second call waits for the first."""
        self.closing = True
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            if self.upstreams is not None:
                self.upstreams.stop(self.settings.shutdown_timeout)
            if self.started:
                self.fine_tuning.stop()
                self.adaptations.close()
                if not self.scheduler.close(self.settings.shutdown_timeout):
                    log.warning("some requests did not finish before shutdown")
                self.fine_tuning.join()
            self.store.close()

    @property
    def ready(self) -> bool:
        """True if requests are accepted."""
        return self.started and not self.closing and self.scheduler.alive

    # Tokenization

    def encode_chat(self, turns: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Return the token ids of a conversation, see `sigmix.engine.tokenization.encode_turns`.

        Raises:
            ConfigError, PromptError: see `encode_turns`.
        """
        with self._tokenizer_lock:
            return encode_turns(self._tokenizer, turns, **options)

    def tool_call_parser(self, tools: Sequence[Mapping[str, Any]]) -> type[ToolCallParser]:
        """Return the parser of tool calls for the model's chat template.

        Raises:
            ConfigError: the format of its tool calls is not known.
        """
        with self._tokenizer_lock:
            return tool_call_parser(chat_template(self._tokenizer, tools))

    def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of bare text.

        Raises:
            PromptError: lone surrogates.
        """
        check_unicode(text)
        with self._tokenizer_lock:
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        with self._tokenizer_lock:
            return token_decoder(self._tokenizer).decode(ids, skip_special_tokens)

    def text_offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Return the index in a prompt's text of the character in which each of its tokens begins."""
        with self._tokenizer_lock:
            return list(text_offsets(self._tokenizer, ids, text))

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, special ones included."""
        with self._tokenizer_lock:
            return token_decoder(self._tokenizer).token_bytes(token)

    def fit_context(self, ids: Sequence[int], max_new_tokens: int | None) -> int:
        """Check a prompt against the context length; return the number of tokens to generate.

        Args:
            max_new_tokens: as requested, a ceiling; None: the default.

        Raises:
            ContextError: empty prompt, or one that leaves no room for an answer.
        """
        settings = self.settings
        if settings.max_prompt_tokens is not None and len(ids) > settings.max_prompt_tokens:
            raise ContextError(
                f"the prompt has {len(ids)} tokens; this server accepts {settings.max_prompt_tokens}",
                remedy="shorten the prompt",
            )
        self.engine.check_prompt(ids, 0 if max_new_tokens == 0 else 1)
        length = self.engine.context_length
        room = settings.max_new_tokens if length is None else length - len(ids)
        limit = settings.default_new_tokens if max_new_tokens is None else max_new_tokens
        return min(limit, room, settings.max_new_tokens)

    def check_example(self, prompt: str, answer: str, max_new_tokens: int) -> None:
        """Raise `ContextError` unless the model can read an example and write a reply of ``max_new_tokens``."""
        ids, reply = self.encode_chat([{"role": "user", "content": prompt}]), self.encode_text(answer)
        self.fit_context(ids, max_new_tokens)
        rest, model = max(max_new_tokens - len(reply), 1), self.engine.model
        check_context(model, [*ids, *reply], rest, "the example", self.engine.tokenizer, option="max_tokens")

    async def embeddings(self, rows: Sequence[list[int]], mix: Mix) -> torch.Tensor:
        """Return the embeddings float32 [N, d] of prompts, computed in one pass between two decoding steps.

        One call runs at a time, so that other requests wait for at most one pass per step.

        Raises:
            UnknownNameError: an expert has been unloaded.
        """
        async with self._embeddings_lock:
            compute = partial(self.engine.embeddings, rows, mix, batch_size=len(rows))
            return await asyncio.wrap_future(self.scheduler.call(compute))

    def load_expert(self, folder: str) -> str:
        """Load an expert from an allowed folder and return its name.

        Raises:
            ConfigError, ExpertError, FingerprintError: see `ModelRegistry.load` and `add_expert`.
        """
        expert = self.registry.load(folder)
        self.add_expert(expert)
        return expert.name

    def add_expert(self, expert: Expert) -> None:
        """Add an expert, which the strategies choose from the next request on.

        Raises:
            ConfigError: its name or label is taken. ExpertError, FingerprintError: see `Expert.check`.
        """

        def add() -> None:
            with self.engine.lock:  # other threads may have placed merged weights in the model
                expert.check(self.engine.model)
            self.registry.add(expert)
            try:
                self._open_strategies()
            except Exception:
                self.registry.remove(expert.name)
                raise

        self.scheduler.call(add).result(CALL_TIMEOUT)

    def unload_expert(self, name: str) -> None:
        """Unload an expert.

        Raises:
            UnknownNameError: no such expert.
            ConfigError: running requests use it.
        """

        def remove() -> None:
            if users := self.scheduler.users(name):
                raise ConfigError(f"{users} running requests use {name}", remedy="repeat once they have finished")
            self.registry.remove(name)
            self._open_strategies()

        self.scheduler.call(remove).result(CALL_TIMEOUT)
