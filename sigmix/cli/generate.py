"""`sigmix generate`: answers to prompts on the command line, in a file or on stdin."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import typer

from sigmix.cli import _options as shared
from sigmix.cli import app
from sigmix.cli._console import emit, note, working
from sigmix.cli._loading import open_engine, open_mixes, read_data_options
from sigmix.cli._options import generated_command
from sigmix.errors import ConfigError, DataError
from sigmix.utils.io import read_text

EXAMPLE = 'for example: sigmix generate "What is 17 + 25?"'


@shared.with_sampling
def generate(
    prompt: list[str] = typer.Argument(None, help="Prompts. Default: stdin, as one prompt."),
    mix: list[str] = typer.Option(
        ["base"], help=f"Mixture: {shared.MIXTURE}, auto, or base; once, or once for each prompt."
    ),
    file: Path = typer.Option(None, help="File of prompts, one per line; - is stdin."),
    image: list[Path] = typer.Option([], help="Image shown before the prompt; once, or once for each prompt."),
    max_new_tokens: int = typer.Option(64, min=1, help="Maximum tokens of an answer."),
    seed: int = typer.Option(0, help="Random seed; prompt i is sampled with seed + i."),
    stop: list[str] = typer.Option([], help="Stop string; may be repeated."),
    json_schema: Path = typer.Option(None, help="File with a JSON schema that every answer matches."),
    regex: str = typer.Option(None, help="Regular expression that every answer matches as a whole."),
    choice: list[str] = typer.Option([], help="Possible answer; repeated for the others."),
    system: str = shared.SYSTEM,
    raw: bool = typer.Option(False, "--raw", help="Continue the prompt without a chat template."),
    form: str = typer.Option(None, help="merged, factored or gain. Default: chosen by the batch."),
    strategy: str = shared.STRATEGY,
    explain: bool = typer.Option(False, "--explain", help="Print the mixtures that auto chose, with reasons."),
    base: str = shared.BASE, quantization: str = shared.QUANTIZATION, basis: str = shared.BASIS,
    device_map: str = shared.DEVICE_MAP, decode_weights: str = shared.DECODE_WEIGHTS, compile: bool = shared.COMPILE,
    bank: Path = shared.BANK, as_json: bool = shared.JSON,
    **options: Any,
) -> None:  # fmt: skip
    """Answer prompts with the base model, a mixture of experts, or a mixture chosen per request (--mix auto)."""
    data = read_data_options(options)
    inputs: list[Any]
    if data.data is not None:
        if prompt or file is not None:
            raise ConfigError("--data and other prompts exclude each other", remedy="give one of them")
        with working("reading the data"):
            rows = [row for _, row in data.task(allow_code=False).conversations(answers=False)]
        prompts, inputs = [row.prompt for row in rows], [(row.turns, row.system or system) for row in rows]
    else:
        prompts = _prompts(prompt or [], file)
        inputs = [(text, system) for text in prompts]
    for option, values in (("--mix", mix), ("--image", image)):
        if len(values) not in (0, 1, len(prompts)):
            problem = f"{len(values)} {option} for {len(prompts)} prompts"
            raise ConfigError(problem, remedy="give it once, or once for each prompt")
    output = None
    if json_schema is not None or regex is not None or choice:
        from sigmix.engine.structured_output import StructuredOutput

        schema = None if json_schema is None else read_text(json_schema)
        output = StructuredOutput(json=schema, regex=regex, choice=choice or None)
    texts = mix if len(mix) == len(prompts) else mix * len(prompts)
    images: list[Any] = [()] * len(prompts)
    if image:
        from sigmix.utils.images import pictures

        loaded = [pictures(path) for path in image]
        images = loaded if len(loaded) == len(prompts) else loaded * len(prompts)
    explicit, experts = open_mixes([text for text in texts if text != "auto"], bank, "auto" in texts)
    engine = open_engine(base, experts, explicit, quantization, basis, device_map, decode_weights, compile)

    from sigmix.adapt.two_pass import TwoPass

    chat_template = False if raw else None
    encoded = [
        engine.encode(turns, own_system, chat_template, own)
        for (turns, own_system), own in zip(inputs, images, strict=True)
    ]
    parsed = iter(explicit)
    with working("generating"):
        answers = TwoPass(engine, strategy).generate(
            prompts, ["auto" if text == "auto" else next(parsed) for text in texts], inputs=encoded,
            max_new_tokens=max_new_tokens, do_sample=options["temperature"] > 0, structured_output=output,
            seeds=[seed + number for number in range(len(encoded))], stop_strings=[text for text in stop if text],
            form=form, keep_errors=True, **options,
        )  # fmt: skip
    figures: list[dict[str, Any]] = []
    for text, source, answer in zip(prompts, texts, answers, strict=True):
        one = answer.generation
        figures.append({
            "prompt": text, "text": one.text, "ids": one.ids, "logprobs": one.logprobs, "mix": one.mix.id,
            "finish": one.finish, "prompt_tokens": one.prompt_tokens,
            "error": str(one.error) if one.error else None,
            "decision": answer.decision.to_json() if source == "auto" else None,
        })  # fmt: skip
        if explain and source == "auto":
            note(f"{_short(text)}: {answer.decision.mix.id}: {answer.decision.reason}")
    failures = [answer.generation.error for answer in answers if answer.generation.error is not None]
    if len(failures) < len(answers):
        shown = [f"> {one['prompt']}\n[{one['mix']}] {one['text']}" for one in figures]
        emit({"base": base, "answers": figures}, as_json, "\n\n".join(shown) if len(shown) > 1 else figures[0]["text"])
    if failures:
        raise failures[0]


app.command(
    "generate", cls=generated_command(generate, shared.data_config), help=generate.__doc__,
    epilog='Example: sigmix generate "the 3rd of March 2021 in iso please" --mix dates',
)(lambda: None)  # fmt: skip


def _prompts(prompts: list[str], file: Path | None) -> list[str]:
    if prompts and file is not None:
        raise ConfigError("prompts are given both as arguments and with --file", remedy="give one of them")
    if file is not None:
        prompts = [line for line in re.split(r"\r\n?|\n", read_text(file)) if line.strip()]
        if not prompts:
            raise DataError(f"{file} has no prompts", remedy="write one prompt per line")
    elif not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("no prompt", remedy=EXAMPLE)
        prompts = [read_text("-").rstrip("\r\n")]
    if not all(text.strip() for text in prompts):
        raise ConfigError("the prompt is empty", remedy=EXAMPLE)
    return prompts


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
