"""Files of a training run: lock, configuration, checkpoint and metrics, as JSON and safetensors."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sigmix.errors import ConfigError, DiskFullError, OutputError, reraised
from sigmix.train.config import TrainConfig
from sigmix.utils.io import (
    atomic_dir,
    check_room,
    file_lock,
    read_json,
    restore_interrupted,
    write_json,
    write_text,
    writing,
)

NEW_RUN = "start a new run in another --run"


class RunDir:
    """Output folder of one training run.

    config.json · metrics.jsonl (one line per step or validation) · checkpoint/ (state.safetensors, state.json) ·
    best/ (the best expert by validation) · curve.png · lock
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process.

        Raises:
            OutputError: another run has locked it, or it cannot be written.
        """

        def busy() -> None:
            message = f"another training run is writing to {self.path}"
            raise OutputError(message, remedy="wait until it ends, or pass another --run")

        with file_lock(self.path / "lock", on_busy=busy):
            yield

    def begin(self, config: TrainConfig, resume: bool) -> dict[str, Any] | None:
        """Compare the folder with the configuration; return the checkpoint's state, or None to start from step 0.

        Raises:
            OutputError: the folder contains a run and ``resume`` is False.
            ConfigError: ``resume`` without a run, or with another configuration.
        """
        stored = self.path / "config.json"
        if not resume:
            if self.exists:
                raise OutputError(f"{self.path} already contains a run", remedy="add --resume, or pass another --run")
            write_json(stored, config.to_dict())
            return None
        if not self.exists:
            raise ConfigError(f"--resume: {self.path} contains no run", remedy="start without --resume")
        if differing := config.difference(self.config()):
            raise ConfigError(
                f"--resume with another configuration: {', '.join(differing)} differ from {stored}",
                remedy="pass the same options, or start a new run in another --run",
            )
        restore_interrupted(self.checkpoint)
        restore_interrupted(self.best)
        if not (self.checkpoint / "state.json").exists():  # killed before its first checkpoint
            self.metrics.unlink(missing_ok=True)
            return None
        return read_json(self.checkpoint / "state.json", ConfigError, NEW_RUN)

    @property
    def exists(self) -> bool:
        """True if the folder contains a run."""
        return (self.path / "config.json").exists()

    def config(self) -> dict[str, Any]:
        """Return the stored configuration.

        Raises:
            ConfigError: the file is damaged.
        """
        return read_json(self.path / "config.json", ConfigError, NEW_RUN)

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the checkpoint atomically.

        Raises:
            DiskFullError: there is no room; the earlier checkpoint is kept.
        """
        content = save({k: v.contiguous() for k, v in tensors.items()})  # save_file's error for a full disk is its own
        check_room(self.checkpoint, len(content))
        with atomic_dir(self.checkpoint) as folder:
            (folder / "state.safetensors").write_bytes(content)
            write_json(folder / "state.json", dict(state))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Load the checkpoint's tensors.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.checkpoint / "state.safetensors"
        with reraised(ConfigError, f"the checkpoint {path} is damaged", NEW_RUN, (SafetensorError, OSError)):
            return load_file(path)

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append a line of metrics; values that are not finite become null."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Return all lines of metrics, without a last line that a crash cut off."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def truncate_history(self, step: int) -> None:
        """Drop the metrics of steps from ``step`` on, which a resumed run repeats."""
        kept = [e for e in self.history() if e["step"] < step or (e["kind"] == "validation" and e["step"] == step)]
        write_text(self.metrics, "".join(json.dumps(e) + "\n" for e in kept))


@contextmanager
def resumable(path: Path) -> Iterator[None]:
    """Add to the error of a full disk how to continue the run in a folder."""
    try:
        yield
    except DiskFullError as error:
        if not any(path.glob("**/config.json")):
            raise
        remedy = f"{error.remedy}, then repeat the command with --resume"
        raise DiskFullError(f"{error.message}; the last checkpoint in {path} is kept", remedy=remedy) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return AdamW's moments and step counts as named tensors."""
    return {
        f"optimizer.{slot}.{names[index]}": torch.as_tensor(value).clone()
        for index, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Load the tensors of `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, slot, name = key.split(".", 2)
            state.setdefault(names.index(name), {})[slot] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
