"""vLLM plugin: a mixture requested by name becomes a LoRA adapter, written on first use.

A request with ``"model": "addition:0.7+larger:0.3"`` names a LoRA that vLLM has not loaded, so it calls its resolvers
(``vllm.lora.resolver``). This one writes the mixture as an adapter of a supported rank and returns its folder. vLLM
computes one LoRA per request, so every mixture is an adapter of its own.

vLLM finds `register` through the entry point group ``vllm.general_plugins``, and calls resolvers only with
``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``. docs/exports.md describes the environment variables ``SIGMIX_VLLM_…``.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sigmix.errors import CacheError, ConfigError, ExpertError, SigmixError, reraised
from sigmix.utils.cache import cache_dir
from sigmix.utils.io import file_lock

if TYPE_CHECKING:
    from sigmix.experts.bank import Bank
    from sigmix.experts.expert import Expert
    from sigmix.experts.mix import Mix
    from sigmix.export.base import BaseCheckpoint

log = logging.getLogger(__name__)

NAME = "sigmix"
MAX_REFUSALS = 1024  # remembered errors; the oldest goes first


@dataclass(frozen=True)
class Settings:
    """Settings from the environment variables ``SIGMIX_VLLM_…``."""

    experts: str  # folder, or "bundled"
    base: str | None = None  # as sigmix names it; None: the model that vLLM serves
    rank: int = 16  # of the adapters, at most vLLM's --max-lora-rank
    error: float | None = None  # refuse a mixture that loses more than this share of its change; None: warn
    keep: int = 64  # adapters on disk, bounded since clients can name any; none is removed, vLLM may load it again
    cache: Path | None = None  # folder of the adapters; None: in sigmix's cache

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """Parse the environment; None without ``SIGMIX_VLLM_EXPERTS``.

        Raises:
            ConfigError: an invalid value, or a rank that vLLM does not support.
        """
        parsers: dict[str, Callable[[str], Any]] = {
            "experts": str, "base": str, "rank": int, "error": float, "keep": int,
            "cache": lambda text: Path(text).expanduser(),
        }  # fmt: skip
        if not environment.get("SIGMIX_VLLM_EXPERTS"):
            return None
        values: dict[str, Any] = {}
        for key, parse in parsers.items():
            variable = f"SIGMIX_VLLM_{key.upper()}"
            if text := environment.get(variable):
                try:
                    values[key] = parse(text)
                except ValueError as error:
                    raise ConfigError(f"{variable} cannot be {text!r}", remedy="see docs/exports.md") from error
        settings = cls(**values)
        if settings.keep < 1 or settings.rank < 1 or not 0 <= (settings.error or 0) < 1:
            raise ConfigError("SIGMIX_VLLM_KEEP and _RANK are 1 or more, and _ERROR is a share from 0 to 1")
        if "rank" in values:
            from sigmix.export.low_rank import vllm_rank

            vllm_rank(settings.rank)  # fail when vLLM starts, not at the first request
        return settings


class Adapters:
    """LoRA adapters of mixtures in a folder, written on first use; independent of vLLM."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.cache or cache_dir() / "vllm"
        self._sources: dict[tuple[str, str | None], BaseCheckpoint] = {}
        self._refused: dict[str, SigmixError] = {}
        self._lock = threading.Lock()

    def path(self, base: str, name: str) -> Path | None:
        """Return the adapter's folder for a mixture on ``base``, or None if ``name`` is not a mixture of this bank.

        Raises:
            SigmixError: it cannot be written: another base, too much lost at the rank, no room.
        """
        from sigmix.experts.bank import Bank
        from sigmix.experts.mix import Mix

        try:
            mix = Mix.parse(name)
        except SigmixError:
            return None
        bank = Bank(self._bank_folder)  # anew, since it may have changed; vLLM calls its resolvers once per adapter
        if not mix.weights or not all(expert in bank for expert in mix.weights):
            return None
        with self._lock:
            return self._cached(self.settings.base or base, mix, bank)

    @functools.cached_property
    def _bank_folder(self) -> Path:
        """Folder of the experts; a collection on the hub is copied once."""
        from sigmix.experts.bank import Bank

        return (Bank.bundled() if self.settings.experts == "bundled" else Bank(self.settings.experts)).folder

    def _source(self, base: str, experts: list[Expert]) -> BaseCheckpoint:
        """Return the base in the dtype of these experts; `adopt_dtype` cannot be undone, so one per dtype."""
        from sigmix.export.base import BaseCheckpoint, dtype_of_experts

        key = base, dtype_of_experts(experts)
        if key not in self._sources:
            self._sources[key] = BaseCheckpoint(base)
            self._sources[key].adopt_dtype(experts)
        return self._sources[key]

    def _cached(self, base: str, mix: Mix, bank: Bank) -> Path:
        experts = [bank[name] for name in mix.weights]
        identities = [(expert.digest, expert.base.get("fingerprint")) for expert in experts]
        key = json.dumps([base, mix.to_json()["weights"], identities], sort_keys=True)
        if key in self._refused:
            raise self._refused[key].with_traceback(None)
        try:
            return self._write(base, mix, bank, experts)
        except _FullError:
            raise
        except (ExpertError, ConfigError) as error:  # permanent, unlike a full folder, disk or cache
            if len(self._refused) >= MAX_REFUSALS:
                del self._refused[next(iter(self._refused))]
            self._refused[key] = error
            raise

    def _write(self, base: str, mix: Mix, bank: Bank, experts: list[Expert]) -> Path:
        from sigmix.export.lora import export_lora
        from sigmix.export.low_rank import LowRank

        source = self._source(base, experts)
        identity = {
            "base": source.fingerprint(), "rank": self.settings.rank, "weights": mix.to_json()["weights"],
            "experts": {expert.name: expert.digest for expert in experts},
        }  # fmt: skip
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        target = self.folder / f"{re.sub('[^a-z0-9.]+', '-', mix.id)[:60].strip('-')}-{digest}"
        with file_lock(self.folder / ".making.lock", lambda: log.info("waiting for another process's adapter")):
            if target.is_dir():
                self._check_loss(mix, *_recorded_loss(target))
            else:
                self._check_room(mix)
                low_rank = LowRank.from_mix(source, mix, bank)
                low_rank.set_ranks(self.settings.rank, vllm=True)
                self._check_loss(mix, low_rank.pad, low_rank.error)
                half = source.dtype_name in ("bfloat16", "float16")
                export_lora(low_rank, target, source.dtype_name if half else "float32")
        return target

    def _check_room(self, mix: Mix) -> None:
        count = sum(1 for entry in self.folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if count >= self.settings.keep:
            raise _FullError(
                f"no room for the adapter of {mix.id}: {self.folder} holds {count} already",
                remedy="raise SIGMIX_VLLM_KEEP, or remove some while vLLM is stopped",
            )

    def _check_loss(self, mix: Mix, rank: int, error: float) -> None:
        limit = self.settings.error
        if limit is not None and error > limit:
            raise ConfigError(
                f"at rank {rank} the adapter of {mix.id} would lose {error:.1%} of its change, more than "
                f"SIGMIX_VLLM_ERROR allows ({limit:.1%})",
                remedy="raise SIGMIX_VLLM_RANK and vLLM's --max-lora-rank, or serve a merged checkpoint",
            )
        if error:
            log.warning("the adapter of %s has rank %d and loses %.1f %% of its change", mix.id, rank, 100 * error)


class _FullError(ConfigError):
    """No room for another adapter."""


def _recorded_loss(folder: Path) -> tuple[int, float]:
    """Return (rank, error) of an existing adapter.

    Raises:
        CacheError: its record is damaged.
    """
    from sigmix.export.model_card import RECORD

    remedy = "remove that folder while vLLM is stopped"
    with reraised(CacheError, f"the adapter {folder} has no readable {RECORD}", remedy):
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return int(record["rank"]), float(record["error"])


def register() -> None:
    """Register the resolver if the environment has `Settings`; vLLM's general plugin.

    Raises:
        ConfigError: an invalid setting. ImportError: no vLLM.
    """
    settings = Settings.of(os.environ)
    if settings is None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, resolver(settings))


def resolver(settings: Settings) -> Any:
    """Return a ``vllm.lora.resolver.LoRAResolver`` over `Adapters`. Raises ImportError without vLLM."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    adapters = Adapters(settings)

    class SigmixResolver(LoRAResolver):
        """Mixtures of sigmix experts by name."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
            """Return the adapter, or None: vLLM then tries the next resolver and finally answers 404."""
            try:
                path = await asyncio.to_thread(adapters.path, base_model_name, lora_name)
            except SigmixError as error:
                log.error("no adapter for %r: %s", lora_name, error)
                return None
            if path is None:
                return None
            # positive, as the constructor requires, and stable; vLLM assigns its own
            number = 1 + int(hashlib.sha256(str(path).encode()).hexdigest()[:7], 16)
            return LoRARequest(lora_name=lora_name, lora_int_id=number, lora_path=str(path))

    return SigmixResolver()
