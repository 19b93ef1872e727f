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
from reproduction.scale import Scale
from sigmix.errors import UnknownNameError


class Stage(Protocol):
    """See the module."""

    name: str
    title: str
    needs: tuple[str, ...]

    def run(self, lab: Lab) -> None: ...
    def tables(self, report: Report) -> str: ...


def stages(scale: Scale) -> dict[str, Any]:
    """The stages of a scale by name, in order."""
    from reproduction.stages.ablations import Ablations
    from reproduction.stages.composition import Composition
    from reproduction.stages.continual import Continual
    from reproduction.stages.fewshot import FewShot
    from reproduction.stages.larger import Larger
    from reproduction.stages.merging import MergingMethods
    from reproduction.stages.position_mixtures import PositionMixtures
    from reproduction.stages.position_variants import PositionVariants
    from reproduction.stages.positions import Gsm8k, Positions, Snips
    from reproduction.stages.spectra import Spectra
    from reproduction.stages.speed import Speed
    from reproduction.stages.strategies import Dispatch, Strategies
    from reproduction.stages.sweep import Sweep
    from reproduction.stages.table1 import Table1, Table4
    from reproduction.stages.transfer import Transfer

    every = (
        Sweep(), Table1(), Composition(), Table4(), Strategies(), Dispatch(), FewShot(), Transfer(), Continual(),
        Ablations(), Spectra(), Larger(), Speed(), Positions(), Snips(), PositionVariants(), PositionMixtures(),
        Gsm8k(), MergingMethods(),
    )  # fmt: skip
    by_name = {stage.name: stage for stage in every}
    return {name: by_name[name] for name in scale.stages}


def chosen(scale: Scale, only: list[str]) -> list[Any]:
    """The stages of these names with those that they need, in order; all of the scale without a name.

    Raises:
        UnknownNameError: there is no such stage.
    """
    every = stages(scale)
    for name in only:
        if name not in every:
            raise UnknownNameError("stage", name, every)
    wanted = set(only or every)
    while more := {need for name in wanted for need in every[name].needs} - wanted:
        wanted |= more
    return [stage for name, stage in every.items() if name in wanted]
