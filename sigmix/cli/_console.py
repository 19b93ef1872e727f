"""What several commands share: common options, output as text or JSON, progress. `sigmix.cli._loading` opens things."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer


def emit(figures: Any, as_json: bool, text: str) -> None:
    """Print figures as JSON, or the text."""
    typer.echo(json.dumps(figures, ensure_ascii=False, default=str) if as_json else text)


def interval(summary: dict[str, Any]) -> str:
    """ "0.684 [0.63, 0.73] (n = 300)"."""
    low, high = summary["interval"]
    return f"{summary['accuracy']:.3f} [{low:.3f}, {high:.3f}] (n = {summary['n']})"


def accuracy(summary: dict[str, Any]) -> str:
    """ "0.684 [0.630, 0.733]"."""
    low, high = summary["interval"]
    return f"{summary['accuracy']:.3f} [{low:.3f}, {high:.3f}]"


def paired(found: dict[str, Any] | None) -> list[str]:
    """Difference with interval, won/lost and p as text; dashes for the base."""
    if found is None:
        return ["-", "-", "-"]
    low, high = found["interval"]
    difference = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
    return [difference, f"{found['won']}/{found['lost']}", f"{found['p']:.2g}"]


def check_output(folder: Path, marker: str) -> None:
    """Raise `OutputError` if ``folder`` cannot be written or holds ``marker`` already: before the work, not after."""
    from sigmix.errors import OutputError
    from sigmix.utils.io import check_writable, writing

    with writing(folder):
        if (folder / marker).exists():
            raise OutputError(f"{folder} holds {marker} already", remedy="give another --out, or remove it first")
    check_writable(folder / marker)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout, never cut off: numbers and short words to the right of the first column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200, highlight=False)
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if sys.stdout.isatty() else box.ASCII2)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console.print(made)


def size(number: float) -> str:
    """ "270 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.5:
            return f"{number:.0f} {unit}" if number >= 10 or unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def note(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
    """A spinner on a terminal's stderr; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


class Ticker:
    """Progress of counted work (0: of unknown length) on stderr: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, title: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self.title, self.total, self.done, self.told = title, total, 0, time.monotonic()
        self.bar = Bar(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(title, total=total or None)

    def __enter__(self) -> Ticker:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, count: int = 1, title: str | None = None) -> None:
        """`count` more are done, now working on ``title``."""
        self.done += count
        self.title = title or self.title
        self.bar.update(self.task, advance=count, description=self.title)
        if not sys.stderr.isatty() and time.monotonic() - self.told >= 10:
            self.told = time.monotonic()
            note(f"{self.title}: {self.done}" + (f"/{self.total}" if self.total else ""))


class Progress:
    """A progress bar on stderr for training, fed with metrics entries; plain lines where stderr is no terminal."""

    def __init__(self, steps: int, title: str, tensorboard: Path | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=self.console,
            disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self.task = self.bar.add_task(title, total=steps, note="")
        self.validation = ""
        self.writer = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(tensorboard))

    def __enter__(self) -> Progress:
        self.bar.start()
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def on_entry(self, entry: dict[str, Any]) -> None:
        """Show one metrics entry."""
        if entry["kind"] == "validation":
            low, high = entry["interval"]
            self.validation = f"val {entry['accuracy']:.3f} [{low:.2f}, {high:.2f}]"
            self._say(f"step {entry['step']}: {self.validation}{' best' if entry['best'] else ''}")
        else:
            note = f"reward {entry['reward']:+.2f} KL {entry['kl']:.3f} {self.validation}"
            self.bar.update(self.task, completed=entry["step"] + 1, note=note)
            self._say(f"step {entry['step'] + 1}: {note} entropy {entry['entropy']:.2f} {entry['seconds']:.0f} s")
        if self.writer is not None:
            for key, value in entry.items():
                if isinstance(value, (int, float)) and key not in ("step", "kind"):
                    self.writer.add_scalar(f"{entry['kind']}/{key}", value, entry["step"])

    def _say(self, line: str) -> None:
        if not sys.stderr.isatty():
            print(line, file=sys.stderr, flush=True)
