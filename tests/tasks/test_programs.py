"""Programs in replies: which block counts, however it is fenced."""

import pytest

from sigmix.tasks.programs import extract_code

GOOD = "def f(x):\n    return x + 1"
BAD = "def f(x):\n    return x"
CALLS, HELPER = "def f(x):\n    return x + g(x)", "def g(x):\n    return 1"


def fenced(code: str, language: str = "python", marks: str = "```", indent: str = "") -> str:
    return "\n".join(indent + line for line in f"{marks}{language}\n{code}\n{marks}".split("\n"))


def increments(code: str) -> bool:
    names: dict = {}
    exec(code, names)
    return names["f"](1) == 2


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("```\ntext\n```\n```python\nx = 2\n```", "x = 2"),
        ("```\r\nx = 1\r\n```", "x = 1"),
        ("x = 1", "x = 1"),
        ("Sure!\n```py\nx = 1\n```\nand\n```python\ny = 2\n```", "x = 1\n\ny = 2"),
        ("```python\n    return x + 1\n```", "    return x + 1"),
    ],
)
def test_code_without_a_name(reply, code):
    assert extract_code(reply) == code


@pytest.mark.parametrize(
    "reply",
    [
        GOOD,
        *(fenced(GOOD, tag) for tag in ("python", "", "Python3", " py", 'python title="f.py"', "{.python #id}")),
        fenced(GOOD, marks="~~~"), fenced(GOOD, marks="````"), fenced(GOOD, indent="   "), fenced(GOOD, indent="\t"),
        "1. First:\n\n" + fenced(GOOD, indent="   ") + "\n2. Done.",
        "- " + fenced(GOOD, indent="  ").lstrip(),
        "\n".join("> " + line for line in fenced(GOOD).split("\n")),
        fenced("    " + GOOD.replace("\n", "\n    ")),
        f"Here:\n```python\n{GOOD}",
        f"First try:\n{fenced(BAD)}\nThat is wrong. Better:\n{fenced(GOOD)}",
        f"{fenced(GOOD)}\nUse it:\n{fenced('print(f(2))')}",
        f"{fenced(GOOD)}\nRun it:\n{fenced('python f.py', 'bash')}\nIt prints:\n{fenced('2', '')}",
        f"{fenced(GOOD)}\n{fenced('def f(x):', 'python')}",
        f"{fenced(HELPER)}\nthen\n{fenced(CALLS)}",
        f"{fenced(CALLS)}\nwhere\n{fenced(HELPER)}",
        fenced('def f(x):\n    """Add one.\n\n```\nf(1)\n```\n    """\n    return x + 1'),
        fenced(fenced("text"), "markdown", "````") + "\n" + fenced(GOOD),
        f"<think>\n{fenced(BAD)}\n</think>\n{fenced(GOOD)}",
        f"<think>{fenced(BAD)}</think>{fenced(GOOD)}",
        fenced(fenced(GOOD), "markdown", "````"),
        f"```python\n{GOOD}```", f"```python\n{GOOD}\n``` It adds one.",
        f"{fenced('STEP = 2 - 1')}\n{fenced('total = a + b')}\n{fenced('def f(x): return x + STEP')}",
        fenced(f'{GOOD}\n\n\ndef g(text):\n    return text.split("</think>")[-1]'),
    ],
)  # fmt: skip
def test_the_last_block_that_defines_the_function_counts(reply):
    assert increments(extract_code(reply, "f"))


@pytest.mark.parametrize(
    "reply",
    [
        f"{fenced(GOOD)}\nNo, rather:\n{fenced(BAD)}",
        f"<think>\n{fenced(GOOD)}\n</think>\n{fenced(BAD)}",
        f"{fenced(BAD)}\n{fenced('print(2)')}",
    ],
)
def test_an_earlier_or_drafted_block_does_not_count(reply):
    assert not increments(extract_code(reply, "f"))


def test_drafts_and_prose_are_no_program():
    assert extract_code(f"<think>\n{fenced(GOOD)}", "f") == ""
    assert extract_code(f"{fenced('raise SystemExit')}\n{fenced(GOOD)}", "f").count("SystemExit") == 0


@pytest.mark.parametrize("reply", ["```\n" * 25_000, "```python\ndef f():\n  return '''\n```\n'''\n```\n" * 2_000])
def test_many_fences_take_linear_time(reply):
    assert isinstance(extract_code(reply, "f"), str)
