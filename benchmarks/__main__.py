"""``python -m benchmarks NAME --json``: compare sigmix with named peers on this machine."""

from __future__ import annotations

import typer

import benchmarks
from benchmarks.harness import text
from sigmix.cli import run as run_app
from sigmix.cli._console import emit
from sigmix.cli._options import JSON
from sigmix.errors import ConfigError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(epilog="Example: python -m benchmarks train-step --json")
def bench(
    name: str = typer.Argument(None, help="Name of a benchmark; see --list."),
    as_json: bool = JSON,
    repeats: int = typer.Option(None, min=1, help="Rounds that count. Default: the benchmark's own."),
    dtype: str = typer.Option(None, help="Such as float32. Default: the faster one on this machine."),
    stream: bool = typer.Option(False, "--stream", help="decompose: streamed against loading the whole model."),
    list_: bool = typer.Option(False, "--list", help="List the benchmarks and exit."),
) -> None:
    """Compare sigmix with named peers on this machine: ratios, and the figures behind them."""
    if list_:
        emit(benchmarks.BENCHES, as_json, "\n".join(f"{key}: {text}" for key, text in benchmarks.BENCHES.items()))
        return
    if name is None:
        raise ConfigError("no benchmark named", remedy=f"give one of {', '.join(benchmarks.BENCHES)}")
    result = benchmarks.run(name, repeats=repeats, dtype=dtype, **({"stream": True} if stream else {}))
    emit(result, as_json, "" if as_json else text(result))


if __name__ == "__main__":
    run_app(app, "benchmarks")
