"""Choices, yes/no, words, lines, JSON: each form of a right reply, and each trap."""

import pytest

from sigmix.tasks.graders import (
    exact,
    exact_lines,
    json_only,
    one_of,
    parse_choice,
    relabel,
    score_choice,
    score_yes_no,
    wrong_choices,
)

TEXTS = {"A": "Rome", "B": "Paris, France", "C": "A bee", "D": "Bonn"}


@pytest.mark.parametrize(
    "reply",
    ["B", "b", " B\n", "B.", "B)", "(B)", "[B]", "(b).", "**B**", "**B.**", "Answer: B", "answer B", "The answer is B.",
     "The correct answer is (B).", "Option B", "B. Paris, France", "B) paris, france.", "(B) Paris, France",
     "B: Paris, France",
     "Answer: **B. Paris, France**"],
)  # fmt: skip
def test_choice_accepted(reply):
    assert parse_choice(reply, list(TEXTS), TEXTS) == "B"
    assert score_choice(reply, "B", TEXTS).value == 1.0


@pytest.mark.parametrize(
    "reply",
    ["", "A or B", "ABCD", "A B C D", "A, B", "BB", "Bonn", "B Bonn", "B. Rome", "Not B", "B or not", "Both A and B",
     "The answer is B, or A.", "B because Paris is in France", "A bee", "Paris, France", "BParis, France", "2", "E",
     "I think B", "(A) (B)", "B?", "The answer is not B"],
)  # fmt: skip
def test_choice_refused(reply):
    score = score_choice(reply, "B", TEXTS)
    assert score.value == 0.0
    assert score.answer is None


def test_choice_other_label_is_an_answer_but_wrong():
    score = score_choice("A", "B", TEXTS)
    assert (score.value, score.answer) == (0.0, "A")


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_wrong_choices_are_refused_for_any_number_of_labels(count):
    texts = {label: f"text {label}" for label in "ABCDE"[:count]}
    for gold in texts:
        assert all(score_choice(reply, gold, texts).value == 0.0 for reply in wrong_choices(gold, list(texts)))


def test_digit_labels_become_the_letters_shown():
    assert relabel(["1", "2", "3", "4", "5"])["4"] == "D"
    assert relabel(["A", "B", "C"]) == {"A": "A", "B": "B", "C": "C"}
    for labels in (["A"], list("ABCDEFGHI"), ["A", "A"]):
        with pytest.raises(ValueError):
            relabel(labels)


@pytest.mark.parametrize(
    ("reply", "value"),
    [("yes", 1.0), ("Yes.", 1.0), ("**YES**", 1.0), ("Answer: yes", 1.0), ("The answer is yes.", 1.0), ("no", 0.0),
     ("yes or no", 0.0), ("yes no", 0.0), ("yes, no", 0.0), ("not yes", 0.0), ("yesyes", 0.0), ("true", 0.0), ("", 0.0),
     ("yes, because it is", 0.0), ("y", 0.0)],
)  # fmt: skip
def test_yes_no(reply, value):
    assert score_yes_no(reply, "yes").value == value


@pytest.mark.parametrize(
    ("reply", "value"),
    [("cat", 1.0), ("Cat.", 1.0), (" CAT! ", 1.0), ("cat..", 0.0), ("the cat", 0.0), ("cat dog", 0.0), ("cats", 0.0),
         ("", 0.0),
     (".", 0.0), ("not cat", 0.0), ("cat or dog", 0.0), ('"cat"', 0.0)],
)  # fmt: skip
def test_exact(reply, value):
    assert exact(reply, "cat").value == value


def test_exact_with_alternatives_case_and_accents():
    assert exact("little", "small", accept=["little"]).value == 1.0
    assert exact("cat", "CAT", casefold=False).value == 0.0
    assert exact("cafe\u0301", "caf\u00e9").value == 1.0


def test_one_of_has_no_answer_outside_the_set():
    assert one_of("Even.", "even", ("odd", "even")).value == 1.0
    assert one_of("odd", "even", ("odd", "even")).answer == "odd"
    assert one_of("odd or even", "even", ("odd", "even")).answer is None


def test_exact_lines():
    assert exact_lines("- a\n- b \n", "- a\n- b").value == 1.0
    for reply in ("- b\n- a", "- a", "- a\n\n- b", "- a\n- b\n- c", "* a\n* b", "- A\n- b", ""):
        assert exact_lines(reply, "- a\n- b").value == 0.0


GOLD = '{"name": "Anna", "age": 31}'


@pytest.mark.parametrize(
    ("reply", "value"),
    [(GOLD, 1.0), ('{"age":31,"name":"Anna"}\n', 1.0), ('{\n "name": "Anna",\n "age": 31}', 1.0),
     (f"```json\n{GOLD}\n```", 0.0), (f"Sure: {GOLD}", 0.0), (f"{GOLD} ok", 0.0), (GOLD.replace("31", '"31"'), 0.0),
     (GOLD.replace("31", "31.0"), 0.0), (GOLD.replace("31", "NaN"), 0.0), (GOLD.replace('"', "'"), 0.0), (GOLD[:-1],
     0.0),
     ('{"name": "Bob", "name": "Anna", "age": 31}', 0.0), (f"[{GOLD}]", 0.0), (GOLD[:-1] + ', "x": 1}', 0.0), ("", 0.0),
     ("[" * 100_000, 0.0)],
)  # fmt: skip
def test_json(reply, value):
    assert json_only(reply, GOLD).value == value


def test_json_true_is_not_one():
    assert json_only('{"a": true}', '{"a": 1}').value == 0.0
