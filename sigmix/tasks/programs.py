"""Tasks with programs as replies: MBPP and HumanEval. Grading runs the reply, so it requires ``allow_code``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from sigmix.errors import ConfigError
from sigmix.tasks.base import Sample, Score
from sigmix.tasks.benchmarks import SAME_NAMES, BenchmarkTask
from sigmix.tasks.data import Row
from sigmix.tasks.registry import register
from sigmix.tasks.sandbox import run_tests

FENCE = "```python\n{}\n```"
_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def extract_code(reply: str) -> str:
    """Return the first block fenced as Python, else the first closed fence, else the whole reply."""
    blocks = _BLOCK.findall(reply.replace("\r\n", "\n") + "\n")
    python = [code for language, code in blocks if language.lower() in ("python", "py", "python3")]
    return (python or [code for _, code in blocks] or [reply])[0].strip("\n")


def score_program(program: str, tests: str, *, stdin: str = "", timeout: float = 5.0) -> Score:
    """Return 1 if all of ``tests`` pass after ``program``, 0 if not, None if the sandbox itself failed."""
    if not program.strip():
        return Score(0.0, None, "no program")
    outcome = run_tests(program, tests, stdin=stdin, timeout=timeout)
    if outcome.kind == "sandbox":
        return Score(None, program, f"the sandbox failed: {outcome.detail}")
    return Score.of(outcome.kind == "passed", program, f"{outcome.kind}: {outcome.detail}".rstrip(": "))


def require_permission(allow_code: bool, task: str) -> None:
    """Raise `ConfigError` unless running programs is allowed."""
    if not allow_code:
        raise ConfigError(
            f"grading {task} runs the program in the reply, which is not allowed",
            remedy="read in sigmix/tasks/sandbox.py what the sandbox does not stop, then add --allow-code",
        )


class ProgramTask(BenchmarkTask):
    """``meta`` has the ``tests`` that must pass, and in ``entry`` the name of the function."""

    domain = "code"
    max_new_tokens = 320
    costly = True

    def __init__(self, data_dir: Path | None = None, allow_code: bool = False) -> None:
        super().__init__(data_dir)
        self.allow_code = allow_code

    def score(self, sample: Sample, reply: str) -> Score:
        require_permission(self.allow_code, self.name or type(self).__name__)
        return score_program(self.program(sample, extract_code(reply)), sample.meta["tests"])

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
        return Sample.make(
            prompt, FENCE.format(code), number=number, tests="\n".join([setup, *tests]), entry=entry
        )

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
