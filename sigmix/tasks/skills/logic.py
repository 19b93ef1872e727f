"""Logic: order, truth values, parity, syllogisms, the odd one out.

Two-valued answers are drawn first, half and half, and the question is built for them, so a constant reply gets one
half and no more.
"""

from __future__ import annotations

import functools
import random

from sigmix.tasks.graders import exact, one_of, wrong_candidates
from sigmix.tasks.skills.base import ONE_WORD, Item, skill
from sigmix.tasks.skills.words import CATEGORIES, NAMES, NONSENSE

logic = functools.partial(skill, domain="logic")


def _two_valued(prompt: str, values: tuple[str, str], first: bool, key: str | None = None) -> Item:
    gold, other = values if first else values[::-1]
    wrong = wrong_candidates([gold, other], gold, f"{gold}/{other}", f"{other} is {gold}", f"not {other}")
    return Item(prompt, gold, wrong, key=key)


@logic("transitive", grader=exact, description="Find the tallest or shortest of three people.")
def transitive(rng: random.Random) -> Item:
    people = rng.sample(NAMES, 3)  # tallest first
    sentences = []
    for taller, shorter in ((people[0], people[1]), (people[1], people[2])):
        # both wordings and both orders are as likely, so neither the first nor the last name wins
        is_taller = rng.random() < 0.5
        sentences.append(f"{taller} is taller than {shorter}." if is_taller else f"{shorter} is shorter than {taller}.")
    rng.shuffle(sentences)
    most, least = ("tallest", "shortest") if rng.random() < 0.5 else ("shortest", "tallest")
    gold = people[0] if most == "tallest" else people[2]
    wrong = wrong_candidates(people, gold, f"{people[1]} is taller than {gold}", f"{gold} is the {least}")
    return Item(f"{' '.join(sentences)} Who is the {most}? {ONE_WORD}", gold, wrong)


def _expression(rng: random.Random, value: bool, depth: int) -> str:
    """Draw an expression with that value; at depth 0 the literal."""
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


TRUE_FALSE, ODD_EVEN, YES_NO = ("true", "false"), ("odd", "even"), ("yes", "no")


@logic(
    "boolean",
    grader=functools.partial(one_of, allowed=TRUE_FALSE),
    description="Evaluate an expression of and, or and not.",
)
def boolean(rng: random.Random, depth: int = 2) -> Item:
    value = rng.random() < 0.5
    return _two_valued(f"Is this true or false: {_expression(rng, value, depth)}? {ONE_WORD}", TRUE_FALSE, value)


@logic(
    "odd-even", grader=functools.partial(one_of, allowed=ODD_EVEN), description="Say whether a number is odd or even."
)
def odd_even(rng: random.Random, digits: int = 4) -> Item:
    number = rng.randrange(10 ** rng.randint(0, digits - 1), 10**digits)
    return _two_valued(f"Is {number} odd or even? {ONE_WORD}", ODD_EVEN, number % 2 == 1)


# premises, a valid and an invalid conclusion; both are used, so the premises alone do not give the answer away
_FORMS = (
    ("All {a} are {b}. All {b} are {c}.", "all {a} are {c}", "all {c} are {a}"),
    ("All {a} are {b}. No {b} are {c}.", "no {a} are {c}", "some {a} are {c}"),
    ("All {a} are {b}. {n} is one of the {a}.", "{n} is one of the {b}", "all {b} are {a}"),
    ("All {a} are {b}. {n} is not one of the {b}.", "{n} is not one of the {a}", "{n} is one of the {a}"),
    ("Some {a} are {b}. All {b} are {c}.", "some {a} are {c}", "all {a} are {c}"),
    ("No {a} are {b}. All {c} are {b}.", "no {a} are {c}", "some {c} are {a}"),
)


@logic(
    "syllogism",
    grader=functools.partial(one_of, allowed=YES_NO),
    description="Say whether a conclusion follows from two premises.",
)
def syllogism(rng: random.Random) -> Item:
    a, b, c = rng.sample(NONSENSE, 3)
    premises, valid, invalid = rng.choice(_FORMS)
    follows = rng.random() < 0.5
    fill = {"a": a, "b": b, "c": c, "n": rng.choice(NAMES)}
    premises, conclusion = premises.format(**fill), (valid if follows else invalid).format(**fill)
    question = f"{premises} Does it follow that {conclusion}? Answer yes or no."
    return _two_valued(question, YES_NO, follows, key=premises)


@logic("odd-one-out", grader=exact, description="Find the word that is of another kind than the rest.")
def odd_one_out(rng: random.Random) -> Item:
    kind, other = rng.sample(sorted(CATEGORIES), 2)
    words = rng.sample(CATEGORIES[kind], 3)
    gold = rng.choice(CATEGORIES[other])
    words.append(gold)
    rng.shuffle(words)
    wrong = wrong_candidates(words, gold, f"{gold} is of the same kind")
    return Item(f"Which word does not belong: {', '.join(words)}? {ONE_WORD}", gold, wrong, key=" ".join(sorted(words)))
