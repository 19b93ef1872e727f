"""The application: help everywhere, and errors that become exit codes and one line."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from unittest import mock

import pytest
import typer

from sigmix import cli
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
    cli.load_commands()
    paths = list(every_command(typer.main.get_command(cli.app)))
    mine = "demo generate chat eval tasks experts doctor cache".split()
    assert {path[0] for path in paths} >= {*mine, "train"}
    for path in paths:
        done = run(*path, "--help")
        assert done.code == 0, path
        assert "Example: sigmix " in done.out, path
        assert not done.err, path


def test_experts_in_examples_are_there(run):
    """What the help shows can be typed as it stands."""
    cli.load_commands()
    named = set()
    for path in every_command(typer.main.get_command(cli.app)):
        example = run(*path, "--help").out.partition("Example: ")[2].replace("\n", " ")
        for mix in re.findall(r"--(?:mix|expert) (\S+)", example):
            named |= set() if mix.endswith(".json") else set(Mix.parse(mix).weights)
        named |= {name for found in re.findall(r"experts (?:show|diff) ([a-z -]+)", example) for name in found.split()}
    assert len(named) >= 2
    assert named <= set(Bank.bundled())


@pytest.mark.parametrize("arguments", [("generate", "--help"), ("--version",)])
def test_help_needs_no_torch(arguments):
    """Only the commands themselves import what is heavy."""
    code = "import sys; sys.modules.update(torch=None, transformers=None, peft=None)\n"  # importing one would fail
    command = [sys.executable, "-c", code + "from sigmix.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sigmix" in done.stdout


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


def exit_code(application):
    with pytest.raises(SystemExit) as left:
        cli.run(application, "sigmix", ["fail"])
    return left.value.code


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
        (OSError(errno.ENOSPC, "No space left on device"), 1, "the output: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
    ],
)
def test_failures(capsys, error, code, line):
    broken = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    broken.callback()(lambda: None)
    broken.command("fail")(failing(error))
    assert exit_code(broken) == code
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert line in err[0]


def test_the_exit_code_of_a_command_is_kept():
    broken = typer.Typer(rich_markup_mode=None)
    broken.callback()(lambda: None)
    broken.command("fail")(failing(typer.Exit(3)))
    assert exit_code(broken) == 3


@pytest.mark.slow
@pytest.mark.parametrize("command", [("experts", "list"), ("generate", "hi", "--max-new-tokens", "2"), ("serve",)])
def test_nothing_but_the_output_is_printed(home, tmp_path, command):
    """torchao, bitsandbytes and torch log about kernels on import; none of it reaches stderr."""
    options = ["--bank", home.bank] + ([] if command[0] == "experts" else ["--base", home.base])
    if command[0] == "serve":
        options += ["--state", tmp_path, "--port", "-1"]  # ends after its imports
    environment = {**os.environ, "SIGMIX_CACHE": str(home.cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "sigmix", *command, *map(str, options)], env=environment, capture_output=True, text=True
    )
    if command[0] == "serve":
        assert done.returncode == 2
        assert done.stderr.startswith("sigmix: setting port")
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0
        assert done.stderr == ""
        assert done.stdout


@pytest.mark.slow
def test_bitsandbytes_is_imported_only_for_a_quantized_base(home):
    pytest.importorskip("bitsandbytes")
    code = (
        "import sys; from sigmix.cli import main\n"
        "try: main()\n"
        "finally: print('bitsandbytes.functional' in sys.modules, file=sys.stderr)"
    )
    environment = {**os.environ, "SIGMIX_CACHE": str(home.cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, "generate", "hi", "--base", home.base, "--max-new-tokens", "2"]
    for options, loaded in (([], "False"), (["--quantization", "nf4"], "True")):
        done = subprocess.run([*map(str, command), *options], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.split() == [loaded]


@pytest.mark.parametrize(
    ("given", "count"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)]
)
def test_the_spin_count_is_set_unless_the_user_chose(monkeypatch, given, count):
    monkeypatch.setattr("sys.argv", ["sigmix", "--version"])
    with mock.patch.dict(os.environ, clear=True):
        os.environ.update(given)
        cli.main()
        assert os.environ.get("GOMP_SPINCOUNT") == count
