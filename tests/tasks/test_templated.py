"""Tasks worded by templates: facts and wordings of one split occur in no other, and every request reads as written."""

import hashlib
import json
import re
import string
import subprocess
import sys
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

import sigmix.tasks.skills
from sigmix.errors import DataError
from sigmix.tasks import SPLITS, get_task
from sigmix.tasks.skills.calendar import duration_spellings
from sigmix.tasks.skills.quantities import value_or_equation
from sigmix.tasks.skills.spelling import date_spellings, in_words, ordinal, ordinal_words, time_spellings
from sigmix.tasks.skills.templated import load_templates

FOLDER = Path(sigmix.tasks.skills.__file__).with_name("templates")
CONSTANT = {"yes-no": 0.6, "durations": 0.12}
FORM = {
    "sums": r"\d+(\.\d\d)?( \+ \d+(\.\d\d)?){1,2} = \d+(\.\d\d)?",
    "compare-numbers": r"-?\d+(\.\d+)?", "compare-people": r"[A-Z][a-zëéö]+",
    "dates": r"\d{4}-\d\d-\d\d", "times": r"\d\d:\d\d",
    "durations": r"(\d+ / 60|\d+ \* 60 \+ \d+) = \d+", "number-words": r"-?\d+(\.\d+)?",
    "units": r"\d+(\.\d{1,2})? [*/] \d+ = \d+(\.\d{1,3})?", "yes-no": "yes|no",
    "payments": r'\{"name": "[^"]+", "amount": \d+(\.\d\d)?, "date": "\d{4}-\d\d-\d\d"\}',
}  # fmt: skip


def test_every_file_is_a_task():
    texts = {"topics", "commands"}  # see test_assistant
    assert {path.stem for path in FOLDER.glob("*.json")} == set(FORM) | texts


@pytest.mark.parametrize("name", FORM)
def test_templates_are_many_and_their_splits_disjoint(name):
    templates = load_templates(FOLDER / f"{name}.json")
    wordings = []
    for split, least in zip(SPLITS, (30, 10, 15), strict=True):
        texts = [text for kind in templates[split].values() for text in kind]
        assert len(texts) >= least
        # the same words with other marks or capitals are the same wording
        wordings += [" ".join(re.findall(r"[\w{}]+|[+=>/|-]", text.casefold())) for text in texts]
    assert len(set(wordings)) == len(wordings)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FORM)
def test_contract(name, split):
    task = get_task(name)
    report = task.validate(split, 40)
    assert report.ok, report.problems[:3]
    assert report.counts["wrong_refused"] == report.counts["wrong_replies"] >= 10 * report.counts["samples"]
    samples = task.samples(split, 200)
    assert len(samples) == 200
    for sample in samples:
        assert re.fullmatch(FORM[name], sample.gold)
        assert sample.prompt == sample.prompt.strip()
        assert "  " not in sample.prompt
        assert not re.search(r"[{}]", re.sub(r'\{"name": ..., "amount": ..., "date": ...\}', "", sample.prompt))
        assert len(sample.prompt.split()) <= 40
    most_common = Counter(sample.gold for sample in samples).most_common(1)[0][1]
    assert most_common <= CONSTANT.get(name, 0.06) * len(samples)
    assert task.description.endswith(".")


@pytest.mark.parametrize("name", FORM)
def test_facts_of_a_test_item_occur_in_no_training_item(name):
    task = get_task(name)
    facts = {split: {_facts(name, sample) for sample in task.samples(split, 400)} for split in SPLITS}
    assert not facts["train"] & facts["test"]
    assert not facts["train"] & facts["validation"]
    assert not facts["validation"] & facts["test"]


def _facts(name, sample):
    """Return what must not recur: the answer where it is the whole content, else answer and all figures and names."""
    if name in ("dates", "payments", "number-words") or (name == "times" and sample.gold not in ("00:00", "12:00")):
        return sample.gold
    return sample.gold, tuple(sorted(re.findall(r"\d[\d.,:h]*|[A-Z][a-z]+", sample.prompt))), sample.prompt


def test_samples_are_the_same_in_another_process():
    code = (
        "import hashlib; from sigmix.tasks import get_task; print(hashlib.sha256('|'.join(s.id + s.gold "
        f"for name in {sorted(FORM)} for s in get_task(name).samples('test', 20, seed=3)).encode()).hexdigest())"
    )
    here = "|".join(s.id + s.gold for name in sorted(FORM) for s in get_task(name).samples("test", 20, seed=3))
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(here.encode()).hexdigest()


def test_some_requests_are_roughened_but_never_their_facts():
    samples = get_task("payments").samples("train", 400)
    lower = sum(sample.prompt[0].islower() for sample in samples)
    assert 40 < lower < 250
    assert all(json.loads(sample.gold)["name"] in sample.prompt for sample in samples)


@pytest.mark.parametrize("split", ["train", "test"])
def test_no_shortcut_compares_numbers(split):
    samples = get_task("compare-numbers").samples(split, 500)
    rules = {
        "first": lambda shown: shown[0],
        "last": lambda shown: shown[-1],
        "longest": lambda shown: max(shown, key=len),
        "largest first digit": lambda shown: max(shown, key=lambda text: text.strip("-")[0]),
        "largest": lambda shown: max(shown, key=Decimal),
        "largest text": max,
    }
    hits = dict.fromkeys(rules, 0)
    for sample in samples:
        numbers = {text for text in [sample.gold, *sample.meta["wrong"]] if re.fullmatch(r"-?\d+(\.\d+)?", text)}
        shown = sorted(numbers, key=sample.prompt.find)
        for rule, pick in rules.items():
            hits[rule] += pick(shown) == sample.gold
    assert max(hits.values()) < 0.6 * len(samples), hits


def test_each_template_of_yes_no_has_both_answers():
    samples = get_task("yes-no").samples("train", 4000)
    for text in sum(load_templates(FOLDER / "yes-no.json")["train"].values(), ()):
        parts = [re.escape(part.rstrip(".!?").casefold()) for part, *_ in string.Formatter().parse(text)]
        pattern = re.compile(".+".join(parts))
        golds = [sample.gold for sample in samples if pattern.match(sample.prompt.casefold())]
        assert 0.25 < golds.count("yes") / len(golds) < 0.75, text


def test_sums_compute_what_the_request_says():
    for sample in get_task("sums").samples("test", 300):
        numbers = [Decimal(text.replace(",", "")) for text in re.findall(r"\d[\d,]*(?:\.\d+)?(?!\d)", sample.prompt)]
        if len(numbers) < 2:
            continue  # in words
        with_distractor = {sum(numbers) - number for number in numbers if len(numbers) > 2}
        assert Decimal(sample.gold.rpartition("= ")[2]) in {sum(numbers), *with_distractor}, sample.prompt


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("115", True), ("26 + 89 = 115", True), ("26+89=115.", True), ("26 + 89 + 0 = 115", True), ("1,115", False),
        ("26 + 90 = 115", False), ("26 + 89 = 116", False), ("115 = 115", False), ("26 + 89", False), ("= 115", False),
        ("a + b = 115", False), ("26 + 89 = 115 = 115", False), ("The answer is 115", False), ("", False),
    ],
)  # fmt: skip
def test_a_sum_is_the_total_alone_or_behind_a_right_equation(reply, right):
    for gold in ("115", "26 + 89 = 115"):
        assert value_or_equation(reply, gold).value == right


def test_a_product_or_quotient_gives_the_value():
    assert value_or_equation("1.5 * 1000 = 1500", "1500").value == 1
    assert value_or_equation("2 * 60 + 20 = 140", "140").value == 1
    assert value_or_equation("20 + 2 * 60 = 140", "140").value == 1
    assert value_or_equation("240 / 100 = 2.4", "240 / 100 = 2.4").value == 1
    for reply in ("240 / 10 = 2.4", "240 / 100 = 24", "240 / 0 = 2.4", "240 - 100 = 140", "(2 * 60) = 120"):
        assert value_or_equation(reply, reply.rpartition("= ")[2]).value == 0


def test_numbers_in_words():
    assert in_words(205) == "two hundred and five"
    assert in_words(205, " ") == "two hundred five"
    assert in_words(12_000) == "twelve thousand"
    assert in_words(40_007) == "forty thousand and seven"
    assert in_words(345_678, " ") == "three hundred forty-five thousand six hundred seventy-eight"
    assert in_words(2_000_300) == "two million three hundred"
    assert [
        ordinal(n) for n in (1, 2, 3, 11, 12, 13, 21, 22, 30)
    ] == "1st 2nd 3rd 11th 12th 13th 21st 22nd 30th".split()
    assert [ordinal_words(n) for n in (1, 12, 20, 31)] == "first twelfth twentieth thirty-first".split()


def test_dates_with_slashes_leave_no_doubt():
    for day in (5, 13):
        spellings = date_spellings(date(2021, 3, day))
        assert len(set(spellings)) >= 30
        assert any(re.fullmatch(r"\d+/\d+/\d{4}", text) for text in spellings) == (day > 12)


def test_spellings_of_times():
    assert {"quarter past six in the evening", "6:15 pm", "18h15", "1815 hours"} <= set(time_spellings(18, 15))
    assert {"ten to nine at night", "8:50 pm"} - set(time_spellings(20, 50)) == {"ten to nine at night"}
    assert "12:05 am" in time_spellings(0, 5)
    assert not any("half to" in text or "quarter past twelve" in text for text in time_spellings(12, 30))
    assert {"an hour and a half", "1h30", "1.5 hours"} <= set(duration_spellings(90))
    assert "three quarters of an hour" in duration_spellings(45)


def test_a_users_templates_stand_beside_the_task(tmp_path):
    code = """
from sigmix.tasks.graders import strict_number
from sigmix.tasks.skills.templated import Facts, templated

@templated("doubles", domain="arithmetic", grader=strict_number, description="Double a number.")
def doubles(rng, kind):
    a = rng.randrange(1, 10_000)
    return Facts({"a": a}, str(2 * a), wrong=[str(a)], key=str(a))
"""
    tmp_path.joinpath("my.py").write_text(code)
    spec = f"{tmp_path / 'my.py'}:doubles"
    with pytest.raises(DataError, match=r"doubles\.json"):
        get_task(spec).samples("train", 1)
    tmp_path.joinpath("templates").mkdir()
    file = tmp_path / "templates" / "doubles.json"
    texts = {"train": ["twice {a}?", "double {a}"], "validation": ["two times {a}"], "test": ["What is {a} doubled?"]}
    for split, text, named in (
        ("test", "{a", "doubles"),
        ("train", "{b}", "field b"),
        ("validation", "", "validation"),
    ):
        file.write_text(json.dumps({**texts, split: [text] * bool(text)}))
        load_templates.cache_clear()
        with pytest.raises(DataError, match=named):
            get_task(spec).samples("train", 20)
    file.write_text(json.dumps(texts))
    load_templates.cache_clear()
    task = get_task(spec)
    assert task.validate("test").ok
    assert all("hat is" in sample.prompt for sample in task.samples("test"))
