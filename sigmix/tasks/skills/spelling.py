"""Numbers, dates and times as people write them, for the templated tasks."""

from __future__ import annotations

import datetime

from sigmix.tasks.skills.words import MONTHS

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}  # fmt: skip
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def in_words(number: int, joint: str = " and ") -> str:
    """Return a number from 0 to 999,999,999 in words; ``joint`` stands after the hundreds (" " in American usage)."""
    if number < 20:
        return _UNITS[number]
    if number < 100:
        return _TENS[number // 10] + (f"-{_UNITS[number % 10]}" if number % 10 else "")
    if number < 1000:
        hundreds = f"{_UNITS[number // 100]} hundred"
        return hundreds + joint + in_words(number % 100) if number % 100 else hundreds
    size, name = (1_000_000, "million") if number >= 1_000_000 else (1000, "thousand")
    head, rest = f"{in_words(number // size, joint)} {name}", number % size
    return head + (joint if rest < 100 else " ") + in_words(rest, joint) if rest else head


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, 11th, …"""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def ordinal_words(number: int) -> str:
    """Return first, second, twenty-first, … up to thirty-first."""
    head, hyphen, last = in_words(number).rpartition("-")
    return head + hyphen + _ORDINALS.get(last, f"{last}th")


def date_spellings(date: datetime.date) -> list[str]:
    """Return the ways to write a date that leave no doubt about it; with slashes or dots only if the day is over 12."""
    d, m, y = date.day, date.month, date.year
    month, weekday, nth = MONTHS[m - 1], _DAYS[date.weekday()], ordinal(d)
    mon, day = {9: "Sept"}.get(m, month[:3]), weekday[:3]
    spellings = [
        f"{d} {month} {y}", f"{month} {d}, {y}", f"{nth} of {month} {y}", f"the {nth} of {month}, {y}",
        f"{month} {nth}, {y}", f"{month} the {nth} {y}", f"{mon} {d} {y}", f"{d} {mon} {y}", f"{mon} {d}, {y}",
        f"{d:02}-{month[:3]}-{y}", f"{d:02}{month[:3].upper()}{y}", f"{weekday}, {month} {d}, {y}",
        f"{weekday} {nth} {month} {y}", f"{day} {d} {mon} {y}", f"{day}, {mon} {d:02}, {y}",
        f"{weekday} the {nth} of {month} {y}", f"{y}/{m:02}/{d:02}", f"{y}.{m}.{d}", f"{y}{m:02}{d:02}",
        f"{d} {month.upper()} {y}", f"{month.upper()} {d:02}, {y}", f"{nth} {month.lower()} {y}",
        f"{mon.lower()} {d} {y}", f"the {ordinal_words(d)} of {month} {y}", f"{month} {ordinal_words(d)}, {y}",
        f"{d}/{mon}/{y}", f"{d}-{month.lower()}-{y}", f"{y} {month} {d}", f"{y}-{month[:3]}-{d:02}",
        f"{d}. {month} {y}", f"{mon}. {d}, {y}" if m != 5 else f"{d}. {mon} {y}", f"{month} {y}, the {nth}",
    ]  # fmt: skip
    if d > 12:
        spellings += [f"{d}/{m}/{y}", f"{m}/{d}/{y}", f"{d}.{m}.{y}", f"{d:02}-{m:02}-{y}", f"{m:02}/{d:02}/{y}"]
    return spellings


def part_of_day(hour: int) -> str:
    """Return "in the morning", "in the afternoon", "in the evening" or "at night"."""
    return (
        "at night" if hour >= 22 or hour < 3
        else "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    )  # fmt: skip


def time_spellings(hour: int, minute: int) -> list[str]:
    """Return the ways to write a time of day that leave no doubt about the half of the day."""
    h, half, part = (hour - 1) % 12 + 1, "am" if hour < 12 else "pm", part_of_day(hour)
    dotted, upper, word = f"{half[0]}.m.", half.upper(), in_words(h)
    spellings = [
        f"{h}:{minute:02} {half}", f"{h}:{minute:02}{half}", f"{h}.{minute:02} {half}", f"{h}:{minute:02} {dotted}",
        f"{h}:{minute:02} {upper}", f"{h}:{minute:02}{upper}", f"{h}:{minute:02} {part}", f"{hour}h{minute:02}",
        f"{hour:02}.{minute:02} hrs", f"{hour:02}{minute:02} hours", f"{h}.{minute:02}{half}",
    ]  # fmt: skip
    if minute == 0:
        spellings += [
            f"{h} {half}", f"{h}{half}", f"{h} {upper}", f"{h} o'clock {part}", f"{word} {part}", f"{word} {half}",
            f"{word} o'clock {part}", f"{hour}h", f"{h} {dotted}",
        ]  # fmt: skip
    elif minute >= 10:
        spellings += [f"{word} {in_words(minute)} {half}", f"{word} {in_words(minute)} {part}"]
    else:
        spellings += [f"{word} oh {in_words(minute)} {half}"]
    if minute % 5 == 0 and minute and hour % 12 != 11 and hour % 12:
        past = minute <= 30
        distance, other = (minute, hour) if past else (60 - minute, hour + 1)
        near, joint = (other - 1) % 12 + 1, "past" if past else "to"
        amount = {15: "quarter", 30: "half"}.get(distance, in_words(distance))
        for shown in (str(near), in_words(near)):
            spellings += [f"{amount} {joint} {shown} {part}", f"{amount} {joint} {shown} {half}"]
        spellings += [f"a quarter {joint} {in_words(near)} {part}"] * 2 if distance == 15 else []
        spellings += [f"{distance} minutes {joint} {in_words(near)} {part}"] if distance not in (15, 30) else []
        spellings += [f"{distance} {joint} {near} {half}"] if distance not in (15, 30) else []
    return spellings
