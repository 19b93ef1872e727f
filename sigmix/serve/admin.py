"""The routes that administrators use: experts, saved mixes, metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from sigmix.errors import SigmixError
from sigmix.serve.errors import ApiError, from_sigmix
from sigmix.serve.routes import Parts, key_of, mix_of
from sigmix.serve.schema import LoadExpert, SaveMix


def only_admins(request: Request) -> None:
    """Refuse everybody else.

    Raises:
        ApiError: the key is a user's.
    """
    if not key_of(request).admin:
        raise ApiError(403, "this needs an administrator's key", "permission_error", "forbidden")


router = APIRouter(dependencies=[Depends(only_admins)])


@router.get("/v1/experts")
async def experts(service: Parts) -> dict[str, Any]:
    """All experts with their cards' facts, how many requests each is answering, and where more can be loaded from."""
    found = []
    for name, expert in service.catalogue.items():
        meta = {key: expert.meta.get(key) for key in ("domain", "task", "description", "licence", "metrics", "created")}
        size = sum(z.numel() for z in expert.z.values())
        about = {"id": name, "object": "sigmix.expert", "numbers": size, "digest": expert.digest}
        found.append({**about, "answering": service.batcher.using(name), **_plain(meta)})
    return {"object": "list", "data": found, "folders": [str(folder) for folder in service.catalogue.folders]}


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


@router.post("/v1/experts", status_code=201)
async def load(asked: LoadExpert, service: Parts) -> dict[str, Any]:
    """Load an expert from one of the allowed folders."""
    try:
        name = await run_in_threadpool(service.load_expert, asked.path)
    except SigmixError as error:
        raise from_sigmix(error, "path") from error
    return {"id": name, "object": "sigmix.expert", "loaded": True}


@router.delete("/v1/experts/{name}")
async def unload(name: str, service: Parts) -> dict[str, Any]:
    """Unload an expert that no request is using."""
    try:
        await run_in_threadpool(service.unload_expert, name)
    except SigmixError as error:
        found = from_sigmix(error, "name")
        raise ApiError(409, found.message, code="in_use") if found.status == 400 else found from error
    return {"id": name, "object": "sigmix.expert", "deleted": True}


@router.post("/v1/mixes", status_code=201)
async def save(asked: SaveMix, service: Parts) -> dict[str, Any]:
    """Give a mix a name, under which it can be asked for."""
    try:
        mix = await run_in_threadpool(mix_of, asked.mix, service)
        await run_in_threadpool(service.catalogue.save_mix, asked.name, mix, {"made_by": "hand"})
    except SigmixError as error:
        raise from_sigmix(error, "mix") from error
    return {"id": asked.name, "object": "sigmix.mix", "mix": mix.id, **mix.to_json()}


@router.delete("/v1/mixes/{name}")
async def drop(name: str, service: Parts) -> dict[str, Any]:
    """Forget a saved mix."""
    try:
        await run_in_threadpool(service.catalogue.drop_mix, name)
    except SigmixError as error:
        raise from_sigmix(error, "name") from error
    return {"id": name, "object": "sigmix.mix", "deleted": True}


@router.get("/metrics")
async def metrics(service: Parts) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
