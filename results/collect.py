"""Collect what training runs measured into results/experts: items, learning metrics and the table in experts.md.

    python results/collect.py RUNS EXPERTS

RUNS holds the runs' folders (metrics.jsonl, test-base.jsonl, test-expert.jsonl), EXPERTS the experts, those of other
seeds as NAME-s1, NAME-s2. Every accuracy of the tables is computed again from the items.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from sigmix.evals.accuracy import Item, Result, compare, constant_baseline
from sigmix.experts.expert import Expert
from sigmix.tasks.registry import get_task

HERE = Path(__file__).parent
HEAD = (
    "| expert | domain | seed | dtype | n | base | no answer | expert "
    "| best constant | entropy | McNemar p | minutes |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|\n"
)


def load(path: Path, task: str) -> Result:
    """A result from its items."""
    return Result(task, [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()])


def shown(result: Result) -> str:
    """Accuracy in per cent with its 95 % Wilson interval."""
    summary = result.summary()
    low, high = summary["interval"]
    return f"{100 * summary['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def row(name: str, runs: Path, experts: Path) -> str:
    """One line of the table, and the copies that it rests on."""
    expert = Expert.load(experts / name)
    task = get_task(expert.meta["task"])
    folder = HERE / "experts" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("test-base.jsonl", "test-expert.jsonl", "metrics.jsonl"):
        if (runs / name / file).exists():  # runs that were not repeated keep the items that are here
            shutil.copyfile(runs / name / file, folder / file)
    base, ours = load(folder / "test-base.jsonl", task.name), load(folder / "test-expert.jsonl", task.name)
    samples = task.samples("test", len(ours.items), seed=0)
    constant, summary = constant_baseline(task, samples)["accuracy"], ours.summary()
    silent = sum(item.answer is None for item in base.items) / len(base.items)
    training = expert.meta["training"]
    return (
        f"| {name} | {task.domain} | {expert.meta['seed']} | {expert.meta['base']['dtype']} | {summary['n']} "
        f"| {shown(base)} | {100 * silent:.0f} | {shown(ours)} "
        f"| {100 * constant:.1f} | {summary['answer_entropy']:.2f} | {compare(ours, base)['p']:.1e} "
        f"| {training['seconds'] / 60:.1f} |\n"
    )


def seeds(names: list[str]) -> str:
    """A table of the tasks that were trained with several seeds."""
    lines = ["| task | n each | seeds 0, 1, 2 | mean | lowest to highest |\n|---|---|---|---|---|\n"]
    for name in names:
        every = [other for other in names if other == name or other.removeprefix(f"{name}-s").isdigit()]
        if len(every) > 1:
            results = [load(HERE / "experts" / one / "test-expert.jsonl", name) for one in every]
            found = [100 * result.accuracy for result in results]
            told = ", ".join(f"{value:.1f}" for value in found)
            lines.append(
                f"| {name} | {len(results[0].scored)} | {told} | {sum(found) / len(found):.1f} "
                f"| {min(found):.1f} to {max(found):.1f} |\n"
            )
    return "".join(lines)


def main() -> None:
    """Write experts.md's tables between their markers."""
    runs, experts = Path(sys.argv[1]), Path(sys.argv[2])
    names = sorted(path.name for path in experts.iterdir() if (path / "sigmix.json").exists())
    table = HEAD + "".join(row(name, runs, experts) for name in names)
    page = HERE / "experts.md"
    text = page.read_text(encoding="utf-8")
    for marker, made in (("table", table), ("seeds", seeds(names))):
        before, _, rest = text.partition(f"<!-- {marker} -->")
        _, _, after = rest.partition(f"<!-- /{marker} -->")
        text = f"{before}<!-- {marker} -->\n{made}<!-- /{marker} -->{after}"
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
