"""`sigmix experts`: list, show, verify, compare and carry experts, add statistics; push to the hub and pull."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from sigmix.cli import app
from sigmix.cli._console import emit, table, working
from sigmix.cli._loading import expert_source, open_bank, open_engine, open_expert, open_model_of
from sigmix.cli._options import BANK, BASE, DATA_DIR, EXPERT_DTYPE, EXPERT_QUANTIZATION, JSON
from sigmix.errors import ConfigError, ExpertError, SigmixError
from sigmix.utils.io import size

group = typer.Typer(
    help="List, show, verify, compare and carry experts; push them to the hub and pull them.",
    no_args_is_help=True, rich_markup_mode=None, epilog="Example: sigmix experts list",
)  # fmt: skip
app.add_typer(group, name="experts")

NAME = typer.Argument(..., help="A name in the bank, an expert's folder, or user/name on the hub.")
LOCAL = typer.Argument(..., help="A name in the bank, or an expert's folder.")
AGAINST = typer.Option(None, "--base", help="Base model to compare with: smollm2-135m, a hub name or a folder.")
TOP = typer.Option(5, min=1, help="Number of matrices to list.")
SEAL = "sigmix experts verify DIR --base BASE --seal"
ROUTE = "sigmix experts statistics"


@group.command("list", epilog="Example: sigmix experts list --bank experts")
def list_experts(bank: Path = BANK, as_json: bool = JSON) -> None:
    """List experts with domain, base model and accuracy."""
    from sigmix.adapt.base import DISPATCH
    from sigmix.experts.inspect import listing

    opened = open_bank(bank)
    rows = listing(opened)
    if emit({"bank": opened.source, "experts": rows}, as_json):
        return
    if not rows:
        typer.echo(f"{opened.source} has no experts -> sigmix train --help")
        return
    cells = []
    for row in rows:
        state = f"DAMAGED: {row['problem']}" if row["problem"] else "verified" if row["verified"] else "unverified"
        base = (row.get("base") or {}).get("name")
        accuracy = _metric((row.get("metrics") or [None])[0])
        routed = "yes" if row.get("requests") else "no"
        cells.append([row["name"], row.get("domain"), accuracy, row.get("positions"), base, state, routed])
    columns = ["name", "domain", "accuracy", "positions", "base", "state", "routed"]
    table(f"experts in {opened.source}", columns, cells)
    skills = [row for row in rows if not row["problem"] and row["domain"] != DISPATCH]
    if names := [row["name"] for row in skills if row["requests"] is None]:
        typer.echo(f"the router never chooses {', '.join(names)}, without request statistics -> {ROUTE}")


def _metric(metric: Mapping[str, Any] | None) -> str:
    if not metric:
        return "not measured"
    shown = {key: f"{value:.3f}" if isinstance(value, float) else str(value) for key, value in metric.items()}
    text = f"{metric.get('name', 'accuracy')} {shown.get('value')}"
    if metric.get("interval"):
        text += " [{:.3f}, {:.3f}]".format(*metric["interval"])
    extra = [label + shown[key] for label, key in (("n = ", "n"), ("base ", "base")) if metric.get(key) is not None]
    return text + (f" ({', '.join(extra)})" if extra else "")


@group.command(epilog="Example: sigmix experts show dates")
def show(name: str = NAME, bank: Path = BANK, top: int = TOP, as_json: bool = JSON) -> None:
    """Show an expert's record, its gains, and the matrices that it changes most."""
    expert = open_expert(name, bank)

    from sigmix.experts.inspect import show
    from sigmix.experts.model_card import POSITIONS

    facts = show(expert, top)
    base, carried, gain, routed = facts["base"] or {}, facts["carried_from"], facts["gain"], facts["requests"]
    rows = {
        **{key: facts[key] for key in ("domain", "task", "objective", "seed", "commit", "license")},
        "positions": f"{facts['positions']}: z acts on {POSITIONS[facts['positions']]}",
        "base": f"{base.get('name')} ({base.get('dtype')}, fingerprint {str(base.get('fingerprint'))[:12]})",
        "verified": "yes" if facts["verified"] else f"no -> {SEAL}",
        "size": f"{facts['numbers']} parameters in {facts['matrices']} matrices, {size(facts['bytes'])}",
        "routed": (
            f"by {routed['train_n']} requests, score above {routed['threshold']:.1f}" if routed
            else f"no -> {ROUTE} {facts['name']}"
        ),
        "digest": facts["digest"][:16],
        "hub": facts["origin"],
        "carried from": carried and f"{carried['base']} ({'same' if carried['basis'] == 'same' else 'OTHER'} weights)",
        **{f"measured {number}": _metric(metric) for number, metric in enumerate(facts["metrics"], 1)},
        "gains z - 1": "mean {mean:+.4f}, std {std:.4f}, from {min:+.3f} to {max:+.3f}".format(**gain),
    }  # fmt: skip
    lines = [f"{facts['name']}: {facts['description'] or 'no description'}"]
    lines += [f"{key}: {value}" for key, value in rows.items() if value is not None]
    lines.append("largest changes:")
    for one in facts["top"]:
        lines.append("  " + " ".join(f"{value:.3f}" if isinstance(value, float) else value for value in one.values()))
    emit(facts, as_json, "\n".join(lines))


@group.command(epilog="Example: sigmix experts verify my-adapter --base smollm2-135m --seal")
def verify(
    folder: str = typer.Argument(..., metavar="DIR", help="An expert's folder, a name in the bank, or user/name."),
    base: str = AGAINST,
    seal: bool = typer.Option(
        False, "--seal", help="Record --base in a folder that PEFT or TRL saved: adds sigmix.json and a model card."
    ),
    dtype: str = EXPERT_DTYPE, quantization: str = EXPERT_QUANTIZATION, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Check an expert's files, and its fingerprint and sketches against a base model."""
    from sigmix.experts import expert as experts
    from sigmix.experts import inspect

    if seal and base is None:
        raise ConfigError("--seal needs --base, the model on which the adapter was trained")
    path = expert_source(folder, bank)
    if seal and isinstance(path, str):
        raise ConfigError(f"{path} is on the hub and cannot be sealed there", remedy=f"sigmix experts pull {path}")
    report = inspect.verify(path)
    sealed = False
    if report["ok"] and base is not None:
        model = open_model_of([experts.Expert.from_pretrained(path)], base, dtype, quantization)
        with working("comparing with the base model"):
            if seal and not report["verified"]:
                experts.seal(path, model)
                sealed = True
            report = inspect.verify(path, model)
    report["sealed"] = sealed
    lines = [f"{report['path']}: {'valid' if report['ok'] else 'INVALID'}{', sealed' if sealed else ''}"]
    lines.append(f"checked: {', '.join(report['checked']) or 'nothing could be read'}")
    if report["ok"] and not report["verified"]:
        lines.append(f"unverified: it records no base model -> {SEAL}")
    emit(report, as_json, "\n".join(lines))
    if not report["ok"]:
        raise ExpertError("; ".join(report["problems"]))


@group.command(epilog="Example: sigmix experts statistics dates")
def statistics(
    name: str = typer.Argument(None, help="A name in the bank. Default: all experts that lack statistics of the base."),
    base: str = BASE, data_dir: Path = DATA_DIR, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Add statistics of their training requests to experts of tasks, so that the router (strategy D) chooses them."""
    from sigmix.adapt.router import unrouted
    from sigmix.evals.dispatch import add_statistics

    experts = open_bank(bank)
    if name is not None:
        experts.path(name)
    engine = open_engine(base, experts)
    rows, problems = [], []
    for one in [name] if name is not None else unrouted(experts, engine.base_fingerprint):
        try:
            with working(f"reading the requests of {one}"):
                found = add_statistics(engine, experts, one, data_dir)
            rows.append({"name": one, "threshold": found.threshold, **found.facts})
        except SigmixError as error:
            problems.append(f"{one}: {error}")
    lines = [
        f"{row['name']}: {row['train_n']} requests; of {row['validation_n']} validation requests {row['kept']:.1%} are "
        f"above the threshold, of other requests {1 - row['refused']:.1%}"
        for row in rows
    ]
    if rows or not problems:
        emit({"bank": experts.source, "experts": rows}, as_json, "\n".join(lines) or "no expert lacks statistics")
    if problems:
        raise ExpertError("; ".join(problems))


@group.command(epilog="Example: sigmix experts diff dates times")
def diff(
    a: str = NAME, b: str = NAME, base: str = AGAINST, dtype: str = EXPERT_DTYPE,
    quantization: str = EXPERT_QUANTIZATION, bank: Path = BANK, top: int = TOP, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Compare two experts, in gains and in weights (exactly with --base, else estimated from sketches)."""
    left, right = open_expert(a, bank), open_expert(b, bank)
    model = None if base is None else open_model_of([left, right], base, dtype, quantization)

    from sigmix.experts.inspect import diff

    with working("comparing"):
        facts = diff(left, right, model)
    if emit(facts, as_json):
        return
    same = {True: "the same base model", False: "DIFFERENT base models", None: "a base model that one does not record"}
    text = f"{a} and {b}: {same[facts['same_base']]}{', identical' if facts['identical'] else ''}"
    if len(set(facts["positions"])) > 1:
        text += ", positions {} and {}".format(*facts["positions"])
    typer.echo(text)
    rows = [
        [space + (" (estimated)" if facts[space].get("estimated") else ""), *_figures(facts[space])]
        for space in ("gain", "weight")
        if facts[space]
    ]
    table("", ["space", "cosine", f"|{facts['a']}|", f"|{facts['b']}|", "distance"], rows)
    far = sorted(facts["matrices"].items(), key=lambda item: -item[1]["gain"]["distance"])[:top]
    rows = [[path, *_figures(one["gain"])] for path, one in far]
    table("largest differences of gains", ["matrix", "cosine", "|a|", "|b|", "distance"], rows)


def _figures(one: Mapping[str, Any]) -> list[str]:
    cosine = "-" if one["cosine"] is None else f"{one['cosine']:+.3f}"
    return [cosine, *(f"{one[key]:.3f}" for key in ("norm_a", "norm_b", "distance"))]


@group.command(epilog="Example: sigmix experts carry dates --to llava-hf/llava-1.5-7b-hf --out carried")
def carry(
    name: str = LOCAL,
    to: str = typer.Option(..., "--to", help="Vision-language model, such as llava-hf/llava-1.5-7b-hf, or a folder."),
    out: Path = typer.Option(..., help="Folder for the carried expert; its name is the expert's."),
    source: str = typer.Option(None, "--from", help="Base model of the expert, to compare weights. Default: sketches."),
    force: bool = typer.Option(False, "--force", help="Carry z by index although the weights differ."),
    dtype: str = EXPERT_DTYPE, quantization: str = EXPERT_QUANTIZATION, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Carry a text model's expert to a vision-language model with the same weights in its language backbone."""
    expert = open_expert(name, bank)

    from sigmix.experts.metadata import check_name
    from sigmix.experts.serialization import check_free
    from sigmix.experts.transfer import carry

    check_name(out.name)
    check_free(out)
    model = open_model_of([expert], to, dtype, quantization)
    base = open_model_of([expert], source, dtype, quantization) if source is not None else None
    with working("comparing weights"):
        carried = carry(expert, model, base=base, force=force, name=out.name)
    carried.save_pretrained(out)
    facts = carried.meta["carried_from"]
    gap = None if facts["deviation"] is None else dict(facts["deviation"])
    figures = {
        "name": carried.name, "path": str(out), "to": carried.meta["base"]["name"], "matrices": len(carried.z),
        "basis": facts["basis"], "deviation": gap,
    }  # fmt: skip
    text = f"{out}: {len(carried.z)} matrices carried from {facts['base']} to {figures['to']}; "
    if gap is None:
        text += "FORCED, and the weights could not be compared: measure its accuracy there"
    elif facts["basis"] == "same":
        text += f"same weights (by {gap['by']}, difference at most {gap['largest']:.1g})"
    else:
        text += f"FORCED: weights differ by {gap['median']:.2g} (median), {gap['largest']:.2g} at most: measure it"
    emit(figures, as_json, text)


@group.command(epilog="Example: sigmix experts push dates user/dates --private")
def push(
    name: str = LOCAL,
    repo: str = typer.Argument(..., metavar="USER/NAME", help="Model repository on the hub, created if needed."),
    private: bool = typer.Option(False, "--private", help="Create a private repository."),
    revision: str = typer.Option(None, help="Branch, created if needed."),
    message: str = typer.Option(None, help="Commit message."),
    bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Commit an expert and its model card to the hub, with the token of `hf auth login` or HF_TOKEN."""
    from sigmix.experts import hub

    hub.check_repo_id(repo)
    expert = open_expert(name, bank)
    with working(f"pushing {name}"):
        options: Any = {
            "requests": expert.requests, "private": private, "revision": revision, "commit_message": message,
        }  # fmt: skip
        done = hub.push(expert.name, expert.z, expert.meta, repo, **options)
    figures = {"expert": expert.name, "repo": repo, **done._asdict()}
    emit(figures, as_json, f"{expert.name} is at {done.url}, " + (done.revision[:12] if done.changed else "unchanged"))


@group.command(epilog="Example: sigmix experts pull user/dates --out my-experts/dates")
def pull(
    source: str = typer.Argument(..., metavar="SOURCE", help="An expert, user/name, or a collection's slug."),
    out: Path = typer.Option(None, help="New folder for the expert, or for a collection's bank. Default: its name."),
    revision: str = typer.Option(None, help="Branch, tag or commit of an expert. Default: main."),
    as_json: bool = JSON,
) -> None:
    """Copy an expert, or all experts of a collection, from the hub to a new folder."""
    from sigmix.experts import hub

    folder = out if out is not None else Path(source.rstrip("/").split("/")[-1])
    with working(f"pulling {source}"):
        rows = hub.pull(source, folder.expanduser(), revision)
    text = [f"{row['name']} from {row['repo']} at {row['revision'][:12]}: {row['path']}" for row in rows]
    emit({"out": str(folder), "experts": rows}, as_json, "\n".join(text))
