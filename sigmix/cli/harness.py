"""`sigmix lm-eval`: EleutherAI's evaluation harness with sigmix as its model."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from sigmix.cli.shared import JSON, note

HELP = """Run tasks of EleutherAI's evaluation harness on a base, a mix, or whatever each request needs (--mix auto).

Every other option is the harness's own and goes to it as it is: --tasks, --num_fewshot, --limit, --apply_chat_template,
--include_path, --output_path, --log_samples, --gen_kwargs, --batch_size … (`lm-eval run --help`). More about the model
goes into --model_args: dtype, device, form, max_length, decisions=FILE.jsonl."""


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(
        "lm-eval", help=HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        epilog="Example: sigmix lm-eval --tasks arc_easy --limit 100 --apply_chat_template --mix larger",
    )(lm_eval)  # fmt: skip


def lm_eval(
    ctx: typer.Context,
    base: str = typer.Option(None, help="Base: smollm2-135m, a hub name, a folder or a .gguf file."),
    mix: str = typer.Option(None, help="a:0.7+b:0.3, a name, a .json file, or auto. Default: base."),
    strategy: str = typer.Option(None, help="How auto chooses: A (prompt), B (classifier), D (probe), or auto."),
    bank: Path = typer.Option(None, help="Folder of experts. Default: the bundled bank."),
    as_json: bool = JSON,
) -> None:
    from sigmix.errors import ConfigError

    given = {"base": base, "mix": mix, "strategy": strategy, "bank": None if bank is None else str(bank)}
    model = {name: value for name, value in given.items() if value is not None}
    words = list(ctx.args)
    if words[:1] == ["run"]:
        words = words[1:]
    _check(words)
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")  # its notes would bury ours; the harness's own variable
    try:
        from sigmix.integrations.lm_eval import SigmixLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs the package {error.name}, which is not installed", remedy="pip install 'sigmix[lm-eval]'"
        ) from error
    if not any(word.split("=")[0] in ("--batch_size", "-b") for word in words):
        words += ["--batch_size", "auto"]
    words += ["--model", "sigmix", "--model_args", json.dumps(model)]
    with tempfile.TemporaryDirectory() as folder:
        place = _value(words, "--output_path", "-o")
        if place is None:
            words += ["--output_path", folder]
        before = set(_results(Path(place or folder)))
        with contextlib.redirect_stdout(io.StringIO() if as_json else sys.stdout):
            _harness(["run", *words], SigmixLM)
        fresh = sorted(set(_results(Path(place or folder))) - before, key=lambda path: path.stat().st_mtime)
        if not fresh:
            from sigmix.errors import OutputError

            raise OutputError(f"the harness wrote no results to {place}", remedy="give another --output_path")
        figures = json.loads(fresh[-1].read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
        return
    _tell(figures["config"]["sigmix"])


def _check(words: Sequence[str]) -> None:
    """Refuse what belongs to the harness's own command line."""
    from sigmix.errors import ConfigError

    if words and not words[0].startswith("-"):
        raise ConfigError(f"unexpected {words[0]!r}: this command runs tasks only", remedy="give --tasks")
    other = _value(words, "--model", "-M")
    if other not in (None, "sigmix"):
        raise ConfigError(f"the model is sigmix here, not {other!r}", remedy="run lm-eval itself for its other models")
    if not any(word.split("=")[0] in ("--tasks", "-t", "--config", "-C") for word in words):
        raise ConfigError("no --tasks", remedy="lm-eval ls tasks lists them; a YAML file of your own will do too")


def _value(words: Sequence[str], *names: str) -> str | None:
    """The word after an option, or after its "="; None without the option."""
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else words[place + 1] if place + 1 < len(words) else None
    return None


def _results(place: Path) -> Iterator[Path]:
    """Result files of the harness at an --output_path, a folder or a name ending in .json."""
    if place.suffix == ".json":
        return place.parent.glob(f"{place.stem}_*.json")
    return place.rglob("results_*.json")


def _harness(words: list[str], model: Any) -> None:
    """The harness's own command line, with its refusals as ours."""
    from lm_eval.__main__ import cli_evaluate

    from sigmix.errors import ConfigError, SigmixError

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise ConfigError(message, remedy="lm-eval run --help")

    before, sys.argv = sys.argv, ["sigmix lm-eval", *words]
    error, argparse.ArgumentParser.error = argparse.ArgumentParser.error, refuse  # type: ignore[method-assign,assignment]
    made = model.made
    try:
        cli_evaluate()
    except SigmixError:
        raise
    except (ValueError, TypeError, OSError, KeyError) as failure:
        if model.made > made:
            raise  # a failure of the work, not of what was asked
        raise ConfigError(f"the evaluation harness refuses: {failure}") from failure
    finally:
        sys.argv, argparse.ArgumentParser.error = before, error  # type: ignore[method-assign]


def _tell(told: dict[str, Any]) -> None:
    """What answered, under the harness's table."""
    mixes = ", ".join(f"{mix} {count}" for mix, count in told["mixes"].items())
    if "strategy" not in told:
        typer.echo(f"requests: {mixes}")
    else:
        labels = ", ".join(f"{label} {count}" for label, count in told["labels"].items())
        typer.echo(f"requests: {mixes}; {told['contexts']} decided by {told['strategy']}: {labels}")
    if told["truncated"]:
        note(f"{told['truncated']} requests were longer than the context and lost their beginning")
