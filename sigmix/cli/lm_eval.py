"""`sigmix lm-eval`: EleutherAI's evaluation harness with sigmix as its model."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import note
from sigmix.cli._options import BASIS, JSON, QUANTIZATION

HELP = """Run tasks of EleutherAI's evaluation harness on a base, a mix, or whatever each request needs (--mix auto).

Every other option is the harness's own and goes to it as it is: --tasks, --num_fewshot, --limit, --apply_chat_template,
--include_path, --output_path, --log_samples, --gen_kwargs, --batch_size … (`lm-eval run --help`). More about the model
goes into --model_args: dtype, device, form, max_length, decisions=FILE.jsonl."""


LISTS = "lm-eval ls tasks lists them; a YAML file of your own will do too"


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
    quantization: str = QUANTIZATION,
    basis: str = typer.Option(None, help=BASIS.help),
    as_json: bool = JSON,
) -> None:
    from sigmix.errors import ConfigError

    given = {
        "base": base, "mix": mix, "strategy": strategy, "bank": None if bank is None else str(bank),
        "quantization": quantization, "basis": basis,
    }  # fmt: skip
    words = list(ctx.args)
    if words[:1] == ["run"]:
        words = words[1:]
    if words and not words[0].startswith("-"):
        raise ConfigError(f"unexpected {words[0]!r}: this command runs tasks only", remedy="give --tasks")
    if not words:
        raise ConfigError("no --tasks", remedy=LISTS)
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")  # its notes would bury ours; the harness's own variable
    try:
        from sigmix.integrations.lm_eval import SigmixLM
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs the package {error.name}, which is not installed", remedy="pip install 'sigmix[lm-eval]'"
        ) from error
    with tempfile.TemporaryDirectory() as folder, _as_ours(["run", *words], SigmixLM):
        harness, asked, place = _asked({name: value for name, value in given.items() if value is not None})
        if place is None:
            asked.output_path = folder
        before = set(_results(Path(place or folder)))
        with contextlib.redirect_stdout(io.StringIO() if as_json else sys.stdout):
            harness.execute(asked)
        fresh = sorted(set(_results(Path(place or folder))) - before, key=lambda path: path.stat().st_mtime)
        if not fresh:
            from sigmix.errors import OutputError

            raise OutputError(f"the harness wrote no results to {place}", remedy="give another --output_path")
        figures = json.loads(fresh[-1].read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(figures, ensure_ascii=False))
        return
    _tell(figures["config"]["sigmix"])


def _asked(given: dict[str, Any]) -> tuple[Any, argparse.Namespace, str | None]:
    """The harness's command line, what it reads from its own words (`sys.argv`), and where results are wanted.

    Its own words go before those of its ``--config``, as it has it; then come our defaults, which are not put in the
    place of either. ``given``: model arguments that our own options say.

    Raises:
        ConfigError: words that the harness does not take, another model, no tasks, samples without a place.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging, simple_parse_args_string

    from sigmix.errors import ConfigError

    setup_logging()
    harness = HarnessCLI()
    asked = harness.parse_args()
    file = EvaluatorConfig.load_yaml_config(asked.config) if asked.config else {}

    def wanted(name: str) -> Any:
        return getattr(asked, name, None) or file.get(name)

    def pairs(held: Any) -> dict[str, Any]:
        return simple_parse_args_string(held) if isinstance(held, str) else held or {}

    model = wanted("model") or "sigmix"
    if model != "sigmix":
        raise ConfigError(f"the model is sigmix here, not {model!r}", remedy="run lm-eval itself for its other models")
    if not wanted("tasks"):
        raise ConfigError("no --tasks", remedy=LISTS)
    place = wanted("output_path") or pairs(wanted("hf_hub_log_args")).get("output_path")
    if place is None:
        for name in ("log_samples", "predict_only"):
            if wanted(name):
                raise ConfigError(f"--{name} needs a place for what it keeps", remedy="add --output_path FOLDER")
    if not wanted("batch_size"):
        asked.batch_size = "auto"
    asked.model, asked.model_args = "sigmix", {**pairs(file.get("model_args")), **pairs(asked.model_args), **given}
    return harness, asked, place


def _results(place: Path) -> Iterator[Path]:
    """Result files of the harness at an --output_path, a folder or a name ending in .json."""
    if place.suffix == ".json":
        return place.parent.glob(f"{place.stem}_*.json")
    return place.rglob("results_*.json")


@contextlib.contextmanager
def _as_ours(words: list[str], model: Any) -> Iterator[None]:
    """The harness reads these words as its command line, and its refusals become ours."""
    from sigmix.errors import ConfigError, SigmixError

    def refuse(parser: argparse.ArgumentParser, message: str) -> None:
        raise ConfigError(message, remedy="lm-eval run --help")

    before, sys.argv = sys.argv, ["sigmix lm-eval", *words]
    error, argparse.ArgumentParser.error = argparse.ArgumentParser.error, refuse  # type: ignore[method-assign,assignment]
    made = model.made
    try:
        yield
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
