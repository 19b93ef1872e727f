"""Command line of sigmix. Commands import torch when they run, so that ``sigmix --help`` stays fast.

Exit codes: 0 success, 1 failure, 2 invalid input (one line on stderr, no traceback), 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

import typer

from sigmix.errors import SigmixError

SPIN_COUNT = "2000"
"""Iterations that an OpenMP thread spins at a barrier. libgomp's default lets decoding collapse beside another busy
process; measured by ``python -m benchmarks neighbour``."""

COMMANDS = "demo generate chat data train adapt serve eval lm_eval experts export cache doctor".split()

app = typer.Typer(
    name="sigmix",
    help="Self-adaptive language models: experts that scale singular values, chosen and mixed per request.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Example: sigmix demo",
)


def _version(requested: bool) -> None:
    if requested:
        from sigmix import __version__

        typer.echo(f"sigmix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line of sigmix."""
    load_commands()
    run(app, "sigmix")


def load_commands() -> None:
    """Import the modules that add commands to `app`."""
    for name in COMMANDS:
        importlib.import_module(f"sigmix.cli.{name}")


def run(application: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a typer application; print errors as one line on stderr and exit with their exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read by libgomp when torch is imported
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|torch|peft")
    _quiet_imports()
    gc.set_threshold(10_000)  # passes at the default take a fifth of the time of importing PEFT
    try:
        code = application(arguments, prog_name=name, standalone_mode=False)
        if code == 130:  # typer's code for Ctrl-C
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
        if hasattr(error, "format_message"):  # usage errors of click
            _fail(error.format_message(), 2)
        if os.environ.get("SIGMIX_TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:  # of stdout, if there is no name
            _fail(f"{error.filename or 'the output'}: {error.strerror}", 1)
        _fail(f"{type(error).__name__}: {error} -> set SIGMIX_TRACEBACK=1 for a traceback", 1)


def _quiet_imports() -> None:
    """Keep logs of optional backends off stderr, and import bitsandbytes when it is first used.

    transformers imports torchao wherever it is installed, and PEFT imports bitsandbytes; both log missing kernels for
    other machines on import, and torch logs torchao's use of pytree. bitsandbytes alone takes a tenth of the start.
    """
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "bitsandbytes" not in sys.modules and _LazyBitsandbytes not in sys.meta_path:
        sys.meta_path.insert(0, _LazyBitsandbytes)


class _LazyBitsandbytes:
    """Finder of the package bitsandbytes, the module of which is executed on the first access to an attribute."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "bitsandbytes":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def _fail(message: str, code: int) -> None:
    print("sigmix: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
