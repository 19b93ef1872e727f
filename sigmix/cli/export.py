"""`sigmix export`: write a mixture as a merged checkpoint, a PEFT LoRA or GGUF adapters, and verify the result."""

from __future__ import annotations

import contextlib
import gc
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from sigmix.cli import app
from sigmix.cli._console import Progress, accuracy, emit, note, paired, working
from sigmix.cli._loading import open_bank
from sigmix.cli._options import ALLOW_CODE, BANK, BASE, DATA_DIR, JSON, MIXTURE
from sigmix.errors import ConfigError, UnknownNameError
from sigmix.utils.io import size

if TYPE_CHECKING:
    import torch

    from sigmix.experts.bank import Bank
    from sigmix.experts.mix import Mix
    from sigmix.export.base import BaseCheckpoint
    from sigmix.export.low_rank import LowRank

MIN_GAIN = 0.9
"""Default share of a mixture's gain in accuracy over the base that a truncated export must keep."""

group = typer.Typer(
    help="Export a mixture: a merged checkpoint, a PEFT LoRA, or GGUF adapters.", no_args_is_help=True,
    rich_markup_mode=None, epilog="Example: sigmix export merged --mix dates --out merged-dates",
)  # fmt: skip
app.add_typer(group, name="export")

MIX = typer.Option(..., help=f"Mixture: {MIXTURE}.")
FOLDER = typer.Option(..., help="New folder for the export.")
DTYPE = typer.Option(None, help="dtype in which the base model is read. Default: that of the experts, else as stored.")
VERIFY = typer.Option(True, "--verify/--no-verify", help="Load the export in the other program and compare logits.")
RANK = typer.Option("exact", help="Maximum rank of a matrix, or exact: all components that the mixture changes.")
ERROR = typer.Option(None, help="Smallest rank that loses at most this share of the change, such as 0.05.")
N = typer.Option(300, min=0, help="Test items per task to measure the accuracy of a truncated export on; 0: none.")
KEPT = typer.Option(
    MIN_GAIN, help="Share of the mixture's gain in accuracy that a truncated export must keep; 0: any is written."
)


@group.command(epilog="Example: sigmix export merged --mix sums:0.7+dates:0.3 --out merged")
def merged(
    mix: str = MIX, out: Path = FOLDER,
    shard_size: str = typer.Option("5GB", help="Maximum file size, such as 500MB or 5GB."),
    dtype: str = DTYPE, verify: bool = VERIFY, base: str = BASE, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Write a checkpoint with the mixture merged into its weights, for plain transformers."""
    from sigmix.export.merged import export_merged
    from sigmix.export.verify import Reference, verify_merged

    limit = _bytes(shard_size)
    with _reserved(out):
        source, parsed, experts = _open(base, dtype, mix, bank)
        with Progress("merging", len(source.shards)) as progress:
            figures = export_merged(source, parsed, experts, out, limit, progress.advance)
        if verify:
            _verify(figures, source, lambda: verify_merged(out, Reference(source, parsed, experts)), "transformers")
    line = f"{out}: {len(figures['files'])} file(s), {size(figures['bytes'])}, {figures['dtype']}"
    line += f"; {figures['changed']} of {figures['tensors']} tensors changed"
    _emit({"out": str(out), **figures}, as_json, [line], source)


@group.command(epilog="Example: sigmix export lora --mix dates --rank 256 --out dates-lora")
def lora(
    mix: str = MIX, out: Path = FOLDER, rank: str = RANK, error: float = ERROR,
    vllm: bool = typer.Option(False, "--vllm", help="Use one rank for all matrices, of those that vLLM accepts."),
    precision: str = typer.Option("float32", help="dtype of the file: float32, bfloat16 or float16."),
    n: int = N, min_gain: float = KEPT, data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE,
    dtype: str = DTYPE, verify: bool = VERIFY, base: str = BASE, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Write a PEFT LoRA of the mixture: exact, or truncated with its loss in accuracy."""
    from sigmix.export.base import DTYPES
    from sigmix.export.lora import export_lora
    from sigmix.export.low_rank import vllm_rank
    from sigmix.export.verify import Reference, verify_lora

    if precision not in (dtypes := ("float32", "bfloat16", "float16")):
        raise UnknownNameError("precision", precision, dtypes)
    count = _rank(rank, error)
    if vllm and count is not None:
        vllm_rank(count)
    test = _AccuracyTest(n, min_gain, data_dir, allow_code, error)
    with _reserved(out):
        source, parsed, experts = _open(base, dtype, mix, bank)
        factors = _low_rank(source, parsed, experts, count, error, vllm)
        measured = test.run(out, parsed, experts, [(factors, 1.0)], DTYPES[precision])
        with Progress("writing", len(factors.paths)) as progress:
            figures = export_lora(factors, out, precision, progress.advance, measured.get("accuracy", ())) | measured
        if verify:
            _verify(
                figures, source,
                lambda: verify_lora(out, source, Reference(source, parsed, experts, upcast=True)), "PEFT",
                exact=not figures["dropped"], upcast=True, adapter_bytes=figures["bytes"],
            )  # fmt: skip
    line = f"{out}: rank {figures['rank']}, {size(figures['bytes'])} in {precision}"
    _emit({"out": str(out), **figures}, as_json, [line], source)


@group.command(epilog="Example: sigmix export gguf --mix dates --out dates.gguf --gguf base.gguf")
def gguf(
    mix: str = MIX,
    out: Path = typer.Option(..., help="New .gguf file; with --each a folder with one file per expert."),
    each: bool = typer.Option(False, "--each", help="Write one file per expert, which llama.cpp mixes per request."),
    rank: str = RANK, error: float = ERROR,
    number: str = typer.Option("f32", "--type", help="Number type of the file: f32 or f16."),
    gguf_base: Path = typer.Option(None, "--gguf", help="GGUF file of the base model, to verify with."),
    n: int = N, min_gain: float = KEPT, data_dir: Path = DATA_DIR, allow_code: bool = ALLOW_CODE,
    dtype: str = DTYPE, verify: bool = VERIFY, base: str = BASE, bank: Path = BANK, as_json: bool = JSON,
) -> None:  # fmt: skip
    """Write a LoRA adapter for llama.cpp: of the mixture, or with --each of every expert in it.

    Verification needs llama-cpp-python and the base model as a GGUF file: --gguf, or --base if it is one; that of the
    default base model is downloaded (93 MB).
    """
    from sigmix.experts.mix import Mix
    from sigmix.export.gguf import TYPES, export_gguf, tensor_names
    from sigmix.export.model_card import CACHE_NOTE, gguf_card
    from sigmix.export.verify import Reference, base_gguf, verify_gguf
    from sigmix.utils.io import atomic_dir

    if number not in TYPES:
        raise UnknownNameError("number type", number, TYPES)
    count = _rank(rank, error)
    if not each and out.suffix != ".gguf":
        raise ConfigError(f"--out must name a .gguf file, not {out}", remedy="or give --each, and a folder")
    if gguf_base is not None and not gguf_base.is_file():
        raise ConfigError(f"there is no file {gguf_base}", remedy="give the base model's GGUF file with --gguf")
    test = _AccuracyTest(n, min_gain, data_dir, allow_code, error)
    with _reserved(out):
        source, parsed, experts = _open(base, dtype, mix, bank)
        weights = _scales(parsed) if each else {}
        jobs = [(Mix.one(name), out / f"{name}.gguf", alpha) for name, alpha in weights.items()] or [(parsed, out, 1.0)]
        scales = {file: alpha for _, file, alpha in jobs}
        adapters = [(_low_rank(source, one, experts, count, error), alpha) for one, _, alpha in jobs]
        for factors, _ in adapters:
            tensor_names(factors)  # fails before the measurement
        measured = test.run(out, parsed, experts, adapters, TYPES[number])
        files = []
        place: Any = atomic_dir(out, new=True) if each else contextlib.nullcontext(out.parent)
        with place as folder:
            for (factors, alpha), file in zip(adapters, scales, strict=True):
                with Progress(f"writing {file.name}", len(factors.paths)) as progress:
                    facts = export_gguf(factors, folder / file.name, number, progress.advance)
                files.append({"file": str(file), "scale": alpha, **facts})
            if each:
                names = {file.name: alpha for file, alpha in scales.items()}
                card = gguf_card(parsed.id, names, files, measured.get("accuracy", ()))
                (folder / "README.md").write_text(card, encoding="utf-8")
        figures: dict[str, Any] = {"out": str(out), "mix": parsed.id, "files": files, **measured}
        if verify:
            model_file = base_gguf(source, gguf_base)
            if isinstance(model_file, Path):
                _verify(
                    figures, source,
                    lambda: verify_gguf(scales, model_file, Reference(source, parsed, experts, upcast=True)),
                    "llama.cpp",
                    exact=not any(one["dropped"] for one in files), upcast=True,
                    adapter_bytes=sum(one["bytes"] for one in files),
                )  # fmt: skip
            else:
                figures["not_verified"] = model_file
    lines = [f"{one['file']}: rank {one['rank']}, {size(one['bytes'])} in {number}" for one in files]
    _emit(figures, as_json, lines, source, [CACHE_NOTE, _server_command(scales)])


def _open(base: str, dtype: str | None, mix: str, bank: Path | None) -> tuple[BaseCheckpoint, Mix, Bank]:
    """Open base model, mixture and bank; the base model is read in the dtype of the experts.

    Raises:
        ConfigError: the mixture is the base model, or has an expert with positions "prompt". Others: see
            `BaseCheckpoint`, `open_bank` and `read_mix`.
    """
    from sigmix.experts.mix import read_mix
    from sigmix.export.base import BaseCheckpoint, check_positions

    experts = open_bank(bank)
    parsed = read_mix(mix, experts)
    if not parsed.weights:
        raise ConfigError("the base model itself cannot be exported", remedy="name an expert: --mix dates")
    check_positions(experts[name] for name in parsed.weights)
    with working(f"reading {base}"):
        source = BaseCheckpoint(base, dtype)
    source.adopt_dtype(experts[name] for name in parsed.weights)
    if not source.complete and any(experts[name].verified for name in parsed.weights):
        note(f"the checkpoint of {base} does not store all tensors of its model: loading it once to check the experts")
    return source, parsed, experts


def _low_rank(
    source: BaseCheckpoint, mix: Mix, experts: Bank, rank: int | None, error: float | None, vllm: bool = False
) -> LowRank:
    """Factor a mixture, choose its rank, and print what the truncation loses."""
    from sigmix.export.low_rank import LowRank

    with Progress("checking the experts", len(source.linears)) as progress:
        factors = LowRank.from_mix(source, mix, experts, progress.advance)
    factors.set_ranks(rank, error, vllm)
    facts = factors.describe()
    text = "{mix}: exact, rank {rank}"
    if facts["dropped"]:
        text = ("{mix}: rank {rank} drops {dropped} of {components} components and {error:.2%} of the change "
                "({error_of_weights:.2g} of the weights), at most {worst[1]:.2%}, in {worst[0]}")  # fmt: skip
    note(text.format(**facts))
    return factors


@dataclass(frozen=True)
class _AccuracyTest:
    """Measurement of the accuracy of a truncated export.

    Args:
        n, min_gain, data_dir, allow_code: options of the command. error: its --error, for the remedy.

    Raises:
        ConfigError: a share outside [0, 1].
    """

    n: int
    min_gain: float
    data_dir: Path | None
    allow_code: bool
    error: float | None

    def __post_init__(self) -> None:
        if not 0 <= self.min_gain <= 1:
            raise ConfigError(
                f"--min-gain must be a share of the gain in [0, 1], not {self.min_gain}",
                remedy=f"for example --min-gain {MIN_GAIN}",
            )

    def run(
        self, out: Path, mix: Mix, experts: Bank, adapters: Sequence[tuple[LowRank, float]], dtype: torch.dtype
    ) -> dict[str, Any]:
        """Measure and print the accuracy of what is to be written; nothing if it is exact.

        Args:
            out: checked for room before the work. adapters: what is to be written, with scales. dtype: of the file.

        Returns:
            ``accuracy``, the rows of `sigmix.evals.truncation.measure`, and ``not_measured`` {expert or task: reason};
            neither if it is empty.

        Raises:
            ConfigError: it keeps too little of the mixture's gain. DiskFullError: there is no room for it.
        """
        from sigmix.evals.truncation import check_kept
        from sigmix.utils.io import check_room

        if not any(factors.dropped for factors, _ in adapters):
            return {}
        check_room(out, sum(factors.nbytes(dtype) for factors, _ in adapters))
        rows, missing = self._measure(mix, experts, adapters, dtype)
        for row in rows:
            note(_accuracy_line(row))
        for name, reason in missing.items():
            note(f"accuracy of {name} not measured: {reason}")
        rank = max(factors.describe()["rank"] for factors, _ in adapters)
        check_kept(rows, self.min_gain, f"{mix.id} at rank {rank}", self._remedy(adapters))
        return {key: value for key, value in (("accuracy", rows), ("not_measured", missing)) if value}

    def _measure(
        self, mix: Mix, experts: Bank, adapters: Sequence[tuple[LowRank, float]], dtype: torch.dtype
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        from sigmix.evals.truncation import measure, training_tasks
        from sigmix.export.verify import load_engine

        if not self.n:
            return [], {mix.id: "--n 0"}
        source = adapters[0][0].base
        tasks, missing = training_tasks(mix, experts, self.data_dir, self.allow_code)
        if tasks and (reason := _too_large(source, upcast=True, copies=2, gpu=True)):
            return [], {**missing, **dict.fromkeys(tasks, reason)}
        if not tasks:
            return [], missing
        with working("loading the base model"):
            engine = load_engine(source, {name: experts[name] for name in mix.weights}, upcast=True)
        with Progress("measuring accuracy", 3 * self.n * len(tasks)) as progress:
            rows, failed = measure(
                engine, mix, tasks, adapters, dtype, self.n, lambda count, _: progress.advance(count)
            )
        del engine
        gc.collect()  # the check of the file loads the base model again
        return rows, {**missing, **failed}

    def _remedy(self, adapters: Sequence[tuple[LowRank, float]]) -> str:
        """Return the options that keep more of the change, and the one that writes it as it is."""
        from sigmix.export.low_rank import VLLM_RANKS, vllm_rank

        rank, exact = (max(max(getattr(low, name).values()) for low, _ in adapters) for name in ("ranks", "exact"))
        pad = adapters[0][0].pad
        if self.error is not None:
            more = f"give a smaller --error, such as --error {self.error / 2:g}"
        elif pad == VLLM_RANKS[-1]:
            more = "export a merged checkpoint, which is exact: sigmix export merged"
        elif pad or 2 * rank < exact:
            more = f"give a larger --rank, such as --rank {vllm_rank(pad + 1) if pad else 2 * rank}"
        else:
            more = "keep all components: --rank exact"
        return f"{more}; or write it all the same: --min-gain 0"


def _accuracy_line(row: Mapping[str, Any]) -> str:
    difference, won_lost, p = paired(row["paired"])
    kept = "the exact mixture gains nothing" if row["kept"] is None else f"{row['kept']:.1%} of the gain kept"
    parts = ", ".join(f"{kind} {accuracy(row[kind])}" for kind in ("base", "exact", "truncated"))
    return (
        f"accuracy on {row['paired']['n']} items of {row['task']}: {parts}; truncated less exact {difference}, "
        f"won/lost {won_lost}, McNemar p {p}; {kept}"
    )


def _too_large(
    source: BaseCheckpoint, upcast: bool, adapter_bytes: int = 0, copies: int = 1, gpu: bool = False
) -> str | None:
    """Return the reason if a comparison does not fit into memory, see `sigmix.export.verify.memory_needed`.

    Args:
        gpu: it runs on the GPU, if there is one.
    """
    from sigmix.cli.doctor import machine
    from sigmix.export.verify import memory_needed

    needed, found = memory_needed(source, upcast, adapter_bytes, copies), machine()
    free = found["gpu"]["memory_bytes"] if gpu and found["gpu"] else found["memory_available_bytes"]
    return f"it needs {size(needed)} of memory, and {size(free)} are available" if needed > free else None


def _verify(
    figures: dict[str, Any], source: BaseCheckpoint, run: Callable[[], dict[str, Any]], tool: str, exact: bool = True,
    upcast: bool = False, adapter_bytes: int = 0,
) -> None:  # fmt: skip
    """Add ``verified`` to the figures, or ``not_verified`` with the reason if the memory is too small.

    Raises:
        SigmixError: the export differs too much; see `sigmix.export.verify.check_figures`.
    """
    from sigmix.export.verify import check_figures

    if reason := _too_large(source, upcast, adapter_bytes):
        figures["not_verified"] = reason
        return
    with working(f"comparing with {tool}"):
        figures["verified"] = run()
    check_figures(figures["verified"], exact)


def _emit(
    figures: dict[str, Any], as_json: bool, lines: list[str], source: BaseCheckpoint, more: list[str] | None = None
) -> None:
    if source.cast is not None:
        lines.append(f"the base model was read in {source.dtype_name}")
    line = f"not verified: {figures.get('not_verified', '--no-verify')}"
    if report := figures.get("verified"):
        line = ("verified with {tool}: maximum difference of logits {max:.2g}, KL {kl:.2g}, same first token "
                "{same_top:.1%} (KL of the mixture to the base model {effect_kl:.2g})").format(**report)  # fmt: skip
        if own := report.get("base"):
            line += f"; the base model alone: {own['max']:.2g}, KL {own['kl']:.2g}"
    lines.append(line)
    emit(figures, as_json, "\n".join([*lines, *(more or [])]))


def _server_command(scales: Mapping[Path, float]) -> str:
    """Return a llama-server command for these files, and the request's scales as JSON."""
    files = " ".join(f"--lora-scaled {shlex.quote(f'{file}:0')}" for file in scales)  # requests without "lora": base
    request = json.dumps([{"id": number, "scale": scale} for number, scale in enumerate(scales.values())])
    command = f"llama-server -m BASE.gguf {files} --no-cache-prompt"
    return f'{command}; in a request: "lora": {request}'


def _rank(text: str, error: float | None) -> int | None:
    """Read --rank, None if exact, and check --error.

    Raises:
        ConfigError: invalid rank or error, or both.
    """
    from sigmix.export.low_rank import check_rank

    if text != "exact" and not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= 1):
        raise ConfigError(f"--rank must be exact or a positive number, not {text!r}", remedy="for example --rank 64")
    rank = None if text == "exact" else int(text)
    check_rank(rank, error)
    return rank


def _scales(mix: Mix) -> dict[str, float]:
    """Return {expert: weight}.

    Raises:
        ConfigError: weights per layer or matrix.
    """
    for name, alpha in mix.weights.items():
        if not isinstance(alpha, float):
            raise ConfigError(
                f"{name} has weights per layer or matrix, and llama.cpp applies one scale per adapter",
                remedy="export the mixture as one file, without --each",
            )
    return dict(mix.weights)  # type: ignore[arg-type]


@contextlib.contextmanager
def _reserved(out: Path) -> Iterator[None]:
    """Check the output path and lock it until the export is written and verified."""
    from sigmix.utils.cache import claimed
    from sigmix.utils.io import check_new, check_writable, writing

    with claimed(out):
        with writing(out):
            check_new(out)
        check_writable(out)
        yield


def _bytes(text: str) -> int:
    """Parse "500MB"."""
    units = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    try:
        number = int(float(text[:-2]) * units[text[-2:].upper()])
    except (KeyError, ValueError, OverflowError):
        number = 0
    if number < 1:
        raise ConfigError(f"{text!r} is no size", remedy="for example --shard-size 5GB")
    return number
