"""What an export is made of, in ``sigmix_export.json`` beside it and in its card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sigmix
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.export.source import Source

RECORD = "sigmix_export.json"


def record(source: Source, mix: Mix, experts: Sequence[Expert]) -> dict[str, Any]:
    """``mix`` (its id), ``weights``, ``base`` {name, dtype, fingerprint}, ``experts`` {name: …} and ``sigmix``.

    The fingerprint is there where an expert was checked against it; no local path is.
    """
    return {
        "mix": mix.id,
        "weights": mix.to_json()["weights"],
        "base": {"name": shown(source.name), "dtype": source.dtype, "fingerprint": source.known_fingerprint},
        "experts": {expert.name: _expert(expert) for expert in experts},
        "sigmix": sigmix.__version__,
    }


def shown(name: str) -> str:
    """A base's name for other people: that of a folder without the path to it."""
    return Path(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name


def _expert(expert: Expert) -> dict[str, Any]:
    meta = thaw(expert.meta)
    kept = {key: meta.get(key) for key in ("task", "domain", "objective", "seed", "commit", "license")}
    return {"digest": expert.digest, "verified": expert.verified, "matrices": len(expert.z), **kept}
