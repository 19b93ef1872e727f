"""Output of commands: text or JSON on stdout, notes and progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.errors import OutputError
from sigmix.utils.io import check_writable, writing
from sigmix.utils.optional import optional

if TYPE_CHECKING:
    from sigmix.train.config import TrainConfig


def emit(figures: Any, as_json: bool, text: str | None = None) -> bool:
    """Print figures as JSON, or the text if it is given; return ``as_json``."""
    if as_json or text is not None:
        typer.echo(json.dumps(figures, ensure_ascii=False, default=str) if as_json else text)
    return as_json


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table on stdout without cutting off cells."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else 200, highlight=False)
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if terminal else box.ASCII2)
    for column in columns:
        grid.add_column(column, overflow="fold")
    for row in rows:
        grid.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(grid)


def accuracy(summary: Mapping[str, Any]) -> str:
    """Format accuracy and interval: "0.684 [0.630, 0.733]"."""
    return "{accuracy:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]".format(**summary)


def paired(test: Mapping[str, Any] | None) -> list[str]:
    """Format a paired comparison: difference with interval, won/lost, p; dashes for the base model itself."""
    texts = ("{difference:+.3f} [{interval[0]:+.3f}, {interval[1]:+.3f}]", "{won}/{lost}", "{p:.2g}")
    return ["-"] * 3 if test is None else [text.format(**test) for text in texts]


def check_output(folder: Path, marker: str) -> None:
    """Raise `OutputError` if ``folder`` cannot be written or contains the file ``marker`` already."""
    with writing(folder):
        if (folder / marker).exists():
            raise OutputError(f"{folder} contains {marker} already", remedy="give another --out, or remove it")
    check_writable(folder / marker)


def working(text: str) -> AbstractContextManager[Any]:
    """Show a spinner if stderr is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(text)


class Progress:
    """Progress bar on stderr; where stderr is no terminal, a line every ten seconds.

    Args:
        total: number of steps; 0: unknown.
    """

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.title, self.total, self.done, self.last_line = title, total, 0, time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=Console(stderr=True), transient=True,
            disable=not self.terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=total or None, note="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, count: int = 1, title: str | None = None) -> None:
        """Add ``count`` finished steps, and change the title."""
        self.done += count
        self.title = title or self.title
        self.bar.update(self.task, advance=count, description=self.title)
        if not self.terminal and time.monotonic() - self.last_line >= 10:
            self.last_line = time.monotonic()
            note(f"{self.title}: {self.done}" + (f"/{self.total}" if self.total else ""))


class TrainingProgress(Progress):
    """Progress of training from its metrics entries, optionally written as TensorBoard events too.

    Args:
        config: of the run.
    """

    def __init__(self, title: str, config: TrainConfig, tensorboard: Path | None = None) -> None:
        super().__init__(title, config.max_steps)
        self.config, self.validation = config, ""
        self.writer: Any = None
        if tensorboard is not None:
            optional("tensorboard", "tensorboard", "--tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            with writing(tensorboard):
                self.writer = SummaryWriter(str(tensorboard))

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self.writer is not None:
            self.writer.close()

    def on_entry(self, entry: Mapping[str, Any]) -> None:
        """Show one metrics entry."""
        if entry["kind"] == "validation":
            self.validation = f"val {accuracy(entry)}"
            line = f"step {entry['step']}: {self.validation}{' best' if entry['best'] else ''}"
        else:
            reinforce = self.config.objective == "reinforce"
            shown = "reward {reward:+.2f} entropy {entropy:.2f}" if reinforce else "loss {loss:.3f}"
            shown += " KL {kl:.3f}" if self.config.beta else ""
            text = f"{shown.format(**entry)} {self.validation}"
            self.bar.update(self.task, completed=entry["step"] + 1, note=text)
            line = f"step {entry['step'] + 1}: {text} {entry['seconds']:.0f} s"
        if not self.terminal:
            note(line)
        for key, value in entry.items() if self.writer is not None else ():
            if isinstance(value, (int, float)) and key not in ("step", "kind"):
                self.writer.add_scalar(f"{entry['kind']}/{key}", value, entry["step"])
