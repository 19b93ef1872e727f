"""OpenAI's grader objects: what they score, what they refuse, and what never crashes them."""

import copy
import json
import os
import random
import sys

import pytest
from openai.types.graders import PythonGrader, StringCheckGrader, TextSimilarityGrader

from sigmix.errors import ConfigError
from sigmix.tasks import sandbox
from sigmix.tasks.base import Sample, Task
from sigmix.tasks.openai_graders import make_grader

posix = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs Linux or macOS")

OUTPUT, LABEL = "{{ sample.output_text }}", "{{item.label}}"
CHECK = {"type": "string_check", "name": "check", "input": OUTPUT, "reference": LABEL, "operation": "eq"}
SIMILAR = {
    "type": "text_similarity", "name": "similar", "input": OUTPUT, "reference": LABEL,
    "evaluation_metric": "fuzzy_match",
}  # fmt: skip
LENGTH = "def grade(sample, item):\n    return min(len(sample['output_text']) / item['longest'], 1.0)"


def check(**fields):
    return {**CHECK, **fields}


def multi(formula, **graders):
    return {"type": "multi", "name": "all", "graders": graders, "calculate_output": formula}


def python(source):
    return {"type": "python", "name": "code", "source": source}


def value(spec, reply="Yes", item=None, **options):
    return make_grader(spec, **options).grade(reply, {"label": "Yes"} if item is None else item).value


def test_the_sdks_own_objects_are_accepted():
    for kind, spec in ((StringCheckGrader, CHECK), (TextSimilarityGrader, SIMILAR), (PythonGrader, python(LENGTH))):
        grader = make_grader(kind(**spec).model_dump(), allow_code=True)
        assert (grader.type, grader.name) == (spec["type"], spec["name"])


@pytest.mark.parametrize(
    ("operation", "reply", "score"),
    [
        ("eq", "Yes", 1), ("eq", "yes", 0), ("eq", "Yes.", 0), ("eq", "Yes\n", 0), ("ne", "Yes", 0), ("ne", "No", 1),
        ("like", "Oh Yes!", 1), ("like", "oh yes", 0), ("ilike", "OH YES", 1), ("ilike", "no", 0), ("eq", "", 0),
        ("eq", "<think>No?</think>\n\nYes", 1), ("eq", "<think>Yes</think>", 0), ("like", "<think>Yes", 0),
    ],
)  # fmt: skip
def test_string_check(operation, reply, score):
    assert value(check(operation=operation), reply) == score


def test_every_text_contains_an_empty_reference_so_it_is_not_graded():
    for operation in ("like", "ilike"):
        grade = make_grader(check(operation=operation)).grade("x", {"label": ""})
        assert grade.value is None
        assert "empty" in grade.explanation


@pytest.mark.parametrize("metric", ["rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l"])
def test_rouge_is_that_of_the_reference_package(metric):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    name = metric.replace("rouge_", "rouge").replace("rougel", "rougeL")
    scorer = rouge_scorer.RougeScorer([name])
    texts = ["the cat sat on the mat", "The cat, it sat on a mat!", "on the mat the cat sat on the mat", "dogs", ""]
    for text in texts:
        for reference in texts:
            expected = scorer.score(reference, text)[name].fmeasure
            spec = {**SIMILAR, "evaluation_metric": metric}
            assert value(spec, text, {"label": reference}) == pytest.approx(expected), (text, reference)


def test_a_missing_package_is_an_error_before_grading(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(ConfigError, match="pip install"):
        make_grader(multi("a", a=SIMILAR))


def test_fuzzy_match():
    assert value(SIMILAR) == 1
    assert value(SIMILAR, "Yess") == pytest.approx(6 / 7)
    assert value(SIMILAR, "qqq") == 0


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{item.label}}", "a"), ("{{ item.label }}!", "a!"), ("{{item.deep.er}}", "b"), ("{{item.list[1]}}", "d"),
        ("{{item.list.0}}", "c"), ("{{item['odd name.x']}}", "e"), ('{{item["odd name.x"]}}', "e"),
        ("{{item.two words}}", "f"), ("{{item.number}}", "1.5"), ("{{item.flag}}", "true"), ("{{item.null}}", "null"),
        ("{{item.deep}}", '{"er": "b"}'), ("{{item.ключ}}", "я"), ("{ {item.label} }", "{ {item.label} }"),
        ("}}{{item.label}}{{item.label}}", "}}aa"), ("{{item.curly}}", "{{item.label}}"), ("", ""),
    ],
)  # fmt: skip
def test_templates(template, filled):
    item = {
        "label": "a", "deep": {"er": "b"}, "list": ["c", "d"], "odd name.x": "e", "two words": "f", "number": 1.5,
        "flag": True, "null": None, "ключ": "я", "curly": "{{item.label}}",
    }  # fmt: skip
    assert make_grader(check(input=template, reference="")).grade("x", item).answer == filled


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{sample.output_json.a}}", "1"), ("{{sample.output_json.b[0].c}}", "é"),
        ("{{sample.choices[0].message.content}}", '{"a": 1, "b": [{"c": "é"}]}'),
    ],
)  # fmt: skip
def test_templates_of_the_reply(template, filled):
    reply = '<think>{"a": 2}</think>\n{"a": 1, "b": [{"c": "é"}]}'
    assert make_grader(check(input=template)).grade(reply, {"label": ""}).answer == filled


@pytest.mark.parametrize("reply", ["", "no JSON", "[]", '{"b": 1}', '{"a": 1', "null", '"a"', "{" * 100_000])
def test_a_reply_without_the_field_scores_zero(reply):
    for operation in ("eq", "ne"):
        grade = make_grader(check(input="{{sample.output_json.a}}", operation=operation)).grade(reply, {"label": "1"})
        assert (grade.value, grade.failure) == (0, "sample_parse_error")
        assert "sample.output_json" in grade.explanation


@pytest.mark.parametrize("item", [{}, {"Label": "x"}, {"label.x": "x"}])
def test_an_item_without_the_field_is_not_graded(item):
    grade = make_grader(CHECK).grade("x", item)
    assert (grade.value, grade.failure) == (None, "invalid_variable_error")
    assert "item.label" in grade.explanation


@pytest.mark.parametrize(
    "template",
    ["{{output_text}}", "{{sample}}", "{{item}}", "{{}}", "{{ }}", "{{items.label}}", "{{Item.label}}", "{{item.label",
     "{{item.}}", "{{item..x}}", "{{item[}}", "{{item.x[a]}}", "{{item.x['a}}", "{{sample.text}}", "{{{{item.label}}}}",
     "{{sample.output_text.x}}", "{{sample.output_text | upper}}", "{{item.__class__.__mro__[1]()}}", "{{7*7}}",
     "{{" * 30_000, "{{item.a}}" * 10_000, "{{item\ud800.a}}", "{% for x in y %}{{ x }}"],
)  # fmt: skip
def test_bad_templates_are_refused_by_name(template):
    with pytest.raises(ConfigError, match=r"^grader\.reference") as error:
        make_grader(check(reference=template))
    str(error.value).encode()
    assert len(str(error.value)) < 500


def test_attributes_are_not_fields():
    grade = make_grader(check(input="{{item.__class__}}")).grade("x", {"label": "x"})
    assert grade.value is None


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({}, "grader.type"), ({"type": "regex"}, "grader.type"), ({"type": ["multi"]}, "grader.type"),
        ([CHECK], "grader"), (None, "grader"), ("eq", "grader"),
        ({**CHECK, "operation": "contains"}, "grader.operation"), ({**CHECK, "operation": ["eq"]}, "grader.operation"),
        ({**CHECK, "input": 5}, "grader.input"), ({**CHECK, "name": {}}, "grader.name"),
        ({**CHECK, "refrence": "x"}, "grader.refrence"), ({**CHECK, "pass_threshold": 0.5}, "grader.pass_threshold"),
        ({key: CHECK[key] for key in CHECK if key != "reference"}, "grader.reference"),
        ({**SIMILAR, "evaluation_metric": "bleu"}, "grader.evaluation_metric"),
        ({**SIMILAR, "evaluation_metric": "cosine"}, "grader.evaluation_metric"),
        (multi("a", a=check(operation="x")), "grader.graders.a.operation"),
        (multi("a", a=check(input="{{x.y}}")), "grader.graders.a.input"),
        (multi("a", a=multi("b", b=CHECK)), "grader.graders.a.type"), (multi("a", a=[]), "grader.graders.a"),
        (multi("1"), "grader.graders"), ({**multi("a"), "graders": [CHECK]}, "grader.graders"),
        ({**multi("a"), "graders": CHECK}, "grader.graders"), (multi("a", **{"a-b": CHECK}), "grader.graders"),
        (multi("a", **{"lambda": CHECK}), "grader.graders"), (multi("max", max=CHECK), "grader.graders"),
        (multi("a0", **{f"a{n}": CHECK for n in range(50)}), "grader.graders"),
        ({**multi("a", a=CHECK), "calculate_output": 1}, "grader.calculate_output"),
        (python(""), "grader.source"), (python("x = 1"), "grader.source"), (python("def grade(:"), "grader.source"),
        (python("import numpy as np\ndef grade(sample, item): return 1"), "grader.source"),
        (python("from rapidfuzz import fuzz\ndef grade(sample, item): return 1"), "grader.source"),
        (python("def grade(s, i): return 1\n" + "#" * 300_000), "grader.source"), (python("\ud800"), "grader.source"),
        (python("\x00"), "grader.source"), (python("(" * 100_000), "grader.source"), (python(b"x"), "grader.source"),
        (python("async def grade(s, i): return 1"), "grader.source"),
        ({**CHECK, "x" * 10_000: 1}, "grader.x"), ({**CHECK, "\ud800": 1}, "grader."),
    ],
)  # fmt: skip
def test_bad_objects_are_refused_by_the_path_of_the_field(spec, path):
    with pytest.raises(ConfigError) as error:
        make_grader(spec, allow_code=True)
    message = str(error.value)
    assert message.startswith(path)
    message.encode()
    assert len(message) < 600


@pytest.mark.parametrize("kind", ["score_model", "label_model"])
def test_graders_that_need_a_model_are_refused(kind):
    with pytest.raises(ConfigError, match=r"grader\.graders\.judge\.type.*model.*string_check"):
        make_grader(multi("judge", judge={"type": kind, "name": "judge", "model": "gpt-5", "input": []}))


def test_metrics_and_operations_are_listed():
    with pytest.raises(ConfigError, match="fuzzy_match.*rouge_l"):
        make_grader({**SIMILAR, "evaluation_metric": "meteor"})
    with pytest.raises(ConfigError, match="eq, ne, like, ilike"):
        make_grader(check(operation="neq"))


def test_python_needs_permission():
    for spec in (python(LENGTH), multi("a", a=python(LENGTH))):
        with pytest.raises(ConfigError, match="--allow-code"):
            make_grader(spec)


@posix
def test_python_graders_return_numbers():
    grader = make_grader(python(LENGTH), allow_code=True)
    grades = grader.grade_all(["1234", "12345678901", "<think>123456</think>12"], [{"longest": 10}] * 3)
    assert [grade.value for grade in grades] == [0.4, 1, 0.2]
    source = (
        "import json, re\ndef grade(sample: dict, item: dict) -> float:\n"
        "    assert sample['choices'][0]['message']['content'] == sample['output_text']\n"
        "    assert sample['output_tools'] == []\n"
        "    return bool(sample['output_json']) and sample['output_json']['a'] == item['gold']['a'][0]"
    )
    grader = make_grader({**python(source), "image_tag": "2025-05-08"}, allow_code=True)
    replies = ['{"a": "é\ud83d"}', '{"a": 2}', "no JSON", '{"a": "é\\ud83d"}', ""]
    items = [{"gold": {"a": ["é\ud83d"]}, "when": object()}] * 5
    assert [grade.value for grade in grader.grade_all(replies, items)] == [1, 0, 0, 1, 0]
    assert grader.grade_all([], []) == []


@posix
def test_python_graders_that_fail_give_no_score(monkeypatch):
    monkeypatch.setattr("sigmix.tasks.openai_graders.PythonGrader.timeout", 1.0)
    source = (
        "import os, sys\ndef grade(sample, item):\n    do = item['do']\n    print(1.0)\n"
        "    if do == 'loop':\n        while True: pass\n    if do == 'exit': os._exit(0)\n"
        "    if do == 'quit': sys.exit()\n    if do == 'open': open('/no/such/file')\n"
        "    return {'nan': float('nan'), 'inf': float('inf'), 'big': 1.5, 'low': -0.01,\n"
        "        'text': '1.0', 'none': None, 'list': [1.0], 'huge': 10 ** 400, 'one': 1 + 1e-15, 'zero': -1e-15}[do]"
    )
    bad = ["loop", "exit", "quit", "open", "nan", "inf", "big", "low", "text", "none", "list", "huge", "other"]
    grades = make_grader(python(source), allow_code=True).grade_all(
        ["x"] * (len(bad) + 2), [{"do": do} for do in ["one", *bad, "zero"]]
    )
    assert [grade.value for grade in grades] == [1, *[None] * len(bad), 0]
    assert {grade.failure for grade in grades[1:-1]} == {"python_grader_runtime_error"}
    assert all("grader" in grade.explanation and "sandbox" not in grade.explanation for grade in grades[1:-1])
    for do in ("time", "1.5", "str", "NoneType", "KeyError"):
        assert any(do in grade.explanation for grade in grades)


@posix
def test_a_failure_of_the_sandbox_is_not_the_graders(monkeypatch):
    sandbox.guards()
    monkeypatch.setattr(sandbox, "_LAUNCHER", sandbox._LAUNCHER.with_name("no_such_launcher.py"))
    grade = make_grader(python(LENGTH), allow_code=True).grade("x", {"longest": 1})
    assert (grade.value, grade.failure) == (None, "python_grader_server_error")
    assert "sandbox" in grade.explanation


def test_an_item_that_is_no_json_gets_no_score():
    circle = []
    circle.append(circle)
    grader = make_grader(python(LENGTH), allow_code=True)
    assert [grade.value for grade in grader.grade_all(["x", "y"], [{"a": circle}, {"a": circle}])] == [None, None]
    assert make_grader(CHECK).grade("x", {"label": circle}).value is None


@pytest.mark.parametrize(
    ("formula", "score"),
    [
        ("a", 1), ("a + b", 1), ("0.7*a + 0.2*a + 0.1*a", 1), ("(a + b) / 2", 0.5), ("a - b", 1), ("-a + 1", 0),
        ("2 * a ^ 2 / 4", 0.5), ("0.5 ** (a + a)", 0.25), ("min(a, b, 0.5)", 0), ("max(a, b)", 1), ("max(b)", 0),
        ("abs(b - a)", 1), ("floor(a * 0.9)", 0), ("ceil(a * 0.1)", 1), ("exp(b)", 1), ("sqrt(a / 4)", 0.5),
        ("log(a)", 0), ("1 - a", 0), (" a\n", 1), ("+a", 1), ("(((((a)))))", 1), ("1e-1 * a", 0.1),
    ],
)  # fmt: skip
def test_formulas(formula, score):
    assert value(multi(formula, a=CHECK, b=check(operation="ne"))) == pytest.approx(score, abs=1e-12)
    if score == 1:
        assert value(multi(formula, a=CHECK, b=check(operation="ne"))) == 1.0


@pytest.mark.parametrize(
    "formula",
    ["", " ", "a +", "c", "a + c", "A", "1", "min(1, 2)", "max()", "abs(a, b)", "log(a, 2)", "pow(a, 2)", "round(a)",
     "a if b else 1", "a and b", "not a", "a < b", "a == 1", "a % 2", "a // 2", "a @ b", "a | b", "~a", "a.real",
     "a[0]", "[a]", "(a, b)", "{a}", "'a'", "a + True", "a + None", "a + 1j", "a + ...", "lambda: a", "(a := 1)",
     "max(*[a])", "max(a, key=b)", "min(a, default=1)", "__import__('os').system('x')", "().__class__", "f'{a}'",
     "a; b", "a = 1", "import os", "eval(a)", "exec(a)", "open(a)", "a\nb", "\ud800", "a\x00", "a +" * 100_000,
     "-" * 1_500 + "a", "(" * 900 + "a" + ")" * 900, "a" + "+a" * 900, "max(" * 90 + "a" + ")" * 90 + "(a)",
     "9" * 1_900 + " * a", "1e999 * a", "min", "a(b)", "max.__call__(a)", "await a", "yield a",
     "a:b", "a # b\n+ c", "[x for x in a]"],
)  # fmt: skip
def test_other_formulas_are_refused(formula):
    with pytest.raises(ConfigError, match=r"^grader\.calculate_output") as error:
        make_grader(multi(formula, a=CHECK, b=CHECK))
    str(error.value).encode()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "formula",
    ["9**9**9 * a", "9^9^9^9^9 + a", "a / b", "b ^ -1 + a", "log(b) + a", "sqrt(b - a)", "exp(999 * a)",
     "(b - a) ** 0.5", "a + a", "b - a", "1e299 * 1e299 * a", "floor(1e299 * 1e299 * a)",
     "1e299*1e299*a - 1e299*1e299*a", "+".join(["9**9**9"] * 25) + "+a"],
)  # fmt: skip
def test_formulas_without_a_score(formula):
    grade = make_grader(multi(formula, a=CHECK, b=check(operation="ne"))).grade("Yes", {"label": "Yes"})
    assert grade.value is None
    assert grade.failure in ("formula_parse_error", "other_error")
    assert "formula" in grade.explanation


def test_a_part_without_a_score_leaves_none():
    spec = multi("max(right, style)", right=CHECK, style={**SIMILAR, "reference": "{{item.style}}"})
    grade = make_grader(spec).grade("Yes", {"label": "Yes"})
    assert (grade.value, grade.failure) == (None, "invalid_variable_error")
    assert "style" in grade.explanation
    assert "item.style" in grade.explanation
    assert [part.value for part in grade.parts.values()] == [1, None]


@posix
def test_multi_grades_many_replies_in_order():
    spec = multi("0.5 * right + 0.5 * length", right=CHECK, length=python(LENGTH))
    grader = make_grader(spec, allow_code=True)
    items = [{"label": "Yes", "longest": 6}, {"label": "No", "longest": 3}, {"label": "x"}]
    grades = grader.grade_all(["Yes", "Yes", "x"], items)
    assert [grade.value for grade in grades] == [0.75, 0.5, None]
    assert {name: part.value for name, part in grades[0].parts.items()} == {"right": 1, "length": 0.5}
    assert "length" in grades[2].explanation
    assert grader.grade("Yes", items[0]) == grades[0]


def test_graders_need_no_names():
    bare = {key: CHECK[key] for key in CHECK if key != "name"}
    spec = multi("a", a=bare)
    del spec["name"]
    assert value(spec) == 1
    assert make_grader(bare).name == "string_check"


@pytest.mark.parametrize(
    "reply",
    ["\ud800", '{"a": "\\ud800"}', "a" * 1_000_000, "\u0301\u0323" * 100_000, "{{item.label}}", "[" * 1_000_000,
     '{"a":' * 900 + "1" + "}" * 900, "\x00", "<think>" * 10_000, '{"a": 1' + "0" * 5_000 + "}"],
)  # fmt: skip
def test_hostile_replies(reply):
    for spec in (CHECK, SIMILAR, check(input="{{sample.output_json.a}}"), check(input="{{sample.output_json}}")):
        grade = make_grader(spec).grade(reply, {"label": "a gold answer"})
        assert grade.value is not None
        assert grade.value < 0.6
        json.dumps([grade.answer, grade.explanation], ensure_ascii=False).encode()


@posix
def test_hostile_replies_reach_python_graders_whole():
    replies = ["\ud800", "a" * 1_000_000, '{"a":' * 900 + "1" + "}" * 900, "\x00", "é" * 1000]
    grader = make_grader(python("def grade(s, item): return len(s['output_text']) == item['n']"), allow_code=True)
    assert [g.value for g in grader.grade_all(replies, [{"n": len(reply)} for reply in replies])] == [1] * len(replies)


def test_templates_cannot_fill_the_memory():
    grade = make_grader(check(input=OUTPUT * 1_000)).grade("a" * 1_000_000, {"label": "x"})
    assert grade.value is None
    assert "longer" in grade.explanation


def test_texts_too_long_to_compare_are_not_graded():
    grade = make_grader(SIMILAR).grade("ab" * 500_000, {"label": "ba" * 500_000})
    assert (grade.value, grade.failure) == (None, "other_error")


MULTI = multi(
    "min(a, b)^2 + 0.5*a - log(b + 1)", b=SIMILAR,
    a=check(input="{{sample.output_json.x}}", reference="{{item['k k']}}"),
)  # fmt: skip
FRAGMENTS = "{{ }} item . sample [ ] 0 ' a b ^ ** ( ) + - / , max log \ud800 \u0301 \x00 é 99999999 1e308 lambda if =="
FRAGMENTS = [*FRAGMENTS.split(), '"', " ", "\n"]
VALUES = [None, True, 0, 1.5, "", [], {}, "x" * 100, ["a"], {"type": "multi"}, 10**400, float("nan")]


def mutated(spec, chance):
    spec = node = copy.deepcopy(spec)
    while isinstance(node[key := chance.choice(list(node))], dict):
        node = node[key]
    text, at = node[key], chance.randrange(len(node[key]) + 1)
    if chance.random() < 0.6:
        node[key] = text[:at] + "".join(chance.choices(FRAGMENTS, k=2)) + text[at + chance.randrange(3) :]
    elif chance.random() < 0.6:
        node[key] = chance.choice(VALUES)
    else:
        node["".join(chance.choices(FRAGMENTS, k=2))] = node.pop(key)
    return spec


@pytest.mark.parametrize("seed", range(3))
def test_any_object_is_refused_by_name_or_grades_any_reply(seed):
    chance = random.Random(seed)
    items = [{}, {"label": "x"}, {"label": None, "k k": 5}, {"label": float("nan"), "k k": ""}, {"label": "\ud800"}]
    replies = ["", "x", '{"x": 1}', '{"x": null}', "[1, 2]", "\ud800", "null", "<think>", '{"x": "\\ud800"}']
    refused = graded = 0
    for _ in range(1_000):
        spec = mutated(chance.choice([CHECK, SIMILAR, MULTI]), chance)
        try:
            grader = make_grader(spec)
        except ConfigError as error:
            refused += str(error).startswith("grader")
            continue
        grade = grader.grade(chance.choice(replies), chance.choice(items))
        assert grade.value is None or 0 <= grade.value <= 1
        assert grade.value is not None or (grade.failure and grade.explanation)
        f"{grade.answer} {grade.explanation}".encode()
        graded += 1
    assert refused + graded == 1_000
    assert min(refused, graded) > 50


class Graded(Task):
    """Two questions with a grader object."""

    def __init__(self, grader, answers):
        super().__init__()
        self.grader, self.answers = grader, answers

    def splits(self):
        return ("train",)

    def samples(self, split, n=None, seed=0):
        return [Sample.make(f"question {n}", answer) for n, answer in enumerate(self.answers)]

    def score(self, sample, reply):
        return self.grader.grade(reply, {"label": sample.gold.strip('{"x: }')})


@posix
def test_strict_graders_pass_the_validation_of_tasks():
    exact = python("def grade(sample, item): return sample['output_text'] == item['label']")
    for spec, answers in (
        (CHECK, ["Yes", "No"]), (check(input="{{sample.output_json.x}}"), ['{"x": "Yes"}', '{"x": "No"}']),
        (exact, ["Yes"]), (multi("a * b", a=CHECK, b=SIMILAR), ["Yes", "No"]),
    ):  # fmt: skip
        report = Graded(make_grader(spec, allow_code=True), answers).validate()
        assert report.ok, report.problems
