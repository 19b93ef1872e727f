"""Queue of fine-tuning jobs. Each is trained by a `sigmix train` process of low priority, one at a time.

The store holds the status, and the process its own checkpoints, so that a job continues after a kill of the process, of
the server, or of both.

    state/files/FILE-ID                 uploaded files
    state/fine_tuning/JOB-ID/data/      links to them, named for the data reader
                            grader.json · run/ (see `RunDir`) · train.json, train.log (output of the process)
                            NAME/       the expert
    state/fine_tuning/reserve           room for the end of a job on a full disk
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as CallTimeoutError
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from filelock import FileLock, Timeout
from prometheus_client import Gauge

from sigmix.errors import ConfigError, OutputError, SigmixError
from sigmix.evals.report import MISTAKES, read_mistakes
from sigmix.experts.expert import Expert
from sigmix.experts.metadata import name_from_folder
from sigmix.serve.auth import ApiKey
from sigmix.serve.fine_tuning.files import RESULTS, Files
from sigmix.serve.fine_tuning.jobs import ACTIVE, STATUSES, STORAGE, Job, Jobs, Mistake
from sigmix.serve.protocol.errors import ApiError, api_errors, rate_limited
from sigmix.serve.protocol.fine_tuning import (
    AUTO,
    CreateJobRequest,
    DataColumns,
    Method,
    ReinforcementHyperparameters,
    SummaryQuery,
)
from sigmix.serve.registry import BASE
from sigmix.serve.scheduler import ClosingError
from sigmix.svf.linears import describe, dtype_and_quantization
from sigmix.tasks.openai_graders import Grader, make_grader
from sigmix.train.checkpointing import RunDir
from sigmix.train.config import make_config
from sigmix.train.trainer import VALIDATIONS
from sigmix.utils.cache import STALE
from sigmix.utils.io import FULL, REASONS, atomic_file, free_bytes, link_or_copy, remove, size, write_json, writing

if TYPE_CHECKING:
    from sigmix.serve.service import Service

log = logging.getLogger("sigmix.serve.fine_tuning")

OBJECTIVES = {"supervised": "sft", "reinforcement": "reinforce"}
NICE = 10  # of a training process
CHECK_SECONDS = 300.0  # to read a training file
STOP_SECONDS = 30.0  # from the interruption of a process, which saves a checkpoint, to its kill
RESERVE_BYTES = 1 << 20  # kept for the end of a job on a full disk; a disk without as many free bytes is full
MAX_RESTARTS = 3  # of a killed process without progress
REPORTS = ("report.json", "report.md", MISTAKES)
GRADER = "grader.json"


class FineTuning:
    """Jobs of a server, and the thread that runs them.

    Args:
        service: with engine, registry, store and settings.

    Attributes:
        reading: one file at a time is read, see `create` and `summary`.
    """

    poll_seconds = 0.5

    def __init__(self, service: Service) -> None:
        self.service, self.settings = service, service.settings
        self.files, self.jobs = Files(service.store, service.settings), Jobs(service.store)
        self.folder = service.settings.state.absolute() / "fine_tuning"
        self.base = service.engine.base_fingerprint
        base = Path(self.settings.base)
        self.base_path = str(base.absolute()) if base.exists() else self.settings.base
        self.base_name = _plain(base.name)[:23].strip("-._") or "model"
        self.reading = asyncio.Lock()
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sigmix-fine-tuning", daemon=True)
        self._reserve = self.folder / "reserve"
        self._lock = FileLock(self.folder / f"lock-{self.base[:12]}", thread_local=False)
        self._process: psutil.Popen | None = None
        self._job_id = ""
        self._progress = -1  # bytes of metrics that have become events
        self._restarts = 0

    # ------------------------------------------------------------------ life cycle

    def load_models(self) -> None:
        """Add the experts of earlier jobs on this base to the registry."""
        for job in self.jobs.all(None):
            if job.value.get("deleted"):
                remove(self.folder / job.id, ignore_errors=True)
            elif job.status == "succeeded" and job.base == self.base:
                try:
                    expert = Expert.from_pretrained(self._expert_folder(job))
                    expert.check(self.service.engine.model)
                    self._register(job)
                    self.service.registry.add(expert)
                except SigmixError as error:
                    log.warning("%s is not served: %s", job.value["fine_tuned_model"], error)

    def start(self) -> None:
        """Continue the jobs of the state folder."""
        gauge = Gauge("sigmix_fine_tuning_jobs", "Fine-tuning jobs by status.", ["status"],
                      registry=self.service.metrics.registry)  # fmt: skip
        for status in STATUSES:
            gauge.labels(status).set_function(partial(self._count, status))
        self.files.sweep()
        kept = {job.id for job in self.jobs.all(None)}
        for path in self.folder.glob("ftjob-*"):
            if path.name not in kept and time.time() - path.stat().st_mtime >= STALE:
                remove(path, ignore_errors=True)
        if self.settings.training != "off":
            self._thread.start()

    def _count(self, status: str) -> float:
        return self.jobs.counts()[status]

    def stop(self) -> None:
        """Interrupt the running process, which saves its checkpoint; see `join`."""
        self._stopping.set()
        self._wake.set()

    def join(self) -> None:
        """Wait until the process and the thread have ended."""
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS + 10)

    # ------------------------------------------------------------------ requests

    def create(self, body: CreateJobRequest, key: ApiKey) -> Job:
        """Check the files of a job and queue it.

        Raises:
            ApiError: names the field, and file and line of an invalid row.
        """
        settings = self.settings
        if body.model not in (BASE, settings.base, self.base_name):
            message = f"{body.model[:60]!r} cannot be fine-tuned here, only {self.base_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")
        if settings.basis != "own":
            raise ApiError(400, "this server runs with --basis original, in which sigmix does not train", param="model")
        suffix = None if body.suffix is None else _plain(body.suffix)
        if suffix == "":
            raise ApiError(400, "suffix must contain letters or digits", param="suffix")
        active = sum(job.active for job in self.jobs.all(key.name))
        if active >= settings.max_jobs_per_client:
            raise rate_limited(f"{key.name} has {active} jobs that are queued, paused or running", 60)
        method = body.chosen_method()
        grader = None if method.reinforcement is None else method.reinforcement.grader
        if grader is not None:
            self.grader(grader, key, "method.reinforcement.grader")
        files = {"training_file": body.training_file, "validation_file": body.validation_file}
        sources: dict[str, tuple[Path, str]] = {}
        for field, id in files.items():
            if id is not None:
                sources[field] = self._source(field, id, key.owner)
        id = f"ftjob-{uuid.uuid4().hex}"
        unique = "".join(secrets.choice(string.ascii_lowercase) for _ in range(8))
        model = f"ft:{self.base_name}:{suffix or ''}:{unique}"
        try:
            data = self._place(id, sources, grader)
            columns = (body.sigmix or DataColumns()).options()
            figures, field = self._read(id, data, sources, *columns)
            if figures["cannot_train"]:
                raise ApiError(400, figures["cannot_train"], code="invalid_training_file", param=field)
            seed = secrets.randbelow(1 << 31) if body.seed is None else body.seed
            value = {
                **files, "model": self.base_name, "suffix": suffix, "seed": seed, "metadata": body.metadata,
                "method": method.model_dump(exclude_none=True), "data": data, "splits": figures["splits"],
                "system": figures["examples"][0]["system"],
                "options": [*self._options(method, seed, figures["splits"]["train"]), *columns],
                "fine_tuned_model": model, "expert": name_from_folder(model),
            }  # fmt: skip
            job = Job(id, key.name, self.base, time.time(), time.time(), "queued", value)
            self.jobs.add(job, f"Created fine-tuning job: {id}")
        except BaseException:
            shutil.rmtree(self.folder / id, ignore_errors=True)
            raise
        _log_status(job, "queued")
        self._wake.set()
        return job

    def summary(self, id: str, query: SummaryQuery, key: ApiKey) -> dict[str, Any]:
        """Return what training would read from a file, and its problems: the figures of `sigmix data`.

        Raises:
            ApiError: no such file, or it cannot be read; an invalid grader.
        """
        if query.grader is not None:
            self.grader(query.grader, key)
        place, source = f"ftjob-{uuid.uuid4().hex}", {"training_file": self._source("file_id", id, key.owner)}
        try:
            data = self._place(place, source, query.grader)
            figures, _ = self._read(place, data, source, "--base", self.base_path, *query.options())
        finally:
            shutil.rmtree(self.folder / place, ignore_errors=True)
        if "rows" not in figures:
            raise ApiError(400, figures["cannot_train"], code="invalid_training_file", param="file_id")
        return figures

    def change(self, job: Job, status: str, allowed: tuple[str, ...], message: str) -> Job:
        """Cancel, pause or resume a job; one that a full disk has stopped can be resumed or cancelled too.

        Raises:
            ApiError: it is in another status.
        """
        finished = int(time.time()) if status == "cancelled" else None
        if status != "paused" and (job.value.get("error") or {}).get("code") == STORAGE:
            allowed = (*allowed, "failed")
        if not self.jobs.change(job.id, status, allowed, message, finished=finished, error=None):
            now = self.jobs.get(job.id, None).status
            raise ApiError(400, f"{job.id} is {now}, not {' or '.join(allowed)}", code="invalid_status")
        _log_status(job, status)
        if status == "cancelled" and (self._process is None or self._job_id != job.id):
            self._discard(job)
        changed = replace(self.jobs.get(job.id, None), status=status)  # a resumed one may be running by now
        self._wake.set()
        return changed

    def mistakes(self, job: Job) -> list[Mistake]:
        """Return the held-out rows that the model of a job got wrong.

        Raises:
            ApiError: the job has no report: it has not succeeded, or its model is deleted.
        """
        try:
            rows = read_mistakes(self.folder / job.id / "run" / "report")
        except OSError as error:
            state = "discarded" if job.value.get("deleted") else job.status
            message = f"{job.id} has no report on held-out rows; it is {state}"
            raise ApiError(404, message, param="fine_tuning_job_id", code="not_found") from error
        return [Mistake(number, row) for number, row in enumerate(rows, 1)]

    def delete_model(self, name: str, key: ApiKey) -> None:
        """Stop serving a fine-tuned model and delete its files.

        Raises:
            ApiError: no such model, not the client's own, or in use.
        """
        jobs = [job for job in self.jobs.all(None) if job.value["fine_tuned_model"] == name]
        if not jobs or jobs[0].status != "succeeded" or jobs[0].value.get("deleted"):
            raise ApiError(404, f"no fine-tuned model {name!r}", param="model", code="model_not_found")
        (job,) = jobs
        if not key.admin and key.name != job.client:
            raise ApiError(403, f"{name} is another client's", "permission_error", code="forbidden")
        if job.value["expert"] in self.service.registry:
            try:
                self.service.unload_expert(job.value["expert"])
            except ConfigError as error:
                raise ApiError(409, str(error), code="in_use", param="model") from error
        self.jobs.update(job.id, deleted=True)
        remove(self.folder / job.id, ignore_errors=True)
        log.info("fine-tuned model deleted", extra={"job": job.id, "model": name})

    def grader(self, spec: Mapping[str, Any], key: ApiKey, param: str = "grader") -> Grader:
        """Return the grader of a client's object.

        Raises:
            ApiError: names the field; 403 for a python grader without the right to run it.
        """
        parts = spec.get("graders")
        kinds = [spec, *(parts.values() if isinstance(parts, dict) else ())]
        if any(isinstance(one, dict) and one.get("type") == "python" for one in kinds) and not (
            self.settings.allow_code and key.allow_code
        ):
            raise ApiError(
                403, "python graders run only on a server started with --allow-code, for keys added with --allow-code",
                "permission_error", code="forbidden", param=param,
            )  # fmt: skip
        try:
            return make_grader(spec, allow_code=True)
        except ConfigError as error:
            path = re.match(r"grader([.\w]*)", error.message)
            raise ApiError(400, str(error), param=param + (path[1] if path else "")) from error

    # ------------------------------------------------------------------ preparation of a job

    def _place(
        self, id: str, sources: Mapping[str, tuple[Path, str]], grader: Mapping[str, Any] | None = None
    ) -> str:
        """Link the files into the folder of a job, and write its grader; return the path of its data there.

        Raises:
            OutputError: the disk is full.
        """
        names = {field: re.sub(r"[^A-Za-z0-9._-]", "_", name) for field, (_, name) in sources.items()}
        data = f"data/{names['training_file']}"
        places = {"training_file": data}
        if "validation_file" in sources:  # a folder, see `DataTask`
            data = f"data/{Path(data).stem}"
            places = {"training_file": f"{data}/train", "validation_file": f"{data}/validation"}
            places = {field: path + Path(names[field]).suffix for field, path in places.items()}
        for field, path in places.items():
            link_or_copy(sources[field][0], self.folder / id / path)
        if grader is not None:
            write_json(self.folder / id / GRADER, grader)
        return data

    def _source(self, field: str, id: str, client: str | None) -> tuple[Path, str]:
        """Return the path and the name of a training file.

        Raises:
            ApiError: no such file, or one with results.
        """
        with api_errors(field):
            file = self.files.get(id, client)
        if file.purpose == RESULTS:
            raise ApiError(400, f"{id} holds results, not training data", param=field)
        return self.files.path(file), file.name

    def _read(
        self, id: str, data: str, sources: Mapping[str, tuple[Path, str]], *options: str
    ) -> tuple[dict[str, Any], str]:
        """Read the data as training will, in a process of its own.

        Args:
            options: of `sigmix data`.

        Returns:
            The figures of `sigmix data` with the names of the uploaded files, only "cannot_train" if they cannot be
            read; and the field of the file that this is about.
        """
        path = str(self.folder / id / data)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "sigmix", "data", path, "--json", *options, *grader_options(self.folder / id)],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_SECONDS,
                env=self._environment(), check=False,
            )  # fmt: skip
            problem = _last_line(done.stderr) or f"the reader ended with status {done.returncode}"
            figures = json.loads(done.stdout) if done.returncode == 0 else {"cannot_train": problem}
        except subprocess.TimeoutExpired:
            figures = {"cannot_train": f"reading the file took more than {CHECK_SECONDS:.0f} s"}
        invalid = f"{path}/validation" in (figures["cannot_train"] or "")

        def renamed(text: str) -> str:
            for field, (_, name) in sources.items():
                stem = "validation" if field == "validation_file" else "train"
                text = re.sub(rf"{re.escape(path)}/{stem}\.\w+", name, text)
            return text.replace(path, next(iter(sources.values()))[1])

        return _map_text(figures, renamed), "validation_file" if invalid else "training_file"

    def _options(self, method: Method, seed: int, rows: int) -> list[str]:
        """Return the options of `sigmix train` for a method and a number of training rows.

        Raises:
            ApiError: hyperparameters that cannot be combined.
        """
        dtype, _ = dtype_and_quantization(describe(self.service.engine.model)["dtype"])
        objective, chosen = OBJECTIVES[method.type], method.hyperparameters
        options: dict[str, Any] = {
            "base": self.base_path, "dtype": dtype, "objective": objective,
            "quantization": self.settings.quantization, "device-map": self.settings.device_map, "seed": seed,
        }  # fmt: skip
        default = make_config(task="", objective=objective)
        generations, interval = default.num_generations, None
        prompts = default.generation_batch_size // generations
        if isinstance(chosen, ReinforcementHyperparameters):
            if chosen.compute_multiplier != AUTO:
                generations = max(2, round(generations * float(chosen.compute_multiplier)))
            if chosen.eval_samples != AUTO:
                options["max-eval-samples"] = chosen.eval_samples
            interval = None if chosen.eval_interval == AUTO else int(chosen.eval_interval)
        if chosen.batch_size != AUTO:
            prompts = int(chosen.batch_size)
        if chosen.learning_rate_multiplier != AUTO:
            options["learning-rate"] = default.learning_rate * float(chosen.learning_rate_multiplier)
        options |= {"num-generations": generations, "generation-batch-size": prompts * generations}
        if chosen.n_epochs == AUTO:
            if interval is not None:
                field = f"method.{method.type}.hyperparameters.eval_interval"
                raise ApiError(400, f"{field} needs a number of n_epochs", param=field)
            options["minutes"] = self.settings.training_minutes
        else:
            steps = math.ceil(int(chosen.n_epochs) * rows / prompts)
            options |= {"max-steps": steps, "eval-steps": interval or math.ceil(steps / VALIDATIONS)}
        return [text for name, value in options.items() if value is not None for text in (f"--{name}", str(value))]

    def _environment(self) -> dict[str, str]:
        threads = self.settings.training_threads or max(1, (os.cpu_count() or 1) // 2)
        return {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def _expert_folder(self, job: Job) -> Path:
        return self.folder / job.id / job.value["expert"]

    def _register(self, job: Job) -> None:
        self.service.registry.model_names[job.value["expert"]] = job.value["fine_tuned_model"]

    # ------------------------------------------------------------------ thread

    def _run(self) -> None:
        reported = ""
        while not self._stopping.is_set():
            try:
                self._step()
                reported = ""
            except Exception as error:  # such as a full disk
                if str(error) != reported:
                    log.error("tried again: %s", error, exc_info=not isinstance(error, SigmixError))
                reported = str(error)
            self._wake.wait(self.poll_seconds)
            self._wake.clear()
        if self._process is not None:
            interrupt(self._process)
        self._lock.release()

    def _step(self) -> None:
        if self._process is None:
            if self._claim() and (job := self.jobs.next(self.base)) is not None:
                self._begin(job)
            return
        job = self.jobs.get(self._job_id, None)
        if job.status != "running":
            interrupt(self._process)
            if job.status == "cancelled":
                self._discard(job)
        elif (code := self._process.poll()) is None:
            self._report_progress(job)
            return
        else:
            try:
                with contextlib.suppress(OutputError):
                    self._report_progress(job)
                self._end(job, code)
            except OutputError:
                remove(self._reserve, ignore_errors=True)  # for the next try
                raise
        self._process = None
        self._wake.set()

    def _claim(self) -> bool:
        """Return True if this server, of all with this state folder and base, runs the jobs."""
        if not self._lock.is_locked:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                return False
        return True

    def _begin(self, job: Job) -> None:
        if not self._reserve.exists():  # without room for it, a job waits in the queue
            with atomic_file(self._reserve) as temporary:
                temporary.write_bytes(secrets.token_bytes(RESERVE_BYTES))
        folder, run = self.folder / job.id, RunDir(self.folder / job.id / "run")
        for process in _processes_of(run.path):  # of a killed server
            interrupt(process)
        if (folder / GRADER).exists() and not self.settings.allow_code:
            spec = json.loads((folder / GRADER).read_text(encoding="utf-8"))
            try:
                make_grader(spec)
            except ConfigError as error:
                self._fail(job, "forbidden", error.message)
                return
        message = "Fine-tuning job continues from its checkpoint" if run.exists else "Fine-tuning job started"
        if not self.jobs.change(job.id, "running", ("queued", "running"), message):
            return  # cancelled in the meantime
        if job.id != self._job_id:
            self._restarts = 0
        self._job_id, self._progress = job.id, -1
        command = train_command(folder, job, resume=run.exists)
        try:
            with (
                writing(folder), open(folder / "train.json", "wb") as output,
                open(folder / "train.log", "ab") as errors,
            ):  # fmt: skip
                # a session of its own: Ctrl-C in the server's terminal must not reach it
                process = psutil.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=self._environment(),
                    start_new_session=True,
                )  # fmt: skip
        except OutputError as error:
            self._fail(job, STORAGE, error.message)
            return
        self._process = process
        if os.name == "posix":
            with contextlib.suppress(psutil.Error):
                process.nice(max(NICE, process.nice()))
        _log_status(job, "running")

    def _report_progress(self, job: Job) -> None:
        """Turn new lines of the run's metrics into events."""
        run = RunDir(self.folder / job.id / "run")
        size = run.metrics.stat().st_size if run.metrics.exists() else 0
        if size == self._progress or not run.exists:
            return
        total = run.config()["max_steps"]
        self.jobs.log(job.id, (_metrics_event(entry, total) for entry in run.history()))
        if self._progress >= 0:
            self._restarts = 0
        self._progress = size

    def _end(self, job: Job, code: int) -> None:
        """Handle the end of a process that was not stopped by the server."""
        folder = self.folder / job.id
        if code == 0:
            self._succeed(job)
            return
        if code < 0 or code == 130:  # killed or interrupted by somebody else: continued by the next step
            self._restarts += 1
            if self._restarts <= MAX_RESTARTS:
                log.warning("training process ended", extra={"job": job.id, "status_code": code})
                return
            self._fail(job, "crashed", f"the training process was killed {self._restarts} times by signal {-code}")
            return
        lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
        message = _last_line(lines[-4096:]) or ""
        full = any(REASONS[number][0] in message for number in FULL)
        try:
            with writing(self.settings.state), tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(RESERVE_BYTES))
        except OutputError as error:  # the process may have found no room for its message either
            full, message = True, message if full else error.message
        message = (message or f"the training process ended with status {code}").replace(f"{folder}{os.sep}", "")
        self._fail(job, STORAGE if full else "training_failed", message)

    def _succeed(self, job: Job) -> None:
        folder = self.folder / job.id
        try:
            figures = json.loads((folder / "train.json").read_text(encoding="utf-8"))
            expert = Expert.from_pretrained(self._expert_folder(job))
            self._register(job)
            if expert.name not in self.service.registry:  # a second try
                self.service.add_expert(expert)
        except (ClosingError, CallTimeoutError):  # the next server, or the next step
            raise
        except (SigmixError, ValueError, OSError) as error:
            self._fail(job, "server_error", str(error))
            return
        reports = [folder / "run" / "report" / name for name in REPORTS]
        ids = [self.files.add(path, path.name, job.client, RESULTS).id for path in reports if path.exists()]
        names = ("best", "test", "base", "paired", "best_constant", "steps", "seconds")
        kept = {name: figures[name] for name in names if name in figures}
        kept["verdict"] = (figures.get("report") or {}).get("verdict")
        tokens = _trained_tokens(RunDir(folder / "run"))
        model = job.value["fine_tuned_model"]
        self.jobs.log(job.id, [(None, f"New fine-tuned model created: {model}", None)])
        if self.jobs.change(
            job.id, "succeeded", ("running",), "The job has successfully completed", finished=int(time.time()),
            trained_tokens=tokens, result_files=ids, figures=kept,
        ):  # fmt: skip
            _log_status(job, "succeeded")
        self._discard(job)

    def _discard(self, job: Job) -> None:
        """Remove what only the training of a job needs."""
        for name in ("data", "run/checkpoint", "run/best"):
            remove(self.folder / job.id / name, ignore_errors=True)

    def _fail(self, job: Job, code: str, message: str) -> None:
        if code == STORAGE:
            message += (
                f"; the state folder {self.settings.state} has {size(free_bytes(self.folder))} free: free some space, "
                f"then POST /v1/fine_tuning/jobs/{job.id}/resume continues from the last checkpoint"
            )
        error = {"code": code, "message": message}
        if self.jobs.change(
            job.id, "failed", ACTIVE, f"The job failed: {message}", "error", finished=int(time.time()), error=error
        ):
            _log_status(job, "failed")
        if code != STORAGE:
            self._discard(job)


def train_command(folder: Path, job: Job, resume: bool) -> list[str]:
    """Return the command that trains a job in its folder."""
    return [
        sys.executable, "-m", "sigmix", "train", "--data", str(folder / job.value["data"]),
        "--run", str(folder / "run"), "--out", str(folder / job.value["expert"]), "--json", *job.value["options"],
        *grader_options(folder), *(["--resume"] if resume else []),
    ]  # fmt: skip


def grader_options(folder: Path) -> list[str]:
    """Return the options of `sigmix data` and `sigmix train` for the grader of a job, which the server has checked."""
    path = folder / GRADER
    return ["--grader", str(path), "--allow-code"] if path.exists() else []


def interrupt(process: psutil.Process) -> None:
    """End a training process: it saves a checkpoint, or is killed after `STOP_SECONDS`."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()  # not SIGINT, which a server that a shell script started in the background ignores
        try:
            process.wait(STOP_SECONDS)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait()


def _plain(text: str) -> str:
    """Return a text with the characters of experts' names alone."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")


def _processes_of(run: Path) -> Iterator[psutil.Process]:
    """Yield the processes that train in a folder."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and str(run) in words:
            yield process


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with all its texts changed."""
    if isinstance(value, dict):
        return {key: _map_text(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [_map_text(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def _last_line(text: str) -> str | None:
    """Return the message of an error of the command line, without its remedy, which names options."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].removeprefix("sigmix: ").partition(" -> ")[0] if lines else None


def _log_status(job: Job, status: str) -> None:
    log.info("fine-tuning job", extra={"job": job.id, "client": job.client, "status": status})


def _metrics_event(entry: Mapping[str, Any], total: int) -> tuple[str, str, dict[str, Any]]:
    """Return (key, message, data) of a line of a run's metrics."""
    if entry["kind"] == "step":
        step = entry["step"] + 1
        text = f"training loss={entry['loss']:.2f}, reward={entry['reward']:.2f}"
        data = {"train_loss": entry["loss"]} | {key: entry[key] for key in ("reward", "kl", "entropy", "learning_rate")}
    else:
        step = entry["step"]
        text = f"validation accuracy={entry['accuracy']:.3f} (n={entry['n']})"
        data = {f"valid_{key}": entry[key] for key in ("accuracy", "interval", "mean_score", "n", "best", "samples")}
    return f"{entry['kind']} {step}", f"Step {step}/{total}: {text}", {"step": step, "total_steps": total, **data}


def _trained_tokens(run: RunDir) -> int:
    """Return the tokens of all completions that were trained on."""
    rows = run.config()["generation_batch_size"]
    return round(sum(entry["completion_tokens"] * rows for entry in run.history() if entry["kind"] == "step"))
