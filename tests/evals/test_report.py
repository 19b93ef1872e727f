"""Report of an expert: what it concludes, and its tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sigmix.evals import report
from sigmix.evals.accuracy import Item, Result
from sigmix.evals.report import BASE, TFIDF
from sigmix.tasks.registry import get_task

TASK = get_task("addition")


def result(scores, golds=None, answers=None) -> Result:
    golds = golds or ["a"] * len(scores)
    answers = answers or golds
    return Result("t", [
        Item(str(number), f"prompt {number}", gold, answer or "?", answer, score, "")
        for number, (score, gold, answer) in enumerate(zip(scores, golds, answers, strict=True))
    ])  # fmt: skip


def figures(constant=0.1, labels=(), **results):
    named = {{"tfidf": TFIDF}.get(name, name): one for name, one in results.items()}
    return report.summarize(TASK, named, {"reply": "a", "accuracy": constant}, labels)


GOOD, BAD, NEARLY = [1.0] * 95 + [0.0] * 5, [0.0] * 100, [1.0] * 94 + [0.0] * 6


@pytest.mark.parametrize(
    ("others", "constant", "beginning"),
    [
        ({"base": result(BAD), "tfidf": result(GOOD)}, 0.1, f"Do not use this expert: {TFIDF}"),
        ({"base": result(BAD), "tfidf": result(NEARLY)}, 0.1, f"The expert is not clearly better than {TFIDF}"),
        ({"base": result(BAD)}, 0.96, f"Do not use this expert: {report.CONSTANT}"),
        ({"base": result(GOOD)}, 0.1, f"Do not use this expert: {BASE}"),
        ({"base": result(BAD), "tfidf": result(BAD)}, 0.1, "The expert has accuracy 95.0%"),
    ],
)
def test_the_first_sentence_names_a_cheaper_way_that_is_as_good(others, constant, beginning):
    found = figures(constant, expert=result(GOOD), **others)
    assert found["verdict"].startswith(beginning)
    assert report.markdown(found).split("\n")[2] == found["verdict"]


def test_partial_scores_are_compared_as_scores():
    found = figures(0.05, expert=result([0.8] * 60), base=result([0.1] * 60))
    assert found["verdict"].startswith("The expert has mean score 80.0%")
    assert found["others"][BASE]["expert_less"]["difference"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("mixture", "expert", "beginning"),
    [
        (BAD, BAD, "Neither"),
        (GOOD, BAD, "Use the mixture: it is better than the trained expert by 95.0 points"),
        ([1.0] * 30 + [0.0] * 70, GOOD, "Use the trained expert: it is better than the mixture by 65.0 points"),
        (GOOD, NEARLY, "Use the mixture: it is better than the base by 95.0 points on 100 held-out rows, and the two"),
        ([1.0] * 3 + [0.0] * 97, [1.0] * 9 + [0.0] * 91, "Use the trained expert: it is better than the"),
    ],
)
def test_a_mixture_and_a_trained_expert_are_told_apart(mixture, expert, beginning):
    sentence = report.adaptation_verdict(result(mixture), result(expert), result(BAD))
    assert sentence.startswith(beginning)


def test_few_rows_are_said():
    assert "hold out more" in figures(expert=result([1.0] * 10), base=result([0.0] * 10))["verdict"]


def test_confusion_counts_answers_by_label():
    golds = ["Yes", "Yes", "no", "no"]
    one = result([1.0, 0.0, 1.0, 0.0], golds, ["yes", "no", "no", None])
    found = report.confusion(one, ["Yes", "no"])
    assert (found["columns"], found["counts"]) == (["Yes", "no", report.NO_LABEL], [[1, 1, 0], [0, 1, 1]])
    labels = figures(labels=["Yes", "no"], expert=one, base=one)["labels"]
    assert {name: (row["n"], row["accuracy"]) for name, row in labels.items()} == {"Yes": (2, 0.5), "no": (2, 0.5)}


def test_calibration_is_the_gap_between_confidence_and_accuracy():
    sure = report.calibration(np.array([0.95] * 10), [True] * 5 + [False] * 5)
    assert sure["error"] == pytest.approx(0.45)
    assert report.calibration(np.array([1.0, 1.0]), [True, True])["error"] == 0


def test_mistakes_are_read_as_they_were_written(tmp_path):
    items = [
        Item("0", "one", "a", "a", "a", 1.0, ""), Item("1", 'x\r\n"y", z', "a", "b;\t<b>\n", "b", 0.5, "half"),
        Item("2", "two", "a", "", None, None, "the grader failed"), Item("3", "three", "", "x" * 200_000, "x", 0.0, ""),
    ]  # fmt: skip
    results = {report.EXPERT: Result("t", items), BASE: Result("t", items)}
    report.write_report(tmp_path, report.summarize(TASK, results, {}), results, [])
    rows = report.read_mistakes(tmp_path)
    expected = [(one.prompt, one.gold, one.reply, one.score, one.explanation) for one in items[1:]]
    assert [tuple(row.values()) for row in rows] == expected


def test_fields_of_json_answers():
    gold = json.dumps({"intent": "play", "artist": "x"})
    one = result([1.0, 0.5, 0.0], [gold] * 3, [gold, json.dumps({"intent": "play", "artist": "y"}), "no JSON"])
    assert report.fields_accuracy(one.items) == {
        "intent": {"n": 3, "accuracy": pytest.approx(2 / 3)}, "artist": {"n": 3, "accuracy": pytest.approx(1 / 3)}
    }  # fmt: skip
    assert report.fields_accuracy(result([1.0]).items) == {}
