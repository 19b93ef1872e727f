"""Dates, times of day and durations as people write them."""

from __future__ import annotations

import datetime
import random
import re

from sigmix.tasks.graders import exact
from sigmix.tasks.skills.quantities import value_or_equation
from sigmix.tasks.skills.spelling import date_spellings, in_words, time_spellings
from sigmix.tasks.skills.templated import Facts, templated
from sigmix.tasks.skills.words import MONTHS

FIRST, LAST = datetime.date(1900, 1, 1).toordinal(), datetime.date(2099, 12, 31).toordinal()
NOON, MIDNIGHT = ("noon", "12 noon", "midday", "twelve noon"), ("midnight", "12 midnight", "twelve at night")


def draw_date(rng: random.Random) -> datetime.date:
    """Draw a date of 1900 to 2099, two in three of them from 1980 to 2039."""
    date = datetime.date.fromordinal(rng.randint(FIRST, LAST))
    if rng.random() < 0.6:
        date = date.replace(year=rng.randrange(1980, 2040), day=min(date.day, 28))
    return date


@templated("dates", domain="format", grader=exact, description="Write a date in any of thirty spellings as YYYY-MM-DD.")
def dates(rng: random.Random, kind: str) -> Facts:
    date = draw_date(rng)
    d, m = date.day, date.month
    shown = rng.choice(date_spellings(date))
    if kind == "century":  # two-digit years, in templates that define them
        date = date.replace(year=2000 + date.year % 100, day=min(d, 28))
        d, y = date.day, f"{date.year % 100:02}"
        month = MONTHS[m - 1]
        shown = rng.choice(
            (f"{d} {month} {y}", f"{d:02}-{month[:3]}-{y}", f"{d} {month[:3]} '{y}", f"{month} {d} '{y}")
        )
    gold, year = date.isoformat(), date.year
    swapped = f"{year}-{d:02}-{m:02}"
    wrong = [
        f"{d} {MONTHS[m - 1]} {year}", f"{d:02}-{m:02}-{year}", f"{year}/{m:02}/{d:02}", f"{year}-{m:02}",
        f"{gold} {swapped}", f"{shown} = {gold}", f"{year}{m:02}{d:02}", f"{year + 1}-{m:02}-{d:02}", f"{gold}T00:00",
    ]  # fmt: skip
    wrong += [text for text in (f"{year}-{m}-{d}", swapped) if text != gold]
    return Facts({"date": shown, "x": rng.randrange(2, 60)}, gold, wrong, key=gold)


@templated("times", domain="format", grader=exact, description="Write a time of day in 24-hour notation, as HH:MM.")
def times(rng: random.Random, kind: str) -> Facts:
    hour = rng.choice((*range(6, 24), *range(24)))
    minute = rng.choice((0, 15, 30, 45, *range(5, 60, 5), *(rng.randrange(60) for _ in range(9))))
    shown = rng.choice(time_spellings(hour, minute))
    key = f"{hour:02}:{minute:02}"
    if rng.random() < 0.03:
        hour, minute = rng.choice((0, 12)), 0
        key = shown = rng.choice(NOON if hour else MIDNIGHT)
    gold, other = f"{hour:02}:{minute:02}", f"{(hour + 12) % 24:02}:{minute:02}"
    wrong = [
        other, f"{gold} h", f"{gold} pm", f"{gold} or {other}", gold.replace(":", "."), gold.replace(":", ""),
        f"{shown} is {gold}", f"{gold}:00", f"{hour:02}:{(minute + 5) % 60:02}",
    ]  # fmt: skip
    wrong += [f"{hour}:{minute:02}"] if hour < 10 else []
    return Facts({"time": shown, "x": rng.randrange(2, 60)}, gold, wrong, key=key)


def duration_spellings(total: int) -> list[str]:
    """Return the ways to write a number of minutes, other than as that number of minutes."""
    hours, minutes = divmod(total, 60)
    h, m = f"{hours} hour{'s' * (hours != 1)}", f"{minutes} minute{'s' * (minutes != 1)}"
    spoken_h = "an hour" if hours == 1 else f"{in_words(hours)} hours"
    if not hours:
        seconds = [f"{total * 60} seconds", f"{total * 60} s", f"{total * 60} sec"]
        spoken = {15: ["a quarter of an hour", "quarter of an hour"], 30: ["half an hour", "half an hr"],
                  45: ["three quarters of an hour"]}.get(total, [])  # fmt: skip
        return spoken * 2 + seconds + [f"{in_words(total)} minutes"] * (total > 1)
    if not minutes:
        return [h, f"{hours} h", f"{hours}h", f"{hours} hrs" if hours > 1 else "1 hr", spoken_h, f"{hours}:00 h"]
    spellings = [
        f"{h} {m}", f"{h} and {m}", f"{hours}h{minutes:02}", f"{hours} h {minutes} min", f"{hours}h {minutes}m",
        f"{hours}hr {minutes}min", f"{hours}:{minutes:02} h", f"{spoken_h} and {in_words(minutes)} minutes",
        f"{spoken_h} {in_words(minutes)}", f"{h}, {m}",
        f"{hours} hrs {minutes} mins", f"{minutes} min more than {spoken_h}",
    ]  # fmt: skip
    if minutes == 30:
        half = "one and a half hours" if hours == 1 else f"{in_words(hours)} and a half hours"
        spellings += [half, f"{spoken_h} and a half", f"{hours}.5 hours", f"{hours}.5h", f"{hours}½ hours"]
    if minutes % 15 == 0 and minutes != 30:
        quarter = {15: "a quarter", 45: "three quarters"}[minutes]
        spellings += [f"{spoken_h} and {quarter}", f"{hours}.{minutes * 100 // 60} hours"] * 2
    if total > 110 and minutes >= 50:
        spellings += [f"{60 - minutes} minutes short of {in_words(hours + 1)} hours"]
    return spellings


@templated(
    "durations", domain="units", grader=value_or_equation, max_new_tokens=24,
    description="Give a duration or a span in minutes.",
)  # fmt: skip
def durations(rng: random.Random, kind: str) -> Facts:
    if kind == "span":
        start, total = 5 * rng.randrange(12 * 6, 12 * 21), 5 * rng.randrange(1, 36)
        total = min(total, 24 * 60 - 5 - start)
        start += rng.choice((0, 0, 0, 1, 2, 3, 4)) if total < 175 else 0
        begin, end = (f"{minute // 60}:{minute % 60:02}" for minute in (start, start + total))
        if rng.random() < 0.3:
            begin, end = begin.zfill(5), end.zfill(5)
        fields, key = {"start": begin, "end": end}, f"{begin} {end}".replace("0", "", begin[0] == "0")
    else:
        total = rng.choice((15 * rng.randrange(1, 29), 5 * rng.randrange(1, 85), rng.randrange(2, 420)))
        fields, key = {"duration": rng.choice(duration_spellings(total))}, str(total)
    gold, hours, minutes = str(total), *divmod(total, 60)
    in_seconds = re.search(r"\d+(?= ?s)", fields.get("duration", ""))
    left = f"{in_seconds[0]} / 60" if in_seconds and not hours else f"{hours} * 60 + {minutes}"
    wrong = [
        f"{left} = {total + 1}", f"{left} + 1 = {gold}", f"{gold} = {gold}",
        str(total + 1), str(total - 1), str(total + 60), f"{gold} minutes", f"{gold} min", f"{gold} or {total + 10}",
        *fields.values(), f"{total // 60}:{total % 60:02}", f"{total + 60} - 60",
    ]  # fmt: skip
    return Facts({**fields, "x": rng.randrange(2, 60)}, f"{left} = {gold}", wrong, key=key)
