"""Hand-written requests: readable, distinct, and with answers in one form a skill."""

from __future__ import annotations

import json
import re
from collections import Counter
from datetime import date
from pathlib import Path

import pytest

from sigmix.tasks.dataset import DataTask

FOLDER = Path(__file__).parents[2] / "reproduction" / "handwritten"
DOMAINS = (
    "banking", "credit cards", "kitchen and dining", "home", "auto and commute", "travel", "utility", "work",
    "small talk", "meta",
)  # fmt: skip
SLOTS = {  # of each intent of SNIPS
    "AddToPlaylist": "artist entity_name music_item playlist playlist_owner",
    "BookRestaurant": "city country cuisine facility party_size_description party_size_number poi restaurant_name "
    "restaurant_type served_dish sort spatial_relation state timeRange",
    "GetWeather": "city condition_description condition_temperature country current_location geographic_poi "
    "spatial_relation state timeRange",
    "PlayMusic": "album artist genre music_item playlist service sort track year",
    "RateBook": "best_rating object_name object_part_of_series_type object_select object_type rating_unit rating_value",
    "SearchCreativeWork": "object_name object_type",
    "SearchScreeningEvent": "location_name movie_name movie_type object_location_type object_type spatial_relation "
    "timeRange",
}
FORMS = {
    "sums": r"\d+(\.\d+)?", "comparison": r"-?\d+(,\d{3})*(\.\d+)?", "dates": r"\d{4}-\d\d-\d\d", "times": r"\d\d:\d\d",
    "durations": r"\d+(\.5)?", "numbers-in-words": r"-?\d+(\.\d\d)?", "units": r"-?\d+(\.\d+)?",
    "extraction": r"\{.+\}", "passages": "yes|no", "topics": "|".join(DOMAINS),
    "commands": r"\{.+\}", "foreign": "base",
}  # fmt: skip
GRADERS = {
    "dates": "exact", "times": "exact", "extraction": "fields", "commands": "fields", "passages": "label",
    "topics": "label", "foreign": "label",
}  # fmt: skip


def rows(name: str) -> list[tuple[str, str]]:
    return [(row.prompt, row.answer) for _, row in DataTask(str(FOLDER / f"{name}.jsonl")).conversations()]


def objects(name: str) -> list[tuple[str, dict[str, object]]]:
    return [(prompt, json.loads(answer)) for prompt, answer in rows(name)]


def test_every_file_has_a_form() -> None:
    assert {path.stem for path in FOLDER.glob("*.jsonl")} == set(FORMS)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_complete_and_answers_have_the_form(name: str) -> None:
    answers = [answer for _, answer in rows(name)]
    assert len(answers) == (120 if name == "foreign" else 40)
    assert [answer for answer in answers if not re.fullmatch(FORMS[name], answer)] == []
    assert DataTask(str(FOLDER / f"{name}.jsonl")).inferred.grader == GRADERS.get(name, "number")


def test_no_prompt_is_repeated() -> None:
    prompts = Counter(" ".join(prompt.casefold().split()) for name in FORMS for prompt, _ in rows(name))
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


def test_dates_and_times_are_valid() -> None:
    assert all(date.fromisoformat(answer) for _, answer in rows("dates"))
    assert all(answer < "24:00" and answer[3:] < "60" for _, answer in rows("times"))


def test_comparisons_are_answered_by_one_of_their_numbers() -> None:
    for prompt, answer in rows("comparison"):
        assert answer in re.findall(r"-?\d[\d,]*(?:\.\d+)?(?<!,)", prompt), prompt


def test_extractions_have_a_name_of_the_text_a_number_and_a_date() -> None:
    for prompt, fields in objects("extraction"):
        assert list(fields) == ["name", "amount", "date"], prompt
        assert str(fields["name"]) in prompt
        assert isinstance(fields["amount"], (int, float))
        assert date.fromisoformat(str(fields["date"]))


def test_labels_are_balanced() -> None:
    assert Counter(answer for _, answer in rows("passages")) == {"yes": 20, "no": 20}
    assert Counter(answer for _, answer in rows("topics")) == dict.fromkeys(DOMAINS, 4)


def test_commands_have_slots_of_snips_with_values_of_the_text() -> None:
    commands = objects("commands")
    assert {fields["intent"] for _, fields in commands} == set(SLOTS)
    for prompt, fields in commands:
        intent = str(fields.pop("intent"))
        assert set(fields) <= set(SLOTS[intent].split()), prompt
        assert all(str(value) in prompt for value in fields.values()), prompt
