"""Text, JSON, choices, yes/no, numbers, LaTeX: each form of a right reply, and each trap."""

from fractions import Fraction

import pytest

from sigmix.tasks.graders import (
    boxed,
    exact,
    exact_lines,
    final_number,
    json_only,
    math_equal,
    one_of,
    parse_choice,
    parse_number,
    relabel,
    score_choice,
    score_final,
    score_yes_no,
    strict_number,
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42), ("-5", -5), ("\u22125", -5), ("+7", 7), ("1,234", 1234), ("1,234,567.5", Fraction(2469135, 2)),
        ("3/4", Fraction(3, 4)), ("-1/2", Fraction(-1, 2)), (".5", Fraction(1, 2)), ("2.50", Fraction(5, 2)), ("1e3",
        1000),
        ("007", 7), (" 12 ", 12), ("12,34", None), ("1,2345", None), ("1,23", None), ("1 000", None), ("--5", None),
        ("5 3", None), ("1/0", None), ("0x10", None), ("", None), ("twelve", None), ("$18", None), ("12 kg", None),
        ("40%", None), ("1.2.3", None), ("9" * 500, None), ("\u0663", None), ("5-3", None), ("nan", None), ("inf",
        None),
    ],
)  # fmt: skip
def test_parse_number(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$18", 18), ("-$5", -5), ("$-5", -5), ("€1,200.50", Fraction(2401, 2)), ("12 kg", 12), ("40%", 40), ("40 %",
        40),
        ("3 square feet", 3), ("20 °C", 20), ("12 or 13", None), ("about 12", None), ("12 kg of the very best", None),
    ],
)  # fmt: skip
def test_parse_number_with_unit(text, value):
    assert parse_number(text, unit=True) == value


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


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("3 + 4 = 7\n#### 7", 7), ("#### $18", 18), ("#### 18 dollars.", 18), ("#### -3", -3), ("#### 40%", 40),
        (r"so \boxed{42}", 42), (r"\boxed{\frac{1}{2}}", Fraction(1, 2)), (r"\boxed{-5}", -5),
        (r"\boxed{18\text{ kg}}", 18),
        ("The answer is 42.", 42), ("The answer is 18 because 3*6 = 18", 18), ("Answer: 12 apples", 12),
        ("So the answer is 5 + 3 = 8.", 8), ("The answer is **42**", 42), ("The answer is $1,234.50.", Fraction(2469,
        2)),
        ("First the answer is 5. No, the answer is 6.", 6), ("5 plus 3 makes 8", 8), ("She has 12/4 = 3.", 3), ("5-3",
        3),
        ("it fell to -3", -3), ("72.", 72), ("#### 7\n\nThe answer is 8", 7),
        # refused
        ("", None), ("no number", None), ("#### 41\n#### 42", None), ("#### 42 #### 43", None), ("#### none, 42", None),
        (r"\boxed{41} or \boxed{42}", None), (r"\boxed{}", None), ("The answer is 41 or 42", None), ("42 or 43", None),
        ("The answer is not 42", None), ("It is not 42.", None), ("41 or maybe 42", None), ("1,2,3", None), ("v1.2.3",
        None),
        ("3/4/2021", None), ("a1 b2", None),
    ],
)  # fmt: skip
def test_final_number(reply, value):
    assert final_number(reply) == value


def test_final_number_is_laxer_than_strict():
    """Documented: without a marker the last number counts, whatever the sentence says."""
    assert score_final("29 is larger than 895", "895").value == 1.0
    assert strict_number("29 is larger than 895", "895").value == 0.0


def test_boxed_matches_braces():
    assert boxed(r"\boxed{\frac{1}{2}} and \boxed{3") == [r"\frac{1}{2}"]


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
