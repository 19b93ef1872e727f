"""Sums, and comparing numbers. Answers are spread over many values, so a constant reply wins next to nothing."""

from __future__ import annotations

import functools
import random
import re

from sigmix.tasks.base import Score
from sigmix.tasks.graders import strict_number, wrong_candidates
from sigmix.tasks.skills.base import NUMBER_ONLY, Item, skill


def number_or_equation(reply: str, gold: str, left: str) -> Score:
    """Return 1 for the number alone or the equation of the question: "115" or "26 + 89 = 115"."""
    question = re.escape(left).replace(r"\ ", r"\s*").replace(r"\*", r"[*x×]")
    return strict_number(re.sub(rf"^\s*{question}\s*=", "", reply, count=1), gold)


def number_list(reply: str, gold: str) -> Score:
    """Return 1 if the reply is whole numbers between commas, those of gold in gold's order."""
    text = reply.strip().removesuffix(".")
    if not re.fullmatch(r"\d{1,15}(?:\s*,\s*\d{1,15})*", text):
        return Score(0.0, None, "the reply is not just numbers between commas")
    numbers = ", ".join(str(int(part)) for part in text.split(","))
    return Score.of(numbers == gold, numbers, f"expected {gold}")


arithmetic = functools.partial(skill, domain="arithmetic", grader=number_or_equation, max_new_tokens=16)
comparing = functools.partial(skill, domain="comparing")


def _number(rng: random.Random, digits: int) -> int:
    """Draw a number of exactly ``digits`` digits; a single digit is 1 to 9."""
    return rng.randrange(10 ** (digits - 1), 10**digits)


def _sum_item(a: int, sign: str, b: int, result: int, operands: tuple[int, int]) -> Item:
    left = f"{a} {sign} {b}"
    wrong = [
        str(result + 1), str(-result - 1), f"{left} = {result + 1}", f"{a} {sign} {b + 1} = {result}",
        f"{result} = {result}", f"{left} = {result + 1} = {result}", f"{result - 1} or {result}", f"{a} {b}",
        f"{a}{b}", f"{result}, {result + 1}", f"{a} is more than {b}", f"It is {result + 10}, not {result}",
    ]  # fmt: skip
    key = f"{min(operands)} {max(operands)}"
    return Item(f"What is {left}? {NUMBER_ONLY}", str(result), wrong, {"left": left}, key=key)


@arithmetic("addition", description="Add two numbers of a given length.")
def addition(rng: random.Random, digits: int = 2) -> Item:
    a, b = _number(rng, digits), _number(rng, digits)
    return _sum_item(a, "+", b, a + b, (a, b))


@arithmetic(
    "subtraction", description="Subtract two numbers of a given length; the result is negative with negative=true only."
)
def subtraction(rng: random.Random, digits: int = 2, negative: bool = False) -> Item:
    a, b = _number(rng, digits), _number(rng, digits)
    if not negative:
        a, b = max(a, b), min(a, b)
    return _sum_item(a, "-", b, a - b, (a, b))


@arithmetic("multiplication", description="Multiply a number from 2 to 9 with a number of a given length.")
def multiplication(rng: random.Random, digits: int = 2) -> Item:
    a, b = rng.randrange(2, 10), max(2, _number(rng, digits))
    left, right = (a, b) if rng.random() < 0.5 else (b, a)
    return _sum_item(left, "*", right, a * b, (a, b))


def _distinct(rng: random.Random, count: int, digits: int) -> list[int]:
    """Draw distinct numbers, half of the time of one length, so that the length does not give the answer away."""
    length = rng.randint(min(2, digits), digits)
    numbers: list[int] = []
    same = rng.random() < 0.5
    while len(numbers) < count:
        number = _number(rng, length if same else rng.randint(1, digits))
        if number not in numbers:
            numbers.append(number)
    return numbers


def _sorted_key(numbers: list[int]) -> str:
    return " ".join(map(str, sorted(numbers)))


def _pick_item(question: str, numbers: list[int], gold: int, false_sentence: str) -> Item:
    wrong = wrong_candidates([str(number) for number in numbers], str(gold), false_sentence, f"-{gold}")
    return Item(f"{question} {NUMBER_ONLY}", str(gold), wrong, key=_sorted_key(numbers))


@comparing("larger", grader=strict_number, description="Say which of two numbers is larger.")
def larger(rng: random.Random, digits: int = 3) -> Item:
    a, b = _distinct(rng, 2, digits)
    low, high = min(a, b), max(a, b)
    return _pick_item(f"Which number is larger, {a} or {b}?", [a, b], high, f"{low} is larger than {high}.")


@comparing("smallest-of-three", grader=strict_number, description="Say which of three numbers is smallest.")
def smallest_of_three(rng: random.Random, digits: int = 3) -> Item:
    a, b, c = numbers = _distinct(rng, 3, digits)
    low, high = min(numbers), max(numbers)
    question = f"Which number is the smallest: {a}, {b} or {c}?"
    return _pick_item(question, numbers, low, f"{high} is smaller than {low}.")


@comparing("sort-numbers", grader=number_list, max_new_tokens=20, description="Put three numbers in ascending order.")
def sort_numbers(rng: random.Random, digits: int = 2) -> Item:
    numbers = _distinct(rng, 3, digits)
    ascending, descending, listed = (
        ", ".join(map(str, order)) for order in (sorted(numbers), sorted(numbers, reverse=True), numbers)
    )
    wrong = [text for text in (descending, listed) if text != ascending]
    wrong += [ascending.replace(", ", " "), f"{ascending}, {numbers[0]}", ascending.replace(", ", " < ")]
    wrong += [f"Sorted: {descending}"]
    question = f"Sort from smallest to largest: {listed}. Answer with the three numbers, separated by commas."
    return Item(question, ascending, wrong, key=_sorted_key(numbers))
