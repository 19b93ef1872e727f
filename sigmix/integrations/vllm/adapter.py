"""A mixture as vLLM's requests name it: a canonical name, and a path with the identity of all that it is computed from.

vLLM's prefix cache keys blocks by a request's adapter name and path, so equal paths must mean equal numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sigmix.errors import ConfigError, ExpertError, SigmixError
from sigmix.experts.bank import Bank
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix, read_mix
from sigmix.svf.decomposition import METHOD

PREFIX = "sigmix:"

VARIABLES = "SIGMIX_VLLM_"

PYTHON = f"{VARIABLES}PYTHON"
"""Names vLLM's interpreter for tests and benchmarks; no setting of the plugin."""


@dataclass(frozen=True)
class Settings:
    """Settings from the environment variables ``SIGMIX_VLLM_…``.

    Attributes:
        experts: folder of experts, or "bundled". base: as sigmix names it; None: the model that vLLM serves.
        mixes: folder of saved mixtures, ``NAME.json`` each.
    """

    experts: str
    base: str | None = None
    mixes: Path | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Settings | None:
        """Parse the environment; None without ``SIGMIX_VLLM_EXPERTS``.

        Raises:
            ConfigError: an unknown variable.
        """
        own = {name: text for name, text in environment.items() if name.startswith(VARIABLES) and text}
        if f"{VARIABLES}EXPERTS" not in own:
            return None
        parsers: dict[str, Callable[[str], Any]] = {
            "experts": str, "base": str, "mixes": lambda text: Path(text).expanduser(),
        }  # fmt: skip
        known = {f"{VARIABLES}{field.upper()}": field for field in parsers}
        if unknown := sorted(own.keys() - known.keys() - {PYTHON}):
            raise ConfigError(f"{unknown[0]} is not a setting; there are {', '.join(known)}", remedy="see docs/vllm.md")
        return cls(**{known[name]: parsers[known[name]](text) for name, text in own.items() if name in known})

    def bank(self) -> Bank:
        """Open the experts as they are on disk now."""
        return Bank.bundled() if self.experts == "bundled" else Bank(self.experts)


@dataclass(frozen=True)
class Adapter:
    """A mixture with the identity of its experts, of their base and of the decomposition.

    Attributes:
        mix: the mixture. experts: {name: digest of its z and positions}. base: fingerprint of their base model.
        prompt: True if an expert acts on prompt tokens only.
    """

    mix: Mix
    experts: Mapping[str, str]
    base: str
    prompt: bool

    @classmethod
    def find(cls, name: str, settings: Settings) -> Adapter | None:
        """Return the adapter of a mixture, an expert or a saved mixture; None if there is none of that name.

        Raises:
            SigmixError: a damaged expert or saved mixture, or experts of several bases.
        """
        bank = settings.bank()  # anew, since it may have changed; vLLM resolves a name once
        mix = _named(name, settings)
        if mix is None or not mix.weights or any(expert not in bank for expert in mix.weights):
            return None
        return cls.of(mix, bank)

    @classmethod
    def of(cls, mix: Mix, bank: Mapping[str, Expert]) -> Adapter:
        """Return the adapter of a mixture of at least one expert.

        Raises:
            UnknownNameError: an expert missing in ``bank``. ExpertError: see `find`.
        """
        experts = {expert: bank[expert] for expert in mix.weights}
        return cls(mix, {key: one.digest for key, one in experts.items()}, _base_of(experts), _prompt(experts))

    @property
    def name(self) -> str:
        """Canonical name: equal mixtures have one name, whatever their spelling."""
        return self.mix.id

    @property
    def path(self) -> str:
        """``lora_path`` of vLLM's requests."""
        identity = {
            "base": self.base, "decomposition": METHOD, "experts": dict(self.experts), "prompt": self.prompt,
            **self.mix.to_json(),
        }  # fmt: skip
        return PREFIX + json.dumps(identity, sort_keys=True, separators=(",", ":"))

    @classmethod
    @lru_cache(maxsize=4096)
    def parse(cls, path: str) -> Adapter:
        """Return the adapter of `path`.

        Raises:
            ConfigError: another path, such as that of a LoRA on disk, or one of another decomposition.
        """
        if not path.startswith(PREFIX):
            raise ConfigError(
                f"{path} is not a mixture of experts, and with SIGMIX_VLLM_EXPERTS vLLM serves no LoRA adapters",
                remedy="unset SIGMIX_VLLM_EXPERTS to serve LoRA adapters",
            )
        value = json.loads(path.removeprefix(PREFIX))
        if value["decomposition"] != METHOD:
            raise ConfigError(f"{path} was made for the decomposition {value['decomposition']}, not {METHOD}")
        return cls(Mix.from_json(value), value["experts"], value["base"], value["prompt"])


def _named(name: str, settings: Settings) -> Mix | None:
    file = None if settings.mixes is None or "/" in name else settings.mixes / f"{name}.json"
    if file is not None and file.is_file():
        return read_mix(str(file))
    try:
        return Mix.parse(name)
    except SigmixError:
        return None


def _base_of(experts: Mapping[str, Expert]) -> str:
    bases = {name: expert.base.get("fingerprint") for name, expert in experts.items()}
    first, *others = bases
    if not bases[first]:
        raise ExpertError(
            f"expert {first!r} has no recorded base", remedy="record it: sigmix experts verify DIR --base BASE --seal"
        )
    if odd := [name for name in others if bases[name] != bases[first]]:
        raise ExpertError(f"experts {first!r} and {odd[0]!r} were made on different bases, so they cannot be mixed")
    return str(bases[first])


def _prompt(experts: Mapping[str, Expert]) -> bool:
    return any(expert.positions == "prompt" for expert in experts.values())
