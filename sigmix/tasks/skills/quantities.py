"""Quantities in people's words: sums and units (the answer is an equation), comparisons, numbers in words."""

from __future__ import annotations

import functools
import random
import re
from decimal import Decimal
from fractions import Fraction

from sigmix.tasks.base import Score
from sigmix.tasks.graders import exact, strict_number, wrong_candidates
from sigmix.tasks.number_parsing import parse_number
from sigmix.tasks.skills.spelling import in_words
from sigmix.tasks.skills.templated import Facts, templated
from sigmix.tasks.skills.words import FIRST_NAMES

number = functools.partial(templated, grader=strict_number)
CURRENCIES = ("${}", "${}", "€{}", "£{}", "{} euros", "{} dollars", "{}€", "{} EUR", "USD {}", "{} pounds")
LENGTHS = {"two": (1, 2, 2, 2, 3, 3, 4), "three": (1, 1, 2, 2, 3)}
"""Digits of the operands of a sum, each as likely as it is often listed."""


def _digits(rng: random.Random, count: int) -> int:
    return rng.randrange(10 ** (count - 1), 10**count)


def _amount(value: Decimal | int) -> str:
    """Write whole amounts without, others with two decimals."""
    return str(int(value)) if value == int(value) else f"{value:.2f}"


def value_or_equation(reply: str, gold: str) -> Score:
    """Return 1 for the value of gold alone ("115"), or behind right arithmetic ("26 + 89 = 115", "15 * 100 = 1500")."""
    value = gold.rpartition("=")[2].strip()
    left, equals, result = reply.rpartition("=")
    if equals and _computed(left) != parse_number(value):
        return Score(0.0, None, f"no arithmetic that gives {value}")
    return strict_number(result if equals else reply, value)


def _computed(text: str) -> Fraction | None:
    """Return the value of a chain of numbers and the signs +, * and /, such as 1.5 * 60 + 20; None if it is none."""
    total, product, sign = Fraction(0), Fraction(1), "*"
    tokens = re.split(r"\s*([+*/])\s*", text.strip())
    if len(tokens) < 3:
        return None
    for place, token in enumerate(tokens):
        if place % 2:
            sign = token
            continue
        number = parse_number(token)
        if number is None or (sign == "/" and not number):
            return None
        if sign == "+":
            total, product = total + product, Fraction(number)
        else:
            product = product / number if sign == "/" else product * number
    return total + product


@templated(
    "sums", domain="arithmetic", grader=value_or_equation, max_new_tokens=24,
    description="Add two or three numbers or amounts, also in a short story.",
)  # fmt: skip
def sums(rng: random.Random, kind: str) -> Facts:
    count, money = (3 if kind in ("three", "story-three") else 2), kind == "money"
    values: list[Decimal] = []
    cents = rng.random() < 0.6
    while len(values) < count:
        value = Decimal(_digits(rng, rng.choice(LENGTHS["three" if count == 3 else "two"])))
        if money:
            value = Decimal(rng.randrange(100, 10000)) / 100 if cents else value % 1000
        values += [value] if value > 1 else []
    total = sum(values)
    numbers = [_amount(value) if value != int(value) else str(value) for value in values]
    if money:
        style = rng.choice(CURRENCIES)
        shown = [style.format(_amount(value)) for value in values]
    elif rng.random() < 0.3 and max(values) < 100:
        shown = [in_words(int(value)) for value in values]
    else:
        shown = [f"{text[:-3]},{text[-3:]}" if len(text) > 3 and rng.random() < 0.3 else text for text in numbers]
    left, gold = " + ".join(numbers), _amount(total)
    wrong = [
        _amount(total + 1), _amount(total + 10), _amount(total - 1), left, "".join(numbers),
        f"{left} = {_amount(total + 1)}", f"{left} + 1 = {gold}", f"{gold} = {gold}", f"{left} = {gold} = {gold}",
        f"{gold} or {_amount(total + 1)}", f"The answer is {_amount(total + 1)}",
    ]  # fmt: skip
    fields = {**dict(zip("abc", shown)), "x": rng.randrange(2, 60)}
    # the equation, since small models add better once they have written the numbers down
    return Facts(fields, f"{left} = {gold}", wrong, key=" ".join(map(str, sorted(values))))


def _whole(rng: random.Random, count: int) -> list[str]:
    """Draw distinct whole numbers: of one length with equal first digits, or the shorter one with a higher digit."""
    length = rng.choice((2, 2, 3, 3, 4))
    first = _digits(rng, length)
    numbers = {first}
    style = rng.choice(("prefix", "prefix", "length", "any"))
    while len(numbers) < count:
        if style == "prefix":  # 4831 and 4819
            unit = 10 ** rng.randrange(1, length)
            numbers.add(first // unit * unit + rng.randrange(unit))
        elif style == "length":  # 87 and 1204
            shorter = max(1, length - rng.randrange(1, 3))
            numbers.add(rng.randrange(5 * 10 ** (shorter - 1), 10**shorter))
        else:
            numbers.add(_digits(rng, length))
    return [str(number) for number in numbers]


def _decimal(rng: random.Random, count: int) -> list[str]:
    """Draw distinct decimals that mostly share the whole part and differ in length: 3.9 and 3.11."""
    whole = rng.choice((0, rng.randrange(1, 10), rng.randrange(10, 200)))
    numbers: dict[Decimal, str] = {}
    while len(numbers) < count:
        length = rng.choice((1, 2, 2, 3))
        near = whole if rng.random() < 0.8 else whole + 1
        text = f"{near}.{rng.randrange(10**length):0{length}}"
        if text[-1] != "0":
            numbers.setdefault(Decimal(text), text)
    return list(numbers.values())


def _numbers(rng: random.Random, kind: str, count: int) -> list[str]:
    if kind.startswith("price"):
        unit = rng.choice((100, 100, 1))
        first = rng.randrange(100, 30000)
        prices = {first}
        while len(prices) < count:
            near = rng.random() < 0.7
            prices.add(first // 100 * 100 + rng.randrange(100) if near else rng.randrange(100, 30000))
        return [f"{price / 100:.2f}" if unit == 100 else str(price) for price in prices]
    draw = rng.random()
    if kind.startswith("count") or draw < 0.45:
        return _whole(rng, count)
    if draw < 0.8:
        return _decimal(rng, count)
    numbers = ["-" + number for number in (_whole(rng, count) if draw < 0.92 else _decimal(rng, count))]
    return [number[1:] if i == 0 and rng.random() < 0.3 else number for i, number in enumerate(numbers)]


HIGHER, LOWER = ("larger", "bigger", "greater", "higher"), ("smaller", "lower")
HIGHEST, LOWEST = ("largest", "biggest", "greatest", "highest"), ("smallest", "lowest")


@number(
    "compare-numbers",
    domain="comparing",
    description="Say which of two or three numbers, decimals, negative numbers or prices is larger or smaller.",
)
def compare_numbers(rng: random.Random, kind: str) -> Facts:
    high = not kind.endswith("low") if "-" in kind else rng.random() < 0.5
    numbers = _numbers(rng, kind, 3 if kind == "three" else 2)
    rng.shuffle(numbers)
    ordered = sorted(numbers, key=Decimal)
    gold = ordered[-1 if high else 0]
    fields = {
        **dict(zip("abc", numbers)), "er": rng.choice(HIGHER if high else LOWER), "x": rng.randrange(2, 60),
        "est": rng.choice(HIGHEST if high else LOWEST),
    }  # fmt: skip
    return Facts(fields, gold, wrong_candidates(numbers, gold, f"{gold} > {ordered[0]}"), key=" ".join(ordered))


PEOPLE = {
    "taller": (145, 199), "shorter": (145, 199), "older": (8, 99), "younger": (8, 99), "more": (2, 2000),
    "less": (2, 2000), "oldest": (8, 99), "youngest": (8, 99), "most": (2, 2000), "least": (2, 2000),
    "slower": (95, 240), "faster": (95, 240),
}  # fmt: skip
"""Kinds of comparisons with their lowest and highest value: centimetres, years, things, seconds."""
DOWNWARD = {"shorter", "younger", "less", "youngest", "least", "faster"}


@templated(
    "compare-people",
    domain="comparing",
    grader=exact,
    description="Say who is taller, older or faster, or has more or less, by the figures given.",
)
def compare_people(rng: random.Random, kind: str) -> Facts:
    count = 3 if kind.endswith("st") else 2
    names, (low, high) = rng.sample(FIRST_NAMES, count), PEOPLE[kind]
    values: list[int] = []
    while len(set(values)) < count:
        near = rng.randrange(low, high - 9) if rng.random() < 0.4 else low
        span = range(near, near + 10 if near > low else high)
        values = [int(text) for text in _whole(rng, count)] if high == 2000 else rng.sample(span, count)
    gold = names[values.index((min if kind in DOWNWARD else max)(values))]
    if rng.random() < 0.1:
        names = [name.lower() for name in names]
    fields = {
        **{f"n{i}": name for i, name in enumerate(names, 1)}, **dict(zip("abc", values)), "x": rng.randrange(2, 60),
    }  # fmt: skip
    everyone = [name.capitalize() for name in names]
    wrong = wrong_candidates(everyone, gold, f"{gold} is {kind}", *map(str, values))
    return Facts(fields, gold, wrong, key=f"{kind} {sorted(zip(values, everyone))}")


MONEY_WORDS = (
    ("euro", "euros", "cents"), ("dollar", "dollars", "cents"), ("pound", "pounds", "pence"),
    ("franc", "francs", "centimes"),
)  # fmt: skip


def _spoken_money(rng: random.Random, whole: int, cents: int, joint: str) -> str:
    one, many, small = rng.choice(MONEY_WORDS)
    text = f"{in_words(whole, joint)} {one if whole == 1 else many}"
    if not cents:
        return text
    small = {"cents": "cent", "pence": "penny", "centimes": "centime"}[small] if cents == 1 else small
    spoken = in_words(cents)
    if cents >= 10 and rng.random() < 0.5:
        return f"{text} {spoken}"
    return rng.choice((f"{text} and {spoken} {small}", f"{text} {spoken} {small}", f"{text}, {spoken} {small}"))


@number("number-words", domain="format", description="Write a number or an amount of money given in words in digits.")
def number_words(rng: random.Random, kind: str) -> Facts:
    joint = rng.choice((" and ", " "))
    size = _digits(rng, rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7)))
    if size > 9999 and rng.random() < 0.6:
        size -= size % 10 ** (len(str(size)) - rng.choice((1, 2, 2, 3)))
    form = rng.random()
    if kind == "money" or (kind == "any" and form < 0.4):
        whole, cents = size % 10_000 or 1, rng.choice((0, rng.randrange(1, 100), rng.randrange(5, 100, 5)))
        gold, words = _amount(whole + Decimal(cents) / 100), _spoken_money(rng, whole, cents, joint)
    elif form > 0.85:
        fraction = f"{_digits(rng, rng.choice((1, 2, 3))) // 10 or ''}{rng.randrange(1, 10)}"
        gold = f"{size % 1000}.{fraction}"
        words = f"{in_words(size % 1000, joint)} point {' '.join(in_words(int(digit)) for digit in fraction)}"
    elif form > 0.78:
        gold, words = f"-{size}", f"minus {in_words(size, joint)}"
    elif form > 0.72:
        hundreds = rng.choice([n for n in range(11, 100) if n % 10])
        gold, words = str(hundreds * 100), f"{in_words(hundreds)} hundred"
    else:
        gold, words = str(size), in_words(size, joint)
    words = f"a {words[4:]}" if re.match("one (hundred|thousand)", words) and rng.random() < 0.4 else words
    words = words.replace("-", " ") if rng.random() < 0.2 else words
    words = words.upper() if rng.random() < 0.05 else words
    value = Decimal(gold)
    wrong = [words, str(value * 10), str(value + 1), f"{gold} {words}", f"{gold} or {value + 1}", f"{words} = {gold}"]
    wrong += [gold.replace(".", " "), gold.replace(".", "")] if "." in gold else [f"{gold}00"] if value else []
    return Facts({"words": words, "x": rng.randrange(2, 60)}, gold, wrong, key=gold)


# dimension: large unit, small unit, small units in a large one, each with its names
UNITS = {
    "length": (
        ("km|kilometres|kilometers", "m|metres|meters", 1000), ("m|metres|meters", "cm|centimetres|centimeters", 100),
        ("cm|centimetres|centimeters", "mm|millimetres|millimeters", 10),
        ("m|metres|meters", "mm|millimetres|millimeters", 1000), ("ft|feet", "in|inches", 12),
        ("yd|yards", "ft|feet", 3),
    ),
    "mass": (
        ("kg|kilograms|kilos", "g|grams", 1000), ("t|tonnes|metric tons", "kg|kilograms|kilos", 1000),
        ("g|grams", "mg|milligrams", 1000), ("lb|pounds", "oz|ounces", 16),
    ),
    "volume": (
        ("l|litres|liters", "ml|millilitres|milliliters", 1000), ("L|liters", "mL|milliliters", 1000),
        ("l|litres|liters", "cl|centilitres|centiliters", 100), ("dl|decilitres|deciliters", "ml|millilitres", 100),
    ),
    "time": (
        ("h|hours|hrs", "min|minutes|mins", 60), ("min|minutes|mins", "s|seconds|secs", 60), ("days", "hours", 24),
        ("weeks", "days", 7), ("years", "months", 12),
    ),
    "count": (("dozen", "pieces", 12), ("euros|EUR", "cents", 100), ("dollars", "cents", 100)),
}  # fmt: skip
PARTS = {3: (1,), 7: (1,), 12: (1, 1, 2), 16: (1, 2), 24: (1, 2), 60: (1, 2, 4, 10)}
"""Parts of a large unit that amounts are multiples of (halves for 2); powers of ten allow one or two decimals."""


@templated(
    "units", domain="units", grader=value_or_equation, max_new_tokens=24,
    description="Convert between common units; results are whole or short decimals.",
)  # fmt: skip
def units(rng: random.Random, kind: str) -> Facts:
    names_large, names_small, factor = rng.choice([
        pair for dimension in (UNITS if kind == "any" else [kind]) if kind != "any" or dimension != "count"
        for pair in UNITS[dimension]
    ])  # fmt: skip
    part = rng.choice(PARTS.get(factor, (1, 1, 10, 10, 100)))
    count = rng.randrange(2, 30) if part == 1 else rng.randrange(3, 10 * part)
    large = Decimal(count) / part
    small = large * factor
    # minutes are the goal of "durations"
    down = names_small[:3] != "min" and (rng.random() < 0.6 or kind == "count" or names_large[:3] == "min")
    source, goal = (names_large, names_small) if down else (names_small, names_large)
    value, result = (large, small) if down else (small, large)
    shown, gold = (f"{amount.normalize():f}" for amount in (value, result))
    source_name, goal_name = rng.choice(source.split("|")), rng.choice(goal.split("|"))
    if source_name.islower() and len(source_name) <= 2 and rng.random() < 0.5:
        amount = f"{shown}{source_name}"
    else:
        amount = f"{shown} {source_name}"
    moved = [f"{(result * step).normalize():f}" for step in (Decimal(10), Decimal("0.1"), Decimal(factor) ** 2)]
    wrong = [*moved, f"{gold} {goal_name}x", f"{amount} = {gold}", f"{gold} or {moved[0]}", f"{result + 1}", amount]
    fields = {"amount": amount, "unit": goal_name, "x": rng.randrange(2, 60)}
    equation = f"{shown} {'*' if down else '/'} {factor} = {gold}"
    wrong += [f"{shown} * {factor + 1} = {gold}", f"{shown} = {gold}", f"{gold} = {gold}"]
    return Facts(fields, equation, wrong, key=f"{shown} {source.split('|')[0]} {goal.split('|')[0]}".lower())
