"""The stages of a reproduction, in the order in which they run. Each is a class with

name, title       for ``--only`` and for the report
needs             stages that must have run
run(lab)          measures and stores what is not there yet
tables(report)    Markdown from what is stored, without a model
plots(report)     pictures from what is stored (some)
"""

from __future__ import annotations

from typing import Any, Protocol

from reproduction.lab import Lab
from reproduction.report import Report
from sigmix.errors import UnknownNameError


class Stage(Protocol):
    """See the module."""

    name: str
    title: str
    needs: tuple[str, ...]

    def run(self, lab: Lab) -> None: ...
    def tables(self, report: Report) -> str: ...


def stages() -> dict[str, Any]:
    """All stages by name, in order."""
    from reproduction.stages.ablations import Ablations
    from reproduction.stages.composition import Composition
    from reproduction.stages.continual import Continual
    from reproduction.stages.fewshot import FewShot
    from reproduction.stages.larger import Larger
    from reproduction.stages.spectra import Spectra
    from reproduction.stages.speed import Speed
    from reproduction.stages.strategies import Dispatch, Strategies
    from reproduction.stages.sweep import Sweep
    from reproduction.stages.table1 import Table1, Table4
    from reproduction.stages.transfer import Transfer

    every = (
        Sweep(), Table1(), Composition(), Table4(), Strategies(), Dispatch(), FewShot(), Transfer(), Continual(),
        Ablations(), Spectra(), Larger(), Speed(),
    )  # fmt: skip
    return {stage.name: stage for stage in every}


def chosen(only: list[str]) -> list[Any]:
    """The stages asked for with those that they need, in order; all without a name.

    Raises:
        UnknownNameError: there is no such stage.
    """
    every = stages()
    for name in only:
        if name not in every:
            raise UnknownNameError("stage", name, every)
    wanted = set(only or every)
    while more := {need for name in wanted for need in every[name].needs} - wanted:
        wanted |= more
    return [stage for name, stage in every.items() if name in wanted]
