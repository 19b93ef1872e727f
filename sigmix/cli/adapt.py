"""`sigmix adapt`: search a mixture on labelled examples (strategy C)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, emit
from sigmix.cli._loading import open_bank, open_engine, open_task
from sigmix.cli._options import ALLOW_CODE, BANK, BASE, DATA_DIR, JSON, data_config, generated_command
from sigmix.errors import ConfigError

if TYPE_CHECKING:
    from sigmix.adapt import Example, FewShotSearch
    from sigmix.tasks.base import Task

    Labelled = tuple[list[Example], Callable[[Example, str], float], int]


def adapt(
    task: str = typer.Option(None, help="Task that gives training items and their grader."),
    shots: int = typer.Option(None, min=1, help="Number of examples. Default: 10 of --task, all rows of --data."),
    out: Path = typer.Option(None, help="JSON file for the mixture; for --granularity z the new expert's folder."),
    expert: list[str] = typer.Option([], help="Expert to mix; may be repeated. Default: all of the bank."),
    method: str = typer.Option("cem", help="Search method: cem, cma-es or swarm."),
    settings: str = typer.Option("full", help="full (up to 100 rounds of 32) or light (8 rounds of 16)."),
    granularity: str = typer.Option("model", help="α per model, layer or matrix; z: a swarm moves z itself."),
    normalised: bool = typer.Option(False, "--normalised", help="α of each layer or matrix sums to 1."),
    low: float = typer.Option(0.0, help="Minimum α."),
    high: float = typer.Option(1.0, help="Maximum α."),
    population: int = typer.Option(None, help="Mixtures per round."),
    iterations: int = typer.Option(None, help="Maximum rounds."),
    patience: int = typer.Option(None, help="Rounds without improvement before the search stops."),
    max_new_tokens: int = typer.Option(
        None, min=1, help="Maximum tokens of a reply. Default: the task's; with --data the longest answer's."
    ),
    seed: int = typer.Option(0, help="Random seed of the search and of the items."),
    data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE, base: str = BASE, bank: Path = BANK,
    as_json: bool = JSON, **options: Any,
) -> None:  # fmt: skip
    """Search a mixture on labelled examples."""
    from sigmix.adapt import FewShotSearch
    from sigmix.adapt.few_shot import SETTINGS
    from sigmix.evals.accuracy import provenance
    from sigmix.experts.metadata import check_name
    from sigmix.experts.mix import answer_note
    from sigmix.utils.io import check_new, check_writable, write_json

    if granularity == "z":
        if out is None or out.suffix == ".json":
            raise ConfigError("--out must be a folder for the new expert", remedy="for example --out experts/mine")
        check_name(out.name)
    elif out is None or out.suffix != ".json":
        raise ConfigError("--out must be a .json file for the mixture", remedy="for example --out mix.json")
    check_new(out)
    check_writable(out)
    loaded = open_task(task, options, data_dir, allow_code)
    labelled, grade, longest = task_examples(loaded, shots, seed)
    engine = open_engine(base, open_bank(bank))
    if task is None:  # a reply as long as the longest answer, and its end token
        longest = max(len(engine.tokenizer(one.gold)["input_ids"]) + 1 for one in labelled)
    with Progress("searching", iterations or SETTINGS.get(settings, {}).get("iterations", 1)) as progress:
        search = FewShotSearch(
            engine, labelled, grade, experts=expert or None, granularity=granularity, normalised=normalised, low=low,
            high=high, method=method, settings=settings, population=population, iterations=iterations,
            patience=patience, max_new_tokens=max_new_tokens or longest, seed=seed,
            progress=lambda entry: progress.advance(1, f"best {entry['best']:.2f}"),
        )  # fmt: skip
        mix = search.fit()
    evidence = search.evidence()
    figures = {
        "name": out.stem, **mix.to_json(), "mix": mix.id, "base": base, "search": evidence, "trace": search.trace,
        "examples": [one.prompt for one in search.examples], **provenance(),
    }  # fmt: skip
    if granularity == "z":
        description = _save_expert(search, out, task, figures)
    else:
        write_json(out, figures)
        description = mix.id
    text = f"{out}: {description}\naccuracy on the {len(labelled)} examples {evidence['accuracy']:.2f}"
    text += f", {evidence['candidates']} mixtures in {evidence['rounds']} rounds"
    if granularity != "z" and (both := answer_note(mix, engine.bank)):
        text += f"\n{both}"
    if "warning" in evidence:
        text += f"\nnote: {evidence['warning']}"
    emit(figures, as_json, text)


def _save_expert(search: FewShotSearch, out: Path, task: str | None, figures: dict[str, Any]) -> str:
    """Save the z that a swarm found as an expert.

    Raises:
        ConfigError: no z is better than the best mixture.
    """
    from sigmix.experts.expert import Expert

    if search.expert is None:
        raise ConfigError(
            f"no z is better on the examples than the mixture {figures['mix']}, so there is no new expert",
            remedy="use that mixture, or search longer",
        )
    space: Any = search.space
    names = ", ".join(space.starts)
    meta = {
        "description": f"Found by a particle swarm between {names} on {len(search.examples)} examples.",
        "objective": "few-shot swarm", "seed": search.seed, "license": "Apache-2.0",
        "training": {"search": figures["search"], "started_from": list(space.starts)},
        **({"task": task} if task else {}),
    }  # fmt: skip
    found = Expert(out.name, search.expert.z, {"positions": search.expert.positions})
    found.with_meta(**meta).sealed(search.engine.model).save_pretrained(out)
    return f"a new expert between {names}"


app.command(
    "adapt", cls=generated_command(adapt, data_config), help=adapt.__doc__,
    epilog="Example: sigmix adapt --data my.jsonl --out mix.json; sigmix chat --mix mix.json",
)(lambda: None)  # fmt: skip


def task_examples(task: Task, shots: int | None, seed: int) -> Labelled:
    """Return labelled examples, their scorer, and the tokens of a reply.

    Args:
        shots: items of the training split. Default: 10, or all rows of a user's data.
    """
    from sigmix.adapt import Example
    from sigmix.tasks.dataset import DataTask

    if isinstance(task, DataTask) and shots is None:
        samples = [task.sample(entry) for entry in task.entries]
    else:
        samples = task.samples("train", shots or 10, seed=seed)
    examples = [Example(one.turns, one.gold, one, one.images, one.system) for one in samples]
    return examples, lambda example, reply: task.score(example.extra, reply).value or 0.0, task.max_new_tokens
