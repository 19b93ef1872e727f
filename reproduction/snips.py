"""SNIPS requests as JSON: intent and slots (Coucke et al. 2018, arXiv:1805.10190; CC0). A task file: FILE.py:snips."""

from __future__ import annotations

import json
from typing import ClassVar

from sigmix.tasks.assistant import intent_and_slots
from sigmix.tasks.base import Sample, Score
from sigmix.tasks.benchmarks import BenchmarkTask
from sigmix.tasks.data import Row
from sigmix.tasks.graders import json_fields
from sigmix.tasks.registry import register

PROMPT = "Extract intent and slots of this request as JSON: "
LONGEST = 200
"""Maximum length of a gold reply in characters; a few requests with more are left out."""


@register("snips")
class Snips(BenchmarkTask):
    """``DATA_DIR/snips/train.jsonl`` and ``test.jsonl`` with text, intent and slots ({name: [values]}).

    A reply gets the share of fields that are right among all fields of gold and reply, 1 for exactly gold's.
    """

    domain = "extraction"
    description = "Intent and slots of a request as JSON (SNIPS)."
    license = "CC0-1.0"
    max_new_tokens = 80
    files: ClassVar = {"train": "snips/train.jsonl", "test": "snips/test.jsonl"}

    def sample(self, row: Row) -> Sample | None:
        gold = intent_and_slots(row)
        return Sample.make(PROMPT + row.get("text", kind=str).strip(), gold) if len(gold) <= LONGEST else None

    def score(self, sample: Sample, reply: str) -> Score:
        return json_fields(reply, sample.gold)

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold}{sample.gold}", "{}", json.dumps([sample.gold])]
