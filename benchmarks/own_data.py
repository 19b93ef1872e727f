"""Experts from files as users have them: what `sigmix data` understands, and what `sigmix train --data` reaches.

    python -m benchmarks.own_data --data-dir DATA --out OUT                  # every set, seed 0
    python -m benchmarks.own_data --data-dir DATA --out OUT snips-intents --seeds 0 1 2 -- --minutes 2
    python -m benchmarks.own_data --data-dir DATA --out OUT --sweep          # rows of a step and rate, on other sets
    python -m benchmarks.own_data --out OUT --table                          # the tables alone

DATA holds clinc150, snips, arc and gsm8k as published. What follows ``--`` goes to `sigmix train`. A run that has its
report is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import percent
from sigmix.evals.report import BASE, CONSTANT, EXPERT, LORA, TFIDF
from sigmix.tasks.registry import get_task
from sigmix.utils.io import write_json

Rows = list[dict[str, Any]]
Splits = dict[str, Rows]

DOMAINS = ("banking", "travel")  # two of CLINC's, with their 30 intents
SWEEP_DOMAINS = ("home", "work")

SETTINGS = ((64, 6e-3), (16, 6e-3), (16, 2e-2), (8, 6e-3), (8, 2e-2))
"""Rows of a step and learning rate."""

SWEEP_ROWS = 1280  # that each setting is trained on


def _json_lines(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _clinc(data: Path) -> tuple[dict[str, list[list[str]]], dict[str, str]]:
    splits = json.loads((data / "clinc150/data_full.json").read_text(encoding="utf-8"))
    domains = json.loads((data / "clinc150/domains.json").read_text(encoding="utf-8"))
    return splits, {intent: domain for domain, intents in domains.items() for intent in intents}


NAMES = {"train": "train", "validation": "val", "test": "test"}


def clinc_domains(data: Path) -> Splits:
    """The domain of a request, out of ten (CLINC150, CC BY 3.0)."""
    splits, domain = _clinc(data)
    return {
        ours: [{"text": text, "label": domain[intent].replace("_", " ")} for text, intent in splits[theirs]]
        for ours, theirs in NAMES.items()
    }


def clinc_intents(data: Path, domains: Sequence[str] = DOMAINS) -> Splits:
    """The intent of a request, out of the 30 of two domains."""
    splits, domain = _clinc(data)
    return {
        ours: [{"text": text, "label": intent.replace("_", " ")} for text, intent in splits[theirs]
               if domain[intent] in domains]
        for ours, theirs in NAMES.items()
    }  # fmt: skip


def snips_intents(data: Path) -> Splits:
    """The intent of a command, out of seven (SNIPS, CC0)."""
    return {
        split: [{"text": row["text"], "label": row["intent"]} for row in _json_lines(data / f"snips/{split}.jsonl")]
        for split in ("train", "test")
    }


def snips_slots(data: Path) -> Splits:
    """Slots of a command as JSON, in OpenAI's chat format."""

    def chat(row: Mapping[str, Any]) -> dict[str, Any]:
        slots = {name: values[0] if len(values) == 1 else values for name, values in row["slots"].items()}
        answer = json.dumps({"intent": row["intent"], **slots}, ensure_ascii=False)
        return {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]}

    return {split: [chat(row) for row in _json_lines(data / f"snips/{split}.jsonl")] for split in ("train", "test")}


def arc_easy(data: Path) -> Splits:
    """The letter of the right choice (ARC-Easy, CC BY-SA 4.0)."""

    def row(one: Mapping[str, Any]) -> dict[str, Any]:
        choices = "\n".join(f"{choice['label']}) {choice['text']}" for choice in one["question"]["choices"])
        question = f"{one['question']['stem']}\n{choices}\nAnswer with the letter."
        return {"question": question, "answer": one["answerKey"]}

    files = {"train": "Train", "validation": "Dev", "test": "Test"}
    lettered = "ABCDE"  # a few questions number their choices
    return {
        split: [row(one) for one in _json_lines(data / f"arc/ARC-Easy-{name}.jsonl") if one["answerKey"] in lettered]
        for split, name in files.items()
    }


def gsm8k(data: Path) -> Splits:
    """Word problems with a solution and, after ####, the number (GSM8K, MIT)."""
    return {split: _json_lines(data / f"gsm8k/{split}.jsonl") for split in ("train", "test")}


SETS: dict[str, Callable[[Path], Splits]] = {
    "clinc-domains": clinc_domains, "clinc-intents": clinc_intents, "snips-intents": snips_intents,
    "snips-slots": snips_slots, "arc-easy": arc_easy, "gsm8k": gsm8k,
}  # fmt: skip


def written(task: str, rows: int = 2000) -> Splits:
    """Requests of a task of sigmix with their right answers."""
    return {
        split: [{"prompt": sample.prompt, "completion": sample.gold} for sample in
                get_task(task).samples(split, count)]
        for split, count in (("train", rows), ("validation", 200))
    }  # fmt: skip


SWEEP: dict[str, Callable[[Path], Splits]] = {
    "clinc-home-work": functools.partial(clinc_intents, domains=SWEEP_DOMAINS),
    "dates": lambda _: written("dates"),
    "payments": lambda _: written("payments"),
}
"""Sets of the sweep; none of them is among `SETS`."""


def write(folder: Path, splits: Splits) -> None:
    """Write the files of a set: CSV where all rows are flat and short, else JSONL; rows in random order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        rows = random.Random(0).sample(rows, len(rows))
        if set(rows[0]) == {"text", "label"}:
            with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        else:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(name: str, data_dir: Path, out: Path, seed: int, options: Sequence[str]) -> None:
    """Write a set's files, describe them, and train on them, with LoRA beside."""
    files, place = out / "files" / name, out / f"{name}-{seed}"
    figures = place / "figures.json"
    if figures.exists():
        return
    write(files, SETS[name](data_dir))
    (out / f"{name}.txt").write_text(_sigmix("data", str(files)), encoding="utf-8")
    started = time.monotonic()
    printed = _sigmix(
        "train", "--data", str(files), "--out", str(place / "skill"), "--run", str(place / "run"),
        "--seed", str(seed), "--compare", "lora", "--json", *options,
    )  # fmt: skip
    measured = json.loads(printed)
    measured["total_seconds"] = round(time.monotonic() - started, 1)
    measured["bytes"] = (place / "skill" / "adapter_model.safetensors").stat().st_size
    write_json(figures, measured)


def sweep(name: str, data_dir: Path, out: Path) -> None:
    """Train on a set of `SWEEP` with each of the `SETTINGS`; no test rows are used."""
    files = out / "files" / name
    write(files, {split: rows for split, rows in SWEEP[name](data_dir).items() if split != "test"})
    for rows, rate in SETTINGS:
        place = _place(out, name, rows, rate)
        if (place / "figures.json").exists():
            continue
        steps = SWEEP_ROWS // rows
        printed = _sigmix(
            "train", "--data", str(files), "--out", str(place / "skill"), "--run", str(place / "run"), "--json",
            "--generation-batch-size", str(rows), "--learning-rate", str(rate), "--max-steps", str(steps),
            "--eval-steps", str(steps // 4), "--test-n", "0",
        )  # fmt: skip
        write_json(place / "figures.json", json.loads(printed))


def _place(out: Path, name: str, rows: int, rate: float) -> Path:
    return out / "sweep" / f"{name}-{rows}@{rate:g}"


def sweep_table(out: Path) -> str:
    """Return the best validation accuracies of the sweep as a Markdown table."""
    lines = [f"| rows of a step | rate | {' | '.join(SWEEP)} |", "|" + "---|" * (2 + len(SWEEP))]
    for rows, rate in SETTINGS:
        paths = [_place(out, name, rows, rate) / "figures.json" for name in SWEEP]
        best = [json.loads(path.read_text(encoding="utf-8"))["best"] if path.exists() else None for path in paths]
        cells = [f"{100 * one['accuracy']:.1f} (step {one['step']})" if one else "" for one in best]
        lines.append(f"| {rows} | {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _sigmix(*words: str) -> str:
    print("sigmix", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "sigmix", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def table(out: Path) -> str:
    """Return the figures of all runs below a folder as a Markdown table."""
    lines = ["| set, seed | rows | base | constant | TF-IDF | LoRA | SVF | SVF less LoRA | steps | minutes | kB |"]
    lines.append("|" + "---|" * 11)
    for path in sorted(out.glob("*/figures.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        report = run["report"]
        own, others = report[EXPERT], report["others"]
        cells = [
            path.parent.name, str(own["n"]), *(percent(others.get(name)) for name in (BASE, CONSTANT, TFIDF, LORA)),
            percent(own), percent(others[LORA]["expert_less"], "difference"),
            " + ".join(map(str, run["steps"].values())), f"{run['seconds'] / 60:.1f}", f"{run['bytes'] / 1e3:.0f}",
        ]  # fmt: skip
        cells[3] = f"{100 * report['best_constant']['accuracy']:.1f}" if report["best_constant"] else ""
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run sets in turn; print the table."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, options = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_data", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SET", help=", ".join(SETS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(own)
    if args.sweep:
        for name in args.names or SWEEP:
            sweep(name, args.data_dir, args.out)
    elif not args.table:
        for name in args.names or SETS:
            for seed in args.seeds:
                run(name, args.data_dir, args.out, seed, options)
    print(table(args.out), sweep_table(args.out), sep="\n\n")


if __name__ == "__main__":
    main()
