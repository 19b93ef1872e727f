"""Names, specs, a user's file, plug-ins."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from sigmix.errors import ConfigError, TaskError, UnknownNameError
from sigmix.tasks import Task, get_task, register, task_names
from sigmix.tasks.registry import format_spec, parse_spec

FIXTURE = Path(__file__).parent / "fixtures" / "double.py"


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("a", {}), ("a?n=2", {"n": 2}), ("a?x=true&y=null", {"x": True, "y": None}), ("a?s=hello there",
        {"s": "hello there"}),
        ('a?s="2"', {"s": "2"}), ("a?s=a%26b%3Dc", {"s": "a&b=c"}), ("a?l=[1,2]", {"l": [1, 2]}), ("a?s=", {"s": ""}),
        ("a?f=0.5", {"f": 0.5}), ("a?s=50%25?", {"s": "50%?"}),
    ],
)  # fmt: skip
def test_specs_round_trip(spec, options):
    assert parse_spec(spec) == ("a", options)
    assert parse_spec(format_spec("a", options)) == ("a", options)


@pytest.mark.parametrize("spec", ["a?n", "a?=2", "a?n=1&n=2", "a?n=1&"])
def test_bad_specs(spec):
    with pytest.raises(ConfigError, match="option"):
        parse_spec(spec)


def test_name_is_canonical_and_gives_the_same_task():
    task = get_task("subtraction?negative=true&digits=1", digits=2)
    assert task.name == "subtraction?digits=2&negative=true"
    assert get_task(task.name).samples("test", 20) == task.samples("test", 20)


def test_unknown_name_lists_the_nearest():
    with pytest.raises(UnknownNameError, match="addition") as caught:
        get_task("additon")
    assert caught.value.exit_code == 2
    with pytest.raises(UnknownNameError, match="rg:chain_sum"):
        get_task("chain_sum")


def test_unknown_option_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"digit'.*digits, negative"):
        get_task("subtraction?digit=2")
    with pytest.raises(ConfigError, match="x"):
        get_task("spell?x=1")


def test_task_in_a_users_file():
    task = get_task(f"{FIXTURE}:double?digits=3")
    assert task.validate().ok
    assert task.name == f"{FIXTURE}:double?digits=3"
    assert get_task(task.name).samples("train", 5) == task.samples("train", 5)
    assert "double" not in task_names(families=False)


def test_users_file_may_reuse_a_name_and_define_a_class(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from sigmix.tasks import Sample, Score, Task, register\n"
        "class Mine(Task):\n"
        "    def __init__(self, word='a'):\n        super().__init__()\n        self.word = word\n"
        "    def samples(self, split, n=None, seed=0):\n        return [Sample.make(split + self.word, self.word)]\n"
        "    def score(self, sample, reply):\n        return Score.of(reply == sample.gold, reply)\n"
        "register('addition')(Mine)\n"
    )
    assert get_task(f"{file}:Mine?word=b").validate().ok
    assert type(get_task(f"{file}:addition")).__name__ == "Mine"
    assert type(get_task("addition")).__name__ == "SkillTask"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("1/0", TaskError, "ZeroDivisionError"), ("def f(:", TaskError, "SyntaxError"),
        ("import sigmix_no_such_module", TaskError, "sigmix_no_such_module"), ("x = 1", UnknownNameError, "broken"),
        ("from sigmix.tasks import register\nregister('t')(lambda: 3)", TaskError, "int"),
        ("from sigmix.tasks import register\nregister('a b')", TaskError, "a b"),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, text, error, match):
    file = tmp_path / "broken.py"
    file.write_text(text if "register(" in text and "a b" not in text else text + "\n")
    if "a b" in text:
        file.write_text(text + "(int)")
    with pytest.raises(error, match=match):
        get_task(f"{file}:t")


def test_missing_file(tmp_path):
    with pytest.raises(TaskError, match=r"none\.py"):
        get_task(f"{tmp_path}/none.py:t")


def test_a_name_is_taken_once():
    with pytest.raises(TaskError, match="addition"):
        register("addition")(Task)


class Point:
    """Stands for an installed entry point."""

    name, value = "plugged", "package:factory"

    def __init__(self, target):
        self.target = target

    def load(self):
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def test_plug_in(monkeypatch):
    target = lambda digits=1: get_task("addition", digits=digits)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(target)])
    task = get_task("plugged?digits=2")
    assert task.name == "plugged?digits=2"
    assert "plugged" in task_names(families=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point(ImportError("no such thing"))])
    with pytest.raises(TaskError, match="no such thing"):
        get_task("plugged")


def test_import_needs_no_heavy_library():
    code = (
        "import sys, sigmix.tasks as t; t.get_task('addition').validate(n=3); "
        "bad = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'math_verify', 'sympy'} & set(sys.modules); "
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
