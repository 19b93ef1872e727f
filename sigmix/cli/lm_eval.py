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

from sigmix.cli import app
from sigmix.cli._console import emit, note
from sigmix.cli._options import BANK, BASIS, ENGINE, JSON, MIXTURE, QUANTIZATION, STRATEGY
from sigmix.errors import ConfigError, OutputError, SigmixError
from sigmix.utils.io import check_writable
from sigmix.utils.optional import optional

HELP = """Run tasks of EleutherAI's evaluation harness on a base model or a mixture, or with --mix auto.

All other options are passed to the harness: --tasks, --num_fewshot, --limit, --apply_chat_template, --include_path,
--output_path, --log_samples, --gen_kwargs, --batch_size … (`lm-eval run --help`). --model_args accepts dtype, device,
form, max_length and decisions=FILE.jsonl."""

LISTS = "lm-eval ls tasks lists them; or give a YAML file of your own"


@app.command(
    "lm-eval", help=HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: sigmix lm-eval --tasks arc_easy --limit 100 --apply_chat_template --mix compare-numbers",
)  # fmt: skip
def lm_eval(
    ctx: typer.Context,
    base: str = typer.Option(None, help="Base model: smollm2-135m, a hub name, a folder or a .gguf file."),
    mix: str = typer.Option(None, help=f"Mixture: {MIXTURE}, or auto. Default: base."),
    strategy: str = typer.Option(None, help=STRATEGY.help),
    bank: Path = BANK, quantization: str = QUANTIZATION,
    basis: str = typer.Option(None, help=BASIS.help),
    engine: str = typer.Option(None, metavar=ENGINE.metavar, help=ENGINE.help),
    as_json: bool = JSON,
) -> None:  # fmt: skip
    model_args = {
        "base": base, "mix": mix, "strategy": strategy, "bank": None if bank is None else str(bank),
        "quantization": quantization, "basis": basis, "engine": engine,
    }  # fmt: skip
    words = ctx.args[1:] if ctx.args[:1] == ["run"] else ctx.args
    if words and not words[0].startswith("-"):
        raise ConfigError(f"unexpected {words[0]!r}: this command only runs tasks", remedy="give --tasks")
    if not words:
        raise ConfigError("no --tasks", remedy=LISTS)
    os.environ.setdefault("LMEVAL_LOG_LEVEL", "ERROR")
    optional("lm_eval", "'sigmix[lm-eval]'", "sigmix lm-eval")
    from sigmix.integrations.lm_eval import SigmixLM

    with tempfile.TemporaryDirectory() as temporary, _harness_arguments(["run", *words], SigmixLM):
        harness, options, place = _options({name: value for name, value in model_args.items() if value is not None})
        if place is None:
            options.output_path = temporary
        folder = Path(place or temporary)
        check_writable(folder if folder.suffix == ".json" else folder / "results.json")
        before = set(_results(folder))
        with contextlib.redirect_stdout(io.StringIO() if as_json else sys.stdout):
            harness.execute(options)
        new = sorted(set(_results(folder)) - before, key=lambda path: path.stat().st_mtime)
        if not new:
            raise OutputError(f"the harness wrote no results to {place}", remedy="give another --output_path")
        figures = json.loads(new[-1].read_text(encoding="utf-8"))
    facts = figures["config"]["sigmix"]
    text = f"requests: {', '.join(f'{one} {count}' for one, count in facts['mixes'].items())}"
    if "strategy" in facts:
        labels = ", ".join(f"{label} {count}" for label, count in facts["labels"].items())
        text += f"; {facts['contexts']} decided by {facts['strategy']}: {labels}"
    emit(figures, as_json, text)
    if facts["truncated"] and not as_json:
        note(f"{facts['truncated']} requests were longer than the context and truncated on the left")


def _options(model_args: dict[str, Any]) -> tuple[Any, argparse.Namespace, str | None]:
    """Return the harness, its options parsed from `sys.argv`, and its output path.

    As in the harness, options on the command line override those of its ``--config`` file. ``model_args`` override
    both, and our defaults apply where neither gives a value.

    Raises:
        ConfigError: invalid options, another model, no tasks, or samples without an output path.
    """
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging, simple_parse_args_string

    setup_logging()
    harness = HarnessCLI()
    options = harness.parse_args()
    file = EvaluatorConfig.load_yaml_config(options.config) if options.config else {}
    given = file | {name: value for name, value in vars(options).items() if value is not None and value is not False}

    def pairs(arguments: Any) -> dict[str, Any]:
        return simple_parse_args_string(arguments) if isinstance(arguments, str) else arguments or {}

    if (model := given.get("model") or "sigmix") != "sigmix":
        raise ConfigError(f"the model must be sigmix, not {model!r}", remedy="use lm-eval for its other models")
    if not given.get("tasks"):
        raise ConfigError("no --tasks", remedy=LISTS)
    for option, lowest in (("limit", 0), ("num_fewshot", -1)):  # exclusive
        if (number := given.get(option)) is not None and not number > lowest:
            raise ConfigError(f"--{option} must be above {lowest}, not {number}")
    place = given.get("output_path") or pairs(given.get("hf_hub_log_args")).get("output_path")
    if place is None and (name := next((one for one in ("log_samples", "predict_only") if given.get(one)), None)):
        raise ConfigError(f"--{name} needs an output path", remedy="add --output_path FOLDER")
    options.batch_size = given.get("batch_size") or "auto"
    options.model = "sigmix"
    options.model_args = {**pairs(file.get("model_args")), **pairs(options.model_args), **model_args}
    return harness, options, place


def _results(place: Path) -> Iterator[Path]:
    """Yield the harness's result files at an --output_path, a folder or a name ending in .json."""
    if place.suffix == ".json":
        return place.parent.glob(f"{place.stem}_*.json")
    return place.rglob("results_*.json")


@contextlib.contextmanager
def _harness_arguments(words: list[str], model: Any) -> Iterator[None]:
    """Set the harness's command line, and raise its complaints about it as `ConfigError`."""

    def fail(parser: argparse.ArgumentParser, message: str) -> None:
        raise ConfigError(message, remedy="lm-eval run --help")

    argv, sys.argv = sys.argv, ["sigmix lm-eval", *words]
    error, argparse.ArgumentParser.error = argparse.ArgumentParser.error, fail  # type: ignore[method-assign,assignment]
    instances = model.instances
    try:
        yield
    except SigmixError:
        raise
    except (ValueError, TypeError, OSError, KeyError, StopIteration) as failure:
        if isinstance(failure, StopIteration) or "did not find any docs" in str(failure):
            raise ConfigError("lm-eval: a task has no documents", remedy="check its data files and split") from failure
        if model.instances > instances and not isinstance(failure, OSError):
            raise  # the evaluation itself failed
        raise ConfigError(f"lm-eval: {failure}") from failure
    finally:
        sys.argv, argparse.ArgumentParser.error = argv, error  # type: ignore[method-assign]
