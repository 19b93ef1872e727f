"""A vLLM plugin: a mix asked for by name becomes a LoRA adapter, made when it is first asked for.

A request with ``"model": "addition:0.7+larger:0.3"`` names a LoRA that vLLM does not know, so it asks its resolvers
(``vllm.lora.resolver``); this one writes the mix as an adapter of a rank that vLLM takes and hands over its folder.
vLLM finds `register` through the entry point group ``vllm.general_plugins``; it does nothing unless
``SIGMIX_VLLM_EXPERTS`` is set, and vLLM asks resolvers only under ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.

    SIGMIX_VLLM_EXPERTS   folder of experts, or ``bundled``
    SIGMIX_VLLM_BASE      their base as sigmix names it; default: the model that vLLM serves
    SIGMIX_VLLM_RANK      of the adapters, at most vLLM's --max-lora-rank; default 16, which is vLLM's own default
    SIGMIX_VLLM_ERROR     refuse a mix that loses more than this share of its change at that rank, whoever made its
                          adapter and when; default: only say it
    SIGMIX_VLLM_KEEP      adapters on disk, at most; default 64. Whoever may send requests may name mixes, so the
                          number is bounded; none is ever removed, because vLLM may load one again at any time
    SIGMIX_VLLM_CACHE     where they lie; default: ``vllm`` in sigmix's cache folder (``sigmix cache list --kind vllm``)

Every mix is an adapter of its own there: vLLM computes one LoRA per request and cannot add several up.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sigmix.errors import CacheError, ConfigError, ExpertError, SigmixError
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import file_lock

log = logging.getLogger(__name__)


NAME = "sigmix"


REFUSALS = 1024
"""Mixes that were refused, at most, whose reason is remembered; the oldest is forgotten first."""


@dataclass(frozen=True)
class Settings:
    """What the environment says; see the module."""

    experts: str
    base: str | None = None
    rank: int = 16
    error: float | None = None
    keep: int = 64
    cache: Path | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """None where no folder of experts is named.

        Raises:
            ConfigError: a value that cannot be, or a rank that vLLM does not take.
        """
        given = {key: value for key in _KEYS if (value := environment.get(f"SIGMIX_VLLM_{key.upper()}"))}
        if "experts" not in given:
            return None
        made: dict[str, Any] = {}
        for key, text in given.items():
            try:
                made[key] = _KEYS[key](text)
            except ValueError as error:
                name = f"SIGMIX_VLLM_{key.upper()}"
                raise ConfigError(f"{name} cannot be {text!r}", remedy="see docs/exports.md") from error
        if made.get("keep", 1) < 1 or made.get("rank", 1) < 1 or not 0 <= made.get("error", 0.0) < 1:
            raise ConfigError("SIGMIX_VLLM_KEEP and _RANK are 1 or more, and _ERROR is a share from 0 to 1")
        if "rank" in made:
            from sigmix.export.low_rank import vllm_rank

            vllm_rank(made["rank"])  # when vLLM starts, not when the first request comes
        return cls(**made)


_KEYS: dict[str, Any] = {"experts": str, "base": str, "rank": int, "error": float, "keep": int}


_KEYS["cache"] = lambda text: Path(text).expanduser()


class Adapters:
    """Adapters of mixes in a folder, made when they are first asked for. Knows nothing of vLLM.

    Args:
        settings: see there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.cache or cache_dir() / "vllm"
        self._sources: dict[tuple[str, str | None], Any] = {}
        self._bank: tuple[Any, Any] | None = None
        self._refused: dict[str, SigmixError] = {}
        self._one = threading.Lock()  # two at once would only wait for each other's memory
        self._opening = threading.Lock()  # another one: names of others need not wait until an adapter is made

    def path(self, base: str, name: str) -> Path | None:
        """The folder of the adapter that ``name`` stands for on ``base``, or None where it is no mix of this bank.

        Raises:
            SigmixError: it is one, but cannot be made: another base, too much lost at the rank, no room.
        """
        from sigmix.experts.mix import Mix

        try:
            mix = Mix.parse(name)
        except SigmixError:
            return None
        with self._opening:
            bank = self._opened()
        if not mix.weights or not all(one in bank for one in mix.weights):
            return None
        with self._one:
            return self._made(self.settings.base or base, mix, bank)

    def _opened(self) -> Any:
        """The bank, read again only after its folder or an expert's has changed; of a collection on the hub it is what
        that was at first."""
        from sigmix.experts.bank import Bank

        if self._bank is None or self._bank[0] != _stamp(self._bank[1].folder):
            bank = Bank.bundled() if self.settings.experts == "bundled" else Bank(self.settings.experts)
            self._bank = _stamp(bank.folder), bank
        return self._bank[1]

    def _source(self, base: str, experts: list[Any]) -> Any:
        """The base as these experts' was read: a source of its own for each dtype, since `Source.adopt` is for good."""
        from sigmix.export.source import Source, dtype_of_experts

        key = base, dtype_of_experts(experts)
        if key not in self._sources:
            source = Source(base)
            source.adopt(experts)
            self._sources[key] = source
        return self._sources[key]

    def _made(self, base: str, mix: Any, bank: Any) -> Path:
        experts = [bank[name] for name in mix.weights]
        # what an expert says of its base decides too
        made = [(expert.digest, (expert.meta.get("base") or {}).get("fingerprint")) for expert in experts]
        key = json.dumps([base, mix.to_json()["weights"], made], sort_keys=True)
        if key in self._refused:
            raise self._refused[key].with_traceback(None)
        try:
            return self._found_or_made(base, mix, bank, experts)
        except _Full:
            raise
        except (ExpertError, ConfigError) as error:  # these stay as they are; room, disk and cache may not
            if len(self._refused) >= REFUSALS:
                del self._refused[next(iter(self._refused))]
            self._refused[key] = error
            raise

    def _found_or_made(self, base: str, mix: Any, bank: Any, experts: list[Any]) -> Path:
        from sigmix.export.lora import export_lora
        from sigmix.export.low_rank import LowRank

        source = self._source(base, experts)
        facts = {
            "base": source.fingerprint(), "rank": self.settings.rank, "weights": mix.to_json()["weights"],
            "experts": {expert.name: expert.digest for expert in experts},
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        target = self.folder / f"{re.sub('[^a-z0-9.]+', '-', mix.id)[:60].strip('-')}-{digest}"
        with file_lock(self.folder / ".making.lock", lambda: log.info("another process makes an adapter; waiting")):
            if target.is_dir():
                self._loss(mix, *_recorded(target))
            else:
                self._room(mix)
                low = LowRank.of(source, mix, bank)
                low.choose(self.settings.rank, vllm=True)
                self._loss(mix, low.pad, low.error)
                export_lora(low, target, source.dtype if source.dtype in ("bfloat16", "float16") else "float32")
        return target

    def _room(self, mix: Any) -> None:
        there = sum(1 for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if there >= self.settings.keep:
            raise _Full(
                f"no adapter is made for {mix.id}: {self.folder} holds {there} already",
                remedy="raise SIGMIX_VLLM_KEEP, or remove some while vLLM is stopped",
            )

    def _loss(self, mix: Any, rank: int, error: float) -> None:
        limit = self.settings.error
        if limit is not None and error > limit:
            raise ConfigError(
                f"at rank {rank} the adapter of {mix.id} would lose {error:.1%} of its change, more than "
                f"SIGMIX_VLLM_ERROR allows ({limit:.1%})",
                remedy="raise SIGMIX_VLLM_RANK and vLLM's --max-lora-rank, or serve a merged checkpoint",
            )
        if error:
            log.warning("the adapter of %s has rank %d and loses %.1f %% of its change", mix.id, rank, 100 * error)


class _Full(ConfigError):
    """No room for another adapter now."""


def _stamp(folder: Path) -> Any:
    """What changes when an expert in a folder is added, replaced, edited or removed."""
    try:
        inside = [entry for entry in folder.iterdir() if entry.is_dir()]
        return [(one.name, one.stat().st_mtime_ns) for one in [folder, *sorted(inside)]]
    except OSError:
        return None


def _recorded(folder: Path) -> tuple[int, float]:
    """(rank, error) of an adapter that is there.

    Raises:
        CacheError: its record is damaged.
    """
    from sigmix.export.model_card import RECORD

    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return int(found["rank"]), float(found["error"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(
            f"the adapter {folder} has no readable {RECORD}: {error}", remedy="remove that folder while vLLM is stopped"
        ) from error


def register() -> None:
    """vLLM's general plugin: enter the resolver, if `Settings.of` the environment finds experts.

    Raises:
        ConfigError: a setting that cannot be. ImportError: no vLLM.
    """
    settings = Settings.of(os.environ)
    if settings is None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, resolver(settings))


def resolver(settings: Settings) -> Any:
    """A ``vllm.lora.resolver.LoRAResolver`` over `Adapters`. Raises ImportError without vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    adapters = Adapters(settings)

    class SigmixResolver(LoRAResolver):
        """Mixes of sigmix experts by name."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """The adapter, or None: vLLM then asks the next resolver and answers 404 in the end."""
            try:
                # in a thread: vLLM answers other requests meanwhile
                path = await asyncio.to_thread(adapters.path, base_model_name, lora_name)
            except SigmixError as error:
                log.error("no adapter for %r: %s", lora_name, error)
                return None
            if path is None:
                return None
            # vLLM gives it a number of its own; this one is positive, as its constructor wants, and the same every time
            number = 1 + int(hashlib.sha256(str(path).encode()).hexdigest()[:7], 16)
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    return SigmixResolver()
