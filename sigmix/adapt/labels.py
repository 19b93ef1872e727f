"""The labels that a request can get: one for each expert of a bank, and "other"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sigmix.adapt.decision import OTHER
from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix

DISPATCH = "dispatch"
"""Domain of classification experts: they choose among the others and are never chosen."""


@dataclass(frozen=True)
class Label:
    """What a model is to say, what it means, and the mix that it stands for."""

    name: str
    description: str
    mix: Mix


def skills(bank: Mapping[str, Any]) -> list[str]:
    """Names of the experts that can be chosen: all but classification experts, sorted."""
    return sorted(name for name in bank if bank[name].meta.get("domain") != DISPATCH)


def labels(bank: Mapping[str, Any]) -> list[Label]:
    """One label for each expert, then "other".

    An expert is called by its domain; by its own name where several share a domain, it has none, or its domain is
    "other". The description is the expert's.

    Raises:
        ConfigError: two experts would get the same label.
    """
    names = skills(bank)
    domains = Counter(bank[name].meta.get("domain") for name in names)
    found = []
    for name in names:
        meta = bank[name].meta
        domain = meta.get("domain")
        label = domain if domain and domains[domain] == 1 and domain != OTHER else name
        found.append(Label(label, str(meta.get("description") or "").strip(), Mix.one(name)))
    found.append(Label(OTHER, "Anything else.", Mix.base()))
    twice = [label for label, count in Counter(one.name for one in found).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two experts of the bank would both be labelled {twice[0]!r}", remedy="rename one, or give it a domain"
        )
    return found


def check_bank(engine: Any, bank: Mapping[str, Any]) -> None:
    """Check every expert that can be chosen against the engine's base, before anything is decided.

    Raises:
        FingerprintError, ExpertError: an expert that was made on another base, or is damaged.
    """
    for name in skills(bank):
        engine.z(Mix.one(name))
