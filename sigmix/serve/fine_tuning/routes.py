"""HTTP routes of OpenAI's files, fine-tuning and grader APIs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response, StreamingResponse

from sigmix.serve.auth import UPLOAD_PATH, ApiKey
from sigmix.serve.dependencies import KeyDep, ServiceDep, get_key, get_service, in_thread
from sigmix.serve.fine_tuning.jobs import Event, Job
from sigmix.serve.protocol.errors import ApiError, api_errors
from sigmix.serve.protocol.fine_tuning import CreateJobRequest, RunGraderRequest, SummaryQuery, ValidateGraderRequest
from sigmix.serve.service import Service
from sigmix.tasks.openai_graders import Grade

STREAM_SECONDS = 0.5  # between two looks for events
HEARTBEAT_SECONDS = 15.0

After = Annotated[str | None, Query()]
Limit = Annotated[int, Query(ge=1, le=10_000)]


def require_training(request: Request) -> None:
    """Reject clients that may not train.

    Raises:
        ApiError: status 403.
    """
    training = get_service(request).settings.training
    if training == "off":
        raise ApiError(403, "fine-tuning is off on this server", "permission_error", code="forbidden")
    if training == "admins" and not get_key(request).admin:
        raise ApiError(
            403, "fine-tuning needs an administrator's key on this server", "permission_error", code="forbidden"
        )


router = APIRouter(dependencies=[Depends(require_training)])


class Listed(Protocol):
    """Object of a list."""

    def to_json(self) -> dict[str, Any]:
        """Return OpenAI's object, with an id."""
        ...


L = TypeVar("L", bound=Listed)


def page(items: Sequence[L], after: str | None, limit: int) -> dict[str, Any]:
    """Return a page of a list: at most ``limit`` items that follow the one with the id ``after``.

    Raises:
        ApiError: no such item.
    """
    values = [item.to_json() for item in items]
    start = 0
    if after is not None:
        ids = [value["id"] for value in values]
        if after not in ids:
            raise ApiError(400, f"after: {after[:60]!r} is not in the list", param="after")
        start = ids.index(after) + 1
    shown = values[start : start + limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(values) > start + limit}


# --- Files


@router.post(UPLOAD_PATH)
async def upload_file(request: Request, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Upload a training file (multipart/form-data with ``purpose`` and ``file``)."""
    with api_errors("file"):
        files = service.fine_tuning.files
        file = await files.receive(request.headers.get("content-type", ""), request.stream(), key.name)
    return file.to_json()


@router.get("/v1/files")
async def list_files(
    service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 10_000,
    order: Literal["asc", "desc"] = "desc", purpose: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """List the client's files."""
    files = await in_thread(None, service.fine_tuning.files.all, key.owner)
    files = [file for file in files if purpose in (None, file.purpose)]
    return page(files if order == "desc" else files[::-1], after, limit)


@router.get("/v1/files/{id}")
async def get_file(id: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Return a file's metadata."""
    return (await in_thread("file_id", service.fine_tuning.files.get, id, key.owner)).to_json()


@router.get("/v1/files/{id}/content")
async def get_file_content(id: str, service: ServiceDep, key: KeyDep) -> Response:
    """Return a file's content."""
    files = service.fine_tuning.files
    file = await in_thread("file_id", files.get, id, key.owner)
    return FileResponse(files.path(file), media_type="application/octet-stream", filename=file.name)


@router.get("/v1/files/{id}/summary")
async def summarise_file(
    id: str, query: Annotated[SummaryQuery, Query()], service: ServiceDep, key: KeyDep
) -> dict[str, Any]:
    """Return what training would read from a file, and its problems, as `sigmix data` does."""
    async with service.fine_tuning.reading:
        return await in_thread("file_id", service.fine_tuning.summary, id, query, key)


@router.delete("/v1/files/{id}")
async def delete_file(id: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Delete a file."""
    files = service.fine_tuning.files
    file = await in_thread("file_id", files.get, id, key.owner)
    await in_thread("file_id", files.delete, file)
    return {"id": id, "object": "file", "deleted": True}


# --- Jobs


@router.post("/v1/fine_tuning/jobs")
async def create_job(body: CreateJobRequest, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Check the training data and queue a job."""
    async with service.fine_tuning.reading:
        return (await in_thread(None, service.fine_tuning.create, body, key)).to_json()


@router.get("/v1/fine_tuning/jobs")
async def list_jobs(
    request: Request, service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """List the client's jobs, the latest first; ``metadata[key]=value`` selects."""
    jobs = await in_thread(None, service.fine_tuning.jobs.all, key.owner)
    for name, value in request.query_params.items():
        if name.startswith("metadata[") and name.endswith("]"):
            jobs = [job for job in jobs if (job.value.get("metadata") or {}).get(name[9:-1]) == value]
        elif name == "metadata" and value == "null":
            jobs = [job for job in jobs if not job.value.get("metadata")]
    return page(jobs, after, limit)


async def _job(service: Service, id: str, key: ApiKey) -> Job:
    return await in_thread("fine_tuning_job_id", service.fine_tuning.jobs.get, id, key.owner)


@router.get("/v1/fine_tuning/jobs/{id}")
async def get_job(id: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Return a job."""
    return (await _job(service, id, key)).to_json()


CHANGES = {
    "cancel": ("cancelled", ("queued", "running", "paused"), "The job has been cancelled"),
    "pause": ("paused", ("queued", "running"), "The job has been paused; its checkpoint is kept"),
    "resume": ("queued", ("paused",), "The job is queued again"),
}


@router.post("/v1/fine_tuning/jobs/{id}/{change}")
async def change_job(
    id: str, change: Literal["cancel", "pause", "resume"], service: ServiceDep, key: KeyDep
) -> dict[str, Any]:
    """Cancel, pause or resume a job. A running one saves its checkpoint and stops."""
    job = await _job(service, id, key)
    return (await in_thread(None, service.fine_tuning.change, job, *CHANGES[change])).to_json()


@router.get("/v1/fine_tuning/jobs/{id}/events")
async def list_events(
    id: str, request: Request, service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 20,
    stream: bool = False,
) -> Any:  # fmt: skip
    """List the events of a job, the latest first; with ``stream=true`` send them in order as they occur."""
    job = await _job(service, id, key)
    if stream:
        return StreamingResponse(_events(service, job), media_type="text/event-stream")
    events = await in_thread(None, service.fine_tuning.jobs.events, job.id)
    return page(events[::-1], after, limit)


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    jobs, number, sent = service.fine_tuning.jobs, 0, time.monotonic()

    def read() -> tuple[bool, Sequence[Event]]:
        return jobs.get(job.id, None).active, jobs.events(job.id, number)  # in this order: the last event comes first

    active = True
    while active and not service.closing:
        active, events = await run_in_threadpool(read)
        for event in events:
            number = event.number
            yield f"data: {json.dumps(event.to_json())}\n\n"
        if events:
            sent = time.monotonic()
        elif time.monotonic() - sent > HEARTBEAT_SECONDS:
            sent = time.monotonic()
            yield ": waiting\n\n"
        if active:
            await asyncio.sleep(STREAM_SECONDS)
    yield "data: [DONE]\n\n"


@router.get("/v1/fine_tuning/jobs/{id}/checkpoints")
async def list_checkpoints(
    id: str, service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """List the last checkpoint of a job and the best one by validation, the model that is served."""
    job = await _job(service, id, key)
    return page(await in_thread(None, service.fine_tuning.jobs.checkpoints, job), after, limit)


@router.get("/v1/fine_tuning/jobs/{id}/mistakes")
async def list_mistakes(
    id: str, service: ServiceDep, key: KeyDep, after: After = None, limit: Limit = 20
) -> dict[str, Any]:
    """List the held-out rows that the model of a job got wrong."""
    job = await _job(service, id, key)
    return page(await in_thread("fine_tuning_job_id", service.fine_tuning.mistakes, job), after, limit)


# --- Graders

ERRORS = (
    "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
    "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
    "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
)  # fmt: skip


@router.post("/v1/fine_tuning/alpha/graders/validate")
async def validate_grader(body: ValidateGraderRequest, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Check a grader."""
    await in_thread("grader", service.fine_tuning.grader, body.grader, key)
    return {"grader": body.grader}


@router.post("/v1/fine_tuning/alpha/graders/run")
async def run_grader(body: RunGraderRequest, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Grade one reply. The reward is 0 where the grader fails, and ``metadata.errors`` has the reason."""
    grader = await in_thread("grader", service.fine_tuning.grader, body.grader, key)
    started = time.perf_counter()
    grade: Grade = await in_thread("grader", grader.grade, body.model_sample, body.item)
    errors: dict[str, Any] = {name: name == grade.failure for name in ERRORS}
    runtime = errors["python_grader_runtime_error"]
    errors |= {
        "python_grader_runtime_error_details": grade.explanation if runtime else None,
        "model_grader_server_error_details": None, "python_grader_server_error_type": None,
    }  # fmt: skip
    scores = {name: part.value for name, part in grade.parts.items()} or {grader.name: grade.value}
    return {
        "reward": grade.value or 0.0, "sub_rewards": scores, "model_grader_token_usage_per_model": {},
        "metadata": {
            "name": grader.name, "type": grader.type, "errors": errors, "scores": scores, "token_usage": None,
            "execution_time": time.perf_counter() - started, "sampled_model_name": None,
            "explanation": grade.explanation,
        },
    }  # fmt: skip
