"""Logic: order, truth values, parity, syllogisms, the odd one out. Two-valued answers are drawn first, half and half,
and the question is built for them, so a constant reply gets one half and no more."""

from __future__ import annotations

import functools
import random

from sigmix.tasks.graders import exact, one_of
from sigmix.tasks.skills.base import Item, skill
from sigmix.tasks.skills.words import CATEGORIES, NAMES, NONSENSE

ONE_WORD = "Answer with one word."


yes_no = functools.partial(one_of, allowed=("yes", "no"))


true_false = functools.partial(one_of, allowed=("true", "false"))


odd_even_word = functools.partial(one_of, allowed=("odd", "even"))


def _two(prompt: str, gold: str, other: str, key: str | None = None) -> Item:
    wrong = [
        other,
        f"{gold} or {other}",
        f"{other}, {gold}",
        f"{gold}/{other}",
        f"{other} is {gold}",
        f"not {other}",
        f"{gold}, no, {other}",
    ]
    return Item(prompt, gold, wrong, key=key)


@skill("transitive", domain="logic", verify=exact, description="Find the tallest or shortest of three people.")
def transitive(rng: random.Random) -> Item:
    people = rng.sample(NAMES, 3)  # tallest first
    sentences = []
    for taller, shorter in ((people[0], people[1]), (people[1], people[2])):
        # both wordings and both orders are as likely, so neither the first nor the last name wins
        told = rng.random() < 0.5
        sentences.append(f"{taller} is taller than {shorter}." if told else f"{shorter} is shorter than {taller}.")
    rng.shuffle(sentences)
    most = rng.random() < 0.5
    gold = people[0] if most else people[2]
    others = [name for name in people if name != gold]
    wrong = [
        *others,
        " ".join(people),
        " or ".join(people),
        f"{gold} or {others[0]}",
        f"{others[0]} is taller than {gold}",
        f"{gold} is the {'shortest' if most else 'tallest'}",
        f"not {gold} but {others[1]}",
    ]
    return Item(f"{' '.join(sentences)} Who is the {'tallest' if most else 'shortest'}? {ONE_WORD}", gold, wrong)


def _expression(rng: random.Random, value: bool, depth: int) -> str:
    """A random expression of that value; at depth 0 the literal."""
    if depth == 0:
        return str(value).lower()
    kind = rng.choice(("not", "and", "or"))
    if kind == "not":
        return f"not {_bracket(_expression(rng, not value, depth - 1))}"
    if (kind == "and") == value:
        left = right = value
    else:  # one of the three ways to make a false "and" or a true "or"
        left, right = rng.choice(((value, value), (value, not value), (not value, value)))
    return f"{_bracket(_expression(rng, left, depth - 1))} {kind} {_bracket(_expression(rng, right, depth - 1))}"


def _bracket(text: str) -> str:
    return f"({text})" if " " in text else text


@skill("boolean", domain="logic", verify=true_false, description="Evaluate an expression of and, or and not.")
def boolean(rng: random.Random, depth: int = 2) -> Item:
    value = rng.random() < 0.5
    gold, other = ("true", "false") if value else ("false", "true")
    return _two(f"Is this true or false: {_expression(rng, value, depth)}? {ONE_WORD}", gold, other)


@skill("odd-even", domain="logic", verify=odd_even_word, description="Say whether a number is odd or even.")
def odd_even(rng: random.Random, digits: int = 4) -> Item:
    number = rng.randrange(10 ** rng.randint(0, digits - 1), 10**digits)
    gold, other = ("odd", "even") if number % 2 else ("even", "odd")
    return _two(f"Is {number} odd or even? {ONE_WORD}", gold, other)


# premises, what follows, what does not; each form is asked both ways, so the premises alone say nothing
_FORMS = (
    ("All {a} are {b}. All {b} are {c}.", "all {a} are {c}", "all {c} are {a}"),
    ("All {a} are {b}. No {b} are {c}.", "no {a} are {c}", "some {a} are {c}"),
    ("All {a} are {b}. {n} is one of the {a}.", "{n} is one of the {b}", "all {b} are {a}"),
    ("All {a} are {b}. {n} is not one of the {b}.", "{n} is not one of the {a}", "{n} is one of the {a}"),
    ("Some {a} are {b}. All {b} are {c}.", "some {a} are {c}", "all {a} are {c}"),
    ("No {a} are {b}. All {c} are {b}.", "no {a} are {c}", "some {c} are {a}"),
)


@skill("syllogism", domain="logic", verify=yes_no, description="Say whether a conclusion follows from two premises.")
def syllogism(rng: random.Random) -> Item:
    a, b, c = rng.sample(NONSENSE, 3)
    premises, valid, invalid = rng.choice(_FORMS)
    follows = rng.random() < 0.5
    fill = {"a": a, "b": b, "c": c, "n": rng.choice(NAMES)}
    said, asked = premises.format(**fill), (valid if follows else invalid).format(**fill)
    gold, other = ("yes", "no") if follows else ("no", "yes")
    return _two(f"{said} Does it follow that {asked}? Answer yes or no.", gold, other, key=said)


@skill("odd-one-out", domain="logic", verify=exact, description="Find the word that is of another kind than the rest.")
def odd_one_out(rng: random.Random) -> Item:
    kind, other = rng.sample(sorted(CATEGORIES), 2)
    rest, gold = rng.sample(CATEGORIES[kind], 3), rng.choice(CATEGORIES[other])
    words = [*rest, gold]
    rng.shuffle(words)
    wrong = [
        *rest,
        " ".join(words),
        ", ".join(words),
        f"{gold} or {rest[0]}",
        f"{rest[0]}, not {gold}",
        f"{gold} is of the same kind",
    ]
    return Item(f"Which word does not belong: {', '.join(words)}? {ONE_WORD}", gold, wrong, key=" ".join(sorted(words)))
