"""Reading: three or four short sentences and a question about one of them.

The sentence, its place and its answer are drawn evenly, so "the last name" or "the first number" does not win.
"""

from __future__ import annotations

import functools
import random

from sigmix.tasks.graders import exact, strict_number, wrong_candidates
from sigmix.tasks.skills.base import NUMBER_ONLY, ONE_WORD, Item, skill
from sigmix.tasks.skills.words import COLOURS, GOODS, NAMES, OBJECTS, PLACES

reading = functools.partial(skill, domain="reading")


def _item(text: str, question: str, gold: str, candidates: list[str], false_sentence: str) -> Item:
    return Item(f"{text} {question}", gold, wrong_candidates(candidates, gold, false_sentence, text))


@reading("who-has", grader=exact, description="Find who has what, or what has which colour.")
def who_has(rng: random.Random) -> Item:
    i = rng.randrange(3)
    if rng.random() < 1 / 3:
        things, colours = rng.sample(OBJECTS, 3), rng.sample(COLOURS, 3)
        text = " ".join(f"The {thing} is {colour}." for thing, colour in zip(things, colours, strict=True))
        question = f"What colour is the {things[i]}? {ONE_WORD}"
        return _item(text, question, colours[i], colours, f"The {things[i - 1]} is {colours[i]}.")
    names, things = rng.sample(NAMES, 3), rng.sample(OBJECTS, 3)
    text = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    false = f"{names[i]} has the {things[i - 1]}."
    if rng.random() < 0.5:
        return _item(text, f"Who has the {things[i]}? {ONE_WORD}", names[i], names, false)
    return _item(text, f"What does {names[i]} have? {ONE_WORD}", things[i], things, false)


@reading("where-is", grader=exact, description="Find where somebody went last (after bAbI's task 1).")
def where_is(rng: random.Random) -> Item:
    mover, other = rng.sample(NAMES, 2)
    places = rng.sample(PLACES, 3)
    moves = [(mover, places[0]), (mover, places[1]), (other, places[2])]
    rng.shuffle(moves)
    person = mover if rng.random() < 2 / 3 else other
    gold = [place for who, place in moves if who == person][-1]
    text = " ".join(f"{who} went to the {place}." for who, place in moves)
    return _item(text, f"Where is {person} now? {ONE_WORD}", gold, places, f"{gold} is where {person} is not")


@reading("fact-lookup", grader=strict_number, description="Find a price in a short price list.")
def fact_lookup(rng: random.Random) -> Item:
    goods, prices = rng.sample(GOODS, 4), [str(price) for price in rng.sample(range(2, 100), 4)]
    i = rng.randrange(4)
    text = "Prices: " + ", ".join(f"{good} {price}" for good, price in zip(goods, prices, strict=True)) + "."
    question = f"What is the price of the {goods[i]}? {NUMBER_ONLY}"
    return _item(text, question, prices[i], prices, f"The {goods[i - 1]} costs {prices[i]}.")
