"""`sigmix adapt`: a mixture for a task from a few examples (strategy C), or what a bank has fitted to it: the probe of
strategy D, the truncated form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import Ticker, emit, working
from sigmix.cli._loading import open_bank, open_engine
from sigmix.cli._options import BANK, BASE, JSON

EXAMPLES = typer.Option(None, help='JSONL with {"prompt": …, "answer": …} a line; all of them are used.')


EXPERT = typer.Option([], help="An expert to mix; may be repeated. Default: all of the bank.")


DATA = typer.Option(None, help="Local JSONL data instead of the hub.")


def add(app: typer.Typer) -> None:
    """Register the command."""
    app.command(epilog="Example: sigmix adapt --examples my.jsonl --out mix.json; sigmix chat --mix mix.json")(adapt)


def adapt(
    examples: Path = EXAMPLES,
    task: str = typer.Option(None, help="Take --shots training items of a task, with its verifier, as examples."),
    shots: int = typer.Option(10, min=1, help="Items of --task."),
    score: str = typer.Option("exact", help="How replies to --examples are judged: exact (text) or number."),
    out: Path = typer.Option(None, help="File for the mix (JSON), which every --mix takes; with z an expert's folder."),
    expert: list[str] = EXPERT,
    method: str = typer.Option("cem", help="cem, cma-es or swarm."),
    settings: str = typer.Option("full", help="full (up to 100 rounds of 32) or light (8 rounds of 16)."),
    granularity: str = typer.Option("model", help="α per model, layer or matrix; z: the swarm moves z itself."),
    normalised: bool = typer.Option(False, "--normalised", help="α of every layer or matrix sum to 1."),
    low: float = typer.Option(0.0, help="Least α."),
    high: float = typer.Option(1.0, help="Largest α."),
    population: int = typer.Option(None, help="Mixtures a round."),
    iterations: int = typer.Option(None, help="Rounds at most."),
    patience: int = typer.Option(None, help="Rounds without a new best before it stops."),
    max_new_tokens: int = typer.Option(None, min=1, help="Longest reply. Default: the task's, or 16."),
    seed: int = typer.Option(0, help="Of the search, and of drawing --task's items."),
    fit_probe: bool = typer.Option(False, "--fit-probe", help="Fit the bank's probe on its experts' training prompts."),
    per_label: int = typer.Option(200, min=4, help="Training prompts a label for --fit-probe."),
    fit_truncation: bool = typer.Option(False, "--fit-truncation", help="Fit the truncated form of mixtures."),
    error_budget: float = typer.Option(0.1, help="Share of what experts do that --fit-truncation may lose."),
    prompts: int = typer.Option(96, min=1, help="Training prompts for --fit-truncation."),
    data_dir: Path = DATA,
    base: str = BASE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Search a mixture on labelled examples, or fit the probe that chooses experts, or the truncated form."""
    from sigmix.errors import ConfigError, OutputError
    from sigmix.experts.metadata import check_name
    from sigmix.utils.io import check_writable, write_json

    if fit_probe + fit_truncation + bool(examples or task) != 1:
        raise ConfigError(
            "give --examples, or --task, or --fit-probe, or --fit-truncation",
            remedy="sigmix adapt --help shows examples",
        )
    if examples and task:
        raise ConfigError("--examples and --task exclude each other")
    if fit_probe:
        figures, text = _probe(base, bank, out, per_label, seed, data_dir)
        emit(figures, as_json, text)
        return
    if fit_truncation:
        figures, text = _truncation(base, bank, out, error_budget, prompts, seed, data_dir)
        emit(figures, as_json, text)
        return
    if granularity == "z":
        if out is None or out.suffix == ".json":
            raise ConfigError("--out must be a folder for the new expert", remedy="for example --out experts/mine")
        check_name(out.name)
    elif out is None or out.suffix != ".json":
        raise ConfigError("--out must be a .json file for the mix", remedy="for example --out mix.json")
    if out.exists():
        raise OutputError(f"{out} exists already", remedy="give another --out, or remove it first")
    check_writable(out)
    given, judge, longest = _from_task(task, shots, seed, data_dir) if task else _from_file(examples, score)
    engine = open_engine(base, open_bank(bank))

    from sigmix.adapt import FewShotSearch
    from sigmix.adapt.few_shot import SETTINGS
    from sigmix.evals.accuracy import provenance

    with Ticker("searching", iterations or SETTINGS.get(settings, {}).get("iterations", 1)) as ticker:

        def progress(entry: dict[str, Any]) -> None:
            ticker.advance(1, f"best {entry['best']:.2f}")

        search = FewShotSearch(
            engine, given, judge, experts=expert or None, granularity=granularity, normalised=normalised, low=low,
            high=high, method=method, settings=settings, population=population, iterations=iterations,
            patience=patience, max_new_tokens=max_new_tokens or longest, seed=seed, progress=progress,
        )  # fmt: skip
        mix = search.fit()
    evidence = search.evidence()
    figures = {
        "name": out.stem, **mix.to_json(), "mix": mix.id, "base": base, "search": evidence, "trace": search.trace,
        "examples": [one.prompt for one in search.examples], **provenance(),
    }  # fmt: skip
    if granularity == "z":
        what = _save_expert(search, out, task, figures)
    else:
        write_json(out, figures)
        what = mix.id
    text = f"{out}: {what}\naccuracy on the {len(given)} examples {evidence['accuracy']:.2f}"
    text += f", {evidence['candidates']} mixtures in {evidence['rounds']} rounds"
    if "warning" in evidence:
        text += f"\nnote: {evidence['warning']}"
    emit(figures, as_json, text)


def _save_expert(search: Any, out: Path, task: str | None, figures: dict[str, Any]) -> str:
    """Save what a search that moved z made, as an expert; says what it is."""
    from sigmix.errors import ConfigError
    from sigmix.experts.expert import Expert

    if search.expert is None:
        raise ConfigError(
            f"no moved z was better on the examples than {figures['mix']}, so there is no new expert",
            remedy="use that one, or search longer",
        )
    names = ", ".join(search.space.starts)
    meta = {
        "description": f"Found by a particle swarm between {names} on {len(search.examples)} examples.",
        "objective": "few-shot swarm", "seed": search.seed, "license": "Apache-2.0",
        "training": {"search": figures["search"], "started_from": list(search.space.starts)},
    }  # fmt: skip
    if task:
        meta["task"] = task
    Expert(out.name, search.expert.z).with_meta(**meta).sealed(search.engine.model).save_pretrained(out)
    return f"a new expert between {names}"


def _from_file(path: Path, score: str) -> tuple[list[Any], Callable[..., float], int]:
    from sigmix.adapt import Example
    from sigmix.errors import UnknownNameError
    from sigmix.tasks.data import local_rows
    from sigmix.tasks.graders import exact, strict_number

    judges = {"exact": exact, "number": strict_number}
    if score not in judges:
        raise UnknownNameError("way to judge replies", score, judges)
    given = [
        Example(str(row.get("prompt", "question", kind=str)), str(row.get("answer", "gold", kind=(str, int, float))))
        for row in local_rows(path)
    ]
    return given, lambda example, reply: judges[score](reply, example.gold).value or 0.0, 16


def _from_task(name: str, shots: int, seed: int, data_dir: Path | None) -> tuple[list[Any], Callable[..., float], int]:
    from sigmix.adapt import Example
    from sigmix.tasks.registry import get_task

    task = get_task(name, data_dir=data_dir)
    samples = task.samples("train", shots, seed=seed)
    given = [Example(sample.prompt, sample.gold, sample, sample.images) for sample in samples]
    return given, lambda example, reply: task.score(example.extra, reply).value or 0.0, task.max_new_tokens


def _probe(
    base: str, bank: Path | None, out: Path | None, per_label: int, seed: int, data_dir: Path | None
) -> tuple[dict[str, Any], str]:
    from sigmix.adapt.probe import FILE, fit_probe
    from sigmix.evals.dispatch import FOREIGN, requests
    from sigmix.utils.io import check_writable

    experts = open_bank(bank)
    path = out or experts.folder / FILE
    check_writable(path)
    engine = open_engine(base, experts)
    with working("fitting the probe"):
        train = requests(experts, "train", per_label, seed=seed, data_dir=data_dir)
        validation = requests(
            experts, "validation", max(per_label // 2, 2), seed=seed, foreign=FOREIGN, data_dir=data_dir
        )
        probe = fit_probe(engine, train, validation)
    probe.save(path)
    figures = {
        "probe": str(path), "labels": list(probe.labels), "depth": probe.depth, "temperature": probe.temperature,
        "threshold": probe.threshold, **dict(probe.facts),
    }  # fmt: skip
    text = f"{path}: layer {probe.depth}, threshold {probe.threshold:.2f}, validation accuracy "
    return figures, text + f"{probe.facts['validation_accuracy']:.3f} over {', '.join(probe.labels)}"


def _truncation(
    base: str, bank: Path | None, out: Path | None, budget: float, count: int, seed: int, data_dir: Path | None
) -> tuple[dict[str, Any], str]:
    from sigmix.adapt.base import skills
    from sigmix.engine.truncation import FILE, check_budget, fit, save_truncation
    from sigmix.evals.dispatch import prompts_of_experts
    from sigmix.utils.io import check_writable

    check_budget(budget)
    experts = open_bank(bank)
    path = out or experts.folder / FILE
    check_writable(path)
    texts = prompts_of_experts(experts, count, seed=seed, data_dir=data_dir)
    engine = open_engine(base, experts)
    with working("fitting the truncated form"):
        plan = fit(engine, texts, skills(experts)).plan(budget)
    save_truncation(plan, engine, path)
    figures = {
        "truncation": str(path), "expected_error": plan.error, "extra_work": plan.cost, "experts": list(plan.experts),
        **plan.facts,
    }  # fmt: skip
    return figures, f"{path}: {plan.describe()}"
