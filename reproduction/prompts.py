"""Prompts and answer forms of the paper's benchmarks on validation items, before any training.

    python -m reproduction.prompts --base FILE.gguf --data-dir DATA --out OUT --allow-code

Every form of a benchmark gets the same first validation items, greedily. OUT holds the items of each cell and is
resumed; ``prompts.md`` has the table. No test item is read.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduction.report import table
from sigmix.engine import Engine
from sigmix.evals.statistics import wilson
from sigmix.models.loading import load_base
from sigmix.tasks.base import Sample, Score, Task
from sigmix.tasks.registry import get_task
from sigmix.utils.io import atomic_file, read_text, write_text

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
SCRIPT = "Please provide a self-contained Python script that solves the following problem in a markdown code block:"


@dataclass(frozen=True)
class Form:
    """One way to show an item and to read the answer.

    Attributes:
        after: in place of the task's instruction, its prompt's last line; None keeps that. before: above the prompt.
        system: system turn. tokens: of an answer at most.
        scored: choose the likeliest choice, "letter" or "text" (mean log-probability of its tokens).
        final: the answer is the letter after the last "answer is", not the whole reply.
        plain: without the chat template, the question alone, as lm-eval does.
    """

    after: str | None = None
    before: str | None = None
    system: str | None = None
    tokens: int = 400
    scored: str | None = None
    final: bool = False
    plain: bool = False

    def prompt(self, sample: Sample) -> str:
        """Return the user turn of a sample."""
        body = sample.prompt
        if self.plain:
            stem = body.split("\n")[: -1 - len(sample.meta["choices"])]
            return f"Question: {' '.join(stem)}\nAnswer:"
        if self.after is not None:
            body = f"{body.rpartition(chr(10))[0]}\n{self.after}".strip()
        return body if self.before is None else f"{self.before}\n{body}"


FORMS: Mapping[str, Mapping[str, Form]] = {
    "gsm8k": {
        "number after ####": Form('Think step by step. End with "#### " and the number.'),
        "boxed, in the system turn": Form("", system=BOXED),
        "boxed": Form(BOXED),
        "the answer is": Form('Think step by step. Then end with "The answer is N."'),
    },
    "arc-easy": {
        "task's": Form(tokens=8),
        "reasons": Form('Think step by step in one or two sentences. Then end with "The answer is X."', final=True),
        "likeliest letter": Form(scored="letter"),
        "likeliest text": Form("Answer with the text of the right choice.", scored="text"),
        "likeliest text, plain": Form(scored="text", plain=True),
    },
    "mbpp": {
        "task's": Form(),
        "self-contained script": Form("", before=SCRIPT),
    },
}


def measure(engine: Engine, task: Task, form: Form, samples: Sequence[Sample]) -> list[tuple[str, Score, int]]:
    """Return reply, score and number of tokens of each sample under a form."""
    rows = [engine.encode(form.prompt(sample), form.system, chat=False if form.plain else None) for sample in samples]
    if form.scored is not None:
        replies = _likeliest(engine, form, rows, samples)
        return [(reply, task.score(sample, reply), 1) for sample, reply in zip(samples, replies, strict=True)]
    made = engine.generate(rows, max_new_tokens=form.tokens)
    replies = [one.text for one in made]
    if form.final:
        letters = [re.findall(r"answer is\W*([A-E])\b", reply) for reply in replies]
        replies = [found[-1] if found else reply for found, reply in zip(letters, replies, strict=True)]
    scores = task.score_all(samples, replies)
    return [(one.text, score, len(one.ids)) for one, score in zip(made, scores, strict=True)]


def _likeliest(engine: Engine, form: Form, rows: Sequence[list[int]], samples: Sequence[Sample]) -> list[str]:
    pairs = [
        (row, engine.tokenizer(" " * form.plain + (text if form.scored == "text" else label), add_special_tokens=False))
        for row, sample in zip(rows, samples, strict=True)
        for label, text in sample.meta["choices"].items()
    ]
    found = iter(engine.score([row for row, _ in pairs], [one["input_ids"] for _, one in pairs]))
    replies = []
    for sample in samples:
        means = {label: sum(one) / len(one) for label, one in zip(sample.meta["choices"], found, strict=False)}
        replies.append(max(means, key=means.__getitem__))
    return replies


def run(engine: Engine, data_dir: Path, out: Path, n: int, allow_code: bool, only: Sequence[str]) -> None:
    """Measure what OUT lacks, and write the table."""
    out.mkdir(parents=True, exist_ok=True)
    for name, forms in FORMS.items():
        if only and name not in only:
            continue
        task = get_task(name, data_dir=data_dir, allow_code=allow_code)
        samples = task.samples("validation", n)
        for label, form in forms.items():
            path = out / f"{name}.{label.replace(' ', '-')}.jsonl"
            if path.exists():
                continue
            started = time.perf_counter()
            found = measure(engine, task, form, samples)
            rows: list[Mapping[str, Any]] = [
                {"id": sample.id, "reply": reply, "answer": score.answer, "score": score.value, "tokens": count,
                 "cut": form.scored is None and count >= form.tokens}
                for sample, (reply, score, count) in zip(samples, found, strict=True)
            ]  # fmt: skip
            with atomic_file(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            print(f"{name}, {label}: {cell(rows)} ({time.perf_counter() - started:.0f} s)", flush=True)
    write_text(out / "prompts.md", page(out))


def cell(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the accuracy of some items in per cent with its 95 % Wilson interval."""
    right = sum(row["score"] == 1 for row in rows)
    low, high = wilson(right, len(rows))
    return f"{100 * right / len(rows):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def page(out: Path) -> str:
    """Return the table of all cells in OUT."""
    lines = []
    for name, forms in FORMS.items():
        for label in forms:
            path = out / f"{name}.{label.replace(' ', '-')}.jsonl"
            if path.exists():
                rows = [json.loads(line) for line in read_text(path).splitlines()]
                tokens = sorted(row["tokens"] for row in rows)[len(rows) // 2]
                none = sum(row["answer"] is None for row in rows)
                lines.append([name, label, len(rows), cell(rows), none, sum(row["cut"] for row in rows), tokens])
    head = ["benchmark", "form", "n", "right", "no answer", "cut off", "median tokens"]
    return f"# Prompts and answer forms on validation items\n\n{table(head, lines)}\n"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--allow-code", action="store_true")
    given = parser.parse_args()
    model, tokenizer = load_base(given.base, given.dtype)
    run(Engine(model, tokenizer, {}), given.data_dir, given.out, given.n, given.allow_code, given.only)


if __name__ == "__main__":
    main()
