"""Tables of the studies besides the reproduction: bundled experts, adaptation, dispatch, and what replies contain.

Every accuracy and paired test is computed from the items in the archives (``python -m reproduction --report``).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reproduction.archive import RESULTS, SUFFIX, read_archive
from reproduction.report import shown, table
from reproduction.store import Store
from sigmix.evals.accuracy import Item, Result, compare, constant_baseline
from sigmix.evals.statistics import wilson
from sigmix.tasks.registry import get_task
from sigmix.utils.io import write_text

UNSEEN = ("subtraction", "time-24h", "sort-numbers")


def rows_of(content: bytes) -> list[dict[str, Any]]:
    """Parse a JSON-lines file."""
    return [json.loads(line) for line in content.decode("utf-8").split("\n") if line]


def result_of(task: str, content: bytes) -> Result:
    """Parse the items that `Result.save` wrote."""
    return Result(task, [Item(**row) for row in rows_of(content)])


def percent(right: int, n: int) -> str:
    """Format an accuracy in per cent with its 95 % Wilson interval."""
    low, high = wilson(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


# ---------------------------------------------------------------------- bundled experts


def experts_page(files: dict[str, bytes]) -> str:
    """Tables of the experts and of the training seeds; ``facts.json`` has what the items do not say."""
    facts = json.loads(files["facts.json"])
    rows, accuracies = [], {}
    for name, fact in sorted(facts.items()):
        task = get_task(fact["task"])
        base = result_of(task.name, files[f"{name}/test-base.jsonl"])
        ours = result_of(task.name, files[f"{name}/test-expert.jsonl"])
        samples = task.samples("test", len(ours.items), seed=0)
        unanswered = sum(item.answer is None for item in base.items) / len(base.items)
        accuracies.setdefault(fact["task"], []).append(100 * ours.accuracy)
        rows.append(
            [
                name, task.domain, fact["seed"], fact["dtype"], len(ours.scored), shown(base),
                f"{100 * unanswered:.0f}", shown(ours), f"{100 * constant_baseline(task, samples)['accuracy']:.1f}",
                f"{ours.summary()['answer_entropy']:.2f}", f"{compare(ours, base)['p']:.1e}", fact["minutes"],
            ]
        )  # fmt: skip
    seeds = [
        [task, ", ".join(f"{one:.1f}" for one in values), f"{sum(values) / len(values):.1f}",
         f"{min(values):.1f} to {max(values):.1f}"]
        for task, values in accuracies.items() if len(values) > 1
    ]  # fmt: skip
    head = ["expert", "domain", "seed", "dtype", "n", "base", "no answer", "expert", "best constant", "entropy",
            "McNemar p", "minutes"]  # fmt: skip
    about = (
        "Accuracy in per cent with its 95 % Wilson interval, on the same held-out test items for base and expert, "
        "greedy decoding. No answer: replies of the base model without an extractable answer, in per cent. Best "
        "constant: accuracy of the best single reply on these items. Entropy: of the expert's answers, in nats."
    )
    by_seed = table(["task", "seeds 0, 1, 2", "mean", "lowest to highest"], seeds)
    return "\n\n".join(["# The bundled experts", about, table(head, rows), "Training seeds:", by_seed])


# ---------------------------------------------------------------------- adaptation and dispatch


def adaptation_page(strategies: dict[str, bytes], dispatch: dict[str, bytes]) -> str:
    """Tables of the strategies on unseen tasks, and of the labels that A, B and D choose."""
    about = (
        "Accuracy in per cent with its 95 % Wilson interval; differences to the base model paired on the same items, "
        "95 % bootstrap interval. Oracle: right if the base model or any expert alone is right."
    )
    parts = ["# Adaptation of the bundled experts", about]
    for task in UNSEEN:
        own = f"{task}/"
        files = {name[len(own) :]: content for name, content in strategies.items() if name.startswith(own)}
        parts += strategies_of(task, files)
    return "\n\n".join([*parts, "## Dispatch", dispatch_table(dispatch)])


def strategies_of(task: str, files: dict[str, bytes]) -> list[str]:
    """Heading, table and result of the search for one task."""
    summary = json.loads(files["summary.json"])
    results = {one["strategy"]: result_of(task, files[one["file"]]) for one in summary["results"]}
    rows = []
    for one in summary["results"]:
        result = results[one["strategy"]]
        cells = ["", "", ""]
        if one["strategy"] != "base":
            pair = compare(result, results["base"], summary["seed"])
            low, high = pair["interval"]
            cells = [f"{100 * pair['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
                     f"{pair['won']} / {pair['lost']}", f"{pair['p']:.2g}"]  # fmt: skip
        chosen = ", ".join(f"{mix if len(mix) < 20 else 'a mixture'} {count}" for mix, count in one["chosen"].items())
        right = sum(item.score == 1.0 for item in result.items)
        rows.append([one["strategy"], percent(right, len(result.items)), *cells, chosen])
    found = summary["few_shot"]
    mixture = re.sub(r"\d\.\d+", lambda alpha: f"{float(alpha[0]):.2f}", found["mix"]).replace("+", " + ")
    head = ["strategy", "accuracy", "difference to the base", "won / lost", "McNemar p", "mixtures chosen"]
    searched = (
        f"C found {mixture}: {round(found['accuracy'] * found['examples'])} of its {found['examples']} examples right, "
        f"best of {found['candidates']} mixtures in {found['rounds']} rounds."
    )
    constant = 100 * summary["best_constant"]["accuracy"]
    heading = f"## `{task}` (n = {summary['n']}, best constant answer {constant:.1f})"
    return [heading, table(head, rows), searched]


def dispatch_table(files: dict[str, bytes]) -> str:
    """Correct labels by true label, and the most frequent wrong ones."""
    items = {letter: rows_of(files[f"dispatch-{letter}.jsonl"]) for letter in "ABD"}
    rows = []
    for truth in [*dict.fromkeys(item["truth"] for item in items["A"]), None]:
        cells = []
        for every in items.values():
            own = [item for item in every if truth in (None, item["truth"])]
            wrong = Counter(item["label"] for item in own if item["label"] != item["truth"].partition(":")[0])
            cells.append(percent(len(own) - sum(wrong.values()), len(own)))
            cells.append(", ".join(f"{label} {count}" for label, count in wrong.most_common(3)) if truth else "")
        rows.append([truth or "all", len(own), *cells])
    head = ["request is", "n", *(f"{letter}: {column}" for letter in items for column in ("right", "wrong labels"))]
    return table(head, rows)


# ---------------------------------------------------------------------- what replies contain


def numbers(text: str) -> list[int]:
    """Extract all whole numbers."""
    return [int(number) for number in re.findall(r"\d+", text)]


def date_kind(item: Item) -> str:
    """Classify a date by the century in the prompt and in the reply."""
    return f"{item.gold[:2]}xx given, {item.reply[:2]}xx written"


def larger_kind(item: Item) -> str:
    """Classify a comparison by what decides it."""
    one, two = re.findall(r"\d+", item.prompt)[:2]
    return "lengths differ" if len(one) != len(two) else "first digits differ" if one[0] != two[0] else "later digits"


def addition_kind(item: Item) -> str:
    """Classify a reply to an addition."""
    operands, reply = numbers(item.prompt)[:2], numbers(item.reply)
    if "+" in item.reply:
        return "an equation" if "=" in item.reply else "the question again"
    if len(reply) != 1:
        return "something else"
    kinds = {sum(operands): "the sum", max(operands): "the larger operand", min(operands): "the smaller operand"}
    return kinds.get(reply[0], "another number")


def subtraction_kind(item: Item) -> str:
    """Classify a reply to a subtraction by its form and its last number."""
    (one, other), reply = numbers(item.prompt)[:2], numbers(item.reply)
    form = "equation, " if "=" in item.reply else ""
    kinds = {one - other: "the difference", one + other: "the sum"}
    return form + (kinds.get(reply[-1], "another number") if reply else "no number")


def sorting_kind(item: Item) -> str:
    """Classify a sorting item by whether it is sorted already and the reply copies it."""
    given = re.findall(r"\d+", item.prompt)
    copied = "copied" if re.findall(r"\d+", item.reply) == given else "not copied"
    return f"{'in order already' if sorted(given, key=int) == given else 'out of order'}, {copied}"


def time_kind(item: Item) -> str:
    """Classify a time by half of the day and digits of the hour."""
    hour = re.search(r"(\d+):", item.prompt)
    return f"{'PM' if ' PM' in item.prompt else 'AM'}, {len(hour[1]) if hour else 0}-digit hour"


def letter_kind(item: Item) -> str:
    """Classify a multiple-choice reply by its letter."""
    return item.reply.strip() if item.reply.strip() in "ABCDE" else "no letter alone"


KINDS: dict[str, Callable[[Item], str]] = {
    "date-iso": date_kind, "larger": larger_kind, "addition": addition_kind, "subtraction": subtraction_kind,
    "sort-numbers": sorting_kind, "time-24h": time_kind, "arc-easy": letter_kind, "openbookqa": letter_kind,
}  # fmt: skip

READ: dict[str, tuple[str, ...]] = {
    "date-iso": tuple(f"svf-rl@0.002.date-iso.s{seed}" for seed in range(3)),
    "larger": (
        "svf-rl@0.002.larger.s0", "lora-rl@0.001.larger.s0", "svf-sft@0.006.larger.s0", "lora-sft@0.001.larger.s0",
    ),
    "addition": (
        *(f"svf-rl@0.002.mix.addition=1+larger=1.s{seed}" for seed in range(3)),
        *(f"svf-rl@0.002.mix.addition=1+larger=1+date-iso=1.s{seed}" for seed in range(3)),
    ),
    "subtraction": (
        "svf-rl@0.002.addition.s0", "svf-mlp-rl@0.002.addition.s0", "lora-sft@0.001.addition.s0",
        "lora-qv-sft@0.003.addition.s0", "svf-sft@0.006.addition.s0",
    ),
    "sort-numbers": ("base", "strategy-C"),
    "time-24h": ("strategy-C", "few-light-20", "few-ia3-20"),
    "arc-easy": ("base", "svf-rl@0.002.arc-easy.s0", "lora-rl@0.0003.arc-easy.s0"),
    "openbookqa": ("base",),
}  # fmt: skip
"""Cells of the laptop reproduction whose replies are counted."""


def replies_page(store: Store) -> str:
    """Counts of replies by kind, and how many of each are right."""
    rows = []
    for task, names in READ.items():
        for who in names:
            cell = store.cell(task, who)
            items = [] if cell is None else cell.result.items
            every = Counter(map(KINDS[task], items))
            right = Counter(KINDS[task](item) for item in items if item.score == 1.0)
            counts = "; ".join(f"{kind}: {right[kind]} of {count}" for kind, count in every.most_common())
            rows.append([task, who, counts])
    return "\n\n".join(
        [
            "# What the replies contain",
            "Replies of the laptop reproduction by kind: right of all.",
            table(["task", "cell", "right of all, by kind"], rows),
        ]
    )


def write_studies(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Write the tables of all studies; return their paths."""
    files = {study: read_archive(results / f"{study}{SUFFIX}") for study in ("experts", "adaptation", "dispatch")}
    pages = {
        "experts": experts_page(files["experts"]),
        "adaptation": adaptation_page(files["adaptation"], files["dispatch"]),
        "replies": replies_page(Store(results / "laptop")),
    }
    note = "Generated by `python -m reproduction --report` from the archives in `results/`."
    paths = []
    for name, text in pages.items():
        head, _, rest = text.partition("\n\n")
        write_text(folder / f"{name}.md", f"{head}\n\n{note} {rest}\n")
        paths.append(folder / f"{name}.md")
    return paths
