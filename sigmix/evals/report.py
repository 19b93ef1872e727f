"""Report of an expert on held-out rows: baselines, confusion, calibration, mistakes, and a verdict in one sentence."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sigmix.evals.accuracy import Item, Result, evaluate, in_part, provenance
from sigmix.evals.plots import figure, save_png
from sigmix.evals.statistics import paired_difference, wilson
from sigmix.tasks.base import Sample, Task
from sigmix.tasks.data import FIELD
from sigmix.tasks.graders import json_value, normalise
from sigmix.utils.io import write_json, write_text

TFIDF = "TF-IDF and logistic regression"
EXPERT, BASE, CONSTANT, LORA = "expert", "base", "best constant answer", "LoRA of rank 16"
MAX_BASELINE_ROWS = 20_000
MAX_PLOTTED_LABELS = 20
BINS = 10
NO_LABEL = "no label"
MISTAKES = "mistakes.csv"
MISTAKE_COLUMNS = ("prompt", "answer", "reply", "score", "explanation")
FEW = 50
"""Held-out rows under which the verdict warns of the interval's width."""


def text_baseline(task: Task, train: Sequence[Sample], samples: Sequence[Sample]) -> Result:
    """Classify prompts by TF-IDF of words and pairs of words, with logistic regression. Needs scikit-learn.

    Args:
        train: labelled samples, of which at most `MAX_BASELINE_ROWS` are used.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\S+"),
        LogisticRegression(C=10.0, max_iter=1000),
    )
    rows = train[:MAX_BASELINE_ROWS]
    model.fit([sample.prompt for sample in rows], [sample.gold for sample in rows])
    return evaluate(task, samples, list(model.predict([sample.prompt for sample in samples])))


def confusion(result: Result, labels: Sequence[str]) -> dict[str, Any]:
    """Return counts by gold label (rows) and answer (columns, the last one for replies that are no label)."""
    places = {normalise(label): place for place, label in enumerate(labels)}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for item in result.scored:
        if (row := places.get(normalise(item.gold))) is not None:
            # with several right answers, a right one counts as gold
            answer = normalise(item.gold if item.score == 1.0 else item.answer or "")
            counts[row][places.get(answer, len(labels))] += 1
    return {"labels": list(labels), "columns": [*labels, NO_LABEL], "counts": counts}


def calibration(probabilities: np.ndarray, right: Sequence[bool]) -> dict[str, Any]:
    """Return expected calibration error and accuracy by bin of confidence (Guo et al. 2017, arXiv 1706.04599).

    Args:
        probabilities: of the chosen label, [N]. right: whether it was right.
    """
    hits = np.asarray(right, dtype=float)
    places = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = [
        {"n": int(part.sum()), "confidence": float(probabilities[part].mean()), "accuracy": float(hits[part].mean())}
        for place in range(BINS)
        if (part := places == place).any()
    ]
    error = sum(one["n"] * abs(one["confidence"] - one["accuracy"]) for one in bins) / max(len(hits), 1)
    return {"n": len(hits), "error": error, "accuracy": float(hits.mean()), "bins": bins}


def fields_accuracy(items: Sequence[Item]) -> dict[str, dict[str, Any]]:
    """Return {field: n, accuracy} over JSON answers: how often a gold field is right; {} if gold is no JSON object."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for item in items:
        gold, reply = _object(item.gold), _object(item.reply) or {}
        for name, value in (gold or {}).items():
            total[name] += 1
            right[name] += name in reply and reply[name] == value
    return {name: {"n": n, "accuracy": right[name] / n} for name, n in total.most_common()}


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json_value(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def summarize(
    task: Task,
    results: Mapping[str, Result],
    constant: Mapping[str, Any],
    labels: Sequence[str] = (),
    calibrated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the JSON figures of a report.

    Args:
        results: on the same items, by name: `EXPERT`, `BASE`, and others to compare with.
        constant: of `sigmix.evals.accuracy.constant_baseline`. labels: the closed set of answers, if there is one.
        calibrated: of `calibration`.
    """
    expert = results[EXPERT]
    others = {
        name: {**result.summary(), "expert_less": _difference(expert, result)}
        for name, result in results.items()
        if name != EXPERT
    }
    figures: dict[str, Any] = {
        "task": task.reference, EXPERT: expert.summary(), "others": others, "best_constant": dict(constant),
        "fields": fields_accuracy(expert.items) or None, "labels": None, "confusion": None,
        "calibration": None if calibrated is None else dict(calibrated), "notes": list(task.notes),
    }  # fmt: skip
    if labels:
        marks: dict[str, list[bool]] = defaultdict(list)
        for item in expert.scored:
            marks[normalise(item.gold)].append(item.score == 1.0)
        figures["labels"] = {
            label: {"n": len(own), "accuracy": sum(own) / len(own), "interval": list(wilson(sum(own), len(own)))}
            for label in labels
            if (own := marks[normalise(label)])
        }
        figures["confusion"] = confusion(expert, labels)
    return {"verdict": verdict(figures), **figures, **provenance()}


def _difference(ours: Result, theirs: Result) -> dict[str, Any]:
    """Return the paired difference of the scores, which may be partial, with its interval."""
    scores = {item.id: item.score for item in theirs.scored}
    pairs = [(item.score, scores[item.id]) for item in ours.scored if item.id in scores]
    value, low, high = paired_difference([a for a, _ in pairs], [b for _, b in pairs])  # type: ignore[misc]
    return {"n": len(pairs), "difference": value, "interval": [low, high]}


def verdict(figures: Mapping[str, Any]) -> str:
    """Return the conclusion in one or two sentences; the first one names a cheaper way that is as good."""
    own, constant = figures[EXPERT], figures["best_constant"].get("accuracy")
    key, scale = ("mean_score", "mean score") if in_part(own) else ("accuracy", "accuracy")
    value = own[key]
    sentence = f"The expert has {scale} {value:.1%} on {own['n']} held-out rows"
    if key == "accuracy":
        sentence += f" [{own['interval'][0]:.1%}, {own['interval'][1]:.1%}]"
    shown = [f"{name} {one[key]:.1%}" for name, one in figures["others"].items()]
    shown += [] if constant is None else [f"{CONSTANT} {constant:.1%}"]
    sentence += f"; {', '.join(shown)}."
    cheap = {CONSTANT: constant} if constant is not None else {}
    cheap |= {name: one[key] for name, one in figures["others"].items() if name in (TFIDF, BASE)}
    winner = max(cheap, key=lambda name: cheap[name], default=None)
    low = 1.0 if winner not in figures["others"] else figures["others"][winner]["expert_less"]["interval"][0]
    if winner is not None and cheap[winner] >= value:
        sentence = f"Do not use this expert: {winner} is as good or better ({cheap[winner]:.1%}). {sentence}"
    elif low <= 0:
        sentence = f"The expert is not clearly better than {winner}. {sentence}"
    if own["n"] < FEW:
        sentence += " So few rows leave a wide interval: hold out more."
    return sentence


def adaptation_verdict(mixed: Result, trained: Result, base: Result) -> str:
    """Return one sentence on which of a mixture and a trained expert is worth using, by paired differences."""
    gains = {"the mixture": _difference(mixed, base), "the trained expert": _difference(trained, base)}
    better = [name for name, gain in gains.items() if gain["interval"][0] > 0]
    between = _difference(trained, mixed)
    rows = f"on {between['n']} held-out rows"
    if not better:
        return f"Neither the mixture nor the trained expert is clearly better than the base {rows}."
    if between["interval"][0] > 0 or between["interval"][1] < 0:
        winner, loser = list(gains)[::-1] if between["difference"] > 0 else list(gains)
        return f"Use {winner}: it is better than {loser} by {100 * abs(between['difference']):.1f} points {rows}."
    gain = gains[better[0]]["difference"]
    sentence = f"Use {better[0]}: it is better than the base by {100 * gain:.1f} points {rows}"
    return f"{sentence}, and the two do not clearly differ."


def write_report(
    folder: Path, figures: Mapping[str, Any], results: Mapping[str, Result], history: Sequence[Mapping[str, Any]]
) -> None:
    """Write ``report.json``, ``report.md``, ``report.png`` and ``mistakes.csv``, which holds the user's own rows.

    Args:
        history: metrics of the training run, for its curve.

    Raises:
        OutputError: the folder cannot be written.
    """
    write_json(folder / "report.json", figures)
    write_text(folder / "report.md", markdown(figures))
    stream = io.StringIO()
    rows = [(item.prompt, item.gold, item.reply, item.score, item.explanation)
            for item in results[EXPERT].items if item.score != 1.0]  # fmt: skip
    csv.writer(stream).writerows([MISTAKE_COLUMNS, *rows])
    write_text(folder / MISTAKES, stream.getvalue())
    plot(figures, history, folder / "report.png")


def read_mistakes(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a report's ``mistakes.csv``; the score is None where the grader failed.

    Raises:
        OSError: there is no report.
    """
    csv.field_size_limit(FIELD)
    with open(folder / MISTAKES, encoding="utf-8", newline="") as file:
        return [{**row, "score": float(row["score"]) if row["score"] else None} for row in csv.DictReader(file)]


def markdown(figures: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    own = figures[EXPERT]
    lines = [
        f"# {figures['task']}", "", figures["verdict"], "",
        "| | accuracy [95 %] | mean score | score of the expert less this |",
        "|---|---|---|---|", f"| {EXPERT} | {_percent(own, 'accuracy')} | {100 * own['mean_score']:.1f} | |",
    ]  # fmt: skip
    for name, one in figures["others"].items():
        cells = _percent(one, "accuracy"), f"{100 * one['mean_score']:.1f}", _percent(one["expert_less"], "difference")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if figures["best_constant"]:
        lines.append(f"| {CONSTANT} | {100 * figures['best_constant']['accuracy']:.1f} | | |")
    for title, table in (("label", figures["labels"]), ("field", figures["fields"])):
        if table:
            lines += ["", f"| {title} | rows | right |", "|---|---|---|"]
            lines += [f"| {name} | {one['n']} | {100 * one['accuracy']:.0f} % |" for name, one in table.items()]
    if figures["calibration"]:
        one = figures["calibration"]
        lines += ["", f"Expected calibration error of the label probabilities: {one['error']:.3f} (n = {one['n']})."]
    return "\n".join([*lines, "", *(f"Note: {note}." for note in figures["notes"])]).rstrip() + "\n"


def _percent(figures: Mapping[str, Any], key: str) -> str:
    low, high = figures["interval"]
    sign = "+" if key == "difference" else ""
    return f"{100 * figures[key]:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def plot(figures: Mapping[str, Any], history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the learning curve, the comparison and, for up to `MAX_PLOTTED_LABELS` labels, the confusion matrix."""
    matrix = figures["confusion"]
    if matrix and len(matrix["labels"]) > MAX_PLOTTED_LABELS:
        matrix = None
    canvas = figure(15 if matrix else 10, 4.5)
    axes = canvas.subplots(1, 3 if matrix else 2)
    validations = [entry for entry in history if entry["kind"] == "validation"]
    axes[0].plot([entry["step"] for entry in validations], [entry["accuracy"] for entry in validations], "o-")
    axes[0].set(xlabel="step", ylabel="validation accuracy", ylim=(-0.02, 1.02), title="Training")
    bars = {"expert": figures[EXPERT], **figures["others"]}
    values = [one["accuracy"] for one in bars.values()]
    spans = [[value - one["interval"][0] for value, one in zip(values, bars.values(), strict=True)],
             [one["interval"][1] - value for value, one in zip(values, bars.values(), strict=True)]]  # fmt: skip
    axes[1].barh(list(bars), values, xerr=np.clip(spans, 0, None), capsize=3)
    if figures["best_constant"]:
        axes[1].axvline(figures["best_constant"]["accuracy"], ls="--", color="grey", label=CONSTANT)
        axes[1].legend(loc="lower right")
    axes[1].invert_yaxis()
    axes[1].set(xlim=(0, 1), xlabel="accuracy", title=f"{figures[EXPERT]['n']} held-out rows")
    if matrix:
        counts = np.array(matrix["counts"])
        axes[2].imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes[2].set_xticks(range(len(matrix["columns"])), matrix["columns"], rotation=60, ha="right")
        axes[2].set_yticks(range(len(matrix["labels"])), matrix["labels"])
        axes[2].set(xlabel="answer", ylabel="right answer", title="Confusion")
        if len(matrix["labels"]) <= 10:
            for y, row in enumerate(counts):
                for x, count in enumerate(row):
                    axes[2].text(x, y, count, ha="center", va="center", fontsize=8)
    save_png(canvas, path)
