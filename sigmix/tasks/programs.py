"""Tasks with programs as replies: MBPP and HumanEval. Grading runs the reply, so it requires ``allow_code``."""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
import warnings
from pathlib import Path
from typing import ClassVar

from sigmix.tasks.base import Sample, Score, final_part
from sigmix.tasks.benchmarks import SAME_NAMES, BenchmarkTask
from sigmix.tasks.data import Row
from sigmix.tasks.registry import register
from sigmix.tasks.sandbox import require_permission, run_tests

FENCE = "```python\n{}\n```"
MAX_ENDS = 8  # fences that are tried as the end of a block
PYTHON = ("python", "py", "python3", "")
_FENCE = re.compile(
    r"(?P<indent>[ \t>]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)"  # a block may be in a list or a quotation
    r"(?P<marks>`{3,}|~{3,})[ \t{.]*(?P<language>[\w+#-]*)(?P<rest>.*)"
)


def extract_code(reply: str, name: str | None = None) -> str:
    """Return the program in a reply: its last Python block that defines ``name``, after what other blocks define.

    Blocks are fenced by three or more backticks or tildes, indented or not; a fence inside a string does not end a
    block, and a block may lack its end. Without a block that defines ``name``: all Python blocks, joined. Without
    blocks: the whole reply. Drafts (see `final_part`) do not count.
    """
    reply = final_part(reply.replace("\r\n", "\n"))
    blocks = _blocks(reply)
    python = [code for language, code in blocks if language in PYTHON] or [code for _, code in blocks]
    if name is not None:
        pattern = re.compile(rf"^(?:(?:async )?def {name}\b|class {name}\b|{name}\s*(?:=(?!=)|:))", re.MULTILINE)
        defining = [code for code in map(textwrap.dedent, python) if pattern.search(code)]
        if defining:
            last = [code for code in defining if _parse(code) is not None or code is defining[0]][-1]
            others = [_definitions(code) for code in map(textwrap.dedent, python) if code != last]
            return "\n\n".join([*filter(None, others), last])
    tagged = [code for language, code in blocks if language and language in PYTHON]
    return "\n\n".join(tagged or python or [reply]).strip("\n")


def _blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, code) of every fenced block."""
    blocks: list[tuple[str, str]] = []
    lines, at = text.split("\n"), 0
    while at < len(lines):
        fence, at = _FENCE.fullmatch(lines[at]), at + 1
        if fence is None or (fence["marks"][0] == "`" and "`" in fence["rest"]):
            continue
        end = re.compile(rf"[\s>]*{fence['marks'][0]}{{{len(fence['marks'])},}}\s*")
        margin = len(fence["indent"])
        ends = (number for number in range(at, len(lines)) if end.fullmatch(lines[number]))
        first = next(ends, len(lines))
        tried = itertools.chain([first], itertools.islice(ends, MAX_ENDS - 1))
        # an end inside a string leaves code that does not parse
        stop = next((n for n in tried if _parse(_without_margin(lines[at:n], margin)) is not None), first)
        language, code = fence["language"].lower(), _without_margin(lines[at:stop], margin).strip("\n")
        if stop == len(lines) and _parse(code) is None:  # an end within a line
            code = code.partition(fence["marks"])[0]
        blocks += _blocks(code) if language in ("markdown", "md") else [(language, code)]
        at = stop + 1
    return blocks


def _without_margin(lines: list[str], margin: int) -> str:
    return "\n".join(re.sub(rf"^[ \t>]{{0,{margin}}}", "", line) for line in lines)


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _definitions(code: str) -> str:
    """Return the imports, functions, classes and constants of a block, without what it runs."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = _parse(code)
    body = tree.body if tree is not None else []
    return "\n".join(ast.unparse(one) for one in body if isinstance(one, kept) or _is_constant(one))


def _is_constant(statement: ast.stmt) -> bool:
    """Return whether a statement assigns a value that is computed from literals alone."""
    if not isinstance(statement, ast.Assign) or not all(isinstance(target, ast.Name) for target in statement.targets):
        return False
    return not any(isinstance(node, ast.Name | ast.Call) for node in ast.walk(statement.value))


def score_program(program: str, tests: str) -> Score:
    """Return 1 if all of ``tests`` pass after ``program``, 0 if not, None if the sandbox itself failed."""
    if not program.strip():
        return Score(0.0, None, "no program")
    outcome = run_tests(program, tests)
    if outcome.kind == "sandbox":
        return Score(None, program, f"the sandbox failed: {outcome.detail}")
    return Score.of(outcome.kind == "passed", program, f"{outcome.kind}: {outcome.detail}".rstrip(": "))


class ProgramTask(BenchmarkTask):
    """``meta`` has the ``tests`` that must pass, and in ``entry`` the name of the function."""

    domain = "code"
    max_new_tokens = 320
    costly = True

    def __init__(self, data_dir: Path | None = None, allow_code: bool = False) -> None:
        super().__init__(data_dir)
        self.allow_code = allow_code

    def score(self, sample: Sample, reply: str) -> Score:
        require_permission(self.allow_code, f"grading {self.name or type(self).__name__}")
        return score_program(self.program(sample, extract_code(reply, sample.meta["entry"])), sample.meta["tests"])

    def program(self, sample: Sample, code: str) -> str:
        """Return the program to run for the code in a reply."""
        return code

    def wrong_replies(self, sample: Sample) -> list[str]:
        name = sample.meta["entry"]
        stub = f"def {name}(*args, **kwargs):\n    return None"
        cheats = [
            stub, f"{stub}\nprint('passed')\nprint('OK')", f"import os\n{stub}\nos._exit(0)",
            f"{stub}\nraise SystemExit(0)",
        ]  # fmt: skip
        text = f"The function {name} would sort the list and return it."
        return [sample.prompt, *(FENCE.format(cheat) for cheat in cheats), text]


@register("mbpp")
class MBPP(ProgramTask):
    """Austin et al. 2021, arXiv:2108.07732.

    Splits by task_id as published: test 11-510, validation 511-600, train 601-974; 1-10 are the authors' prompts and
    are left out. The prompt shows the first test, the only place with the function's name and arguments; grading uses
    all tests.
    """

    description = "Short Python functions from a sentence (MBPP)."
    license = "CC BY 4.0"
    files: ClassVar = {"all": "mbpp/mbpp.jsonl"}
    hub, hub_configs = "google-research-datasets/mbpp", ("full",)
    hub_splits: ClassVar = SAME_NAMES

    def sample(self, row: Row) -> Sample | None:
        number = row.get("task_id", kind=int)
        if number <= 10:
            return None
        tests = row.get("test_list", kind=list)
        if not tests:
            raise row.bad("no tests")
        code = row.get("code", kind=str).replace("\r\n", "\n")
        setup = str(row.data.get("test_setup_code") or "")
        text = row.get("text", kind=str).strip()
        prompt = f"{text}\nIt must pass this test:\n{tests[0]}\nReply with one Python code block."
        entry = _tested_function("\n".join(tests), code)
        return Sample.make(prompt, FENCE.format(code), number=number, tests="\n".join([setup, *tests]), entry=entry)

    def divide(self, tables: dict[str, list[Sample]]) -> dict[str, list[Sample]]:
        divided: dict[str, list[Sample]] = {"train": [], "validation": [], "test": []}
        for sample in (sample for samples in tables.values() for sample in samples):
            number = sample.meta["number"]
            divided["test" if number <= 510 else "validation" if number <= 600 else "train"].append(sample)
        return divided


@register("humaneval")
class HumanEval(ProgramTask):
    """Chen et al. 2021, arXiv:2107.03374. A test set only."""

    description = "Python functions to complete from signature and docstring (HumanEval)."
    license = "MIT"
    files: ClassVar = {"test": "humaneval/HumanEval.jsonl"}
    hub = "openai/openai_humaneval"
    hub_splits: ClassVar = {"test": "test"}
    only_test = True

    def sample(self, row: Row) -> Sample:
        head, name = row.get("prompt", kind=str), row.get("entry_point", kind=str)
        instruction = "Complete this Python function. Reply with the whole function in one code block."
        prompt = f"{instruction}\n{FENCE.format(head)}"
        tests = f"{row.get('test', kind=str)}\ncheck({name})"
        return Sample.make(
            prompt, FENCE.format(head + row.get("canonical_solution", kind=str)), tests=tests, entry=name, head=head
        )

    def program(self, sample: Sample, code: str) -> str:
        """Return the prompt's imports and helpers, followed by the reply: a whole function or its body alone."""
        head = sample.meta["head"].rstrip() + "\n"
        return f"{head}    pass\n\n{code}" if f"def {sample.meta['entry']}" in code else head + code


def _tested_function(tests: str, code: str) -> str:
    """Return the function that the tests call and that the published solution defines."""
    defined = set(re.findall(r"def\s+(\w+)", code))
    return next((name for name in re.findall(r"(\w+)\s*\(", tests) if name in defined), "solution")
