"""Answers out of a sentence or a short passage: a payment as JSON, yes or no."""

from __future__ import annotations

import datetime
import functools
import random

from sigmix.tasks.graders import json_only, one_of
from sigmix.tasks.skills.calendar import FIRST
from sigmix.tasks.skills.quantities import CURRENCIES
from sigmix.tasks.skills.spelling import date_spellings
from sigmix.tasks.skills.templated import Facts, templated
from sigmix.tasks.skills.words import COLOURS, FIRST_NAMES, OBJECTS, PLURALS, SURNAMES

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


@templated(
    "payments",
    domain="format",
    grader=json_only,
    max_new_tokens=56,
    typos=False,
    description="Extract who paid, how much and when as JSON with the keys name, amount and date.",
)
def payments(rng: random.Random, kind: str) -> Facts:
    name = rng.choice(FIRST_NAMES) + (f" {rng.choice(SURNAMES)}".replace("_", " ") if rng.random() < 0.6 else "")
    whole = rng.randrange(2, 10 ** rng.randint(1, 4))
    amount = f"{whole}.{rng.randrange(1, 100):02}" if rng.random() < 0.5 else str(whole)
    shown = amount
    if whole > 999 and rng.random() < 0.3:
        shown = f"{amount[0]},{amount[1:]}"
    date = datetime.date.fromordinal(rng.randrange(datetime.date(1990, 1, 1).toordinal(), FIRST + 50_000))
    gold = f'{{"name": "{name}", "amount": {amount}, "date": "{date}"}}'
    wrong = [
        f"```json\n{gold}\n```", f"Here it is: {gold}", gold.replace(f" {amount},", f' "{amount}",'),
        gold.replace('"', "'") if "'" not in name else name, gold[:-1], f"[{gold}]", gold.replace(name, name.lower()),
        gold.replace("}", ', "currency": "EUR"}'), f"{name}, {amount}, {date}", gold.replace('"name"', '"payer"'),
        gold.replace(str(date), f"{date:%d-%m-%Y}"), gold.replace(f" {amount},", f" {whole + 1},"),
    ]  # fmt: skip
    fields = {
        "name": name, "amount": rng.choice(CURRENCIES).format(shown), "date": rng.choice(date_spellings(date)),
        "x": rng.randrange(1000, 99999),
    }  # fmt: skip
    return Facts(fields, gold, wrong, key=f"{name} {amount} {date}")


THINGS = [plural for word, plural in PLURALS.items() if word in OBJECTS]


def _listed(words: list[str], last: str = "and") -> str:
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _limit(rng: random.Random, truth: bool, low: int, high: int) -> tuple[int, int]:
    """Draw a limit and a value that is above it if ``truth``, often close to it."""
    while True:
        limit, value = (rng.randint(low, high) for _ in range(2))
        if rng.random() < 0.4:
            value = limit + rng.randint(-3, 3)
        if low <= value != limit and (value > limit) == truth:
            return limit, value


def _passage(rng: random.Random, kind: str, truth: bool) -> dict[str, object]:
    """Return the fields of a passage about which the statement asked for is true or false."""
    names, things, colours, days = (rng.sample(words, 4) for words in (FIRST_NAMES, THINGS, COLOURS, DAYS))
    if kind == "limit":  # is {v} above {limit}?
        limit, value = _limit(rng, truth, 5, 60)
        return {"limit": limit, "v": value, "n": names[0]}
    if kind == "stock":  # is {item} among those that are there?
        item = rng.choice(things[:2] if truth else things[2:])
        return {"in1": things[0], "in2": things[1], "out1": things[2], "out2": things[3], "item": item, "n": names[0]}
    if kind == "people":  # is {who} among those who come?
        who = rng.choice(names[:2] if truth else names[2:])
        return {"n1": names[0], "n2": names[1], "n3": names[2], "n4": names[3], "who": who, "day": days[0]}
    if kind == "days":  # is {day} one of the days listed?
        listed, day = days[:3], rng.choice(days[:3]) if truth else days[3]
        listed.sort(key=DAYS.index)
        return {"days": _listed(listed), "ordays": _listed(listed, "or"), "day": day, "n": names[0]}
    if kind == "hours":  # is {t} within the hours?
        opening, length = rng.randrange(6, 12), rng.randrange(4, 11)
        minute = rng.choice((0, 10, 15, 20, 30, 40, 45))
        hour = rng.randrange(opening, opening + length) if truth else rng.choice(
            [h for h in range(5, 24) if not opening <= h <= opening + length]
        )  # fmt: skip
        return {
            "from": f"{opening}:00", "to": f"{opening + length}:00", "t": f"{hour}:{minute:02}", "day": days[0],
            "n": names[0],
        }  # fmt: skip
    # colours: has the first thing the colour {c}?
    singular = rng.sample(OBJECTS, 2)
    return {"o1": singular[0], "o2": singular[1], "c1": colours[0], "c2": colours[1], "n": names[0],
            "o": singular[0], "c": colours[0 if truth else 1]}  # fmt: skip


@templated(
    "yes-no",
    domain="reading",
    grader=functools.partial(one_of, allowed=("yes", "no")),
    description="Answer yes or no from a short passage: rules, opening hours, stock, plans.",
)
def yes_no(rng: random.Random, kind: str) -> Facts:
    kind, _, negated = kind.partition("-")
    yes = rng.randrange(2) == 1
    fields = _passage(rng, kind, yes != bool(negated))
    if kind == "colours" and rng.random() < 0.5:  # the same question about the second thing
        other = {fields["c1"]: fields["c2"], fields["c2"]: fields["c1"]}
        fields |= {"o": fields["o2"], "c": other[fields["c"]]}
    gold, no = ("yes", "no") if yes else ("no", "yes")
    wrong = [no, f"{gold} or {no}", f"{no}, not {gold}", f"{gold}, {no}", f"{no} {gold}", "maybe", f"{gold}, but {no}"]
    return Facts({**fields, "x": rng.randrange(2, 60)}, gold, wrong, key=f"{kind} {sorted(map(str, fields.items()))}")
