"""Requests to an assistant about a text: its topic (CLINC150), or intent and slots of a command (SNIPS); local files.

The texts are published; the requests around them are this project's, ``skills/templates/topics.json`` and
``commands.json``, with other wordings in each split.
"""

from __future__ import annotations

import json
import random
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from sigmix.errors import DataError
from sigmix.tasks import skills
from sigmix.tasks.base import Sample, Score, content_id, hash_split
from sigmix.tasks.benchmarks import BenchmarkTask
from sigmix.tasks.data import Row
from sigmix.tasks.graders import json_fields, one_of, wrong_candidates
from sigmix.tasks.registry import register
from sigmix.tasks.skills.templated import load_templates, render
from sigmix.utils.io import read_json

TEMPLATES = Path(skills.__file__).with_name("templates")


class TextTask(BenchmarkTask):
    """A published text in a request. A tenth of train is for validation if the source has no such split."""

    @abstractmethod
    def content(self, row: Row) -> tuple[str, str]:
        """Return the text and the right reply."""

    def _rows(self) -> dict[str, list[Row]]:
        rows = self._texts()
        if "validation" not in rows:
            parts: dict[str, list[Row]] = {"train": [], "validation": []}
            for row in rows["train"]:
                parts[hash_split(f"{self.name} {row.get('text', kind=str)}", (0.9, 0.1, 0.0))].append(row)
            rows |= parts
        return {split: [Row({**row.data, "split": split}, row.where) for row in part] for split, part in rows.items()}

    def _texts(self) -> dict[str, list[Row]]:
        return super()._rows()

    def sample(self, row: Row) -> Sample | None:
        templates = load_templates(TEMPLATES / f"{self.name}.json")[row.get("split")][""]
        text, gold = self.content(row)
        rng = random.Random(f"{self.name} {text}")
        return Sample.make(render(rng, rng.choice(templates), {"text": text}), gold, key=content_id(text))


def intent_and_slots(row: Row) -> str:
    """Return intent and slots of a row of SNIPS as JSON; a slot with one value has no list."""
    slots: dict[str, Any] = {
        name: values[0] if len(values) == 1 else values for name, values in row.get("slots", kind=dict).items()
    }
    return json.dumps({"intent": row.get("intent", kind=str), **slots}, ensure_ascii=False)


@register("topics")
class Topics(TextTask):
    """Larson et al. 2019, arXiv:1909.02027: the domain of a message, out of ten."""

    domain = "reading"
    description = "Topic of a customer's message: banking, travel, work and seven more (CLINC150)."
    license = "CC BY 3.0"
    max_new_tokens = 8
    files: ClassVar = {"train": "clinc150/data_full.json", "names": "clinc150/domains.json"}
    names: ClassVar = (
        "auto and commute", "banking", "credit cards", "home", "kitchen and dining", "meta", "small talk", "travel",
        "utility", "work",
    )  # fmt: skip

    def _texts(self) -> dict[str, list[Row]]:
        remedy = f"put {' and '.join(self.files.values())} of clinc/oos-eval into a folder and give it with --data-dir"
        if self.data_dir is None:
            raise DataError(f"task {self.name} is not on the hub", remedy=remedy)
        data, domains = (read_json(self.data_dir / path, DataError, remedy) for path in self.files.values())
        topic = {intent: domain.replace("_", " ") for domain, intents in domains.items() for intent in intents}
        where = str(self.data_dir / self.files["train"])
        rows: dict[str, list[Row]] = {}
        for split, theirs in {"train": "train", "validation": "val", "test": "test"}.items():
            if theirs not in data:
                raise DataError(f"{where} has no split {theirs!r}", remedy=remedy)
            rows[split] = [
                Row({"text": text, "topic": topic.get(intent)}, f"{where}, {theirs} row {number}")
                for number, (text, intent) in enumerate(data[theirs], 1)
            ]
        return rows

    def content(self, row: Row) -> tuple[str, str]:
        return row.get("text", kind=str).strip(), row.get("topic", kind=str)

    def score(self, sample: Sample, reply: str) -> Score:
        return one_of(reply, sample.gold, self.names)

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), *wrong_candidates(self.names, sample.gold)]


@register("commands")
class Commands(TextTask):
    """Coucke et al. 2018, arXiv:1805.10190: intent and slots of a spoken command as JSON.

    ``DATA_DIR/snips/train.jsonl`` and ``test.jsonl`` with text, intent and slots ({name: [values]}).
    """

    domain = "format"
    description = "Intent and slots of a spoken command as JSON (SNIPS)."
    license = "CC0-1.0"
    max_new_tokens = 96
    files: ClassVar = {"train": "snips/train.jsonl", "test": "snips/test.jsonl"}

    def content(self, row: Row) -> tuple[str, str]:
        return row.get("text", kind=str).strip(), intent_and_slots(row)

    def score(self, sample: Sample, reply: str) -> Score:
        return json_fields(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold}{sample.gold}", "{}", json.dumps([sample.gold])]
