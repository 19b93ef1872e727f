"""`sigmix experts list | show | verify | diff`; `push`, `pull` and `carry` are in `sigmix.cli.experts` and `.carry`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from sigmix.cli._console import emit, size, table, working
from sigmix.cli._loading import base_of, folder_of, open_bank
from sigmix.cli._options import AS_MADE, BANK, DTYPE, JSON

NAME = typer.Argument(..., help="A name in the bank, an expert's folder, or user/name on the hub.")


AGAINST = typer.Option(None, "--base", help="Also compare with this base: smollm2-135m, a hub name, a folder.")


def add(app: typer.Typer) -> None:
    """Register the commands."""
    group = typer.Typer(
        help="List, show, verify, compare and carry experts; push them to the hub and pull them.",
        no_args_is_help=True, rich_markup_mode=None,
        epilog="Example: sigmix experts list",
    )  # fmt: skip
    group.command("list", epilog="Example: sigmix experts list --bank experts")(listed)
    group.command("show", epilog="Example: sigmix experts show addition")(shown)
    group.command("verify", epilog="Example: sigmix experts verify my-adapter --base smollm2-135m --seal")(verified)
    group.command("diff", epilog="Example: sigmix experts diff addition larger")(compared)
    group.command("carry", epilog="Example: sigmix experts carry addition --to llava-hf/llava-1.5-7b-hf --out carried")(
        carry
    )
    _add_hub(group)
    app.add_typer(group, name="experts")


def listed(bank: Path = BANK, as_json: bool = JSON) -> None:
    """Experts with their domains, bases and measured accuracy."""
    from sigmix.experts.inspect import listing

    opened = open_bank(bank)
    rows = listing(opened)
    if as_json:
        emit({"bank": opened.source, "experts": rows}, True, "")
        return
    if not rows:
        typer.echo(f"{opened.source} has no experts; sigmix train --help shows how to make one")
        return
    cells = [
        [row["name"], row.get("domain"), _metric(row.get("metrics")), (row.get("base") or {}).get("name"), _state(row)]
        for row in rows
    ]
    table(f"experts in {opened.source}", ["name", "domain", "accuracy", "base", "state"], cells)


def _state(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"DAMAGED: {row['problem']}"
    return "verified" if row["verified"] else "does not know its base"


def _metric(metrics: list[dict[str, Any]] | None) -> str:
    if not metrics:
        return "not measured"
    one = metrics[0]
    text = f"{one.get('name', 'accuracy')} {_number(one.get('value'))}"
    if one.get("interval"):
        text += f" [{', '.join(map(_number, one['interval']))}]"
    extra = [f"n = {one['n']}"] if one.get("n") is not None else []
    extra += [f"base {_number(one['base'])}"] if one.get("base") is not None else []
    return text + (f" ({', '.join(extra)})" if extra else "")


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def shown(name: str = NAME, bank: Path = BANK, top: int = typer.Option(5, min=1, help="Matrices listed."),
          as_json: bool = JSON) -> None:  # fmt: skip
    """What an expert is, where it came from, and what it changes most."""
    from sigmix.experts.expert import Expert
    from sigmix.experts.inspect import show

    found = show(Expert.from_pretrained(folder_of(name, bank)), top)
    lines = [f"{found['name']}: {found['description'] or 'no description'}"]
    base = found["base"] or {}
    facts = {
        "domain": found["domain"], "task": found["task"], "objective": found["objective"], "seed": found["seed"],
        "commit": found["commit"], "license": found["license"],
        "base": f"{base.get('name')} ({base.get('dtype')}, fingerprint {str(base.get('fingerprint'))[:12]})",
        "verified": "yes" if found["verified"] else "no: sigmix experts verify DIR --base BASE --seal",
        "size": f"{found['numbers']} numbers in {found['matrices']} matrices, {size(found['bytes'])}",
        "digest": found["digest"][:16],
        "from the hub": found["origin"],
        "carried from": _origin(found["carried_from"]),
    }  # fmt: skip
    lines += [f"{key}: {value}" for key, value in facts.items() if value is not None]
    lines += [f"measured: {_metric([metric])}" for metric in found["metrics"]]
    gain = found["gain"]
    lines.append(
        f"gains z - 1: mean {gain['mean']:+.4f}, std {gain['std']:.4f}, from {gain['min']:+.3f} to {gain['max']:+.3f}"
    )
    lines.append("changes most:")
    lines += [f"  {' '.join(f'{v:.3f}' if isinstance(v, float) else v for v in one.values())}" for one in found["top"]]
    emit(found, as_json, "\n".join(lines))


def _origin(carried: dict[str, Any] | None) -> str | None:
    if carried is None:
        return None
    basis = {"same": "the same weights", "differs": "OTHER WEIGHTS"}[carried["basis"]]
    return f"{carried['base']} ({basis} in the matrices that it acts on)"


def verified(
    folder: str = typer.Argument(..., metavar="DIR", help="An expert's folder, a name in the bank, or user/name."),
    base: str = AGAINST,
    seal: bool = typer.Option(
        False, "--seal", help="Bind a folder that PEFT or TRL saved to --base: adds sigmix.json and a card."
    ),
    dtype: str = DTYPE,
    quantization: str = AS_MADE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Check an expert's files, and that it fits a base."""
    from sigmix.errors import ConfigError, ExpertError
    from sigmix.experts.expert import Expert
    from sigmix.experts.inspect import verify

    if seal and base is None:
        raise ConfigError("--seal needs --base: the model that the adapter was trained on")
    path = folder_of(folder, bank)
    if seal and isinstance(path, str):
        raise ConfigError(f"{path} is on the hub, where nothing can be sealed", remedy=f"sigmix experts pull {path}")
    report = verify(path)
    sealed = False
    if report["ok"] and base is not None:
        model = base_of(base, [Expert.from_pretrained(path)], dtype, quantization)
        with working("comparing with the base"):
            if seal and not report["verified"]:
                from sigmix.experts.expert import seal as bind

                bind(path, model)
                sealed = True
            report = verify(path, model)
    report["sealed"] = sealed
    lines = [f"{report['path']}: {'in order' if report['ok'] else 'NOT IN ORDER'}{', sealed now' if sealed else ''}"]
    lines.append(f"checked: {', '.join(report['checked']) or 'nothing could be read'}")
    if report["ok"] and not report["verified"]:
        lines.append("it does not know its base: sigmix experts verify DIR --base BASE --seal")
    emit(report, as_json, "\n".join(lines))
    if not report["ok"]:
        raise ExpertError("; ".join(report["problems"]))


def compared(
    a: str = NAME,
    b: str = NAME,
    base: str = AGAINST,
    dtype: str = DTYPE,
    quantization: str = AS_MADE,
    bank: Path = BANK,
    top: int = typer.Option(5, min=1, help="Matrices listed."),
    as_json: bool = JSON,
) -> None:
    """How two experts differ, in gains and in weights (exactly with --base, else estimated from sketches)."""
    from sigmix.experts.expert import Expert
    from sigmix.experts.inspect import diff

    left, right = (Expert.from_pretrained(folder_of(name, bank)) for name in (a, b))
    model = None if base is None else base_of(base, [left, right], dtype, quantization)
    with working("comparing"):
        found = diff(left, right, model)
    if as_json:
        emit(found, True, "")
        return
    same = {True: "the same base", False: "DIFFERENT bases", None: "a base that one of them does not know"}
    identical = ", identical" if found["identical"] else ""
    typer.echo(f"{found['a']} and {found['b']}: {same[found['same_base']]}{identical}")
    rows = []
    for space in ("gain", "weight"):
        if found[space]:
            label = space + (" (estimated)" if found[space].get("estimated") else "")
            rows.append([label, *_figures(found[space])])
    table("", ["space", "cosine", f"|{found['a']}|", f"|{found['b']}|", "distance"], rows)
    far = sorted(found["matrices"].items(), key=lambda item: -item[1]["gain"]["distance"])[:top]
    table("matrices that differ most, by gains", ["matrix", "cosine", "|a|", "|b|", "distance"],
          [[path, *_figures(one["gain"])] for path, one in far])  # fmt: skip


def _figures(one: dict[str, Any]) -> list[str]:
    cosine = "-" if one["cosine"] is None else f"{one['cosine']:+.3f}"
    return [cosine, f"{one['norm_a']:.3f}", f"{one['norm_b']:.3f}", f"{one['distance']:.3f}"]


# --- `sigmix experts push | pull`: experts on the Hugging Face hub.


def _add_hub(group: typer.Typer) -> None:
    """Register the commands."""
    group.command("push", epilog="Example: sigmix experts push addition user/addition --private")(push)
    group.command("pull", epilog="Example: sigmix experts pull user/addition --out my-experts/addition")(pull)


def push(
    name: str = typer.Argument(..., help="A name in the bank, or an expert's folder."),
    repo: str = typer.Argument(..., metavar="USER/NAME", help="The model on the hub; it is made if need be."),
    private: bool = typer.Option(False, "--private", help="Only you can see it."),
    revision: str = typer.Option(None, help="Branch to commit to; it is made if need be."),
    message: str = typer.Option(None, help="Message of the commit."),
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Commit an expert and its card to the hub, as whoever `hf auth login` or HF_TOKEN says."""
    from sigmix.cli._loading import folder_of
    from sigmix.experts.expert import Expert
    from sigmix.experts.hub import check_repo_id
    from sigmix.experts.hub import push as pushed

    check_repo_id(repo)
    expert = Expert.from_pretrained(folder_of(name, bank))
    with working(f"pushing {name}"):
        options = {"private": private, "revision": revision, "commit_message": message}
        done = pushed(expert.name, expert.z, expert.meta, repo, **options)  # type: ignore[arg-type]
    figures = {"expert": expert.name, "repo": repo, **done._asdict()}
    what = f"at {done.revision[:12]}" if done.changed else "there was nothing to change"
    emit(figures, as_json, f"{expert.name} is at {done.url}, {what}")


def pull(
    source: str = typer.Argument(..., metavar="SOURCE", help="An expert, user/name, or a collection's slug."),
    out: Path = typer.Option(None, help="New folder: the expert's, or for a collection the bank's. Default: its name."),
    revision: str = typer.Option(None, help="Branch, tag or commit of an expert. Default: main."),
    as_json: bool = JSON,
) -> None:
    """Copy an expert, or all of a collection, from the hub to a new folder."""
    from sigmix.experts.hub import pull as pulled

    folder = out if out is not None else Path(source.rstrip("/").split("/")[-1])
    with working(f"pulling {source}"):
        rows = pulled(source, folder.expanduser(), revision)
    text = [f"{row['name']} from {row['repo']} at {row['revision'][:12]}: {row['path']}" for row in rows]
    emit({"out": str(folder), "experts": rows}, as_json, "\n".join(text))


# --- `sigmix experts carry`.


def carry(
    name: str = typer.Argument(..., help="A name in the bank, or an expert's folder."),
    to: str = typer.Option(..., "--to", help="The model to carry it to, such as llava-hf/llava-1.5-7b-hf or a folder."),
    out: Path = typer.Option(..., help="Folder for the carried expert; its name is the expert's."),
    source: str = typer.Option(None, "--from", help="Its own base: compares weights. Default: compares sketches."),
    force: bool = typer.Option(False, "--force", help="Carry z by index order although the weights differ."),
    dtype: str = DTYPE,
    quantization: str = AS_MADE,
    bank: Path = BANK,
    as_json: bool = JSON,
) -> None:
    """Carry a text model's expert into a vision-language model, if its language backbone has the same weights."""
    from sigmix.cli._loading import folder_of
    from sigmix.experts.expert import Expert
    from sigmix.experts.metadata import check_name
    from sigmix.experts.serialization import check_free
    from sigmix.experts.transfer import carry as carried

    check_name(out.name)
    expert = Expert.from_pretrained(folder_of(name, bank))
    check_free(out)
    model = base_of(to, [expert], dtype, quantization)
    base = base_of(source, [expert], dtype, quantization) if source is not None else None
    with working("comparing weights"):
        made = carried(expert, model, base=base, force=force, name=out.name)
    made.save_pretrained(out)
    facts = made.meta["carried_from"]
    figures = {"name": made.name, "path": str(out), "to": made.meta["base"]["name"], "matrices": len(made.z)}
    figures |= {"basis": facts["basis"], "deviation": None if facts["deviation"] is None else dict(facts["deviation"])}
    text = f"{out}: {len(made.z)} matrices carried from {facts['base']} to {figures['to']}; "
    if facts["basis"] == "same":
        text += f"the weights are the same (by {facts['deviation']['by']}, at most {facts['deviation']['largest']:.1g})"
    elif facts["deviation"] is None:
        text += "FORCED, and the weights could not be compared: measure what it does there"
    else:
        gap = facts["deviation"]
        text += f"FORCED: the weights differ by {gap['median']:.2g} (median), {gap['largest']:.2g} at most: measure it"
    emit(figures, as_json, text)
