"""Count what replies are, beside being right: the counts in sentences of README.md, here and above.

    python results/readings.py             # all counts
    python results/readings.py --fill      # put them where the two mark them

A mark is ``<!-- read=TASK|WHO|KIND -->R of N<!-- = -->``, or with ``|right`` or ``|all`` behind it for R or N alone.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from reproduction.store import Store

HERE = Path(__file__).parent
STORE = Store(HERE / "laptop")
MARK = re.compile(r"(<!-- read=(.+?) -->)[^<]*(<!-- = -->)")


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


def subtraction(item) -> str:
    """Whether an equation is written, and what its last number is."""
    one, other = [int(number) for number in re.findall(r"\d+", item.prompt)[:2]]
    said = re.findall(r"\d+", item.reply)
    form = "equation, " if "=" in item.reply else ""
    named = {one - other: "the difference", one + other: "the sum"}
    return form + (named.get(int(said[-1]), "another number") if said else "no number")


def sorting(item) -> str:
    """By whether the numbers stand in order already, and whether the reply only repeats them."""
    given = re.findall(r"\d+", item.prompt)
    copied = "copied" if re.findall(r"\d+", item.reply) == given else "not copied"
    return f"{'in order already' if sorted(given, key=int) == given else 'out of order'}, {copied}"


def clock(item) -> str:
    """By the half of the day, and whether the hour needs a nought."""
    hour = re.search(r"(\d+):", item.prompt)[1]
    return f"{'PM' if ' PM' in item.prompt else 'AM'}, {len(hour)}-digit hour"


def letter(item) -> str:
    """The letter that is answered."""
    return item.reply.strip() if item.reply.strip() in "ABCDE" else "no letter alone"


READERS = {
    "date-iso": dates, "larger": larger, "addition": addition, "subtraction": subtraction, "sort-numbers": sorting,
    "time-24h": clock,
    "arc-easy": letter, "arc-challenge": letter, "openbookqa": letter,
}  # fmt: skip


def counts(task: str, who: str) -> tuple[Counter[str], Counter[str]]:
    """How many replies there are of each kind, and how many of them are right."""
    items = STORE.cell(task, who).result.items
    kind_of = READERS[task]
    return Counter(map(kind_of, items)), Counter(kind_of(item) for item in items if item.score == 1.0)


def fill(text: str) -> str:
    """Put counts where a text marks them."""

    def count(mark: re.Match[str]) -> str:
        task, who, kind, *only = mark[2].split("|")
        every, right = counts(task, who)
        told = {"right": f"{right[kind]}", "all": f"{every[kind]}"}
        return f"{mark[1]}{told[only[0]] if only else f'{right[kind]} of {every[kind]}'}{mark[3]}"

    return MARK.sub(count, text)


def main() -> None:
    if "--fill" in sys.argv:
        for page in (HERE / "README.md", HERE.parent / "README.md"):
            page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for task in READERS:
        for who in STORE.cells(task):
            every, right = counts(task, who)
            told = "; ".join(f"{kind}: {right[kind]} of {count} right" for kind, count in every.most_common(4))
            print(f"{task} under {who}: {told}")


if __name__ == "__main__":
    main()
