"""Accuracy of a task's samples under a mixture, with items, intervals and paired comparisons.

Every accuracy comes with n, a 95 % Wilson interval, the accuracy of the best constant reply and the entropy of the
answers, which reveals a model that always gives the same one. Replies that the verifier cannot judge are left out of n
and counted apart.
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

from sigmix.adapt.base import Strategy
from sigmix.adapt.two_pass import AUTO, Answer, TwoPass
from sigmix.engine.base import InferenceEngine
from sigmix.errors import ExpertError, SigmixError
from sigmix.evals.statistics import answer_entropy, best_constant, mcnemar, paired_difference, wilson
from sigmix.experts.expert import Expert
from sigmix.experts.mix import Mix
from sigmix.models.loading import cpu_name
from sigmix.tasks.base import Sample, Split, Task
from sigmix.tasks.registry import get_task
from sigmix.utils.io import write_json, write_text

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Item:
    """Scored sample: prompt, image names, reply and score (None if the verifier could not judge it)."""

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
    """Items of one evaluation; all figures are computed from them."""

    task: str
    items: list[Item]

    @property
    def scored(self) -> list[Item]:
        """Items with a score."""
        return [item for item in self.items if item.score is not None]

    @property
    def right(self) -> list[bool]:
        """Full marks, per scored item."""
        return [item.score == 1.0 for item in self.scored]

    @property
    def accuracy(self) -> float:
        """Fraction of scored items with full marks; 0 without scored items."""
        return sum(self.right) / len(self.right) if self.right else 0.0

    def summary(self) -> dict[str, Any]:
        """Return task, n, accuracy, interval (95 % Wilson), mean_score (differs from the accuracy where a reply can be
        partly right, as in VQA), unscorable, answer_entropy (nats) and distinct_answers."""
        scores = [item.score for item in self.scored if item.score is not None]
        answers = [item.answer for item in self.items]
        return {
            "task": self.task, "n": len(self.right), "accuracy": self.accuracy,
            "interval": list(wilson(sum(self.right), len(self.right))),
            "mean_score": sum(scores) / len(scores) if scores else 0.0,
            "unscorable": len(self.items) - len(self.scored), "answer_entropy": answer_entropy(answers),
            "distinct_answers": len(set(answers)),
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the items as JSON lines, atomically."""
        rows = [{key: value for key, value in asdict(item).items() if key != "images" or value} for item in self.items]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def training_task(expert: Expert, data_dir: Path | None = None, allow_code: bool = False) -> Task:
    """Return the task that an expert was trained on, see `get_task`.

    Raises:
        ExpertError: its record names none, or one that is not available.
    """
    spec = expert.meta.get("task")
    if not isinstance(spec, str) or not spec:
        raise ExpertError(
            f"expert {expert.name!r} names no training task",
            remedy='add it to sigmix.json in its folder, for example "task": "addition"',
        )
    try:
        return get_task(spec, data_dir, allow_code)
    except SigmixError as error:
        raise ExpertError(f"expert {expert.name!r} was trained on {spec!r}, which is not available: {error}") from error


def evaluate(task: Task, samples: Sequence[Sample], replies: Sequence[str]) -> Result:
    """Score the replies to samples, in order."""
    items = []
    for sample, reply, score in zip(samples, replies, task.score_all(samples, replies), strict=True):
        names = tuple(image.name for image in sample.images)
        items.append(
            Item(sample.id, sample.prompt, sample.gold, reply, score.answer, score.value, score.explanation, names)
        )
    return Result(task.name, items)


def answer_samples(
    engine: InferenceEngine,
    task: Task,
    samples: Sequence[Sample],
    choice: Mix | Strategy,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[Result, list[Answer], tuple[float, float]]:
    """Answer and score samples, under one mixture or each under the mixture that a strategy chooses for its text.

    Args:
        rows: token ids of the samples; default: encoded here. options: keyword arguments of `Engine.generate`.
        seed: sample i is drawn from the same random stream under every mixture.
        progress: called with the number of samples of each batch.

    Returns:
        The result, the answers, and the seconds of the first and the second pass.
    """
    runner = TwoPass(engine, AUTO if isinstance(choice, Mix) else choice)
    mix = choice if isinstance(choice, Mix) else AUTO
    rows = encode_samples(engine, samples) if rows is None else rows
    answers: list[Answer] = []
    first = second = 0.0
    for start in range(0, len(samples), batch_size):
        stop = min(start + batch_size, len(samples))
        answers += runner.generate(
            [sample.prompt for sample in samples[start:stop]], mix, inputs=rows[start:stop],
            seeds=[(seed << 32) + place for place in range(start, stop)], batch_size=batch_size, **options,
        )  # fmt: skip
        first, second = first + runner.seconds[0], second + runner.seconds[1]
        if progress is not None:
            progress(stop - start)
    result = evaluate(task, samples, [answer.text for answer in answers])
    return result, answers, (first, second)


def encode_samples(engine: InferenceEngine, samples: Sequence[Sample]) -> list[list[int]]:
    """Return token ids of samples, with their system prompts and images."""
    return [engine.encode(sample.turns, sample.system, images=sample.images) for sample in samples]


def compare(ours: Result, theirs: Result, seed: int = 0) -> dict[str, Any]:
    """Compare two results on the items that both scored: paired difference with interval, and McNemar's test."""
    other = {item.id: item for item in theirs.scored}
    pairs = [(item, other[item.id]) for item in ours.scored if item.id in other]
    a, b = [x.score == 1.0 for x, _ in pairs], [y.score == 1.0 for _, y in pairs]
    difference, low, high = paired_difference(a, b, seed)
    return {"n": len(pairs), "difference": difference, "interval": [low, high], **mcnemar(a, b)}


def in_part(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return {"mean_score": …} of a summary with partly right replies; {} where it equals the accuracy."""
    score = summary.get("mean_score")
    return {} if score is None or score == summary["accuracy"] else {"mean_score": score}


def rank(summary: Mapping[str, Any]) -> tuple[float, float]:
    """Return the sort key of a summary: mean score, then accuracy."""
    return in_part(summary).get("mean_score", summary["accuracy"]), summary["accuracy"]


def held_out_metric(
    test: Mapping[str, Any], base: Mapping[str, Any], paired: Mapping[str, Any], constant: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the entry of an expert's metrics for held-out items.

    Args:
        test, base: summaries. paired: of `compare`. constant: of `constant_baseline`.
    """
    metric = {
        "name": "test accuracy", "value": test["accuracy"], "n": test["n"], "interval": test["interval"],
        "base": base["accuracy"], "base_interval": base["interval"], "p": paired["p"],
        "best_constant": constant.get("accuracy"), "answer_entropy": test["answer_entropy"],
        "note": "held out; chose nothing",
    }  # fmt: skip
    if in_part(test) or in_part(base):
        metric |= {"mean_score": test["mean_score"], "base_mean_score": base["mean_score"]}
    return metric


def constant_baseline(task: Task, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return the best constant reply and its accuracy; {} for a task that is costly to score."""
    if task.costly:
        return {}
    reply, accuracy = best_constant(task, samples)
    return {"reply": reply, "accuracy": accuracy}


def run(
    engine: InferenceEngine,
    task: Task,
    mixes: Sequence[Mix] = (),
    *,
    split: Split = "test",
    n: int = 300,
    seed: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, str], None] | None = None,
) -> tuple[dict[str, Any], dict[str, Result]]:
    """Evaluate the base model and mixtures on the same items.

    Args:
        mixes: evaluated after the base model; duplicates count once.
        n: number of items, at most the size of the split.
        seed: seed of the draw of items, of sampling and of the bootstrap.
        max_new_tokens: default: the task's.
        progress: called with (items answered, mix id) after each batch.

    Returns:
        JSON figures: task, split, seed, n, temperature (0: greedy), max_new_tokens, base, best_constant ({"reply",
        "accuracy"}, or {} if too costly), notes, seconds, and results: per mixture `Result.summary`, ``mix`` (id),
        ``weights``, ``no_answer`` (scored replies without an extractable answer), ``truncated`` (replies cut at
        max_new_tokens), ``seconds`` and ``paired`` (`compare` with the base model; None for the base model itself).
        And {mix id: `Result`}.

    Raises:
        ContextError: item longer than the context. Others: see `Engine.z` and `Task.samples`.
    """
    task.prepare(engine.tokenizer, engine.encode, engine.context_length)
    samples = task.samples(split, n, seed=seed)
    limit = max_new_tokens or task.max_new_tokens
    rows = encode_samples(engine, samples)
    for sample, row in zip(samples, rows, strict=True):
        engine.check_prompt(row, limit, f"item {sample.id} of {task.name}")
    order = list(dict.fromkeys([Mix.base(), *mixes]))
    for mix in order:
        engine.check_mix(mix)  # fail before the work
    results: dict[str, Result] = {}
    entries = []
    began = time.monotonic()
    for mix in order:
        started = time.monotonic()
        results[mix.id], answers, _ = answer_samples(
            engine, task, samples, mix, rows=rows, batch_size=batch_size, seed=seed, max_new_tokens=limit,
            do_sample=do_sample, temperature=temperature,
            progress=None if progress is None else lambda count, mix=mix: progress(count, mix.id),  # type: ignore[misc]
        )  # fmt: skip
        result, base = results[mix.id], results[Mix.base().id]
        entries.append(
            {
                "mix": mix.id, "weights": mix.to_json()["weights"], **result.summary(),
                "no_answer": sum(item.answer is None for item in result.scored),
                "truncated": sum(one.generation.finish == "length" for one in answers),
                "seconds": round(time.monotonic() - started, 2),
                "paired": compare(result, base, seed) if mix.weights else None,
            }
        )  # fmt: skip
    figures = figures_of(engine, task, samples, entries, split=split, seed=seed, max_new_tokens=limit)
    figures |= {"temperature": temperature if do_sample else 0.0, "seconds": round(time.monotonic() - began, 2)}
    return figures, results


def figures_of(
    engine: InferenceEngine, task: Task, samples: Sequence[Sample], entries: list[dict[str, Any]], **options: Any
) -> dict[str, Any]:
    """Return the JSON figures of an evaluation: its ``options``, task and base, and an entry per row of results."""
    return {
        "task": task.name, **options, "n": len(samples), "base": engine.base_name,
        "best_constant": constant_baseline(task, samples), "notes": list(task.notes), "results": entries,
    }  # fmt: skip


def save(folder: str | os.PathLike[str], figures: dict[str, Any], results: dict[str, Result]) -> Path:
    """Write the items, one JSON-lines file per mixture, and ``summary.json`` with the figures and their provenance.

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
    """Return command, versions, commit (None outside a checkout), date (UTC) and machine of this process."""
    import torch
    import transformers

    from sigmix import __version__

    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "sigmix": __version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}", "cpu": cpu_name(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }  # fmt: skip


def commit() -> str | None:
    """Return the short commit of the running checkout, with "+" if it is modified; None for an installed package."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # an installed copy may lie inside another repository, which does not track this file
        for words in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty=+", "--exclude=*"]):
            done = subprocess.run([*git, *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
