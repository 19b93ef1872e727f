"""Everything of a run that lies on disk: lock, configuration, checkpoint, metrics. No pickle: safetensors and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from sigmix.errors import ConfigError, OutputError
from sigmix.train.config import TrainConfig
from sigmix.utils.io import atomic_dir, file_lock, restore_interrupted, write_json, write_text, writing


class RunDir:
    """The folder of one training run.

    config.json · metrics.jsonl (a line per step or validation) · checkpoint/ (state.safetensors, state.json) ·
    best/ (the best expert so far) · curve.png · lock
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint"
        self.best = self.path / "best"
        self.metrics = self.path / "metrics.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            OutputError: another run holds it, or it cannot be written.
        """

        def busy() -> None:
            raise OutputError(
                f"another training run is writing to {self.path}", remedy="wait for it, or give another --run"
            )

        with file_lock(self.path / "lock", on_busy=busy):
            yield

    def begin(self, config: TrainConfig, resume: bool) -> dict[str, Any] | None:
        """Check the folder against the configuration; returns the state to go on from, or None for a fresh start.

        Raises:
            OutputError: the folder holds a run and `resume` was not asked for. ConfigError: `resume` with another
            configuration, or of a folder without a run.
        """
        stored = self.path / "config.json"
        if not resume:
            if stored.exists():
                raise OutputError(f"{self.path} holds a run already", remedy="add --resume, or give another --run")
            write_json(stored, config.to_dict())
            return None
        if not stored.exists():
            raise ConfigError(f"--resume: there is no run in {self.path}", remedy="start without --resume")
        if differing := config.difference(_json(stored)):
            raise ConfigError(
                f"--resume with another configuration: {', '.join(differing)} differ from {stored}",
                remedy="give the same options, or start a new run in another --run",
            )
        restore_interrupted(self.checkpoint)
        restore_interrupted(self.best)
        if not (self.checkpoint / "state.json").exists():  # it was killed before its first checkpoint
            self.metrics.unlink(missing_ok=True)
            return None
        return _json(self.checkpoint / "state.json")

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a checkpoint in place of the previous one, atomically."""
        with atomic_dir(self.checkpoint) as folder:
            # bytes and not save_file, which reports a full disk as an error of its own class
            (folder / "state.safetensors").write_bytes(save({k: v.contiguous() for k, v in tensors.items()}))
            write_json(folder / "state.json", dict(state))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.checkpoint / "state.safetensors"
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"the checkpoint {path} is damaged: {error}", remedy="start a new run") from error

    def log(self, entry: Mapping[str, Any]) -> None:
        """Append one line of metrics; a figure that is not finite becomes null, as JSON has no NaN."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with writing(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """Metrics so far; a last line that a crash cut off is left out."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]

    def forget_after(self, step: int) -> None:
        """Drop metrics of steps at or after `step`: a resumed run takes them again."""
        kept = [e for e in self.history() if e["step"] < step or (e["kind"] == "validation" and e["step"] == step)]
        write_text(self.metrics, "".join(json.dumps(e) + "\n" for e in kept))


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        remedy = "start a new run in another --run"
        raise ConfigError(f"{file} of this run is damaged: {error}", remedy=remedy) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts as named tensors."""
    found = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            found[f"optimizer.{slot}.{names[index]}"] = torch.as_tensor(value).clone()
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, slot, name = key.split(".", 2)
            state.setdefault(names.index(name), {})[slot] = value
    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})
