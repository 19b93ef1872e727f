"""OpenAI's grader objects: string_check, text_similarity, python and multi, as in fine-tuning jobs and evals.

    grader = make_grader({"type": "string_check", "input": "{{sample.output_text}}",
                          "reference": "{{item.label}}", "operation": "eq"})
    grader.grade("billing", {"label": "billing"}).value  # 1.0

Schema: https://developers.openai.com/api/docs/guides/graders. As everywhere in sigmix a draft is no part of the reply
(see `final_part`). Graders that need a model (score_model, label_model) are refused.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
import operator
import re
import sys
import unicodedata
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from sigmix.errors import ConfigError
from sigmix.tasks.base import Score, final_part
from sigmix.tasks.graders import MAX_PRODUCT, json_value, similarity
from sigmix.tasks.sandbox import Outcome, require_permission, run_function
from sigmix.utils.optional import optional

Failure = Literal[
    "invalid_variable_error", "sample_parse_error", "formula_parse_error", "python_grader_runtime_error",
    "python_grader_server_error", "other_error",
]  # fmt: skip

MAX_GRADERS = 20
MAX_TEMPLATE = 1 << 16
MAX_RENDERED = 4 << 20
MAX_SOURCE = 256 << 10
MAX_FORMULA = 2_000
MAX_FORMULA_NODES = 200
DIGITS = 12
"""Decimals that a score keeps, so that weights such as 0.7, 0.2 and 0.1 add to 1."""


@dataclass(frozen=True)
class Grade(Score):
    """Score of a grader object.

    Attributes:
        failure: the error flag of OpenAI's "run grader" response that applies, or None.
        parts: of multi, by name.
    """

    failure: Failure | None = None
    parts: Mapping[str, Grade] = field(default_factory=dict, hash=False)


class Grader(ABC):
    """Checked grader object; see `make_grader`."""

    type: str
    name: str

    def grade(self, reply: str, item: Mapping[str, Any]) -> Grade:
        """Grade one reply; see `grade_all`."""
        return self.grade_all([reply], [item])[0]

    @abstractmethod
    def grade_all(self, replies: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[Grade]:
        """Grade replies, each with its item, the fields of its row.

        ``value`` is None, never an exception, where the grader fails: a field that the item lacks, a program that
        raises, hangs, or returns no number from 0 to 1. A reply that lacks a field of ``output_json`` scores 0.
        """


def make_grader(spec: Mapping[str, Any], *, allow_code: bool = False) -> Grader:
    """Check a grader object and build the grader.

    Args:
        spec: the object, as JSON gives it.
        allow_code: allow python graders, which run in `sigmix.tasks.sandbox`.

    Raises:
        ConfigError: names the field, such as ``grader.graders.style.operation``.
    """
    return _make(spec, "grader", allow_code, nested=False)


def _make(spec: Any, path: str, allow_code: bool, nested: bool) -> Grader:
    if not isinstance(spec, Mapping):
        raise ConfigError(f"{path} is a {type(spec).__name__}, not an object", remedy='start with {"type": …}')
    kind = spec.get("type")
    if kind in ("score_model", "label_model"):
        raise ConfigError(
            f"{path}.type: {kind} graders need a second model as a judge, which sigmix does not run",
            remedy=f"use {', '.join(_TYPES)}",
        )
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(f"{path}.type is {_quoted(kind)}, not one of {', '.join(_TYPES)}")
    if nested and kind == "multi":
        raise ConfigError(f"{path}.type: multi graders do not nest", remedy="put all graders into one multi")
    required, more, build = _TYPES[kind]
    for key in required:
        if key not in spec:
            raise ConfigError(f"{path}.{key} is missing", remedy=f"a {kind} grader has {', '.join(required)}")
    for key in spec:
        if key not in (*required, *more, "type", "name"):
            fields = ", ".join(("name", *required, *more))
            raise ConfigError(f"{path}.{_short(key)} is no field of a {kind} grader", remedy=f"its fields: {fields}")
    for key in ("name", *required, *more):
        absent = key not in required and spec.get(key) is None
        if not absent and key != "graders" and not isinstance(spec[key], str):
            raise ConfigError(f"{path}.{key} is {_quoted(spec[key])}, not a string")
    grader = build(spec, path, allow_code)
    grader.type, grader.name = kind, spec.get("name") or kind
    return grader


def _choice(spec: Mapping[str, Any], key: str, path: str, choices: Iterable[str]) -> str:
    if spec[key] not in (choices := list(choices)):
        raise ConfigError(f"{path}.{key} is {_quoted(spec[key])}, not one of {', '.join(choices)}")
    return spec[key]


class _Unrenderable(Exception):
    """Template that cannot be filled."""

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure


class Template:
    """Text with variables: ``{{item.field}}``, ``{{sample.output_json.tags[0]}}``, ``{{item['a b.c']}}``.

    Strings are inserted as they are, other values as JSON.

    Raises:
        ConfigError: names ``path``; an unknown variable, or a template longer than `MAX_TEMPLATE`.
    """

    VARIABLES = ("output_text", "output_json", "output_tools", "choices")
    _STEP = re.compile(r"\.\s*([^.\[\]'\"{}]+)|\[\s*(\d{1,9})\s*\]|\[\s*'([^']*)'\s*\]|\[\s*\"([^\"]*)\"\s*\]")

    def __init__(self, text: str, path: str) -> None:
        if len(text) > MAX_TEMPLATE:
            raise ConfigError(f"{path} has {len(text):,} characters; at most {MAX_TEMPLATE:,} are allowed")
        self.parts: list[str | tuple[str | int, ...]] = []  # texts and variables
        start = 0
        while (opened := text.find("{{", start)) >= 0:
            closed = text.find("}}", opened)
            if closed < 0:
                raise ConfigError(f"{path}: '{{{{' without '}}}}' in {_quoted(text[opened:])}")
            self.parts += [text[start:opened], self._variable(text[opened + 2 : closed].strip(), path)]
            start = closed + 2
        self.parts.append(text[start:])

    def _variable(self, text: str, path: str) -> tuple[str | int, ...]:
        namespace = re.match(r"\w*", text)[0]  # type: ignore[index]  # matches every text
        steps: list[str | int] = [namespace]
        at = len(namespace)
        while at < len(text) and (match := self._STEP.match(text, at)):
            plain, index, *quoted = match.groups()
            steps.append(plain.strip() if plain else int(index) if index else next(filter(None, quoted), ""))
            at = match.end()
        if at < len(text) or namespace not in ("item", "sample") or len(steps) < 2:
            raise ConfigError(
                f"{path}: {{{{{_short(text)}}}}} is no variable",
                remedy="write {{sample.output_text}}, {{sample.output_json.field}} or {{item.field}}",
            )
        deeper = len(steps) > 2 and steps[1] == "output_text"
        if namespace == "sample" and (deeper or steps[1] not in self.VARIABLES):
            raise ConfigError(f"{path}: {{{{{_short(text)}}}}} does not exist; sample has {', '.join(self.VARIABLES)}")
        return tuple(steps)

    def render(self, sample: Mapping[str, Any], item: Mapping[str, Any]) -> str:
        """Fill in the variables.

        Raises:
            _Unrenderable: a field is missing, or the text is longer than `MAX_RENDERED`.
        """
        texts: list[str] = []
        length = 0
        for part in self.parts:
            text = part if isinstance(part, str) else self._value(part, sample, item)
            length += len(text)
            if length > MAX_RENDERED:
                raise _Unrenderable(f"the filled template is longer than {MAX_RENDERED:,} characters", "other_error")
            texts.append(text)
        return "".join(texts)

    @staticmethod
    def _value(steps: tuple[str | int, ...], sample: Mapping[str, Any], item: Mapping[str, Any]) -> str:
        value: Any = sample if steps[0] == "sample" else item
        name = str(steps[0])
        for step in steps[1:]:
            name = _short(f"{name}[{step}]" if isinstance(step, int) else f"{name}.{step}")
            try:
                by_index = isinstance(value, list | tuple) and str(step).isdecimal()
                value = value[int(step) if by_index else str(step)]
                if value is None and name == "sample.output_json":
                    raise LookupError("not JSON")
            except (LookupError, TypeError) as error:
                if steps[:2] == ("sample", "output_json"):
                    raise _Unrenderable(f"the reply has no {name}: {error}", "sample_parse_error") from error
                raise _Unrenderable(f"the {steps[0]} has no {name}", "invalid_variable_error") from error
        if isinstance(value, str):
            return value
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (ValueError, RecursionError) as error:
            raise _Unrenderable(f"{name} cannot be written as JSON: {error}", "other_error") from error


def sample_of(reply: str) -> dict[str, Any]:
    """Return the ``sample`` namespace of a reply; ``output_json`` is None unless the reply is one JSON value."""
    text = final_part(reply)
    text = text.strip() if text != reply else text
    try:
        value = json_value(text)
    except ValueError:
        value = None
    message = {"role": "assistant", "content": text}
    return {
        "output_text": text, "output_json": value, "output_tools": [],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }  # fmt: skip


class TextGrader(Grader):
    """string_check and text_similarity: a comparison of two filled templates."""

    def __init__(self, spec: Mapping[str, Any], path: str, compare: Callable[[str, str], float]) -> None:
        self.input = Template(spec["input"], f"{path}.input")
        self.reference = Template(spec["reference"], f"{path}.reference")
        self.compare = compare

    def grade_all(self, replies: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[Grade]:
        return [self._grade(reply, item) for reply, item in zip(replies, items, strict=True)]

    def _grade(self, reply: str, item: Mapping[str, Any]) -> Grade:
        sample = sample_of(reply)
        value: float | None
        try:
            text, reference = self.input.render(sample, item), self.reference.render(sample, item)
            value = self.compare(text, reference)
        except _Unrenderable as error:
            value = 0.0 if error.failure == "sample_parse_error" else None
            return Grade(value, None, str(error), error.failure)
        except ValueError as error:
            return Grade(None, None, str(error), "other_error")
        return Grade(value, _utf8(text), f"{self.type} of {_quoted(text)} and {_quoted(reference)}")


def _contains(text: str, reference: str) -> float:
    if not reference:
        raise ValueError("the reference is empty, and every text contains it")
    return float(reference in text)


_OPERATIONS: dict[str, Callable[[str, str], float]] = {
    "eq": lambda text, reference: float(text == reference), "ne": lambda text, reference: float(text != reference),
    "like": _contains, "ilike": lambda text, reference: _contains(text.casefold(), reference.casefold()),
}  # fmt: skip


def _string_check(spec: Mapping[str, Any], path: str, allow_code: bool) -> Grader:
    return TextGrader(spec, path, _OPERATIONS[_choice(spec, "operation", path, _OPERATIONS)])


def _rouge(size: int | None) -> Callable[[str, str], float]:
    """Return ROUGE-N, or ROUGE-L for None: the F-measure of shared n-grams or of the longest common subsequence."""

    def score(text: str, reference: str) -> float:
        words, expected = (re.findall(r"[a-z0-9]+", one.lower()) for one in (text, reference))
        if size is None:
            if len(words) * len(expected) > MAX_PRODUCT:
                raise ValueError(f"texts of {len(words):,} and {len(expected):,} words are too long to compare")
            distance = optional("rapidfuzz.distance", "'sigmix[tasks]'", "comparing texts")
            same, total = distance.LCSseq.similarity(words, expected), len(words) + len(expected)
        else:
            grams, others = (Counter(zip(*(one[n:] for n in range(size)))) for one in (words, expected))
            same, total = (grams & others).total(), grams.total() + others.total()
        return 2 * same / total if same else 0.0

    return score


_METRICS: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": similarity, **{f"rouge_{size}": _rouge(size) for size in range(1, 6)}, "rouge_l": _rouge(None),
}  # fmt: skip


def _text_similarity(spec: Mapping[str, Any], path: str, allow_code: bool) -> Grader:
    optional("rapidfuzz", "'sigmix[tasks]'", f"{path}.type: text_similarity")
    return TextGrader(spec, path, _METRICS[_choice(spec, "evaluation_metric", path, _METRICS)])


class PythonGrader(Grader):
    """A program with ``grade(sample, item) -> float``; every reply is graded in a fresh process of the sandbox.

    ``timeout`` is in seconds of CPU time for each reply.
    """

    timeout = 5.0

    def __init__(self, spec: Mapping[str, Any], path: str, allow_code: bool) -> None:
        require_permission(allow_code, f"{path}.source")
        self.source = spec["source"]
        path = f"{path}.source"
        if len(self.source) > MAX_SOURCE:
            raise ConfigError(f"{path} has {len(self.source):,} characters; at most {MAX_SOURCE:,} are allowed")
        try:
            tree = _parsed(self.source, "exec")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{path} is no Python program: {error}") from error
        if not any(
            (isinstance(node, ast.FunctionDef) and node.name == "grade")
            or (isinstance(node, ast.Name) and node.id == "grade" and isinstance(node.ctx, ast.Store))
            or (isinstance(node, ast.alias) and (node.asname or node.name) in ("grade", "*"))
            for node in ast.walk(tree)
        ):
            raise ConfigError(f"{path} defines no function grade", remedy="write def grade(sample, item): … return 1.0")
        for node in tree.body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                if module.partition(".")[0] not in sys.stdlib_module_names:
                    raise ConfigError(
                        f"{path} imports {_short(module)}, but the sandbox has Python's standard library alone",
                        remedy="do without it, or use a text_similarity grader",
                    )

    def grade_all(self, replies: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[Grade]:
        calls = [(sample_of(reply), item) for reply, item in zip(replies, items, strict=True)]
        grades: list[Grade | None] = [None] * len(calls)
        texts = []
        for number, (sample, item) in enumerate(calls):
            try:
                texts.append((sample, json.loads(json.dumps(item, default=str))))
            except (ValueError, TypeError, RecursionError) as error:
                grades[number] = Grade(None, None, f"the item cannot be written as JSON: {error}", "other_error")
        outcomes = iter(run_function(self.source, "grade", texts, timeout=self.timeout))
        return [
            grade or _python_grade(next(outcomes), sample["output_text"])
            for grade, (sample, _) in zip(grades, calls, strict=True)
        ]


def _python_grade(outcome: Outcome, text: str) -> Grade:
    if outcome.kind == "sandbox":
        return Grade(None, None, f"the sandbox failed: {outcome.detail}", "python_grader_server_error")
    if outcome.value is None:
        how = "ran out of time" if outcome.kind == "timeout" else "failed"
        return Grade(None, None, f"the grader {how}: {outcome.detail}", "python_grader_runtime_error")
    return _checked(outcome.value, text, "the grader returned", "python_grader_runtime_error")


def _checked(value: float, text: str, what: str, failure: Failure) -> Grade:
    """Return a grade of ``value``, or none if it is outside [0, 1] or NaN."""
    rounded = round(value, DIGITS) if math.isfinite(value) else value
    if not 0 <= rounded <= 1:
        return Grade(None, None, f"{what} {value}, which is not a number from 0 to 1", failure)
    return Grade(abs(rounded), _utf8(text), f"{what} {rounded:g}")


_OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.Pow: math.pow,
}  # fmt: skip
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": lambda *values: min(values), "max": lambda *values: max(values), "abs": abs, "floor": math.floor,
    "ceil": math.ceil, "exp": math.exp, "sqrt": math.sqrt, "log": math.log,
}  # fmt: skip


class Formula:
    """Arithmetic over the scores of graders: numbers, names, ``+ - * / ^ **``, brackets, min max abs floor ceil exp
    sqrt log.

    Raises:
        ConfigError: names ``path``.
    """

    def __init__(self, text: str, path: str, names: Iterable[str]) -> None:
        self.path, self.names = path, sorted(names)
        if len(text) > MAX_FORMULA:
            raise ConfigError(f"{path} has {len(text):,} characters; at most {MAX_FORMULA:,} are allowed")
        try:
            tree = _parsed(text.strip().replace("^", "**"), "eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ConfigError(f"{path} {_quoted(text)} is no formula: {error}") from error
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.expr)]
        if len(nodes) > MAX_FORMULA_NODES:
            raise ConfigError(f"{path} has {len(nodes)} terms and operators; at most {MAX_FORMULA_NODES} are allowed")
        self.body = tree.body
        self._check(self.body)
        if not any(isinstance(node, ast.Name) and node.id in self.names for node in nodes):
            raise ConfigError(f"{path} {_quoted(text)} uses none of the graders", remedy=f"name {self._listed()}")

    def _listed(self) -> str:
        return ", ".join(self.names)

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool) and abs(value) < 1e300:
                return
            case ast.Name(id=name) if name in self.names:
                return
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                self._check(left)
                self._check(right)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self._check(operand)
            case ast.Call(func=ast.Name(id=name), args=[first, *others], keywords=[]) if name in _FUNCTIONS and (
                not others or name in ("min", "max")
            ):
                for argument in (first, *others):
                    self._check(argument)
            case _:
                what = _short(ast.unparse(node))
                raise ConfigError(
                    f"{self.path}: {what} is not allowed; the graders are {self._listed()}",
                    remedy=f"use numbers, the graders' names, + - * / ^ and {', '.join(_FUNCTIONS)}",
                )

    def value(self, scores: Mapping[str, float]) -> float:
        """Evaluate the formula.

        Raises:
            ArithmeticError, ValueError: no real, finite number.
        """
        return self._value(self.body, scores)

    def _value(self, node: ast.expr, scores: Mapping[str, float]) -> float:
        match node:
            case ast.Constant(value=value):
                return float(cast(float, value))
            case ast.Name(id=name):
                return scores[name]
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](self._value(left, scores), self._value(right, scores))
            case ast.UnaryOp(op=op, operand=operand):
                value = self._value(operand, scores)
                return -value if isinstance(op, ast.USub) else value
            case ast.Call(func=ast.Name(id=name), args=arguments):
                return float(_FUNCTIONS[name](*(self._value(argument, scores) for argument in arguments)))
        raise AssertionError("checked before")


class MultiGrader(Grader):
    """Named graders and a formula over their scores; no score where one of them gives none."""

    def __init__(self, spec: Mapping[str, Any], path: str, allow_code: bool) -> None:
        graders = spec["graders"]
        if not isinstance(graders, Mapping) or not graders or isinstance(graders.get("type"), str):
            raise ConfigError(f"{path}.graders is no object of graders by name", remedy='write {"style": {"type": …}}')
        if len(graders) > MAX_GRADERS:
            raise ConfigError(f"{path}.graders has {len(graders)} graders; at most {MAX_GRADERS} are allowed")
        for name in graders:
            normal = isinstance(name, str) and name.isidentifier() and unicodedata.normalize("NFKC", name) == name
            if not normal or keyword.iskeyword(name) or name in _FUNCTIONS:
                raise ConfigError(
                    f"{path}.graders: {_quoted(name)} cannot be used in a formula",
                    remedy="name graders with letters, digits and _, and not like a function",
                )
        self.graders = {
            name: _make(one, f"{path}.graders.{_short(name)}", allow_code, nested=True) for name, one in graders.items()
        }
        self.formula = Formula(spec["calculate_output"], f"{path}.calculate_output", graders)

    def grade_all(self, replies: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[Grade]:
        columns = [grader.grade_all(replies, items) for grader in self.graders.values()]
        return [
            replace(self._combined(parts := dict(zip(self.graders, row, strict=True)), reply), parts=parts)
            for reply, *row in zip(replies, *columns, strict=True)
        ]

    def _combined(self, parts: Mapping[str, Grade], reply: str) -> Grade:
        scores: dict[str, float] = {}
        for name, part in parts.items():
            if part.value is None:
                return Grade(None, None, f"{name}: {part.explanation}", part.failure)
            scores[name] = part.value
        try:
            value = self.formula.value(scores)
        except (ArithmeticError, ValueError) as error:
            given = ", ".join(f"{name} = {score:g}" for name, score in scores.items())
            return Grade(None, None, f"the formula has no value for {given}: {error}", "formula_parse_error")
        return _checked(value, final_part(reply).strip(), "the formula gives", "other_error")


_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping[str, Any], str, bool], Grader]]] = {
    "string_check": (("input", "reference", "operation"), (), _string_check),
    "text_similarity": (("input", "reference", "evaluation_metric"), (), _text_similarity),
    "python": (("source",), ("image_tag",), PythonGrader),
    "multi": (("graders", "calculate_output"), (), MultiGrader),
}
"""Of each type the required fields, the optional ones besides name, and the constructor."""


def _parsed(source: str, mode: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as invalid escapes
        return ast.parse(source, mode=mode)


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _short(text: Any) -> str:
    text = _utf8(str(text))
    return text if len(text) <= 80 else f"{text[:80]}…"


def _quoted(value: Any) -> str:
    """Return a short string or number as it is written; of other values the type."""
    if isinstance(value, str):
        return repr(_short(value))
    return repr(value) if isinstance(value, bool | float | None) else f"of type {type(value).__name__}"
