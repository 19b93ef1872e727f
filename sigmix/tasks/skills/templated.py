"""`templated`: a task worded by many templates. A generator function draws facts, a data file holds the requests.

    @templated("doubles", domain="arithmetic", grader=strict_number, description="Double a number.")
    def doubles(rng, kind):
        a = rng.randrange(1, 100)
        return Facts({"a": a}, str(2 * a), wrong=[str(a)], key=str(a))

``templates/doubles.json`` maps each split to its templates, or to kinds of them: ``{"train": {"bare": ["twice {a}?"],
"story": [...]}, "validation": ..., "test": ...}``. ``kind`` is "" in a file without kinds. The key of the facts decides
the split and the split its templates, so neither facts nor wordings of one split occur in another.

Some requests are roughened as people write them: lower case, no final full stop, a typing error. Only the template's
own words change, never the facts.
"""

from __future__ import annotations

import functools
import json
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigmix.tasks.base import SPLITS, ProceduralTask, Split, hash_split
from sigmix.tasks.skills.base import Grader, Item, skill, split_key

FOLDER = Path(__file__).with_name("templates")
LOWER, UNPUNCTUATED, TYPO = 0.2, 0.1, 0.08
"""Shares of requests in lower case, without the final mark, and with two letters swapped."""

Templates = Mapping[Split, Mapping[str, tuple[str, ...]]]


@dataclass
class Facts:
    """What a request is about.

    Attributes:
        values: for the fields of the templates of this kind.
        gold, wrong, extra: as in `Item`.
        key: decides the split; facts with the same key stay in one split.
    """

    values: Mapping[str, object]
    gold: str
    wrong: list[str]
    key: str
    extra: dict[str, Any] = field(default_factory=dict)


@functools.cache
def load_templates(name: str) -> Templates:
    """Return the templates of a task: split to kind to templates. Every split has the same kinds."""
    text = FOLDER.joinpath(f"{name}.json").read_text(encoding="utf-8")
    data: dict[Split, Any] = {
        split: {kind: tuple(lines) for kind, lines in (kinds if isinstance(kinds, dict) else {"": kinds}).items()}
        for split, kinds in json.loads(text).items()
    }
    if tuple(data) != SPLITS or any(data[split].keys() != data["train"].keys() for split in SPLITS):
        raise ValueError(f"{name}.json: train, validation and test must come in this order, with the same kinds")
    return data


def render(rng: random.Random, template: str, values: Mapping[str, object], typos: bool = True) -> str:
    """Fill in a template, with its own words roughened in some requests."""
    lower, unpunctuated, typo = (rng.random() < share for share in (LOWER, UNPUNCTUATED, TYPO * typos))
    parts = [(text, name) for text, name, _, _ in string.Formatter().parse(template)]
    if unpunctuated and parts[-1][1] is None:
        parts[-1] = (parts[-1][0].rstrip(".!?"), None)
    texts = [text.lower() if lower else text for text, _ in parts]
    if typo:
        swap = [(i, match) for i, text in enumerate(texts) for match in re.finditer(r"\b[a-z]{6,}\b", text)]
        if swap:
            i, word = rng.choice(swap)
            at = rng.randrange(word.start() + 1, word.end() - 2)
            texts[i] = texts[i][:at] + texts[i][at + 1] + texts[i][at] + texts[i][at + 2 :]
    return "".join(text + ("" if name is None else str(values[name])) for text, (_, name) in zip(texts, parts))


def templated(
    name: str, *, domain: str, grader: Grader, description: str, max_new_tokens: int = 12, typos: bool = True
) -> Callable[[Callable[[random.Random, str], Facts]], Callable[[random.Random, str], Facts]]:
    """Register a generator of facts as the task ``name``, worded by ``templates/NAME.json``; return it unchanged.

    Kinds are drawn as often as they have templates. ``typos=False``: the templates name words that the reply repeats.
    """

    def decorate(facts: Callable[[random.Random, str], Facts]) -> Callable[[random.Random, str], Facts]:
        def generate(rng: random.Random) -> Item:
            templates = load_templates(name)
            kinds = list(templates["train"])
            weights = [sum(len(templates[split][kind]) for split in SPLITS) for kind in kinds]
            kind = rng.choices(kinds, weights)[0]
            drawn = facts(rng, kind)
            split = hash_split(split_key(name, drawn.key), ProceduralTask.shares)
            prompt = render(rng, rng.choice(templates[split][kind]), drawn.values, typos)
            return Item(prompt, drawn.gold, drawn.wrong, drawn.extra, drawn.key)

        skill(name, domain=domain, grader=grader, description=description, max_new_tokens=max_new_tokens)(generate)
        return facts

    return decorate
