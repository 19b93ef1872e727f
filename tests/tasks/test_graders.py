"""Text, JSON, choices, yes/no, numbers, LaTeX: each form of a right reply, and each trap."""

import json
import random
from fractions import Fraction

import pytest

from sigmix.errors import ConfigError, UnknownNameError
from sigmix.tasks.base import GARBAGE, Sample, Task
from sigmix.tasks.graders import (
    GRADERS,
    SIMILAR,
    boxed,
    exact,
    exact_lines,
    final_number,
    final_part,
    grader_of,
    infer_grader,
    json_fields,
    json_only,
    math_equal,
    number_text,
    one_of,
    parse_choice,
    parse_number,
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


def number(reply: str, value) -> None:
    assert final_number(reply) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("#### Step 1: add\n3 + 4 = 7\n#### Step 2\n#### 42", 42), ("#### 1. Add\n#### 2. Subtract\n#### 42", 42),
        ("### Step 1\n## Step 2\n#### 42", 42), ("# 5\n## 6\n#### 7", 7), ("#### 42\n\n#### Check\n40 + 2 = 42", 42),
        ("#### Step 1\nadd 5\n\nThe answer is 42.", 42), ("#### Step 1: 5 apples\nso 40 + 2 = 42", 42),
        ("#### Answer: 42", 42), ("#### Final answer: 42 apples", 42), ("#### The answer is 42", 42),
        ("#### Answer\n42", 42), ("####42", 42), ("**#### 42**", 42), ("#### `42`", 42), ("#### __42__.", 42),
        ("#### **$42.00**", 42), ("#### x = 42", 42),
        (r"#### \boxed{42}", 42), (r"#### $\boxed{42}$", 42), ("#### 40 + 2 = 42", 42), ("#### 42\n#### 42.0", 42),
        ("##### 42", 42), ("\\boxed{8}\n#### 8", 8),
        # no number after the last mark, or different ones
        ("#### Step 1\n#### Step 2", None), ("so it is 42.\n\n#### Step 3", None), ("#### 41\n#### 42", None),
        ("#### 7\n\\boxed{8}", None),
    ],
)  # fmt: skip
def test_headings_before_the_answer(reply, value):
    number(reply, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$1,234.50", "1234.5"), ("42 km", 42), ("5 %", 5), ("€ 12", 12), ("12€", 12), ("12 apples", 12), ("42.0", 42),
        ("USD 12", 12), ("US$12", 12), ("Rs. 500", 500), ("£3", 3), ("₹500", 500), ("42 km/h", 42), ("42 km²", 42),
        ("42 m^2", 42), ("42 sq. ft.", 42), ("$18 per day", 18), ("5 kg", 5), ("300 K", 300), ("20°C", 20),
        (r"20^\circ", 20), (r"20^{\circ}\text{C}", 20), (r"12\text{ cm}^2", 12), (r"12~\mathrm{km/h}", 12),
        ("1.5 million dollars", 1500000), ("$2 million", 2000000), ("10k", 10000), ("3 hundred", 300),
        ("1{,}234", 1234), (r"1\,234", 1234), (r"1\,234\,567", 1234567), (r"1,\!234", 1234), (r"\$1,234", 1234),
        (r"\$1{,}234.50", "1234.5"), (r"1{,}234\text{ cm}", 1234), (r"\text{42 apples}", 42),
        ("1 234", 1234), ("1\u2009234", 1234), ("1\u202f234\u00a0567", 1234567), ("1'234", 1234),
        ("12,34,567", 1234567),
        ("1/2", "1/2"), ("1 1/2", "3/2"), ("1½", "3/2"), ("½", "1/2"), (r"\frac{3}{4}", "3/4"), (r"-\dfrac34", "-3/4"),
        (r"1\frac{1}{2}", "3/2"), ("−5", -5), ("–5", -5), ("-$5", -5), ("minus 5", -5), ("negative 5", -5),
        ("1.5e3", 1500), ("1.5 × 10^3", 1500), ("1.5 x 10^3", 1500), (r"3 \times 10^{-2}", "0.03"),
        # ambiguous, or an expression
        ("1,5", None), ("1.234,56", None), ("1,2345", None), ("3 5/4", None), ("42 or 43", None), ("42, 43", None),
        ("12 and a half", None), ("41 not 42", None), ("12x", None), (r"12\pi", None), (r"2\sqrt{3}", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["#### {}", r"\boxed{{{}}}"])
def test_units_currency_and_groups_of_thousands(text, value, form):
    number(form.format(text), value)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("The answer is 1 1/2.", "3/2"), ("The answer is $\\frac{1}{2}$.", "1/2"), ("It is 1½ cups", "3/2"),
        ("The answer is 1 000.", 1000), ("The answer is 1.5 million.", 1500000), ("The answer is 1.2e3", 1200),
        ("The answer is \\(42\\).", 42), ("The answer is:\n$$42$$", 42), ("**Answer**: 42 (5 more)", 42),
        ("The answer is minus 5", -5), ("8 minus 3 is 5", 5), ("The answer is 42, not 43", 42), ("x = 10^2 = 100", 100),
        ("Final answer: 42\n\nFinal Answer: 42.0", 42),
        ("Final Answer: The final answer is $42$. I hope it is correct.", 42),
        ("The answer is 10:30", None), ("The answer is 3:4", None), ("The answer is 5-8", None),
        ("= $2\\sqrt{3}$", None),
        ("The answer is 41 and 42", None), ("The answer is certainly not 42", None), ("total 2^10", None),
        ("Final answer: 41\nFinal answer: 42", None), ("The final answer is 41. The final answer is 42.", None),
        ("She paid 10 and got 42,5", None), ("She had 5 of them on 3/4/2021", None),
    ],
)  # fmt: skip
def test_numbers_in_sentences_are_read_whole_or_not_at_all(reply, value):
    number(reply, value)


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


@pytest.mark.parametrize(("number", "text"), [("5", "5"), ("5/2", "2.5"), ("1/3", "1/3"), ("-0.1", "-0.1")])
def test_number_text_reads_back_exactly(number, text):
    assert number_text(Fraction(number)) == text
    assert parse_number(text) == Fraction(number)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("#### 100 (50 + 50)", 100), ("#### 72 (not 73)", 72), ("#### 5 (five)", 5), ("#### Total: 5 eggs", 5),
        ("#### : 5", 5), ("#### 5 ####", 5), (r"#### 3 \text{ m/s}^2", 3), ("#### $5K", 5000), ("#### $5M", 5_000_000),
        ("<answer>\n6\n</answer>", 6),
        # another number or none
        ("#### 72 (or 73)", None), ("#### 15 (16)", None), ("#### Step 3: 42", None), ("The answer isn't 12", None),
        ("The answer can't be 12", None), ("The answer is less than 12", None), ("The answer is at least 12", None),
        ("The answer is ≤ 12", None), ("The answer is 12 (or 13)", None), ("The answer is 5 + 3", None),
        ("The answer is 2 * 6.", None), ("The answer is 12 divided by 3", None), ("The answer is 2x", None),
        ("The answer is 5 feet 6 inches", None), ("Answer: 5 hours and 30 minutes", None),
    ],
)  # fmt: skip
def test_what_a_sentence_says_about_its_number(reply, value):
    assert final_number(reply) == value


@pytest.mark.parametrize("tag", ["<thought>", "<reasoning>", "<seed:think>", "◁think▷"])
def test_drafts_of_other_models(tag):
    assert final_number(f"{tag}#### 5{tag[0]}/{tag[1:]} #### 6") == 6
    assert final_number(f"{tag}#### 5") is None


@pytest.mark.parametrize("reply", ["<answer>B</answer>", '"B"', "The best answer is B.", "B - Paris, France"])
def test_choices_in_tags_and_quotes(reply):
    assert parse_choice(reply, list(TEXTS), TEXTS) == "B"


@pytest.mark.parametrize(
    "reply",
    [r"\boxed{" * 15_000, r"\boxed{" * 3_000 + "5" + "}" * 3_000, "the answer is " * 7_000, "#### " + "1+" * 50_000],
)
def test_long_replies_take_linear_time(reply):
    assert final_number(reply) in (5, None)


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
