"""Sums, and comparing numbers. Answers are spread over many values, so a constant reply wins next to nothing."""

from __future__ import annotations

import random
import re

from sigmix.tasks.base import Score
from sigmix.tasks.graders import strict_number
from sigmix.tasks.skills.base import Item, skill

ONLY = "Answer with the number only."


def _number(rng: random.Random, digits: int) -> int:
    """Exactly ``digits`` digits; a single digit is 1 to 9."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _sum_item(a: int, sign: str, b: int, result: int, key: str) -> Item:
    wrong = [
        str(result + 1),
        str(-result - 1),
        f"{a} {sign} {b} = {result + 1}",
        f"{a} {sign} {b + 1} = {result}",
        f"{result} = {result}",
        f"{a} {sign} {b} = {result + 1} = {result}",
        f"{result - 1} or {result}",
        f"{a} {b}",
        f"{a}{b}",
        f"{result}, {result + 1}",
        f"{a} is more than {b}",
        f"It is {result + 10}, not {result}",
    ]
    return Item(f"What is {a} {sign} {b}? {ONLY}", str(result), wrong, {"left": f"{a} {sign} {b}"}, key=key)


def _result(reply: str, gold: str, left: str) -> Score:
    """The number alone, or the very equation that was asked for: "115" or "26 + 89 = 115", nothing else."""
    asked = re.escape(left).replace(r"\ ", r"\s*").replace(r"\*", r"[*x×]")
    return strict_number(re.sub(rf"^\s*{asked}\s*=", "", reply, count=1), gold)


@skill(
    "addition", domain="arithmetic", verify=_result, max_new_tokens=16, description="Add two numbers of a given length."
)
def addition(rng: random.Random, digits: int = 2) -> Item:
    a, b = _number(rng, digits), _number(rng, digits)
    return _sum_item(a, "+", b, a + b, f"{min(a, b)} {max(a, b)}")


@skill(
    "subtraction",
    domain="arithmetic",
    verify=_result,
    max_new_tokens=16,
    description="Subtract two numbers of a given length; the result is negative only if asked for.",
)
def subtraction(rng: random.Random, digits: int = 2, negative: bool = False) -> Item:
    a, b = _number(rng, digits), _number(rng, digits)
    if not negative:
        a, b = max(a, b), min(a, b)
    return _sum_item(a, "-", b, a - b, f"{min(a, b)} {max(a, b)}")


@skill(
    "multiplication",
    domain="arithmetic",
    verify=_result,
    max_new_tokens=16,
    description="Multiply a number from 2 to 9 with a number of a given length.",
)
def multiplication(rng: random.Random, digits: int = 2) -> Item:
    a, b = rng.randrange(2, 10), max(2, _number(rng, digits))
    left, right = (a, b) if rng.random() < 0.5 else (b, a)
    return _sum_item(left, "*", right, a * b, f"{min(a, b)} {max(a, b)}")


def _distinct(rng: random.Random, count: int, digits: int) -> list[int]:
    """Distinct numbers, half of the time of one length, so that the number of digits does not give the answer away."""
    length = rng.randint(min(2, digits), digits)
    found: list[int] = []
    same = rng.random() < 0.5
    while len(found) < count:
        number = _number(rng, length if same else rng.randint(1, digits))
        if number not in found:
            found.append(number)
    return found


def _pick_item(question: str, numbers: list[int], gold: int, false_sentence: str) -> Item:
    listed = " ".join(map(str, numbers))
    wrong = [str(number) for number in numbers if number != gold]
    wrong += [
        listed,
        listed.replace(" ", ", "),
        listed.replace(" ", " or "),
        false_sentence,
        f"-{gold}",
        f"not {gold} but {wrong[0]}",
    ]
    return Item(question, str(gold), wrong, key=" ".join(map(str, sorted(numbers))))


@skill("larger", domain="comparing", verify=strict_number, description="Say which of two numbers is larger.")
def larger(rng: random.Random, digits: int = 3) -> Item:
    a, b = _distinct(rng, 2, digits)
    return _pick_item(
        f"Which number is larger, {a} or {b}? {ONLY}", [a, b], max(a, b), f"{min(a, b)} is larger than {max(a, b)}."
    )


@skill(
    "smallest-of-three", domain="comparing", verify=strict_number, description="Say which of three numbers is smallest."
)
def smallest_of_three(rng: random.Random, digits: int = 3) -> Item:
    numbers = _distinct(rng, 3, digits)
    return _pick_item(
        f"Which number is the smallest: {numbers[0]}, {numbers[1]} or {numbers[2]}? {ONLY}",
        numbers,
        min(numbers),
        f"{max(numbers)} is smaller than {min(numbers)}.",
    )


def number_list(reply: str, gold: str) -> Score:
    """1 if the reply is just whole numbers between commas, those of gold in gold's order."""
    text = reply.strip().removesuffix(".")
    if not re.fullmatch(r"\d{1,15}(?:\s*,\s*\d{1,15})*", text):
        return Score(0.0, None, "the reply is not just numbers between commas")
    found = ", ".join(str(int(part)) for part in text.split(","))
    return Score.of(found == gold, found, f"expected {gold}")


@skill(
    "sort-numbers",
    domain="comparing",
    verify=number_list,
    max_new_tokens=20,
    description="Put three numbers in ascending order.",
)
def sort_numbers(rng: random.Random, digits: int = 2) -> Item:
    numbers = _distinct(rng, 3, digits)
    gold = ", ".join(map(str, sorted(numbers)))
    others = [", ".join(map(str, order)) for order in (sorted(numbers, reverse=True), numbers)]
    wrong = [text for text in others if text != gold]
    wrong += [gold.replace(", ", " "), f"{gold}, {numbers[0]}", gold.replace(", ", " < "), f"Sorted: {others[0]}"]
    listed = ", ".join(map(str, numbers))
    return Item(
        f"Sort from smallest to largest: {listed}. Answer with the three numbers, separated by commas.",
        gold,
        wrong,
        key=" ".join(map(str, sorted(numbers))),
    )
