"""The typer application and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import os
import re
import sys
from typing import Any

import typer

from sigmix.errors import SigmixError

app = typer.Typer(
    name="sigmix",
    help="Self-adaptive language models: experts that scale singular values, chosen and mixed per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Example: sigmix demo",
)


def _version(asked: bool) -> None:
    if asked:
        from sigmix import __version__

        typer.echo(f"sigmix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _commands() -> None:
    from sigmix.cli import (
        adapt,
        cache,
        decompose,
        demo,
        doctor,
        eval,
        experts,
        export,
        generate,
        lm_eval,
        serve,
        train,
    )  # fmt: skip

    modules = (demo, generate, train, adapt, serve, eval, lm_eval, experts, export, decompose, cache, doctor)
    if not app.registered_commands:  # main may run more than once in a process
        for module in modules:
            module.add(app)


def main() -> None:
    """Run the command line of sigmix."""
    _commands()
    run(app, "sigmix")


def run(application: typer.Typer, name: str) -> None:
    """Run a typer application; an error that a user can fix is one line on stderr and an exit code, no traceback."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch|peft")
    _hush()
    try:
        code = application(prog_name=name, standalone_mode=False)
        if code == 130:  # what typer makes of Ctrl-C
            _fail("interrupted", 130)
        if isinstance(code, int) and code:
            sys.exit(code)
    except SigmixError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())  # type: ignore[attr-defined]
            return
        if hasattr(error, "format_message"):  # click's own: an unknown option, a missing argument
            _fail(error.format_message() + _nearest(error), 2)
        if os.environ.get("SIGMIX_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} -> set SIGMIX_TRACEBACK=1 to see where", 1)


def _hush() -> None:
    """Keep what torchao and bitsandbytes log about kernels for other machines off stderr; peft imports both."""
    import logging

    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _nearest(error: Any) -> str:
    """The commands whose names come closest to an unknown one."""
    found = re.match(r"No such command '(.+)'", error.format_message())
    if found is None or getattr(error, "ctx", None) is None:
        return ""
    known = list(getattr(error.ctx.command, "commands", {}))
    near = difflib.get_close_matches(found[1], known, n=3, cutoff=0.5)
    return f" There are {', '.join(near or known)}."


def _fail(message: str, code: int) -> None:
    print("sigmix: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
