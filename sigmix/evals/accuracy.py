"""A task, a set of its samples and a way of answering -> scored items and a summary.

Every accuracy comes with n, a 95 % Wilson interval, the accuracy of the best constant reply and the entropy of the
answers, so that a model that learned to say one thing is seen. Replies that a verifier could not judge are left out
of n and counted apart.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sigmix.engine import Engine
from sigmix.engine.tokenization import check_context
from sigmix.evals.statistics import answer_entropy, best_constant, mcnemar, paired_difference, wilson
from sigmix.experts.mix import Mix
from sigmix.tasks.base import Sample, Split, Task
from sigmix.utils.io import write_json, write_text

Answer = Callable[[Sequence[Sample]], list[str]]


@dataclass(frozen=True)
class Item:
    """One sample (of its images the names), its reply and its score (None where the verifier could not judge)."""

    id: str
    prompt: str
    gold: str
    reply: str
    answer: str | None
    score: float | None
    explanation: str
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Items of one evaluation; the figures are computed from them alone."""

    task: str
    items: list[Item]

    @property
    def scored(self) -> list[Item]:
        """Items that could be judged."""
        return [item for item in self.items if item.score is not None]

    @property
    def right(self) -> list[bool]:
        """Per scored item: full marks."""
        return [item.score == 1.0 for item in self.scored]

    @property
    def accuracy(self) -> float:
        """Share of scored items with full marks; 0 if there is none."""
        return sum(self.right) / len(self.right) if self.right else 0.0

    def summary(self) -> dict[str, Any]:
        """task, n, accuracy, interval (95 % Wilson), mean_score (which differs from the accuracy where a reply can be
        right in part, as in VQA), unscorable, answer_entropy (nats), distinct_answers."""
        scores = [item.score for item in self.scored if item.score is not None]
        answers = [item.answer for item in self.items]
        return {
            "task": self.task,
            "n": len(self.right),
            "accuracy": self.accuracy,
            "interval": list(wilson(sum(self.right), len(self.right))),
            "mean_score": sum(scores) / len(scores) if scores else 0.0,
            "unscorable": len(self.items) - len(self.scored),
            "answer_entropy": answer_entropy(answers),
            "distinct_answers": len(set(answers)),
        }

    def save(self, path: str | Path) -> None:
        """One JSON object a line, atomically."""
        rows = [{key: value for key, value in asdict(item).items() if key != "images" or value} for item in self.items]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def evaluate(task: Task, samples: Sequence[Sample], answer: Answer) -> Result:
    """Answer and score samples, in their order."""
    replies = answer(samples)
    items = []
    for sample, reply in zip(samples, replies, strict=True):
        score = task.score(sample, reply)
        names = tuple(image.name for image in sample.images)
        items.append(
            Item(sample.id, sample.prompt, sample.gold, reply, score.answer, score.value, score.explanation, names)
        )
    return Result(task.name, items)


def compare(ours: Result, theirs: Result, seed: int = 0) -> dict[str, Any]:
    """Paired comparison on the items that both could be judged on: difference with interval, McNemar."""
    other = {item.id: item for item in theirs.scored}
    pairs = [(item, other[item.id]) for item in ours.scored if item.id in other]
    a, b = [x.score == 1.0 for x, _ in pairs], [y.score == 1.0 for _, y in pairs]
    difference, low, high = paired_difference(a, b, seed)
    return {"n": len(pairs), "difference": difference, "interval": [low, high], **mcnemar(a, b)}


def in_part(summary: Mapping[str, Any]) -> dict[str, float]:
    """{"mean_score": …} of a summary where some reply was right in part; {} where it is the accuracy."""
    score = summary.get("mean_score")
    return {} if score is None or score == summary["accuracy"] else {"mean_score": score}


def rank(summary: Mapping[str, Any]) -> tuple[float, float]:
    """What the better of two summaries of the same items has more of: mean score, then full marks. Where no reply is
    right in part both are the accuracy."""
    return in_part(summary).get("mean_score", summary["accuracy"]), summary["accuracy"]


def constant_baseline(task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """The best constant reply on these samples and its accuracy; empty where trying them is too costly."""
    if task.costly:
        return {}
    reply, accuracy = best_constant(task, samples)
    return {"reply": reply, "accuracy": accuracy}


# --- A task under several mixes on the same items: accuracies with intervals, each mix paired with the base.


SUMMARY = "summary.json"


def run(
    engine: Engine,
    task: Task,
    mixes: Sequence[Mix] = (),
    *,
    split: Split = "test",
    n: int = 300,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Result]]:
    """Evaluate the base and every mix on the same items.

    Args:
        mixes: beside the base, which always comes first; equal ones count once.
        n: items; a split that has fewer gives all it has.
        seed: of the drawing of items, of sampling (item i has the same stream under every mix) and of the bootstrap.
        max_new_tokens: default: the task's.
        progress: called with (items just answered, mix id).

    Returns:
        Figures for JSON: task, split, seed, n, temperature, max_new_tokens, best_constant ({"reply", "accuracy"}, empty
        where too costly), notes, seconds, results: a list with, for each mix, `Result.summary`, ``mix`` (its id),
        ``weights``, ``no_answer`` (scored replies from which the verifier could read none: wrong by their form),
        ``truncated`` (replies that ran into max_new_tokens), ``seconds`` and ``paired`` (`compare` with the base; None
        for the base itself). And the `Result` of every mix by its id.

    Raises:
        ContextError: an item that does not fit the context. Others: see `Engine.z` and `Task.samples`.
    """
    samples = task.samples(split, n, seed=seed)
    limit = max_new_tokens or task.max_new_tokens
    rows = {sample.id: engine.encode(sample.prompt, sample.system, images=sample.images) for sample in samples}
    for sample in samples:
        check_context(engine.model, rows[sample.id], limit, f"item {sample.id} of {task.name}")
    order = list(dict.fromkeys([Mix.base(), *mixes]))
    for mix in order:
        engine.z(mix)  # errors come before the work
    results: dict[str, Result] = {}
    entries = []
    began = time.monotonic()
    for mix in order:
        started, cut = time.monotonic(), 0

        def answer(wanted: Sequence[Sample], mix: Mix = mix) -> list[str]:
            nonlocal cut
            texts = []
            for start in range(0, len(wanted), batch_size):
                part = wanted[start : start + batch_size]
                done = engine.generate(
                    [rows[sample.id] for sample in part], mix, max_new_tokens=limit, temperature=temperature,
                    seeds=[(seed << 32) + start + place for place in range(len(part))], batch_size=batch_size,
                )  # fmt: skip
                texts += [one.text for one in done]
                cut += sum(one.finish == "length" for one in done)
                if progress is not None:
                    progress(len(part), mix.id)
            return texts

        result = results[mix.id] = evaluate(task, samples, answer)
        base = results[Mix.base().id]
        entries.append(
            {
                "mix": mix.id,
                "weights": mix.to_json()["weights"],
                **result.summary(),
                "no_answer": sum(item.answer is None for item in result.scored),
                "truncated": cut,
                "seconds": round(time.monotonic() - started, 2),
                "paired": compare(result, base, seed) if mix.weights else None,
            }
        )
    figures = {
        "task": task.name,
        "split": split,
        "seed": seed,
        "n": len(samples),
        "temperature": temperature,
        "max_new_tokens": limit,
        "base": (getattr(engine.model, "sigmix_base", None) or {}).get("name"),
        "best_constant": constant_baseline(task, samples),
        "notes": list(task.notes),
        "seconds": round(time.monotonic() - began, 2),
        "results": entries,
    }
    return figures, results


def save(folder: str | os.PathLike[str], figures: dict[str, Any], results: dict[str, Result]) -> Path:
    """Write items as JSONL, one file a mix, and ``summary.json`` with the figures and where they came from.

    Raises:
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    entries = []
    for number, entry in enumerate(figures["results"]):
        file = f"{number}-{re.sub(r'[^A-Za-z0-9._+-]+', '-', entry['mix'])[:80]}.jsonl"
        results[entry["mix"]].save(folder / file)
        entries.append({**entry, "file": file})
    write_json(folder / SUMMARY, {**figures, "results": entries, **provenance()})
    return folder / SUMMARY


def provenance() -> dict[str, Any]:
    """command, commit (None outside of a checkout), date (UTC), machine: what made a figure."""
    import torch
    import transformers

    from sigmix import __version__

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "sigmix": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def commit() -> str | None:
    """Short commit of the source checkout that runs, with "+" if it has changes; None for an installed package."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed copy may lie inside somebody else's repository, which does not track this file
        for words in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty=+", "--exclude=*"]):
            done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
