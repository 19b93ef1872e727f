"""What a reply must look like before reasoning-gym's own scorer sees it.

Two kinds of scorer need a rule in front (read in reasoning-gym 0.1.25):

- those that run the reply as code: ``eval`` (binary_matrix, n_queens, spiral_matrix, string_insertion) or sympy's
  ``parse_expr``, which evals too (countdown, puzzle24, the integrations, polynomial_multiplication). A reply could
  run any program. Their rule lets only the answer's own notation through.
- those that give full marks to wrong replies: they take the first number (gsm_symbolic), skip what they cannot read
  (kakurasu, knights_knaves, quantum_lock, sokoban, survo, time_intervals ...), compare ``bool`` of two strings
  (game_of_life_halting), round 24.9 down and do not check the numbers used (puzzle24), or take an unevaluated
  ``Integral`` for an integration.

A rule only refuses; full marks still need the scorer's own verdict.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from sigmix.tasks.numbers import strict_number
from sigmix.tasks.text import normalise

Rule = Callable[[str, Mapping[str, Any]], bool]
MAX_EXPRESSION = 600
_SYMPY_TOKEN = re.compile(r"\s+|\d{1,9}(?:\.\d{1,6})?|\*\*|[-+*/(),]|[A-Za-z]+")
_SYMPY_NAMES = {"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "pi"}


def _form(pattern: str) -> Rule:
    compiled = re.compile(pattern)
    return lambda reply, entry: compiled.fullmatch(reply) is not None


def _same_text(reply: str, entry: Mapping[str, Any]) -> bool:
    return normalise(reply) == normalise(entry["answer"])


def _same_words(reply: str, entry: Mapping[str, Any]) -> bool:
    return reply.casefold().split() == entry["answer"].casefold().split()


def _number(reply: str, entry: Mapping[str, Any]) -> bool:
    return strict_number(reply, entry["answer"]).value == 1.0


def symbolic(reply: str, entry: Mapping[str, Any]) -> bool:
    """Only numbers, one-letter symbols, + - * / **, parentheses and a few functions, in a size that evaluates quickly.

    The product of all whole exponents is held to 1,000, because "9**9**9" would never come back.
    """
    if len(reply) > MAX_EXPRESSION:
        return False
    at, exponents = 0, 1
    while at < len(reply):
        token = _SYMPY_TOKEN.match(reply, at)
        if token is None:
            return False
        word = token[0]
        if word.isalpha() and len(word) > 1 and word not in _SYMPY_NAMES:
            return False
        if word == "**":
            power = re.compile(r"\s*\(?\s*-?\s*(\d{1,3})(?![\d.])|\s*\(?\s*-?\s*[A-Za-z]").match(reply, token.end())
            if power is None or reply[power.end() :].lstrip().startswith("**"):
                return False
            exponents *= max(1, int(power[1] or 1))
        at = token.end()
    return exponents <= 1000


def rational(expression: str) -> Fraction:
    """The exact value of an expression of whole numbers, + - * / and parentheses.

    Raises:
        ValueError: anything else in it, too long, too deep, or a division by zero.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError("too long")
    operations: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
        ast.Add: lambda a, b: a + b,
        ast.Sub: lambda a, b: a - b,
        ast.Mult: lambda a, b: a * b,
        ast.Div: lambda a, b: a / b,
    }

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in operations:
            return operations[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not an arithmetic expression")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _arithmetic(target: Callable[[Mapping[str, Any]], int]) -> Rule:
    def rule(reply: str, entry: Mapping[str, Any]) -> bool:
        if not re.fullmatch(r"[\d\s+\-*/()]+", reply) or "**" in reply or "//" in reply:
            return False
        used = sorted(int(number) for number in re.findall(r"\d{1,9}", reply))
        try:
            return used == sorted(entry["metadata"]["numbers"]) and rational(reply) == target(entry)
        except ValueError:
            return False

    return rule


def _coloring(reply: str, entry: Mapping[str, Any]) -> bool:
    return reply.startswith("{") and reply.count(":") == len(entry["metadata"]["puzzle"]["vertices"])


_GRID = _form(r"-?\d+(?:\s+-?\d+)*")
RULES: dict[str, Rule] = {
    "binary_matrix": _form(r"[\d\s,\[\]]*"),
    "countdown": _arithmetic(lambda entry: entry["metadata"]["target"]),
    "fraction_simplification": _form(r"\$?\s*(?:\d+\s*/\s*\d+|\\d?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\})\s*\$?"),
    "game_of_life_halting": _same_text,
    "graph_color": _coloring,
    "gsm_symbolic": _number,
    "intermediate_integration": symbolic,
    "kakurasu": _form(r"[01](?:\s+[01])*"),
    "knights_knaves": _form(r"(?:[A-Z]\w* is an? \w+(?:, and |, | and |\.?$))+"),
    "letter_jumble": _same_words,
    "n_queens": _form(r"[Q_\s\[\]'\",]*"),
    "number_sorting": _form(r"[\[\]'\"\s\d.,-]*"),  # evals its own answer only; the rule costs nothing
    "polynomial_equations": _form(r"-?\d+(?:\.\d+)?(?:\s*,\s*-?\d+(?:\.\d+)?)*"),
    "polynomial_multiplication": symbolic,
    "prime_factorization": _form(r"\d{1,12}(?:\s*[×x*]\s*\d{1,12})*"),
    "puzzle24": _arithmetic(lambda entry: 24),
    "quantum_lock": _form(r"[A-Ca-c](?:\s*(?:→|->|,|\s)\s*[A-Ca-c])*"),
    "simple_integration": symbolic,
    "sokoban": _form(r"[LRUD]+"),
    "spell_backward": _same_text,
    "spiral_matrix": _form(r"[\d\s,\[\]-]*"),
    "string_insertion": _form(r"[A-Z\[\]'\", ]*"),
    "survo": _GRID,
    "time_intervals": _form(r"\d+(?: days)?|(?:\d+ days, )?\d+:\d\d(?::\d\d(?:\.\d+)?)?"),
}
