"""Fine-tuning jobs and their events in the store."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sigmix.errors import UnknownNameError
from sigmix.serve.store import Store

ACTIVE = ("queued", "running", "paused")
STORAGE = "storage"  # error code of a job that failed by a full disk and can be resumed
STATUSES = (*ACTIVE, "succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Job:
    """One job.

    Attributes:
        base: fingerprint of the base model; a server runs the jobs of its own base.
        created, queued: Unix times; a job that is resumed is queued again.
        value: JSON values. Of the request: "model", "training_file", "validation_file", "suffix", "seed", "metadata",
            "method". For the process: "data" (path in the job's folder), "options" of `sigmix train`. Of the result:
            "fine_tuned_model", "expert" (its name), "finished", "trained_tokens", "result_files", "figures",
            "error", "deleted". Of the data: "splits" (number of rows), "system" (system turn of the first row).
    """

    id: str
    client: str
    base: str
    created: float
    queued: float
    status: str
    value: dict[str, Any]

    @property
    def active(self) -> bool:
        """True if the job has not ended."""
        return self.status in ACTIVE

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's job object, with figures of the training in its field ``sigmix``."""
        value, done = self.value, self.status == "succeeded"
        figures = value.get("figures", {})
        method, error = value["method"], value.get("error")
        return {
            "id": self.id, "object": "fine_tuning.job", "created_at": int(self.created), "status": self.status,
            "model": value["model"], "fine_tuned_model": value["fine_tuned_model"] if done else None,
            "finished_at": value.get("finished"), "error": error and {"param": None, **error}, "seed": value["seed"],
            "training_file": value["training_file"], "validation_file": value.get("validation_file"),
            "user_provided_suffix": value.get("suffix"), "metadata": value.get("metadata"), "method": method,
            "hyperparameters": method[method["type"]]["hyperparameters"], "organization_id": "sigmix",
            "trained_tokens": value.get("trained_tokens"), "result_files": value.get("result_files", []),
            "estimated_finish": None, "integrations": [],
            "sigmix": {
                "expert": value["expert"] if done else None, "data": value["splits"], "system": value.get("system"),
                "deleted": value.get("deleted", False), **figures,
            },
        }  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Event of a job; ``data`` holds the figures of a step or a validation."""

    number: int
    created: float
    level: str
    message: str
    data: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's event object."""
        return {
            "id": f"ftevent-{self.number}", "object": "fine_tuning.job.event", "created_at": int(self.created),
            "level": self.level, "message": self.message, "type": "message" if self.data is None else "metrics",
            "data": self.data,
        }  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Parameters of a job at a validation.

    Attributes:
        model: name of the model; that of the best checkpoint of a job that has succeeded is served.
    """

    job: str
    model: str
    created: float
    metrics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's checkpoint object."""
        step = self.metrics["step"]
        return {
            "id": f"ftckpt-{self.job.removeprefix('ftjob-')}-{step}", "object": "fine_tuning.job.checkpoint",
            "created_at": int(self.created), "fine_tuning_job_id": self.job, "step_number": step,
            "fine_tuned_model_checkpoint": self.model, "metrics": self.metrics,
        }  # fmt: skip


@dataclass(frozen=True)
class Mistake:
    """Held-out row that a model got wrong; ``row`` is one of `sigmix.evals.report.read_mistakes`."""

    number: int
    row: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the object of a list."""
        return {"id": f"ftmistake-{self.number}", "object": "fine_tuning.job.mistake", **self.row}


class Jobs:
    """Jobs of all clients."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, job: Job, message: str) -> None:
        """Save a new job, with its first event."""
        values = (job.id, job.client, job.base, job.created, job.queued, job.status, json.dumps(job.value))
        with self.store.transaction() as db:
            db.execute("INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            _log(db, job.id, message)

    def all(self, client: str | None) -> list[Job]:
        """Return a client's jobs, the latest first; None: of all clients."""
        return self._select("(?1 IS NULL OR client = ?1) ORDER BY created DESC, rowid DESC", client)

    def get(self, id: str, client: str | None) -> Job:
        """Return a job of a client; None: of any client.

        Raises:
            UnknownNameError: no such job.
        """
        for job in self._select("id = ?1 AND (?2 IS NULL OR client = ?2)", id, client):
            return job
        raise UnknownNameError("fine-tuning job", id, [])

    def next(self, base: str) -> Job | None:
        """Return the job of a base to run: the one that is running already, or the one that is queued longest."""
        condition = "base = ? AND status IN ('running', 'queued') ORDER BY status = 'queued', queued LIMIT 1"
        return next(iter(self._select(condition, base)), None)

    def _select(self, condition: str, *values: Any) -> list[Job]:
        with self.store.transaction() as db:
            rows = db.execute(f"SELECT * FROM jobs WHERE {condition}", values).fetchall()
        columns = ("id", "client", "base", "created", "queued", "status")
        return [Job(**dict(zip(columns, row)), value=json.loads(row[-1])) for row in rows]

    def counts(self) -> dict[str, int]:
        """Return the number of jobs by status."""
        with self.store.transaction() as db:
            found = dict(db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())
        return {status: found.get(status, 0) for status in STATUSES}

    def change(
        self, id: str, status: str, allowed: Iterable[str], message: str, level: str = "info", **value: Any
    ) -> bool:
        """Change the status of a job and log an event.

        Args:
            allowed: earlier statuses. value: new entries of the job's value; None removes one.

        Returns:
            False, without any change, if the job has another status.
        """
        allowed = tuple(allowed)
        query = "UPDATE jobs SET status = ?1, value = json_patch(value, ?2), queued = iif(?1 = 'queued', ?3, queued)"
        marks = ", ".join(f"?{number}" for number in range(5, 5 + len(allowed)))
        with self.store.transaction() as db:
            values = (status, json.dumps(value), time.time(), id, *allowed)
            changed = db.execute(f"{query} WHERE id = ?4 AND status IN ({marks})", values).rowcount > 0
            if changed:
                _log(db, id, message, level)
            return changed

    def update(self, id: str, **value: Any) -> None:
        """Change entries of a job's value."""
        with self.store.transaction() as db:
            db.execute("UPDATE jobs SET value = json_patch(value, ?) WHERE id = ?", (json.dumps(value), id))

    def log(self, id: str, entries: Iterable[tuple[str | None, str, dict[str, Any] | None]]) -> None:
        """Add events (key, message, data); one with the key of an earlier event of the job is left out."""
        with self.store.transaction() as db:
            for key, message, data in entries:
                _log(db, id, message, key=key, data=data)

    def checkpoints(self, job: Job) -> list[Checkpoint]:
        """Return the last checkpoint of a job and the best one, if they differ; none if they have been discarded."""
        value = job.value
        kept = job.active or (job.status == "failed" and value["error"]["code"] == STORAGE)
        if not kept and (job.status != "succeeded" or value.get("deleted")):
            return []
        validations: dict[int, tuple[float, dict[str, Any]]] = {}
        loss: dict[str, Any] = {}
        best = 0
        for event in self.events(job.id):
            data = event.data or {}
            if "train_loss" in data:
                loss = {"train_loss": data["train_loss"]}
            elif "valid_accuracy" in data:
                names = ("step", "valid_accuracy", "valid_mean_score")
                validations[data["step"]] = event.created, {name: data[name] for name in names} | loss
                best = data["step"] if data["valid_best"] else best
        checkpoints = []
        for step in sorted({best, max(validations)}, reverse=True) if validations else ():
            served = step == best and job.status == "succeeded"
            model = value["fine_tuned_model"] + ("" if served else f":ckpt-step-{step}")
            checkpoints.append(Checkpoint(job.id, model, *validations[step]))
        return checkpoints

    def events(self, id: str, after: int = 0) -> Sequence[Event]:
        """Return the events of a job with numbers above ``after``, the earliest first."""
        query = "SELECT number, created, level, message, data FROM job_events WHERE job = ? AND number > ?"
        with self.store.transaction() as db:
            rows = db.execute(f"{query} ORDER BY number", (id, after)).fetchall()
        columns = ("number", "created", "level", "message")
        return [Event(**dict(zip(columns, row)), data=json.loads(row[-1]) if row[-1] else None) for row in rows]


def _log(
    db: Any, job: str, message: str, level: str = "info", key: str | None = None, data: dict[str, Any] | None = None
) -> None:
    values = (job, key, time.time(), level, message, None if data is None else json.dumps(data))
    db.execute(
        "INSERT OR IGNORE INTO job_events (job, key, created, level, message, data) VALUES (?, ?, ?, ?, ?, ?)", values
    )
