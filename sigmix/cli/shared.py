"""What several commands share: common options, output as text or JSON, progress."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

BASE = typer.Option("smollm2-135m", help="Base: smollm2-135m, a hub name, a folder or a .gguf file.")
JSON = typer.Option(False, "--json", help="Print one JSON object.")
BANK = typer.Option(None, help="Folder of experts, or a collection on the hub (its slug). Default: the bundled bank.")
QUANTIZATION = typer.Option(None, help="Keep the base's linear layers in fewer bits: int8, int4 or nf4.")
DEVICE_MAP = typer.Option(
    None, metavar="auto|FILE.json", help="Where the base's parts go: spread by itself, or {module: device} in a file."
)
DTYPE = typer.Option(None, help="Of the base's weights. Default: the one that the expert was made in.")
AS_MADE = typer.Option(None, "--quantization", help="int8, int4 or nf4. Default: that of the expert's base, if any.")
BASIS = typer.Option("own", help="Of a quantised base: own, or original for experts made on the base unquantised.")


def read_targets(text: str | None) -> list[str] | str | None:
    """``target_modules`` from --targets: a word, a regular expression, or names with commas between them."""
    return text.split(",") if text and "," in text else text


def read_layers(text: str | None) -> list[int] | str | None:
    """``layers_to_transform`` from --layers.

    Raises:
        ConfigError: neither "half" nor numbers.
    """
    from sigmix.errors import ConfigError

    if not text or text == "half":
        return text
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--layers must be half or numbers like 0,2,4, not {text!r}") from None


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


def open_bank(folder: Path | None) -> Any:
    """The bank in a folder or of a collection on the hub, or the bundled one."""
    from sigmix.experts.bank import Bank

    with working("opening the experts"):
        # as text, which can name a collection where there is no such folder
        return Bank(folder.as_posix()) if folder is not None else Bank.bundled()


def read_mix(text: str, bank: Any = None) -> Any:
    """A `Mix` from "a:0.7+b:0.3" or from a file that holds one as JSON; its experts are looked up in ``bank``.

    Raises:
        ConfigError: neither. UnknownNameError: an expert that the bank does not have.
    """
    from sigmix.experts.mixfile import read_mix as read

    return read(text, bank)


def open_mixes(texts: Sequence[str], folder: Path | None, wanted: bool = False) -> tuple[list[Any], Any]:
    """The mixes and the bank that they need (None if no bank was asked for or is ``wanted``, and all are the base)."""
    mixes = [read_mix(text) for text in texts]
    needed = wanted or folder is not None or any(mix.weights for mix in mixes)
    bank: Any = open_bank(folder) if needed else None
    for name in [name for mix in mixes for name in mix.weights]:
        bank.path(name)  # there is a bank if any mix has an expert
    return mixes, bank


def read_device_map(text: str | None) -> Any:
    """What ``--device-map`` says, as `load_base` takes it: None, "auto", or the {module: device} of a JSON file.

    Raises:
        ConfigError: no such file, or another content.
    """
    from sigmix.errors import ConfigError

    if text is None or text == "auto":
        return text
    remedy = 'auto, or a file like {"model.embed_tokens": 0, "model.layers.0": 0, …, "lm_head": "cpu"}'
    try:
        made = json.loads(Path(text).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--device-map {text} cannot be read: {why}", remedy=remedy) from error
    devices = made.values() if isinstance(made, dict) else ()
    if not devices or not all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in devices):
        raise ConfigError(f"--device-map {text} holds no object of modules and devices", remedy=remedy)
    return made


def open_base(
    base: str, dtype: str | None = None, quantization: str | None = None, basis: str = "own",
    device_map: str | None = None,
) -> Any:  # fmt: skip
    """(model, tokenizer) of a base, quantised or not, in the basis asked for; shown as work on stderr.

    Args:
        device_map: see `read_device_map`.

    Raises:
        ConfigError: a basis that there is not, or "original" for a base that is not quantised. Others: see `load_base`.
    """
    from sigmix.experts.original import check_basis

    check_basis(basis, quantization)
    placed = read_device_map(device_map)
    with working(f"loading {base}"):
        from sigmix.models import load_base

        model, tokenizer = load_base(base, dtype, quantization=quantization, device_map=placed)
    if basis == "original":
        from sigmix.experts.original import use_original_basis

        with Ticker("reading the original weights", 0) as ticker:
            use_original_basis(model, lambda *_: ticker.advance())
    else:
        _decompose(model)
    return model, tokenizer


def base_of(base: str, experts: Sequence[Any], dtype: str | None = None, quantization: str | None = None) -> Any:
    """The model of a base, for comparing it with experts: without more words in the dtype and quantisation in which the
    first of them that says so was made; shown as work on stderr.

    Raises:
        See `load_base`.
    """
    from sigmix.experts.base import dtype_and_quantization

    told = [(expert.meta.get("base") or {}).get("dtype") for expert in experts]
    made, kept = dtype_and_quantization(next((one for one in told if one), None))
    with working(f"loading {base}"):
        from sigmix.models import load_base

        return load_base(base, dtype or made, quantization=quantization or kept)[0]


def open_engine(
    base: str, bank: Any, mixes: Sequence[Any] = (), quantization: str | None = None, basis: str = "own",
    device_map: str | None = None,
) -> Any:  # fmt: skip
    """An `Engine` on a base, see `open_base`; experts in ``mixes`` are checked against the base at once."""
    model, tokenizer = open_base(base, None, quantization, basis, device_map)
    with working("checking the experts"):
        from sigmix.engine import Engine

        engine = Engine(model, tokenizer, bank)
        for mix in mixes:
            engine.z(mix)
    return engine


def _decompose(model: Any) -> None:
    """Fill the cache of decompositions with a progress bar; the engine would do the same in silence."""
    from sigmix.experts.base import linears, matrix_of
    from sigmix.svf.decompose import cache_path, cached_decompose, weight_digest
    from sigmix.vision import backbone

    head, inside = model.get_output_embeddings(), backbone(model)
    root = f"{inside[0]}." if inside is not None else ""
    layers = [module for path, module in linears(model).items() if path.startswith(root) and module is not head]
    if layers and not cache_path(weight_digest(matrix_of(layers[-1]))).exists():
        with Ticker("decomposing the base, once", len(layers)) as ticker:
            for module in layers:
                cached_decompose(matrix_of(module))
                ticker.advance()


def check_output(folder: Path, marker: str) -> None:
    """Raise `OutputError` if ``folder`` cannot be written or holds ``marker`` already: before the work, not after."""
    from sigmix.errors import OutputError
    from sigmix.files import check_writable, writing

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
