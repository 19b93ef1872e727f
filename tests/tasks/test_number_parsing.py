"""Numbers in replies: each form, units, LaTeX, headings and boxes, and what is refused."""

from fractions import Fraction

import pytest

from sigmix.tasks.number_parsing import boxed, final_number, number_text, parse_number


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


def test_boxed_matches_braces():
    assert boxed(r"\boxed{\frac{1}{2}} and \boxed{3") == [r"\frac{1}{2}"]


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
def test_remarks_about_a_number(reply, value):
    assert final_number(reply) == value


@pytest.mark.parametrize("tag", ["<thought>", "<reasoning>", "<seed:think>", "◁think▷"])
def test_drafts_of_other_models(tag):
    assert final_number(f"{tag}#### 5{tag[0]}/{tag[1:]} #### 6") == 6
    assert final_number(f"{tag}#### 5") is None


@pytest.mark.parametrize(
    "reply",
    [r"\boxed{" * 15_000, r"\boxed{" * 3_000 + "5" + "}" * 3_000, "the answer is " * 7_000, "#### " + "1+" * 50_000],
)
def test_long_replies_take_linear_time(reply):
    assert final_number(reply) in (5, None)
