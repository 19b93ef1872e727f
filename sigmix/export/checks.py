"""Why an expert is not one of the base that is exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sigmix.errors import FingerprintError
from sigmix.experts.base import dtype_and_quantization
from sigmix.experts.fingerprint import short


def check_kind(expert: str, mine: Mapping[str, Any]) -> None:
    """Raise `FingerprintError` if the base that an expert recorded was quantised as it was loaded.

    Args:
        expert: its name. mine: ``base`` of its metadata; its dtype is then "bfloat16 in int8", say.
    """
    kind, quantised = dtype_and_quantization(mine.get("dtype"))
    if quantised:
        raise FingerprintError(
            f"expert {expert!r} belongs to {mine.get('name', 'a base')} quantised to {quantised}, whose weights are "
            "others than those that an export is made of, so it cannot be exported",
            remedy=f"use it on that base with sigmix (--quantization {quantised}), or train one on the base in {kind} "
            "to export it",
        )


def foreign(expert: str, mine: Mapping[str, Any], name: str, dtype: str, found: str) -> FingerprintError:
    """Another base.

    Args:
        expert, mine: as in `check_kind`. name, dtype, found: of the base at hand; ``found`` is its fingerprint.
    """
    kind = f" in {mine['dtype']}" if mine.get("dtype") else ""
    remedy = f"give the base that it was made on, --base {mine.get('name')}"
    if mine.get("name") == name and mine.get("dtype") not in (None, dtype):
        remedy = f"read the base as it was when the expert was made: --dtype {mine['dtype']}"
    return FingerprintError(
        f"expert {expert!r} was made on {mine.get('name', 'an unnamed base')}{kind} (fingerprint "
        f"{short(mine['fingerprint'])}), but this base is {name} in {dtype} (fingerprint {short(found)})",
        remedy=remedy,
    )
