"""`templated`: a task worded by many templates. A generator function draws facts, a data file holds the requests.

    @templated("doubles", domain="arithmetic", grader=strict_number, description="Double a number.")
    def doubles(rng, kind):
        a = rng.randrange(1, 100)
        return Facts({"a": a}, str(2 * a), wrong=[str(a)], key=str(a))

``templates/doubles.json``, beside the Python file, holds the templates of each split, by kind if there are several:
``{"train": {"bare": ["twice {a}?"], "story": [...]}, "validation": ..., "test": ...}``. ``kind`` is "" without kinds.
The key of the facts decides the split, and the split the templates: neither facts nor wordings of one split occur in
another.

Some requests are roughened as people write them: in lower case, without the final mark, with a typing error. Only the
template's own words change, never the facts.
"""

from __future__ import annotations

import functools
import inspect
import json
import random
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sigmix.errors import DataError, reraised
from sigmix.tasks.base import SPLITS, ProceduralTask, Split, hash_split
from sigmix.tasks.skills.base import Grader, Item, skill, split_key

LOWER, UNPUNCTUATED, TYPO = 0.2, 0.1, 0.08
"""Shares of requests in lower case, without the final mark, and with two letters swapped."""

Templates = Mapping[Split, Mapping[str, tuple[str, ...]]]


@dataclass
class Facts:
    """Content of a request.

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
def load_templates(path: Path) -> Templates:
    """Return the templates of a file, from split to kind to templates.

    Raises:
        DataError: no such file, not JSON, braces that do not match, or kinds that not every split has.
    """
    with reraised(DataError, f"templates {path}"):
        data = json.loads(path.read_text(encoding="utf-8"))
        templates: Templates = {
            split: {kind: tuple(texts) for kind, texts in (kinds if isinstance(kinds, dict) else {"": kinds}).items()}
            for split, kinds in ((split, data[split]) for split in SPLITS)
        }
        for split in SPLITS:
            if templates[split].keys() != templates["train"].keys() or not all(templates[split].values()):
                raise DataError(f"templates {path}: every split needs templates of every kind; {split} does not fit")
            for text in sum(templates[split].values(), ()):
                list(string.Formatter().parse(text))
    return templates


def render(rng: random.Random, template: str, values: Mapping[str, object], typos: bool = True) -> str:
    """Fill in a template; its own words are roughened in some requests."""
    lower, unpunctuated, typo = (rng.random() < share for share in (LOWER, UNPUNCTUATED, TYPO * typos))
    template = template.rstrip(".!? ") if unpunctuated else template
    parts = [(text.lower() if lower else text, name) for text, name, *_ in string.Formatter().parse(template)]
    words = [(i, word) for i, (text, _) in enumerate(parts) for word in re.finditer(r"\b[a-z]{6,}\b", text)]
    if typo and words:
        i, word = rng.choice(words)
        at = rng.randrange(word.start() + 1, word.end() - 2)
        text, name = parts[i]
        parts[i] = text[:at] + text[at + 1] + text[at] + text[at + 2 :], name
    prompt = ""
    for text, name in parts:
        prompt += text[1:] if prompt.endswith("m.") and text.startswith(".") else text  # not "at 5 p.m.."
        if name is not None and name not in values:
            raise DataError(f"template {template!r} has the field {name}; there are {', '.join(values)}")
        prompt += "" if name is None else str(values[name])
    return prompt


def templated(
    name: str, *, domain: str, grader: Grader, description: str, max_new_tokens: int = 12, typos: bool = True
) -> Callable[[Callable[[random.Random, str], Facts]], Callable[[random.Random, str], Facts]]:
    """Register a generator of facts as the task ``name``, worded by ``templates/NAME.json``; return it unchanged.

    Kinds are drawn as often as they have templates. ``typos=False``: the templates name words that the reply repeats.
    """

    def decorate(facts: Callable[[random.Random, str], Facts]) -> Callable[[random.Random, str], Facts]:
        path = Path(inspect.getfile(facts)).with_name("templates") / f"{name}.json"

        def generate(rng: random.Random) -> Item:
            templates = load_templates(path)
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
