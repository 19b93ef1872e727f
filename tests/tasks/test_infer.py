"""The grader that follows from the answers of a data set."""

import json

import pytest

from sigmix.errors import ConfigError
from sigmix.tasks.base import GARBAGE, Sample, Task
from sigmix.tasks.graders import grader_of
from sigmix.tasks.infer import infer_grader


def rows(distinct, times=4):
    return [answer for answer in distinct for _ in range(times)]


INTENTS = [f"{verb}_{thing}" for verb in ("cancel", "lost", "new", "change") for thing in "abcdefghijklmnopqrst"][:77]


SENTENCES = ["The parcel left our warehouse on Monday and arrives tomorrow.", "Turn it off, wait a minute, turn it on.",
             "We have refunded your payment in full today.", "I am sorry, but that item is out of stock."]  # fmt: skip


@pytest.mark.parametrize(
    ("grader", "answers"),
    [
        ("label", rows(["billing", "technical issue", "account", "other"], 25)),  # support tickets
        ("label", rows(["positive", "negative", "neutral"])),
        ("label", rows(INTENTS, 10)),
        ("label", rows("ABCD", 10)),
        ("label", rows("12345", 10)),  # stars
        ("label", rows(["1 star", "2 stars", "5 stars"], 10)),
        ("label", rows(["0.5", "1.0", "1.5"], 10)),
        ("label", rows("01", 10)),
        ("label", ["yes", "no", "yes"]),
        ("label", ["True", "False"]),
        ("label", rows(["spam", "ham"])),
        ("label", rows(["O", "B-PER", "I-PER"])),
        ("label", rows(["👍", "👎"])),
        ("label", rows(["+", "-", "~"])),
        ("label", rows(["entailment", "contradiction", "neutral"])),
        ("label", rows(["Question about a bill that was paid twice by card"])),  # one label: the data's fault, not this
        ("fields", [json.dumps({"PER": [f"Ann {n}"], "LOC": []}) for n in range(20)]),  # NER
        ("fields", rows(['{"intent": "a"}', '{"intent": "b"}'])),
        ("json", [json.dumps([n, "x"]) for n in range(20)]),
        ("json", ["[1, 2]", '{"a": 1}']),
        ("number", [str(n * 7) for n in range(100)]),
        ("number", rows([str(n) for n in range(19)], 30)),  # sums of two digits
        ("number", ["1,234", "-5", "3.5", "1/2"]),
        ("number", [str(year) for year in range(1900, 1950)]),
        ("final", [f"First {n} + 1 = {n + 1}.\n#### {n + 1}" for n in range(20)]),
        ("final", [f"She pays {n} dollars.\n#### ${n},000" for n in range(20)]),
        ("exact", [f"2024-03-{day:02}" for day in range(1, 29)]),
        ("exact", rows([f"2024-03-{day:02}" for day in range(1, 29)])),
        ("exact", ["3 March 2024", "14 April 1999"]),
        ("exact", rows(["09:30", "17:05"])),
        ("exact", [f"${n}.20" for n in range(40)]),  # prices
        ("exact", [f"555-01{n:02}" for n in range(40)]),  # phone numbers
        ("exact", [f"+49 30 1234{n:02}" for n in range(40)]),
        ("exact", ["02139", "10115", "00501"]),  # postal codes
        ("exact", ["J45.909", "E11.9", "I10", "F32.1"]),  # ICD codes
        ("exact", ["Paris", "Rome", "New York City", "São Paulo"]),
        ("exact", ["Ann", "Bob"]),
        ("exact", ["東京", "大阪", "京都"]),
        ("exact", ["x"]),
        ("text", SENTENCES),
        ("text", rows(SENTENCES, 2)),
        ("text", [f"SELECT name FROM users WHERE id = {n}" for n in range(20)]),
        ("text", ["Je ne sais pas où est la gare.", "Il fait très beau ce matin à Paris."]),  # translations
        ("text", ["今天天气很好,我们去公园散步吧。", "我不知道火车站在哪里,你能告诉我吗?"]),
        ("text", ["def f(x):\n    return x + 1", "for i in range(3):\n    print(i)\n    break"]),
        ("text", ["No", "Only after you have signed the second form", "Yes"]),
        ("label", ["", " ", *rows(["a", "b"])]),
        ("label", [f"<think>I see {n} words</think>\n{label}" for n, label in enumerate(rows(["a", "b"]))]),
    ],
)  # fmt: skip
def test_the_grader_follows_from_the_answers(grader, answers):
    inferred = infer_grader(answers)
    assert (inferred.grader, inferred.near_duplicates) == (grader, ())
    assert inferred.reason
    assert "\n" not in inferred.reason
    assert bool(inferred.labels) == (grader == "label")
    grade = grader_of(inferred.grader, inferred.labels)
    for answer in filter(str.strip, answers):
        assert grade(answer, answer).value == 1
        assert [grade(reply, answer).value for reply in (*GARBAGE, f"<think>{answer}</think>")] == [0] * 7


def test_labels_and_near_duplicates_stay_apart():
    inferred = infer_grader(rows(["Billing", "billing", "sign up", "signup", "other"]))
    assert inferred.labels == ("Billing", "billing", "other", "sign up", "signup")
    assert set(inferred.near_duplicates) == {("Billing", "billing"), ("sign up", "signup")}


@pytest.mark.parametrize(
    ("distinct", "times", "grader"),
    [(200, 3, "label"), (201, 3, "exact"), (200, 2, "exact"), (40, 3, "label")],
)
def test_how_many_labels_make_a_closed_set(distinct, times, grader):
    assert infer_grader(rows([f"intent x{n}" for n in range(distinct)], times)).grader == grader
    assert infer_grader(rows([f"intent x{n} {'y' * 60}" for n in range(distinct)], times)).grader == "text"


def test_an_answer_that_does_not_fit_is_named():
    answers = [str(n * 13) for n in range(100)]
    inferred = infer_grader([*answers, "n/a"])
    assert inferred.grader == "exact"
    assert "n/a" in inferred.reason
    inferred = infer_grader([*(json.dumps({"a": n}) for n in range(100)), '{"a": 1'])
    assert inferred.grader != "fields"
    assert '{"a": 1' in inferred.reason
    inferred = infer_grader([*(["She has 3.\n#### 3"] * 30), "She has some.\n#### none"])
    assert inferred.grader != "final"
    assert "none" in inferred.reason


@pytest.mark.parametrize("answers", [[], ["", " \n"], ["<think>hm</think>"]])
def test_no_answers_is_an_error(answers):
    with pytest.raises(ConfigError, match="--answer"):
        infer_grader(answers)


class Answers(Task):
    """Rows of a user's file with the inferred grader."""

    def __init__(self, answers):
        super().__init__()
        inferred = infer_grader(answers)
        self.grade = grader_of(inferred.grader, inferred.labels)
        self.rows = [Sample.make(f"question number {n}", answer) for n, answer in enumerate(answers)]

    def splits(self):
        return ("train",)

    def samples(self, split, n=None, seed=0):
        return self.rows[:n]

    def score(self, sample, reply):
        return self.grade(reply, sample.gold)

    def wrong_replies(self, sample):
        return [sample.prompt]


@pytest.mark.parametrize(
    "answers",
    [rows(["a", "b"]), ['{"a": 1, "b": {"c": 2}}', '{"a": 2}'], ["[1]", "[2]"], ["2024-01-02"], ["17", "18"],
     ["so\n#### 5"], SENTENCES],
)  # fmt: skip
def test_inferred_graders_pass_the_validation_of_tasks(answers):
    report = Answers(answers).validate()
    assert report.ok, report.problems
