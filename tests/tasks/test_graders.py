"""Text, JSON, choices, yes/no, numbers, LaTeX: each form of a right reply, and each trap."""

import json
import random

import pytest

from sigmix.errors import UnknownNameError
from sigmix.tasks.base import GARBAGE, final_part
from sigmix.tasks.graders import (
    GRADERS,
    SIMILAR,
    exact,
    exact_lines,
    grader_of,
    json_fields,
    json_only,
    math_equal,
    one_of,
    parse_choice,
    relabel,
    score_choice,
    score_final,
    score_yes_no,
    strict_number,
    text_similarity,
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


@pytest.mark.parametrize("reply", ["42", " 42\n", "42.", "42.0", "+42", "84/2", "042"])
def test_strict_accepts(reply):
    assert strict_number(reply, "42").value == 1.0


@pytest.mark.parametrize(
    "reply",
    ["", ".", "41", "-42", "42 43", "43 42", "42 apples", "The answer is 42", "40 + 2 = 42", "42, 43", "4 2", "42..",
         "$42",
     "42%", "**42**", "42 is larger than 895.", "not 42", "42?", "forty-two", "4,2"],
)  # fmt: skip
def test_strict_refuses(reply):
    assert strict_number(reply, "42").value == 0.0


def test_commas_are_thousands_not_decimals():
    assert strict_number("1,234", "1234").value == 1.0
    assert strict_number("234", "1234").value == 0.0
    assert score_final("#### 1,234", "1234").value == 1.0
    assert score_final("So she has $1,234.", "234").value == 0.0


def test_final_number_is_laxer_than_strict():
    """Documented: without a marker the last number counts, whatever the sentence says."""
    assert score_final("29 is larger than 895", "895").value == 1.0
    assert strict_number("29 is larger than 895", "895").value == 0.0


@pytest.mark.parametrize(
    ("reply", "gold", "value"),
    [
        (r"\boxed{\frac12}", r"\frac{1}{2}", 1.0), (r"thus \boxed{0.5}.", r"\frac{1}{2}", 1.0), ("3", "3", 1.0),
        (r"\boxed{2\sqrt{3}}", r"\sqrt{12}", 1.0), (r"\boxed{\text{east}}", r"\text{east}", 1.0), (r"\boxed{(1,2)}",
        "(1,2)", 1.0),
        (r"\boxed{x+1}", "1+x", 1.0), (r"\boxed{2} and again \boxed{2}", "2", 1.0),
        (r"\boxed{2}", r"\frac12", 0.0), (r"\boxed{(2,1)}", "(1,2)", 0.0), (r"\boxed{1} \boxed{2}", "2", 0.0), ("",
        "2", 0.0),
        (r"\boxed{}", "2", 0.0), ("it may be 2 or 3", "3", 0.0), (r"\boxed{9^{9^{9^9}}}", "1", 0.0),
        (r"\boxed{2^{99999}}", "1", 0.0),
        (r"\boxed{10000000000!}", "1", 0.0),
        (r"\boxed{\binom{99999999}{4444444}}", "1", 0.0), (r"\boxed{" + "1+" * 400 + "1}", "401", 0.0),
        (r"\boxed{west}", r"\text{east}", 0.0), (r"\boxed{1, 2}", "2", 0.0),
        (r"\boxed{1 or 2}", "2", 0.0), (r"\boxed{not 2}", "2", 0.0), ("It is not 2", "2", 0.0), ("x = 2", "2", 1.0),
    ],
)  # fmt: skip
def test_math_equal(reply, gold, value):
    assert math_equal(reply, gold).value == value


@pytest.mark.parametrize(("reply", "gold"), [("50%", "0.5"), ("0.5", "50%"), ("1,234", "1.234"), ("1.234", "1234")])
def test_ambiguous_numbers_stay_wrong(reply, gold):
    assert score_final(f"#### {reply}", gold).value == 0.0


@pytest.mark.parametrize(
    ("reply", "rest"),
    [
        ("42", "42"), ("<think>41</think>42", "42"), ("41</think>42", "42"), ("<think>41</think>", ""),
        ("<think>a</think>41<think>b</think>42", "42"), ("<think>it is 42", ""), ("41 <think>or 42", ""),
        ("[THINK]41[/THINK]42", "42"), ("<thinking>41</thinking>42", "42"), ("<Think>41</THINK>42", "42"),
        ('a "</think>" b', 'a "</think>" b'), ("I think 42", "I think 42"),
    ],
)  # fmt: skip
def test_a_draft_is_not_part_of_the_reply(reply, rest):
    assert final_part(reply) == rest


@pytest.mark.parametrize(
    "grade",
    [
        lambda reply: exact(reply, "42"), lambda reply: one_of(reply, "42", ["41", "42"]),
        lambda reply: exact_lines(reply, "42"), lambda reply: json_only(reply, "42"),
        lambda reply: strict_number(reply, "42"), lambda reply: score_final(reply, "42"),
        lambda reply: math_equal(reply, "42"), lambda reply: score_choice(reply, "42", {"41": "x", "42": "y"}),
    ],
)  # fmt: skip
def test_no_grader_reads_a_draft(grade):
    assert grade("<think>\nis it 41?\n</think>\n\n42").value == 1.0
    for reply in ("<think>42</think>41", "<think>42</think>", "<think>42", "42</think>41", "42</think>"):
        assert grade(reply).value == 0.0


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("#### B", "B"), (r"\boxed{B}", "B"), (r"$\boxed{\text{B}}$", "B"), ("**Answer:** (B)", "B"),
        ("Final answer: B", "B"), ("### Answer: B", "B"), (r"The final answer is \boxed{B}.", "B"),
        ("A\nB", None), (r"\boxed{A}\boxed{B}", None), ("Answer: A\nAnswer: B", None), ("#### A or B", None),
    ],
)  # fmt: skip
def test_choices_in_boxes_and_after_headings(reply, label):
    assert parse_choice(reply, list(TEXTS), TEXTS) == label


def test_yes_in_a_box_and_after_a_heading():
    for reply in ("#### yes", r"\boxed{\text{yes}}", "**Final answer:** Yes."):
        assert score_yes_no(reply, "yes").value == 1.0
    assert score_yes_no(r"\boxed{yes} \boxed{no}", "yes").value == 0.0


@pytest.mark.parametrize(
    ("reply", "gold", "value"),
    [
        (r"\boxed{1\,234}", "1234", 1.0), (r"\boxed{1{,}234}", "1234", 1.0), (r"\boxed{\$1,234}", "1234", 1.0),
        (r"\boxed{12~\mathrm{km/h}}", "12", 1.0), (r"\boxed{€12}", "12", 1.0), (r"\boxed{\boxed{4}}", "4", 1.0),
        (r"\boxed{\text{not possible}}", r"\text{not possible}", 1.0), (r"\boxed{234}", "1{,}234", 0.0),
        (r"\boxed{1}", "1{,}234", 0.0), (r"\boxed{1{,}5}", "1.5", 0.0), (r"\boxed{9^{999\cdot999\cdot999}}", "1", 0.0),
        (r"\boxed4", "4", 1.0), (r"\boxed{\boxed{4} \boxed{5}}", "4", 0.0),
    ],
)  # fmt: skip
def test_math_units_thousands_and_nested_boxes(reply, gold, value):
    assert math_equal(reply, gold).value == value


def test_a_gold_answer_that_is_no_json_is_an_answer_that_nothing_equals():
    assert json_only("{}", "{").value == 0.0


@pytest.mark.parametrize("reply", ["<answer>B</answer>", '"B"', "The best answer is B.", "B - Paris, France"])
def test_choices_in_tags_and_quotes(reply):
    assert parse_choice(reply, list(TEXTS), TEXTS) == "B"


def test_an_expression_that_takes_too_long_is_not_equal():
    assert math_equal(r"\boxed{(x+y+z+w)^{200}}", r"\sqrt{5}").value == 0.0


NESTED = '{"a": {"b": 1, "c": [1, 2]}, "d": "x"}'


@pytest.mark.parametrize(
    ("reply", "value", "wrong"),
    [
        ('{"d": "x", "a": {"c": [1, 2], "b": 1}}', 1, ""),
        ('{"a": {"b": 1, "c": [2, 1]}, "d": "x"}', 2 / 3, "a.c"),
        ('{"a": {"b": 1.0, "c": [1, 2]}, "d": "x"}', 2 / 3, "a.b"),
        ('{"a": {"b": true, "c": [1, 2]}, "d": "x"}', 2 / 3, "a.b"),
        ('{"a": {"b": 1, "c": [1, 2]}}', 2 / 3, "d"),
        ('{"a": {"b": 1, "c": [1, 2]}, "d": "x", "e": null}', 3 / 4, "e"),
        ('{"a": {}, "d": "x"}', 1 / 4, "a.b, a.c, a"),
        ('{"a.b": 1, "d": "x"}', 1 / 4, "a.b, a.c"),
        ("{}", 0, "d"),
    ],
)
def test_fields_are_compared_by_path(reply, value, wrong):
    score = json_fields(reply, NESTED)
    assert score.value == value
    assert json.loads(score.answer) == json.loads(reply)
    assert wrong in score.explanation


@pytest.mark.parametrize(
    "reply",
    ["", "x", "[1]", "1", "null", f"```json\n{NESTED}\n```", NESTED + NESTED, NESTED[:-1], '{"d": "x", "d": "x"}',
     '{"d": NaN}', '{"a": ' * 100_000, '{"a":' * 500 + "1" + "}" * 500, "[" * 120 + "]" * 120,
     f"<think>{NESTED}</think>", f"<think>{NESTED}"],
)  # fmt: skip
def test_a_reply_that_is_no_json_object_has_no_answer(reply):
    score = json_fields(reply, NESTED)
    assert (score.value, score.answer) == (0.0, None)
    assert json_fields(NESTED, reply).value == 0.0


def test_fields_agree_with_json_on_equality():
    chance = random.Random(0)

    def value(depth):
        kind = chance.randrange(6 if depth else 4)
        if kind < 4:
            return chance.choice([0, 1, 1.0, True, False, None, "", "1", "é"])
        children = [value(depth - 1) for _ in range(chance.randrange(3))]
        return children if kind == 4 else dict(zip("ab", children))

    objects = [json.dumps({key: value(2) for key in chance.sample("abc", chance.randrange(3))}) for _ in range(40)]
    for one in objects:
        for other in objects:
            assert (json_fields(one, other).value == 1) == (json_only(one, other).value == 1)


def test_answers_of_json_graders_are_utf8():
    for grade in (json_only, json_fields):
        grade(r'{"\ud800": "\udfff"}', "{}").answer.encode()
        grade('{"\ud800": 1}', "{}").answer.encode()
        assert grade('{"é": "\U0001f600"}', '{"é": "\\ud83d\\ude00"}').value == 1


GOLD_TEXT = "Please restart the router and wait two minutes before you call us again."


def test_similarity_of_free_text():
    assert text_similarity(f"<think>no</think> {GOLD_TEXT.upper()}\n", GOLD_TEXT).value == 1
    assert text_similarity(GOLD_TEXT.replace("  ", " ").rstrip("."), GOLD_TEXT).value == 1
    near = text_similarity(GOLD_TEXT.replace("two", "three"), GOLD_TEXT)
    far = text_similarity("Please restart the router and wait.", GOLD_TEXT)
    assert SIMILAR <= far.value < near.value < 1
    replies = (*GARBAGE, f"<think>{GOLD_TEXT}</think>\nI don't know.", f"<think>{GOLD_TEXT}", "Where is my order?")
    assert {text_similarity(reply, GOLD_TEXT).value for reply in replies} == {0.0}


def test_texts_too_long_to_compare_are_not_graded():
    score = text_similarity("ab" * 500_000, "ba" * 500_000)
    assert score.value is None
    assert "1,000,000" in score.explanation
    assert text_similarity("ab" * 500_000, GOLD_TEXT).value == 0
    assert text_similarity("ab" * 500_000, "ab" * 500_000).value == 1


@pytest.mark.parametrize("name", sorted({*GRADERS, "label"} - {"math"}))
@pytest.mark.parametrize(
    "reply",
    ["\ud800", "a\udfffb", "\u0301\u0323" * 200_000, "a" * 1_000_000, "\x00" * 1000, "{" * 1_000_000, "\u202e" * 9,
     '{"a":' * 1000, "<think>" * 10_000, " " * 1_000_000, "9" * 100_000, "-" * 100_000],
)  # fmt: skip
def test_hostile_replies_score_zero(name, reply):
    gold = {"fields": '{"a": 1}', "json": "[1]", "number": "7", "final": "so\n#### 7"}.get(name, "seven of them")
    grade = grader_of(name, ["seven of them", "eight"])
    assert grade(reply, gold).value == 0
    assert grade(gold, gold).value == 1


def test_unknown_graders_are_named():
    with pytest.raises(UnknownNameError, match="fields"):
        grader_of("field")


def test_single_marks_are_labels():
    assert [one_of(reply, "!", ["!", "?"]).value for reply in ("!", "?", "", ".")] == [1, 0, 0, 0]
