"""`sigmix generate` and `sigmix chat`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import emit, note, working
from sigmix.cli._loading import AUTO, explained, open_engine, open_mixes, open_strategy
from sigmix.cli._options import BANK, BASE, BASIS, DEVICE_MAP, JSON, QUANTIZATION, STRATEGY
from sigmix.cli.chat import chat

PROMPT = typer.Argument(None, help="User turns, one answer each. None: standard input is one.")


MIX = typer.Option(["base"], help="a:0.7+b:0.3, a name, a .json file, or auto; once for all, or once for each prompt.")


FILE = typer.Option(None, help="Read prompts from a file, one a line.")


IMAGE = typer.Option([], help="An image file, shown before the prompt; once for all prompts, or once for each.")


STOP = typer.Option([], help="Text that ends an answer; may be repeated.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(epilog='Example: sigmix generate "What is 17 + 25?" --mix addition:0.7+larger:0.3')(generate)
    app.command(epilog="Example: sigmix chat --mix addition")(chat)


def generate(
    prompt: list[str] = PROMPT,
    mix: list[str] = MIX,
    file: Path = FILE,
    image: list[Path] = IMAGE,
    max_new_tokens: int = typer.Option(64, min=1, help="Longest answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 is greedy."),
    top_p: float = typer.Option(1.0, help="Sample from the smallest set of this probability."),
    seed: int = typer.Option(0, help="Prompt number i is sampled with seed + i."),
    stop: list[str] = STOP,
    system: str = typer.Option(None, help="System turn. Default: the chat template's own."),
    raw: bool = typer.Option(False, "--raw", help="Continue the bare text: no chat template."),
    form: str = typer.Option(None, help="merged, factored, gain or truncated (fitted before). Default: the cheapest."),
    strategy: str = STRATEGY,
    explain: bool = typer.Option(False, "--explain", help="Say which experts auto chose, and why."),
    base: str = BASE,
    quantization: str = QUANTIZATION,
    basis: str = BASIS,
    device_map: str = DEVICE_MAP,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Answer prompts with the base, a mix of experts, or whatever each request needs (--mix auto)."""
    prompts = _prompts(prompt or [], file)
    _counts(len(mix), len(prompts))
    shown = _images(image, len(prompts))
    texts = mix if len(mix) == len(prompts) else mix * len(prompts)
    given, experts = open_mixes([text for text in mix if text != AUTO], bank, AUTO in mix)
    engine = open_engine(base, experts, given, quantization, basis, device_map)
    if form == "truncated":
        from sigmix.engine.truncation import bank_truncation

        engine.truncation = bank_truncation(engine)
        note(engine.truncation.describe())
    chat = False if raw else None
    rows = [engine.encode(text, system, chat, own) for text, own in zip(prompts, shown, strict=True)]
    asked = [number for number, text in enumerate(texts) if text == AUTO]
    decisions = {}
    if asked:
        chooser = open_strategy(engine, strategy)
        with working("choosing experts"):
            decisions = dict(zip(asked, chooser.decide([prompts[number] for number in asked]), strict=True))
    fixed = iter(given if len(mix) == len(prompts) else given * len(prompts))
    mixes = [decisions[number].mix if number in decisions else next(fixed) for number in range(len(prompts))]
    with working("answering"):
        answers = engine.generate(
            rows, mixes, max_new_tokens=max_new_tokens, do_sample=temperature > 0, temperature=temperature, top_p=top_p,
            seeds=[seed + number for number in range(len(rows))], stop_strings=[mark for mark in stop if mark],
            form=form, keep_errors=True,
        )  # fmt: skip
    figures = [
        {
            "prompt": text, "text": one.text, "ids": one.ids, "logprobs": one.logprobs, "mix": one.mix.id,
            "finish": one.finish, "prompt_tokens": one.prompt_tokens,
            "error": str(one.error) if one.error else None,
            "decision": decisions[number].to_json() if number in decisions else None,
        }
        for number, (text, one) in enumerate(zip(prompts, answers, strict=True))
    ]  # fmt: skip
    if explain:
        for number, decision in decisions.items():
            note(f"{_short(prompts[number])}: {explained(decision)}")
    failed = [one.error for one in answers if one.error is not None]
    if len(failed) == len(answers):
        raise failed[0]
    text = answers[0].text
    if len(answers) > 1:
        text = "\n\n".join(f"> {p}\n[{a.mix.id}] {a.text}" for p, a in zip(prompts, answers, strict=True))
    emit({"base": base, "answers": figures}, as_json, text)
    if failed:  # after the answers to the others
        raise failed[0]


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


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."


def _images(given: Sequence[Path], prompts: int) -> list[Any]:
    from sigmix.errors import ConfigError
    from sigmix.utils.images import pictures

    if len(given) not in (0, 1, prompts):
        raise ConfigError(
            f"{len(given)} images for {prompts} prompts", remedy="give --image once, or once for each prompt"
        )
    found = [pictures(path) for path in given]  # before a model is loaded
    return found if len(found) == prompts else (found or [()]) * prompts


def _counts(mixes: int, prompts: int) -> None:
    from sigmix.errors import ConfigError

    if mixes not in (1, prompts):
        raise ConfigError(f"{mixes} mixes for {prompts} prompts", remedy="give --mix once, or once for each prompt")
