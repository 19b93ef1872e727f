"""Count what replies are, beside being right: the figures under "What the replies are" in README.md.

    python results/readings.py
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from sigmix.reproduce.store import Store

STORE = Store(Path(__file__).parent / "laptop")


def dates(item) -> str:
    """By the century asked for, and the one that was written."""
    return f"{item.gold[:2]}xx asked, {item.reply[:2]}xx written"


def larger(item) -> str:
    """By what decides between the two numbers."""
    one, two = re.findall(r"\d+", item.prompt)[:2]
    return "lengths differ" if len(one) != len(two) else "first digits differ" if one[0] != two[0] else "later digits"


def addition(item) -> str:
    """What the reply is: of an addition, or of one of the tasks that compare numbers."""
    operands = [int(number) for number in re.findall(r"\d+", item.prompt)[:2]]
    said = re.findall(r"\d+", item.reply)
    if "+" in item.reply:
        return "an equation" if "=" in item.reply else "the question again"
    if len(said) != 1:
        return "something else"
    number = int(said[0])
    named = {sum(operands): "the sum", max(operands): "the larger operand", min(operands): "the smaller operand"}
    return named.get(number, "another number")


def main() -> None:
    for task, kind_of in (("date-iso", dates), ("larger", larger), ("addition", addition)):
        for who in STORE.cells(task):
            items = STORE.cell(task, who).result.items
            every = Counter(map(kind_of, items))
            right = Counter(kind_of(item) for item in items if item.score == 1.0)
            told = "; ".join(f"{kind}: {right[kind]} of {count} right" for kind, count in every.most_common(4))
            print(f"{task} under {who}: {told}")


if __name__ == "__main__":
    main()
