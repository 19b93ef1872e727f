"""Decisions, strategies, and the labels that strategies choose from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sigmix.engine.base import InferenceEngine
from sigmix.errors import ConfigError
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix

OTHER = "other"  # label of requests outside every expert's domain; its mixture is the base model
DISPATCH = "dispatch"  # domain of classification experts (strategy B), which are never chosen themselves


@dataclass(frozen=True)
class Decision:
    """Mixture chosen for a request.

    Attributes:
        mix: mixture of the second pass. label: label of the chosen expert, or "other".
        reason: one sentence for people.
        evidence: JSON values: probabilities by label, thresholds, the trace of a search.
        tokens: tokens of the request that the first pass computed, without a cached prefix.
        seconds: the request's share of the first pass.
    """

    mix: Mix
    label: str
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: ``mix`` (its id), ``weights`` (as in `Mix.to_json`) and the other attributes."""
        return {
            "mix": self.mix.id, **self.mix.to_json(), "label": self.label, "reason": self.reason,
            "evidence": dict(self.evidence), "tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip


class Strategy(Protocol):
    """First pass of two-pass inference. ``name`` is a letter and a name, such as "A (prompt)"."""

    name: str

    def decide(self, prompts: Sequence[str]) -> list[Decision]:
        """Return one decision per user turn, in order."""


@dataclass(frozen=True)
class Label:
    """Class of requests: its name and description in the prompt, and the mixture that answers it."""

    name: str
    description: str
    mix: Mix


def skills(bank: Mapping[str, Expert]) -> list[str]:
    """Return the sorted names of the experts that can be chosen: all but classification experts."""
    return sorted(name for name in bank if bank[name].meta.get("domain") != DISPATCH)


def labels(bank: Mapping[str, Expert]) -> list[Label]:
    """Return one label per expert, then "other".

    A label's name is the expert's domain, or the expert's own name where the domain is missing, shared or "other".

    Raises:
        ConfigError: two experts with the same label.
    """
    names = skills(bank)
    domains = Counter(bank[name].meta.get("domain") for name in names)
    listed = []
    for name in names:
        domain = bank[name].meta.get("domain")
        label = domain if domain and domains[domain] == 1 and domain != OTHER else name
        listed.append(Label(label, str(bank[name].meta.get("description") or "").strip(), Mix.one(name)))
    listed.append(Label(OTHER, "Anything else.", Mix.base()))
    label, count = Counter(one.name for one in listed).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"two experts have the label {label!r}", remedy="rename one, or set its domain")
    return listed


def check_bank(engine: InferenceEngine) -> None:
    """Check the fingerprint of every expert that can be chosen; the engine checks its sketches when it is used.

    Raises:
        FingerprintError, ExpertError: an expert of another base, or a damaged one.
    """
    for name in skills(engine.bank):
        engine.check_expert(engine.bank[name])
