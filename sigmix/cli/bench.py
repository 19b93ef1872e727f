"""`sigmix bench`."""

from __future__ import annotations

import typer

from sigmix.cli.shared import JSON, emit


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix bench train-step --json")(bench)


def bench(
    name: str = typer.Argument(None, help="Which benchmark; --list names them."),
    as_json: bool = JSON,
    repeats: int = typer.Option(None, min=1, help="Rounds that count. Default: 3 for train-step, 1 for decompose."),
    dtype: str = typer.Option(None, help="Of train-step, such as float32. Default: the faster one on this machine."),
    list_: bool = typer.Option(False, "--list", help="Name the benchmarks and stop."),
) -> None:
    """Compare sigmix with named peers on this machine; ratios, with the figures that they came from."""
    from sigmix.bench import BENCHES, run

    if list_:
        emit(BENCHES, as_json, "\n".join(f"{key}: {what}" for key, what in BENCHES.items()))
        return
    if name is None:
        from sigmix.errors import ConfigError

        raise ConfigError("no benchmark named", remedy=f"give one of {', '.join(BENCHES)}")
    from sigmix.bench.harness import text

    result = run(name, repeats=repeats, dtype=dtype)
    emit(result, as_json, "" if as_json else text(result))
