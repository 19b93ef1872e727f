"""Write the tables of adaptation.md again from the items and summaries beside it.

    python results/adaptation.py

Every accuracy and paired test is computed from the items in adaptation/TASK, as `sigmix eval --strategy … --out` saved
them; the confusion matrices from dispatch/dispatch-LETTER.jsonl.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from sigmix.evals.accuracy import Item, Result, compare
from sigmix.evals.statistics import wilson

HERE = Path(__file__).parent
TASKS = ("subtraction", "time-24h", "sort-numbers")
PAGE = HERE / "adaptation.md"


def percent(right: int, n: int) -> str:
    """Accuracy in per cent with its 95 % Wilson interval."""
    low, high = wilson(right, n)
    return f"{100 * right / n:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def items(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def strategies(task: str) -> str:
    """All cells of one task."""
    folder = HERE / "adaptation" / task
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    results = {
        one["strategy"]: Result(task, [Item(**item) for item in items(folder / one["file"])])
        for one in summary["results"]
    }
    constant = 100 * summary["best_constant"]["accuracy"]
    lines = [
        f"### `{task}` (n = {summary['n']}, best constant answer {constant:.1f})\n",
        "| strategy | accuracy | difference to the base | won / lost | McNemar p | mixes chosen |",
        "|---|---|---|---|---|---|",
    ]
    for one in summary["results"]:
        result = results[one["strategy"]]
        right = sum(item.score == 1.0 for item in result.items)
        cells = [one["strategy"], percent(right, len(result.items)), "", "", ""]
        if one["strategy"] != "base":
            pair = compare(result, results["base"], summary["seed"])
            low, high = pair["interval"]
            cells[2] = f"{100 * pair['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            cells[3:] = [f"{pair['won']} / {pair['lost']}", f"{pair['p']:.2g}"]
        chosen = ", ".join(f"{_short(mix)} {count}" for mix, count in one["chosen"].items())
        lines.append(f"| {' | '.join([*cells, chosen])} |")
    found = summary["few_shot"]
    lines.append(
        f"\nC found {_short(found['mix'], 2)}: {round(found['accuracy'] * found['examples'])} of its "
        f"{found['examples']} examples right, "
        f"best of {found['candidates']} mixtures in {found['rounds']} rounds."
    )
    return "\n".join(lines)


def _short(mix: str, digits: int | None = None) -> str:
    if digits is None:
        return mix if len(mix) < 20 else "a mixture"
    return re.sub(r"\d\.\d+", lambda number: f"{float(number[0]):.{digits}f}", mix).replace("+", " + ")


def dispatch() -> str:
    """Right answers of A, B and D by what a request is, and what else they said."""
    letters = [letter for letter in "ABD" if (HERE / "dispatch" / f"dispatch-{letter}.jsonl").exists()]
    told = {letter: items(HERE / "dispatch" / f"dispatch-{letter}.jsonl") for letter in letters}
    lines = [
        "| request is | n | " + " | ".join(f"{letter}: right | {letter}: else" for letter in letters) + " |",
        "|---|---|" + "---|---|" * len(letters),
    ]
    truths = list(dict.fromkeys(item["truth"] for item in told[letters[0]]))
    for truth in [*truths, None]:
        cells = []
        for letter in letters:
            own = [item for item in told[letter] if truth in (None, item["truth"])]
            wrong = Counter(item["label"] for item in own if item["label"] != item["truth"].partition(":")[0])
            cells.append(percent(len(own) - wrong.total(), len(own)))
            cells.append(", ".join(f"{label} {count}" for label, count in wrong.most_common(3)) if truth else "")
        lines.append(f"| {truth or 'all'} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    tables = {"strategies": "\n\n".join(map(strategies, TASKS)), "dispatch": dispatch()}
    for name, table in tables.items():
        text = re.sub(
            f"<!-- {name} -->.*?<!-- /{name} -->",
            lambda _, name=name, table=table: f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
            text,
            flags=re.DOTALL,
        )
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
