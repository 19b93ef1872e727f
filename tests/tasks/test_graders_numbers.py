"""Numbers: what is one, which one a reply ends in, and which replies must not be read as one."""

from fractions import Fraction

import pytest

from sigmix.tasks.graders import boxed, final_number, math_equal, parse_number, score_final, strict_number


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
