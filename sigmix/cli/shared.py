"""What several commands share: common options, output as text or JSON, progress."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import typer

BASE = typer.Option("smollm2-135m", help="Base: smollm2-135m, a hub name, a folder or a .gguf file.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
BANK = typer.Option(None, help="Folder of experts. Default: the bundled bank.")


def emit(figures: Any, as_json: bool, text: str) -> None:
    """Print figures as JSON, or the text."""
    typer.echo(json.dumps(figures, ensure_ascii=False, default=str) if as_json else text)


def interval(summary: dict[str, Any]) -> str:
    """"0.684 [0.63, 0.73] (n = 300)"."""
    low, high = summary["interval"]
    return f"{summary['accuracy']:.3f} [{low:.3f}, {high:.3f}] (n = {summary['n']})"


def open_bank(folder: Path | None) -> Any:
    """The bank in a folder, or the bundled one."""
    from sigmix.experts.bank import Bank

    return Bank(folder) if folder is not None else Bank.bundled()


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
