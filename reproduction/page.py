"""The page of a reproduction: every stage's tables, from stored items alone."""

from __future__ import annotations

import re
from pathlib import Path

from reproduction.report import Report
from reproduction.scale import Scale
from reproduction.stages import stages
from reproduction.store import Store
from sigmix.errors import ConfigError
from sigmix.utils.io import write_text

FILE = "tables.md"


def page(store: Store, scale: Scale) -> str:
    """All tables in Markdown."""
    report = Report(store, scale)
    hours = store.seconds() / 3600
    base = (store.fact("scale") or {}).get("base", scale.base)
    about = (
        f"Written by `sigmix reproduce --scale {scale.name} --report` from the items in this folder, not by hand. Base "
        f"{base}; accuracy in per cent, greedy answers, up to {scale.n} test items a cell, 95 % interval in "
        "square brackets (Wilson for one seed; bootstrap over seeds and items for several, whose own accuracies follow "
        "in round brackets). Differences are paired on the same items (bootstrap interval; exact McNemar p). "
        f"Everything stored took {hours:.1f} hours of computing."
    )
    parts = [f"# Tables of `sigmix reproduce --scale {scale.name}`", about]
    for stage in stages().values():
        parts += [f"## {stage.title}", f"Stage `{stage.name}`.", stage.tables(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def fill(text: str, store: Store, scale: Scale) -> str:
    """Put tables between ``<!-- SCALE:STAGE -->`` and ``<!-- /SCALE:STAGE -->``, where a text has these.

    ``SCALE:STAGE.PART`` stands for one table of a stage that has ``parts``. A figure in a sentence stands between
    ``<!-- SCALE=TASK/WHO -->`` and ``<!-- = -->``, where WHO is base or a kind, with or without ``/SEED``: an accuracy;
    or between ``<!-- SCALE=STAGE/… -->`` and ``<!-- = -->`` for a stage that has a ``figure`` of its own.

    Raises:
        ConfigError: a block that names no stage or part, or a figure that was not measured.
    """
    report = Report(store, scale)

    def block(match: re.Match[str]) -> str:
        name, _, part = match["name"].partition(".")
        stage = stages().get(name)
        if stage is None or (part and part not in getattr(stage, "parts", {})):
            raise ConfigError(f"there is no table {match['name']!r} to fill in")
        made = stage.parts[part](report) if part else stage.tables(report)
        made = re.sub(r"(!\[[^]]*\]\()", rf"\g<1>{scale.name}/", made)  # pictures lie in the scale's folder
        return f"<!-- {scale.name}:{match['name']} -->\n{made}\n<!-- /{scale.name}:{match['name']} -->"

    name = re.escape(scale.name)
    blocks = rf"<!-- {name}:(?P<name>[\w.]+) -->\n.*?<!-- /{name}:(?P=name) -->"
    text = re.sub(blocks, block, text, flags=re.DOTALL)
    figures = rf"(?P<mark><!-- {name}=(?P<key>\S+) -->)[^<]*(?P<end><!-- = -->)"
    return re.sub(figures, lambda found: f"{found['mark']}{_figure(report, found['key'])}{found['end']}", text)


def _figure(report: Report, key: str) -> str:
    name, *rest = key.split("/")
    stage = stages().get(name)
    found = stage.figure(report, rest) if stage is not None and hasattr(stage, "figure") else report.figure(key)
    if found is None:
        raise ConfigError(f"a text asks for the figure {key!r}, which was not measured")
    return found


def write_page(store: Store, scale: Scale) -> Path:
    """Write the tables and plots, and fill what READMEs above the scale's folder mark; returns the page."""
    report = Report(store, scale)
    write_text(store.folder / FILE, page(store, scale))
    # results/README.md, and the project's own; a README without such marks stays as it is
    for beside in (store.folder.parent / "README.md", store.folder.parent.parent / "README.md"):
        if beside.exists() and (filled := fill(text := beside.read_text(encoding="utf-8"), store, scale)) != text:
            write_text(beside, filled)
    for stage in stages().values():
        if hasattr(stage, "plots"):
            stage.plots(report)
    return store.folder / FILE
