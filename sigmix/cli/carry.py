"""`sigmix experts carry`."""

from __future__ import annotations

from pathlib import Path

import typer

from sigmix.cli.opening import base_of
from sigmix.cli.shared import AS_MADE, BANK, DTYPE, JSON, emit, working


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
    from sigmix.cli.named import folder_of
    from sigmix.experts.carry import carry as carried
    from sigmix.experts.directory import check_free
    from sigmix.experts.expert import Expert
    from sigmix.experts.metadata import check_name

    check_name(out.name)
    expert = Expert.load(folder_of(name, bank))
    check_free(out)
    model = base_of(to, [expert], dtype, quantization)
    base = base_of(source, [expert], dtype, quantization) if source is not None else None
    with working("comparing weights"):
        made = carried(expert, model, base=base, force=force, name=out.name)
    made.save(out)
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
