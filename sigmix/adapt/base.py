"""`Decision`: what pass one found out about a request, and `Strategy`: whatever finds it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sigmix.errors import ConfigError
from sigmix.experts.mix import Mix

OTHER = "other"
"""The label of a request that no expert is for; it means the base, exactly."""


@dataclass(frozen=True)
class Decision:
    """Which mix answers a request, and why.

    Attributes:
        mix: for pass two. label: the expert's label, or "other". reason: one sentence for people.
        evidence: JSON values: probabilities by label, thresholds, a search's trace.
        tokens: that pass one put through the model for this request, without what a stored prefix had.
        seconds: of pass one, this request's share of its batch.
    """

    mix: Mix
    label: str
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``mix`` as its id and ``weights`` as `Mix.to_json` has them."""
        return {
            "mix": self.mix.id,
            **self.mix.to_json(),
            "label": self.label,
            "reason": self.reason,
            "evidence": dict(self.evidence),
            "tokens": self.tokens,
            "seconds": self.seconds,
        }


def decide_those_that_fit(
    rows: Sequence[list[int]], limit: int | None, decide: Callable[[list[list[int]]], list[Decision]]
) -> list[Decision]:
    """``decide`` over the rows of at most ``limit`` tokens; the others get the base, so that they stop no one."""
    fits = [limit is None or len(row) <= limit for row in rows]
    short = [row for row, fit in zip(rows, fits, strict=True) if fit]
    decided = iter(decide(short) if short else [])
    long = Decision(Mix.base(), OTHER, f"it is too long to ask about: more than {limit} tokens")
    return [next(decided) if fit else long for fit in fits]


class Strategy(Protocol):
    """Pass one. ``name`` is its letter and name, such as "A (prompt)"."""

    name: str

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """One decision for each request, in order."""
        ...


# --- The labels that a request can get: one for each expert of a bank, and "other".


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
