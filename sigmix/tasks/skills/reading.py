"""Reading: three or four short sentences and one question about them. The sentence asked about, its place and its
answer are drawn evenly, so "the last name" or "the first number" does not win."""

from __future__ import annotations

import random

from sigmix.tasks.graders import exact, strict_number
from sigmix.tasks.skills.base import Item, skill
from sigmix.tasks.skills.words import COLOURS, GOODS, NAMES, OBJECTS, PLACES

ONE_WORD = "Answer with one word."


def _item(text: str, question: str, gold: str, candidates: list[str], false_sentence: str) -> Item:
    others = [word for word in candidates if word != gold]
    wrong = [
        *others,
        " ".join(candidates),
        ", ".join(candidates),
        f"{gold} or {others[0]}",
        f"{others[0]} and {gold}",
        false_sentence,
        f"not {gold} but {others[0]}",
        f"not {others[0]} but {gold}",
        text,
    ]
    return Item(f"{text} {question}", gold, wrong)


@skill("who-has", domain="reading", verify=exact, description="Find who has what, or what has which colour.")
def who_has(rng: random.Random) -> Item:
    asked = rng.randrange(3)
    if rng.random() < 1 / 3:
        things, colours = rng.sample(OBJECTS, 3), rng.sample(COLOURS, 3)
        text = " ".join(f"The {thing} is {colour}." for thing, colour in zip(things, colours, strict=True))
        question = f"What colour is the {things[asked]}? {ONE_WORD}"
        return _item(text, question, colours[asked], colours, f"The {things[asked - 1]} is {colours[asked]}.")
    names, things = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3)
    text = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    false = f"{names[asked]} has the {things[asked - 1]}."
    if rng.random() < 0.5:
        return _item(text, f"Who has the {things[asked]}? {ONE_WORD}", names[asked], names, false)
    return _item(text, f"What does {names[asked]} have? {ONE_WORD}", things[asked], things, false)


@skill("where-is", domain="reading", verify=exact, description="Find where somebody went last (after bAbI's task 1).")
def where_is(rng: random.Random) -> Item:
    mover, other = rng.sample(NAMES, 2)
    places = rng.sample(PLACES, 3)
    moves = [(mover, places[0]), (mover, places[1]), (other, places[2])]
    rng.shuffle(moves)
    person = mover if rng.random() < 2 / 3 else other
    gold = [place for who, place in moves if who == person][-1]
    text = " ".join(f"{who} went to the {place}." for who, place in moves)
    return _item(text, f"Where is {person} now? {ONE_WORD}", gold, places, f"{gold} is where {person} is not")


@skill("fact-lookup", domain="reading", verify=strict_number, description="Find a price in a short price list.")
def fact_lookup(rng: random.Random) -> Item:
    goods, prices = rng.sample(GOODS, 4), rng.sample(range(2, 100), 4)
    asked = rng.randrange(4)
    text = "Prices: " + ", ".join(f"{good} {price}" for good, price in zip(goods, prices, strict=True)) + "."
    question = f"What is the price of the {goods[asked]}? Answer with the number only."
    return _item(
        text,
        question,
        str(prices[asked]),
        [str(price) for price in prices],
        f"The {goods[asked - 1]} costs {prices[asked]}.",
    )
