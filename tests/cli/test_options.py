"""Command-line options that are generated from a class."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import typer

from sigmix import cli
from sigmix.cli._options import generated_command, options_from

pytest_plugins = ["helpers_cli"]


@dataclasses.dataclass
class Config:
    steps: int = dataclasses.field(default=3, metadata={"help": "Number of steps."})
    rate: float | None = dataclasses.field(default=None, metadata={"help": "Rate."})
    target_modules: str | list[str] = dataclasses.field(default="all", metadata={"help": "T.", "option": "--targets"})
    kind: Literal["one", "two"] = dataclasses.field(default="one", metadata={"help": "Kind."})
    packed: bool = dataclasses.field(default=False, metadata={"help": "Pack."})
    folders: list[Path] = dataclasses.field(default_factory=list, metadata={"help": "Folders."})


@pytest.fixture
def command(capsys):
    """``command("--steps", "5")`` -> exit code, keywords of the function, stdout, stderr."""
    calls = []

    def function(out: str = typer.Option("here", help="Output."), **fields: object) -> None:
        calls.append((out, fields))

    application = typer.Typer(rich_markup_mode=None, add_completion=False)
    application.callback()(lambda: None)
    application.command("go", cls=generated_command(function, lambda: Config), help="Go.")(lambda: None)

    def call(*arguments):
        code = 0
        try:
            cli.run(application, "sigmix", ["go", *arguments])
        except SystemExit as left:
            code = left.code
        return code, calls.pop() if calls else None, *capsys.readouterr()

    return call


def test_options_have_the_types_of_the_fields(command):
    code, (out, fields), _, _ = command(
        "--steps", "5", "--rate", "0.5", "--targets", "a,b", "--kind", "two", "--packed", "--folders", "x",
        "--folders", "y", "--out", "there",
    )  # fmt: skip
    assert (code, out) == (0, "there")
    assert fields == {
        "steps": 5, "rate": 0.5, "target_modules": "a,b", "kind": "two", "packed": True,
        "folders": [Path("x"), Path("y")],
    }  # fmt: skip


def test_options_that_are_not_given_are_none(command):
    _, (out, fields), _, _ = command()
    assert out == "here"
    assert not any(fields.values())


def test_help_shows_texts_choices_and_defaults(command):
    code, called, out, _ = command("--help")
    assert (code, called) == (0, None)
    for text in ("Go.", "Output.", "--steps", "Number of steps. Default: 3.", "--targets", "one|two", "--no-packed"):
        assert text in out


def test_a_value_of_another_type_is_one_line(command):
    code, _, _, err = command("--steps", "many")
    assert code == 2
    assert "--steps" in err
    assert len(err.splitlines()) == 1


def test_every_setting_and_training_option_has_a_help_text():
    from sigmix.serve.settings import Settings
    from sigmix.train.config import TrainConfig

    for source in (Settings, TrainConfig):
        options = list(options_from(source))
        assert len(options) > 20
        assert all(option.default.help for option in options)


@pytest.mark.parametrize("name", ["train", "serve"])
def test_commands_have_the_options_of_their_class(run, name):
    from sigmix.serve.settings import Settings
    from sigmix.train.config import TrainConfig

    text = run(name, "--help").out
    source = {"train": TrainConfig, "serve": Settings}[name]
    for option in options_from(source):
        assert option.default.param_decls[0].split("/")[0] in text
