"""reasoning-gym data sets as tasks: ``rg:NAME?option=value``.

Generators and scorers are those of open-thought/reasoning-gym. Added here: splits by content hash, a strict reading of
partial marks, rules in front of scorers that are lax or that run the reply as code, and errors that list the valid
options. Not offered: ``composite`` (a mixture of others) and the data sets without answers (``boxnet``, ``rush_hour``),
so that a grader cannot be checked. A test split takes about five draws an item.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import math
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from sigmix.errors import ConfigError, DataError, UnknownNameError, reraised
from sigmix.tasks.base import ProceduralTask, Sample, Score, content_id, final_part
from sigmix.tasks.graders import normalise, strict_number
from sigmix.utils.optional import optional

REFUSED = {
    "boxnet": "it has no answers, so its grader cannot be checked",
    "rush_hour": "it has no answers, so its grader cannot be checked",
    "composite": "it is a mixture of others; use them one by one",
}

# answers that are not in entry["answer"] but in the metadata, as one of several right ones
_EXAMPLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "graph_color": lambda metadata: json.dumps({str(key): value for key, value in metadata["possible_answer"].items()}),
    "propositional_logic": lambda metadata: metadata["example_answer"],
    "rubiks_cube": lambda metadata: metadata["example_correct_answer"],
}
_MAX_BARREN = 50
_CHUNK = 500

Rule = Callable[[str, Mapping[str, Any]], bool]
"""A check of a reply against its reasoning-gym entry, before reasoning-gym's scorer sees the reply."""

MAX_EXPRESSION = 600
_SYMPY_TOKEN = re.compile(r"\s+|\d{1,9}(?:\.\d{1,6})?|\*\*|[-+*/(),]|[A-Za-z]+")
_SYMPY_NAMES = {"sin", "cos", "tan", "asin", "acos", "atan", "exp", "log", "sqrt", "pi"}
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def symbolic(reply: str, entry: Mapping[str, Any]) -> bool:
    """Allow numbers, one-letter symbols, + - * / **, parentheses and a few functions, small enough to evaluate.

    The product of all whole exponents is at most 1,000: "9**9**9" would not terminate.
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
    """Return the exact value of an expression of whole numbers, + - * / and parentheses.

    Raises:
        ValueError: anything else in it, too long, too deep, or a division by zero.
    """
    if len(expression) > MAX_EXPRESSION:
        raise ValueError("too long")

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise ValueError("not an arithmetic expression")

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(str(error)) from error


def _form(pattern: str) -> Rule:
    compiled = re.compile(pattern)
    return lambda reply, entry: compiled.fullmatch(reply) is not None


def _same_text(reply: str, entry: Mapping[str, Any]) -> bool:
    return normalise(reply) == normalise(entry["answer"])


def _same_words(reply: str, entry: Mapping[str, Any]) -> bool:
    return reply.casefold().split() == entry["answer"].casefold().split()


def _number(reply: str, entry: Mapping[str, Any]) -> bool:
    return strict_number(reply, entry["answer"]).value == 1.0


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
    "survo": _form(r"-?\d+(?:\s+-?\d+)*"),
    "time_intervals": _form(r"\d+(?: days)?|(?:\d+ days, )?\d+:\d\d(?::\d\d(?:\.\d+)?)?"),
}


def names() -> list[str]:
    """Return the offered data sets; none if reasoning-gym is not installed."""
    try:
        return sorted(set(_data_sets()) - set(REFUSED))
    except ConfigError:
        return []


def _data_sets() -> dict[str, Any]:
    optional("reasoning_gym", "'sigmix[tasks]'", "an rg: task")  # registers the data sets
    return optional("reasoning_gym.factory", "'sigmix[tasks]'", "an rg: task").DATASETS


class ReasoningGymTask(ProceduralTask):
    """One reasoning-gym data set.

    Args:
        dataset: its name.
        suffix: an instruction appended to the question, such as "Answer with the number only."
        partial: keep the scorer's partial marks. They reward a right answer within any sentence, so by default
            anything below full marks is 0; with them `validate` reports exactly that.
        allow_code: as in `get_task`; ``codeio`` requires it.
        options: fields of the data set's configuration, except seed and size.

    Raises:
        UnknownNameError: no such data set.
        ConfigError: an unknown or invalid option, a data set that is not offered, or no reasoning-gym.
    """

    default_n = 200
    patience_per_item = 3  # generators can be slow: a small space may lose its last items
    license = "generated by reasoning-gym (Apache-2.0)"

    def __init__(
        self, *, dataset: str, suffix: str = "", partial: bool = False, allow_code: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if dataset == "codeio" and not allow_code:
            raise ConfigError(
                "rg:codeio runs collected programs in this very process (some print, some write files)",
                remedy="--allow-code, from a folder where stray files do no harm",
            )
        data_sets = _data_sets()
        if dataset in REFUSED:
            raise ConfigError(f"rg:{dataset} is not offered: {REFUSED[dataset]}")
        if dataset not in data_sets:
            raise UnknownNameError("reasoning-gym data set", dataset, set(data_sets) - set(REFUSED))
        if not isinstance(suffix, str) or not isinstance(partial, bool):
            raise ConfigError(f"rg:{dataset}: suffix must be text and partial true or false")
        self.name = f"rg:{dataset}"
        self._dataset, self._suffix, self._partial = dataset, suffix, partial
        self._class, self._config = data_sets[dataset]
        fields = {field.name for field in dataclasses.fields(self._config)} - {"seed", "size"}
        for key in options:
            if key not in fields:
                valid = ", ".join([*sorted(fields), "suffix", "partial"])
                raise ConfigError(f"rg:{dataset} has no option {key!r}; it has {valid}")
        self._options = {
            key: tuple(value) if isinstance(value, list) and isinstance(getattr(self._config, key, None), tuple)
            else value
            for key, value in options.items()
        }  # fmt: skip
        self._rule = _rule(dataset, self._class)
        self._scorer = self._build(0)
        self.domain = self._scorer.category
        paragraph = " ".join((self._class.__doc__ or "").strip().split("\n\n")[0].split())
        self.description = paragraph.split(". ")[0] or f"reasoning-gym's {dataset}."

    def _build(self, seed: int) -> Any:
        with reraised(ConfigError, f"rg:{self._dataset} refuses its options {self._options}"):
            config = self._config(**self._options, seed=seed)
            if hasattr(config, "validate"):
                config.validate()
            return self._class(config)

    @functools.cached_property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        """16 to 512, from the first five answers: no answer has more tokens than characters."""
        longest = max(len(sample.gold) for (sample, _), _ in zip(self.stream(0), range(5), strict=False))
        return min(512, max(16, longest + 8))

    def stream(self, seed: int) -> Iterator[tuple[Sample, str]]:
        """Yield the items of one seeded data set after the other.

        Items that cannot be generated, or that do not get full marks for their own answer, are left out (see `notes`).

        Raises:
            DataError: 50 such items in a row.
        """
        chunk = barren = 0
        while True:
            # reasoning-gym seeds item i with seed + i, so neighbouring seeds would share nearly all items
            digest = hashlib.sha256(f"{self._dataset} {seed} {chunk}".encode()).digest()
            data = self._build(int.from_bytes(digest[:4], "big") // 2)
            for index in range(min(_CHUNK, len(data))):
                sample = self._sample(data, index)
                barren = 0 if sample else barren + 1
                if sample:
                    # the question alone: another suffix must not move an item to another split
                    yield sample, content_id(sample.meta["entry"]["question"])
                elif barren >= _MAX_BARREN:
                    raise DataError(
                        f"{self.name}: {barren} items in a row without an answer that its scorer accepts",
                        remedy="choose other options",
                    )
            chunk += 1

    def _sample(self, data: Any, index: int) -> Sample | None:
        try:
            with contextlib.redirect_stdout(io.StringIO()), _global_random(f"{data.seed} {index}"):
                entry = data[index]  # bf and codeio print; list_functions draws from the global generator
            gold = entry["answer"]
            if self._dataset in _EXAMPLES:
                gold = _EXAMPLES[self._dataset](entry["metadata"])
        except Exception:  # some generators fail on some seeds
            gold, entry = None, {}
        sample = None
        if isinstance(gold, str) and gold.strip():
            question = entry["question"].strip()
            sample = Sample.make(f"{question}\n{self._suffix}" if self._suffix else question, gold, entry=entry)
            sample = sample if self.score(sample, gold).value == 1.0 else None
        note = "left out items that could not be generated or where the scorer does not accept its own answer"
        if sample is None and note not in self.notes:
            self.notes.append(note)
        return sample

    def score(self, sample: Sample, reply: str) -> Score:
        """Return 1 for full marks of reasoning-gym's scorer on the stripped reply, else 0 (unless ``partial``)."""
        text, entry = final_part(reply).strip(), sample.meta["entry"]
        if not text:
            return Score(0.0, None, "an empty reply")
        if self._rule is not None and not self._rule(text, entry):
            return Score(0.0, text, "not in the form of an answer to this task")
        try:
            marks = float(self._scorer.score_answer(text, entry))
        except (MemoryError, OSError, ImportError) as error:
            return Score(None, text, f"the scorer failed: {type(error).__name__}: {error}")
        except Exception as error:
            # If the scorer can grade this entry's own answer, it works, and the reply is unreadable: wrong. (As
            # ungradable it would let a policy escape every penalty with a reply that makes the scorer raise.)
            why = f"{type(error).__name__}: {error}"
            if text != sample.gold.strip() and self.score(sample, sample.gold).value == 1.0:
                return Score(0.0, None, f"the scorer cannot read the reply: {why}")
            return Score(None, text, f"the scorer fails on its own answer: {why}")
        if not math.isfinite(marks):
            return Score(None, text, f"the scorer gave {marks}")
        value = min(1.0, max(0.0, marks)) if self._partial else float(marks >= 1.0)
        return Score(value, text, f"reasoning-gym gave {marks:.3g}, its answer is {sample.gold!r}")

    def wrong_replies(self, sample: Sample) -> list[str]:
        return [*super().wrong_replies(sample), f"{sample.gold} or not?", f"Either {sample.gold} or something else"]


@contextlib.contextmanager
def _global_random(seed: str) -> Iterator[None]:
    """Seed Python's global generator, and restore its state afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _rule(dataset: str, cls: type) -> Rule | None:
    """Return the rule for a data set; refuse a scorer that evaluates the reply as code without one."""
    if dataset in RULES:
        return RULES[dataset]
    source = inspect.getsource(cls.score_answer)  # type: ignore[attr-defined]
    if any(call in source for call in ("eval(", "exec(", "parse_expr(", "sympify(")):
        raise ConfigError(f"rg:{dataset} is not offered: its scorer may run the reply as code, and no rule guards it")
    return None
