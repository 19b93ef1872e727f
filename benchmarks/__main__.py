"""``python -m benchmarks NAME --json``: compare sigmix with named peers on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from sigmix.cli import run as run_app
from sigmix.cli._console import emit
from sigmix.cli._options import JSON

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m benchmarks train-step --json")
def bench(
    name: str = typer.Argument(None, help="Which benchmark; --list names them."),
    as_json: bool = JSON,
    repeats: int = typer.Option(None, min=1, help="Rounds that count. Default: 3 for train-step, 1 for decompose."),
    dtype: str = typer.Option(None, help="Of train-step, such as float32. Default: the faster one on this machine."),
    plot: Path = typer.Option(None, help="PNG of what truncation found; no other benchmark draws one."),
    stream: bool = typer.Option(False, "--stream", help="decompose: streamed against loading the whole model."),
    list_: bool = typer.Option(False, "--list", help="Name the benchmarks and stop."),
) -> None:
    """Compare sigmix with named peers on this machine; ratios, with the figures that they came from."""
    from benchmarks import BENCHES, run

    if list_:
        emit(BENCHES, as_json, "\n".join(f"{key}: {what}" for key, what in BENCHES.items()))
        return
    if name is None:
        from sigmix.errors import ConfigError

        raise ConfigError("no benchmark named", remedy=f"give one of {', '.join(BENCHES)}")
    from benchmarks.harness import text

    if plot is not None:
        from sigmix.errors import ConfigError
        from sigmix.utils.io import check_writable

        if name != "truncation":
            raise ConfigError(f"{name} draws no plot", remedy="leave out --plot, or run truncation")
        check_writable(plot)
    result = run(name, repeats=repeats, dtype=dtype, **({"stream": True} if stream else {}))
    if plot is not None:
        from benchmarks.truncation import plot as draw

        draw(result, plot)
    emit(result, as_json, "" if as_json else text(result))


if __name__ == "__main__":
    run_app(app, "benchmarks")
