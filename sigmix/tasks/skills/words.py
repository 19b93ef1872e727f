"""Word lists for the generated tasks (``words.json``): short, common English words, chosen for this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LISTS: dict[str, Any] = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))

# Members of one category only, so that the odd one out is never a matter of taste (no "orange", no "bat").
CATEGORIES: dict[str, list[str]] = {name: words.split() for name, words in _LISTS["categories"].items()}
COLOURS = CATEGORIES["colours"]

# At least ten words for each of 20 letters, so that every first letter is as likely as any other.
COMMON: list[str] = " ".join(_LISTS["common"]).split()

NAMES, OBJECTS, PLACES, CITIES, GOODS, NONSENSE, MONTHS = (
    _LISTS[name].split() for name in ("names", "objects", "places", "cities", "goods", "nonsense", "months")
)

# for the templated tasks; "_" is a blank within a name
FIRST_NAMES, SURNAMES = (" ".join(_LISTS[name]).split() for name in ("first names", "surnames"))

# singular and plural, in turn
_FORMS: list[str] = " ".join(_LISTS["plurals"]).split()
PLURALS: dict[str, str] = dict(zip(_FORMS[::2], _FORMS[1::2], strict=True))

# pairs of words, each with its other forms or opposites: word[/form...] opposite[/opposite...]
OPPOSITES: list[tuple[str, str, list[str], list[str]]] = []
for _pair in "|".join(_LISTS["opposites"]).split("|"):
    _left, _right = (side.split("/") for side in _pair.split())
    OPPOSITES.append((_left[0], _right[0], _left, _right))
