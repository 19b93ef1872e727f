"""The application: help everywhere, and errors that become exit codes and one line."""

from __future__ import annotations

import re
import sys

import pytest
import typer

from sigmix.cli import app as application
from sigmix.errors import DivergedError
from sigmix.experts.bank import Bank
from sigmix.experts.mix import Mix

pytest_plugins = ["helpers_cli"]


def every_command(group, path=()):
    """Paths of all commands and groups."""
    for name, command in sorted(group.commands.items()):
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))


def test_help_of_every_command_has_an_example(run):
    application._commands()
    paths = list(every_command(typer.main.get_command(application.app)))
    mine = "demo generate chat eval tasks experts doctor cache".split()
    assert {path[0] for path in paths} >= {*mine, "train"}
    for path in paths:
        done = run(*path, "--help")
        assert done.code == 0, path
        assert "Example: sigmix " in done.out, path
        assert not done.err, path


def test_experts_in_examples_are_there(run):
    """What the help shows can be typed as it stands."""
    application._commands()
    named = set()
    for path in every_command(typer.main.get_command(application.app)):
        example = run(*path, "--help").out.partition("Example: ")[2].replace("\n", " ")
        for mix in re.findall(r"--(?:mix|expert) (\S+)", example):
            named |= set() if mix.endswith(".json") else set(Mix.parse(mix).weights)
        named |= {name for found in re.findall(r"experts (?:show|diff) ([a-z -]+)", example) for name in found.split()}
    assert len(named) >= 2
    assert named <= set(Bank.bundled())


def test_help_needs_no_torch(run, monkeypatch):
    """Only the commands themselves import what is heavy."""
    for name in list(sys.modules):
        if name.startswith("sigmix."):
            monkeypatch.delitem(sys.modules, name)
    for name in ("torch", "transformers", "peft"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would fail
    assert run("generate", "--help").code == 0
    assert run("--version").code == 0


def test_no_arguments_show_the_help(run):
    done = run()
    assert done.code == 0
    assert "generate" in done.out
    assert "show" in run("experts").out


def test_version(run):
    from sigmix import __version__

    assert run("--version").out.strip() == f"sigmix {__version__}"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["generat"], "generate"),
        (["experts", "lst"], "list"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["eval"], "--task"),
        (["generate", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["generate", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_wrong_usage_is_one_line(refused, arguments, expected):
    assert expected in refused(*arguments)


def failing(error):
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    "error, code, line",
    [
        (DivergedError("NaN at step 3", remedy="lower --lr"), 1, "NaN at step 3 -> lower --lr"),
        (RuntimeError("several\nlines"), 1, "RuntimeError: several lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures(run, monkeypatch, error, code, line):
    broken = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    broken.callback()(lambda: None)
    broken.command("fail")(failing(error))
    monkeypatch.setattr(application, "app", broken)
    done = run("fail")
    assert done.code == code
    assert len(done.err) == 1
    assert line in done.err[0]


def test_a_commands_own_exit_code_counts(run, monkeypatch):
    broken = typer.Typer(rich_markup_mode=None)
    broken.callback()(lambda: None)
    broken.command("fail")(failing(typer.Exit(3)))
    monkeypatch.setattr(application, "app", broken)
    assert run("fail").code == 3
