"""Formats: facts in a prescribed notation, which the whole reply has to follow."""

from __future__ import annotations

import functools
import json
import random

from sigmix.tasks.graders import exact, exact_lines, json_only
from sigmix.tasks.skills.base import Item, skill
from sigmix.tasks.skills.words import CITIES, MONTHS, NAMES, OBJECTS

formats = functools.partial(skill, domain="format")


def _person(rng: random.Random) -> tuple[str, int, str, str]:
    """Draw name, age and city, and a sentence about them."""
    name, age, city = rng.choice(NAMES), rng.randrange(18, 90), rng.choice(CITIES)
    return name, age, city, f"{name} is {age} and lives in {city}."


@formats("json-record", grader=json_only, max_new_tokens=32, description="Give a person's name, age and city as JSON.")
def json_record(rng: random.Random) -> Item:
    name, age, city, sentence = _person(rng)
    gold = json.dumps({"name": name, "age": age, "city": city})
    wrong = [
        f"```json\n{gold}\n```", f"Here it is: {gold}", gold.replace(str(age), f'"{age}"'), gold.replace('"', "'"),
        json.dumps({"name": name, "age": age}), gold[:-1], f"[{gold}]", gold.replace(name, name.lower()),
        gold.replace("}", ', "country": "?"}'), f"{name}, {age}, {city}", gold.replace("}", f', "age": {age}}}'),
    ]  # fmt: skip
    return Item(f"{sentence} Give name, age and city as JSON with those three keys.", gold, wrong)


@formats(
    "csv-row",
    grader=exact_lines,
    max_new_tokens=16,
    description="Give a person's name, age and city as one line of comma-separated values.",
)
def csv_row(rng: random.Random) -> Item:
    name, age, city, sentence = _person(rng)
    gold = f"{name},{age},{city}"
    wrong = [
        f"{name}, {age}, {city}", f"{name};{age};{city}", f"{city},{age},{name}", f"{name},{age}",
        f"name,age,city\n{gold}", f"{gold},", f"{name} {age} {city}",
    ]  # fmt: skip
    return Item(f"{sentence} Give name, age and city as one line of CSV, without spaces.", gold, wrong)


@formats(
    "bullet-list", grader=exact_lines, max_new_tokens=24, description="Write three given things as a list with dashes."
)
def bullet_list(rng: random.Random) -> Item:
    things = rng.sample(OBJECTS, 3)
    gold = "\n".join(f"- {thing}" for thing in things)
    wrong = [
        "\n".join(things), "- " + ", ".join(things), gold.replace("- ", "* "), gold + "\n- more",
        gold[: gold.rindex("\n")], "Here is the list:\n" + gold, gold.replace("- ", "-"), gold.replace("\n", " "),
        "\n".join(f"- {thing}" for thing in reversed(things)),
    ]  # fmt: skip
    return Item(f'Write as a list of three lines, each starting with "- ": {", ".join(things)}', gold, wrong)


@formats("date-iso", grader=exact, max_new_tokens=16, description="Write a date as YYYY-MM-DD.")
def date_iso(rng: random.Random) -> Item:
    year, month, day = rng.randrange(1900, 2100), rng.randrange(1, 13), rng.randrange(1, 29)
    shown = f"{day} {MONTHS[month - 1]} {year}"
    gold, swapped = f"{year}-{month:02}-{day:02}", f"{year}-{day:02}-{month:02}"
    wrong = [
        shown, f"{day:02}-{month:02}-{year}", f"{year}/{month:02}/{day:02}", f"{year}-{month:02}",
        f"{gold} {swapped}", f"{shown} = {gold}", f"{year}{month:02}{day:02}", f"{year + 1}-{month:02}-{day:02}",
    ]  # fmt: skip
    wrong += [text for text in (f"{year}-{month}-{day}", swapped) if text != gold]
    return Item(f"Write the date {shown} as YYYY-MM-DD.", gold, wrong)


@formats("time-24h", grader=exact, description="Write a 12-hour time in 24-hour notation.")
def time_24h(rng: random.Random) -> Item:
    hour, minute = rng.randrange(24), rng.randrange(60)
    half = "AM" if hour < 12 else "PM"
    shown = f"{(hour - 1) % 12 + 1}:{minute:02} {half}"
    gold, other = f"{hour:02}:{minute:02}", f"{(hour + 12) % 24:02}:{minute:02}"
    wrong = [
        shown, other, f"{gold} {half}", f"{gold} or {other}", gold.replace(":", "."), gold.replace(":", ""),
        f"{shown} is {gold}",
    ]  # fmt: skip
    wrong += [f"{hour}:{minute:02}"] if hour < 10 else []
    return Item(f"Write the time {shown} in 24-hour notation, as HH:MM.", gold, wrong)
