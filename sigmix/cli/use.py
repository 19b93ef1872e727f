"""`sigmix generate` and `sigmix chat`."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from sigmix.cli.chat import chat
from sigmix.cli.shared import BANK, BASE, JSON, emit, open_engine, open_mixes, working

PROMPT = typer.Argument(None, help="User turns, one answer each. None: standard input is one.")
MIX = typer.Option(["base"], help="a:0.7+b:0.3, a name, or a .json file; once for all, or once for each prompt.")
FILE = typer.Option(None, help="Read prompts from a file, one a line.")
STOP = typer.Option([], help="Text that ends an answer; may be repeated.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog='Example: sigmix generate "What is 17 + 25?" --mix arithmetic:0.7+reading:0.3')(generate)
    app.command(epilog="Example: sigmix chat --mix arithmetic")(chat)


def generate(
    prompt: list[str] = PROMPT,
    mix: list[str] = MIX,
    file: Path = FILE,
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Sample from the smallest set of this probability."),
    seed: int = typer.Option(0, help="Prompt number i is sampled with seed + i."),
    stop: list[str] = STOP,
    system: str = typer.Option(None, help="System turn. Default: the chat template's own."),
    raw: bool = typer.Option(False, "--raw", help="Continue the bare text: no chat template."),
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Answer prompts with the base or a mix of experts."""
    prompts = _prompts(prompt or [], file)
    mixes, experts = open_mixes(mix, bank)
    _counts(len(mixes), len(prompts))
    engine = open_engine(base, experts, mixes)
    rows = [engine.encode(text, system, False if raw else None) for text in prompts]
    with working("answering"):
        answers = engine.generate(
            rows, mixes if len(mixes) > 1 else mixes[0], max_new_tokens=max_new_tokens, temperature=temperature,
            top_p=top_p, seeds=[seed + number for number in range(len(rows))], stop=[mark for mark in stop if mark],
        )  # fmt: skip
    figures = [
        {
            "prompt": text, "text": one.text, "ids": one.ids, "logprobs": one.logprobs, "mix": one.mix.id,
            "finish": one.finish, "prompt_tokens": one.prompt_tokens,
        }
        for text, one in zip(prompts, answers, strict=True)
    ]  # fmt: skip
    text = answers[0].text
    if len(answers) > 1:
        text = "\n\n".join(f"> {p}\n[{a.mix.id}] {a.text}" for p, a in zip(prompts, answers, strict=True))
    emit({"base": base, "answers": figures}, as_json, text)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    from sigmix.errors import ConfigError, DataError

    if given and file is not None:
        raise ConfigError("prompts were given both as arguments and with --file", remedy="give one of them")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise DataError(f"cannot read prompts from {file}: {why}") from error
        given = [line for line in text.splitlines() if line.strip()]
        if not given:
            raise DataError(f"{file} has no prompts", remedy="write one prompt a line")
    elif not given:
        if sys.stdin is None or sys.stdin.isatty():
            raise ConfigError("no prompt", remedy='for example: sigmix generate "What is 17 + 25?"')
        given = [sys.stdin.read().rstrip("\n")]
    if not all(text.strip() for text in given):
        raise ConfigError("the prompt is empty", remedy='for example: sigmix generate "What is 17 + 25?"')
    return given


def _counts(mixes: int, prompts: int) -> None:
    from sigmix.errors import ConfigError

    if mixes not in (1, prompts):
        raise ConfigError(f"{mixes} mixes for {prompts} prompts", remedy="give --mix once, or once for each prompt")
