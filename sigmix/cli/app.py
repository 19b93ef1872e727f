"""The typer application and the one place where errors become exit codes."""

from __future__ import annotations

import os
import sys

import typer

from sigmix.errors import SigmixError

app = typer.Typer(
    name="sigmix",
    help="Self-adaptive language models: experts that scale singular values, chosen and mixed per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        from sigmix import __version__

        typer.echo(f"sigmix {__version__}")
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    pass


def _commands() -> None:
    from sigmix.cli import admin, experts, measure, training, use

    for module in (use, training, measure, experts, admin):
        module.add(app)


def main() -> None:
    """Run the command line; never shows a traceback for an error that a user can mend."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch")
    _commands()
    try:
        app(standalone_mode=False)
    except SigmixError as error:
        _fail(str(error), error.exit_code)
    except typer.Exit as done:
        sys.exit(done.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own: an unknown option, a missing argument
            _fail(" ".join(error.format_message().split()), 2)
        if os.environ.get("SIGMIX_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} -> set SIGMIX_TRACEBACK=1 to see where", 1)


def _fail(message: str, code: int) -> None:
    print("sigmix: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
