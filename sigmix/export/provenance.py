"""What an export is made of, in ``sigmix_export.json`` beside it and in its card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sigmix
from sigmix.experts.card import LICENSE_OF_DEFAULT, LICENSES, without_path
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.export.source import Source

RECORD = "sigmix_export.json"


def record(source: Source, mix: Mix, experts: Sequence[Expert]) -> dict[str, Any]:
    """``mix`` (id), ``weights``, ``base`` {name, dtype, fingerprint, license}, ``experts`` {name: …} and ``sigmix``.

    The fingerprint is there where an expert was checked against it, the licence where the base's own card says it; no
    local path is.
    """
    return {
        "mix": mix.id,
        "weights": mix.to_json()["weights"],
        "base": {
            "name": without_path(source.name), "dtype": source.dtype, "fingerprint": source.known_fingerprint,
            "license": _license(source),
        },
        "experts": {expert.name: _expert(expert) for expert in experts},
        "sigmix": sigmix.__version__,
    }  # fmt: skip


def _license(source: Source) -> str | None:
    """What the card in the base's folder says, if the hub knows it; "other" says nothing."""
    if source.kind == "default":
        return LICENSE_OF_DEFAULT
    from huggingface_hub import metadata_load

    try:
        found = str((metadata_load(source.folder / "README.md") or {}).get("license") or "").strip().lower()
    except Exception:  # no card, or whatever the parser of its header raises
        return None
    return found if found in LICENSES - {"other", "unknown"} else None


def _expert(expert: Expert) -> dict[str, Any]:
    meta = thaw(expert.meta)
    kept = {key: meta.get(key) for key in ("task", "domain", "objective", "seed", "commit", "license")}
    return {"digest": expert.digest, "verified": expert.verified, "matrices": len(expert.z), **kept}
