"""`sigmix data`: what training would read from a user's data, and its problems."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import typer

from sigmix.cli import app
from sigmix.cli._console import emit, working
from sigmix.cli._loading import read_data_options
from sigmix.cli._options import ALLOW_CODE, JSON, data_config, generated_command

SHOWN_LABELS = 12


def data(
    data: str = typer.Argument(..., help="A data file, a folder with train.* and more, or hub:USER/SET."),
    base: str = typer.Option(None, help="Base model for lengths in tokens. Default: lengths in characters alone."),
    allow_code: bool = ALLOW_CODE, as_json: bool = JSON,
    **options: Any,
) -> None:  # fmt: skip
    """Show how a file of examples is read: columns, splits, labels, lengths, duplicates and contradictions."""
    config = read_data_options({"data": data, **options})
    with working("reading the data"):
        task = config.task(allow_code)
        _ = task.entries  # an invalid row is reported at once: loading a tokenizer takes seconds
        tokenizer, encode, context = (None, None, None) if base is None else _tokens(base)
        figures = task.summary(tokenizer, encode, context)
        figures["problems"] = problems(figures)
    emit(figures, as_json, describe(figures))


def describe(figures: dict[str, Any]) -> str:
    """Return the figures of `DataTask.summary` as text."""
    splits = ", ".join(f"{name} {count:,}" for name, count in figures["splits"].items())
    division = "as given" if len(figures["given_splits"]) == len(figures["splits"]) else "divided by content"
    prompt, answer = figures["prompt_characters"], figures["answer_characters"]
    lines = [
        f"{figures['source']}: {figures['rows']:,} rows, {figures['prompts']:,} distinct prompts",
        f"columns: {figures['columns']}",
        f"splits: {splits} ({division})",
        f"grader: {figures['grader']} ({figures['reason']})",
        f"prompts: median {prompt['median']:,} characters, 95 % under {prompt['p95']:,}, longest {prompt['max']:,}",
        f"answers: median {answer['median']:,} characters, 95 % under {answer['p95']:,}, longest {answer['max']:,}",
    ]
    if "answer_tokens" in figures:
        lines.append(f"tokens: longest answer {figures['answer_tokens']}, context {figures['context']}")
    if figures["labels"]:
        shown = [f"{name} {one['share']:.0%}" for name, one in list(figures["labels"].items())[:SHOWN_LABELS]]
        more = len(figures["labels"]) - len(shown)
        lines.append(f"labels: {', '.join(shown)}" + (f", {more} more" if more else ""))
    for one in figures["examples"]:
        lines += [f"> {_line(one['prompt'])}", f"  {_line(one['answer'])}"]
    return "\n".join(lines + [f"problem: {text}" for text in figures["problems"]])


def problems(figures: dict[str, Any]) -> list[str]:
    """Return what is wrong with the data, a sentence each."""
    from sigmix.tasks.graders import normalise

    found = [f"training would fail: {figures['cannot_train']}"] if figures["cannot_train"] else []
    if figures["repeats"]:
        found.append(f"{figures['repeats']:,} rows repeat an earlier one; they count once")
    if figures["conflicts"]:
        one = figures["conflict_examples"][0]
        answers = " and ".join(repr(_line(text, 40)) for text in one["answers"][:2])
        found.append(
            f"{figures['conflicts']:,} prompts have different answers, for example {one['where']} ({answers}); "
            "each of them counts as right"
        )
    for splits, count in figures["leaks"].items():
        found.append(f"{count:,} prompts are in {splits}; they stay in {splits.split()[0]}")
    for group in figures["near_duplicate_labels"][:3]:
        names = " and ".join(map(repr, group))
        effect = "count as equal" if len(set(map(normalise, group))) == 1 else "count as different: write them alike"
        found.append(f"the labels {names} differ by case, blanks or invisible characters alone, and {effect}")
    if figures.get("untrained_labels"):
        names = ", ".join(figures["untrained_labels"][:5])
        found.append(f"{len(figures['untrained_labels'])} labels are not among the training rows: {names}")
    shares = [one["share"] for one in (figures["labels"] or {}).values()]
    if shares and max(shares) > 2 / len(shares) and max(shares) > 0.5:
        name = next(iter(figures["labels"]))
        found.append(f"{max(shares):.0%} of the answers are {name!r}: a constant answer has that accuracy")
    if figures["skipped"]:
        found.append(f"{figures['skipped']:,} rows were skipped; the first one: {figures['first_skipped']}")
    if figures["weight_0"]:
        found.append(f"{figures['weight_0']:,} rows have an answer of weight 0 and are left out")
    if figures["beyond"]:
        found.append(f"{figures['beyond']:,} rows are beyond the limit and left out")
    if figures.get("over_context"):
        found.append(f"{figures['over_context']:,} prompts are longer than the context and left out")
    return found


def _line(text: str, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def _tokens(base: str) -> tuple[Any, Any, int | None]:
    from functools import partial

    from sigmix.engine.tokenization import context_length, encode
    from sigmix.models.loading import read_tokenizer

    tokenizer, config = read_tokenizer(base)
    return tokenizer, partial(encode, tokenizer), context_length(SimpleNamespace(config=config))


app.command(
    "data", cls=generated_command(data, data_config), help=data.__doc__,
    epilog="Example: sigmix data tickets.csv --answer category",
)(lambda: None)  # fmt: skip
