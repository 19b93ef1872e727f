"""The routes that clients use: OpenAI's, and ours beside them."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from sigmix.errors import SigmixError
from sigmix.experts.mix import Mix
from sigmix.serve.auth import Key
from sigmix.serve.fair_queue import QueueFull
from sigmix.serve.protocol import (
    Adapt,
    ApiError,
    Chat,
    ChatForm,
    Completion,
    Feedback,
    LoadExpert,
    PlainForm,
    SaveMix,
    busy,
    from_sigmix,
)
from sigmix.serve.registry import AUTO, BASE
from sigmix.serve.request import Answering
from sigmix.serve.service import Service

router = APIRouter()


def service_of(request: Request) -> Service:
    """The server's parts."""
    return request.app.state.service


def key_of(request: Request) -> Key:
    """Whose request it is."""
    return request.state.key


Parts = Annotated[Service, Depends(service_of)]


Client = Annotated[Key, Depends(key_of)]


@router.post("/v1/chat/completions")
async def chat(asked: Chat, request: Request, service: Parts, key: Client) -> Response:
    """Answer a conversation."""
    turns = [{"role": _role(turn.role), "content": turn.words()} for turn in asked.messages]
    said = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
    if not said.strip():
        raise ApiError(400, "messages must hold a user's turn that is not empty", param="messages")
    try:
        ids = await run_in_threadpool(service.encode_chat, turns)
    except SigmixError as error:
        raise from_sigmix(error, "messages") from error
    answering = Answering(
        service, request, key, asked, [(ids, said)], ChatForm, asked.limit(), asked.top_logprobs or 0,
        bool(asked.logprobs),
    )  # fmt: skip
    return await answering.response()


def _role(role: str) -> str:
    return "system" if role == "developer" else role


@router.post("/v1/completions")
async def completions(asked: Completion, request: Request, service: Parts, key: Client) -> Response:
    """Go on from bare text, without a chat template."""
    given = asked.prompt if isinstance(asked.prompt, list) else [asked.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    if len(given) > service.settings.max_choices:
        raise ApiError(400, f"at most {service.settings.max_choices} prompts in a request", param="prompt")
    if not given:
        raise ApiError(400, "prompt must not be empty", param="prompt")
    prompts = []
    for one in given:
        if isinstance(one, str):
            prompts.append((await run_in_threadpool(service.encode_text, one), one))
        else:
            ids = [int(token) for token in one]  # type: ignore[union-attr]
            size = service.engine.model.get_input_embeddings().weight.shape[0]
            if not all(0 <= token < size for token in ids):
                raise ApiError(400, f"token ids must be from 0 to {size - 1}", param="prompt")
            prompts.append((ids, await run_in_threadpool(service.decode, ids)))
    top = asked.logprobs or 0
    answering = Answering(
        service, request, key, asked, prompts, PlainForm, asked.limit() or 16, top, asked.logprobs is not None
    )
    return await answering.response()


@router.get("/v1/models")
async def models(service: Parts) -> dict[str, Any]:
    """What `model` can be, besides mixes written out."""
    return {"object": "list", "data": _models(service)}


@router.get("/v1/models/{name:path}")
async def model(name: str, service: Parts) -> dict[str, Any]:
    """One of them."""
    for found in _models(service):
        if found["id"] == name:
            return found
    try:
        mix = service.catalogue.resolve(name)
    except SigmixError as error:
        raise from_sigmix(error, "model") from error
    assert mix is not None
    return _model(service, name, "mix", mix=mix.id)


def _models(service: Service) -> list[dict[str, Any]]:
    catalogue = service.catalogue
    found = [
        _model(service, AUTO, "auto", policy=service.decider.default, policies=sorted(service.decider.strategies)),
        _model(service, BASE, "base", base=service.settings.base),
    ]
    for name, expert in catalogue.items():
        about = {key: expert.meta.get(key) for key in ("domain", "task", "description")}
        found.append(_model(service, name, "expert", **about))
    for name, (mix, about) in catalogue.mixes().items():
        told = {key: value for key, value in about.items() if key != "client"}
        found.append(_model(service, name, "mix", mix=mix.id, **mix.to_json(), **told))
    return found


def _model(service: Service, name: str, kind: str, **more: Any) -> dict[str, Any]:
    sigmix = {"kind": kind, **more}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "sigmix", "sigmix": sigmix}


# ------------------------------------------------------------------ adaptation and feedback


@router.post("/v1/adapt", status_code=202)
async def adapt(asked: Adapt, service: Parts, key: Client) -> dict[str, Any]:
    """Search a mix on a few labelled examples, in the background."""
    if len(asked.examples) > service.settings.max_examples:
        raise ApiError(400, f"at most {service.settings.max_examples} examples", param="examples")
    id = f"adapt-{uuid.uuid4().hex}"
    try:
        for example in asked.examples:
            ids = await run_in_threadpool(service.encode_chat, [{"role": "user", "content": example.prompt}])
            service.check_length(ids, asked.max_tokens)
        made = service.adaptations.submit(
            id, None if key.admin else key.name, asked.name or f"adapted-{id[-8:]}",
            [(one.prompt, one.answer) for one in asked.examples], asked.score, method=asked.method,
            settings=asked.settings, granularity=asked.granularity,
            max_new_tokens=asked.max_tokens, seed=asked.seed,
        )  # fmt: skip
    except SigmixError as error:
        raise from_sigmix(error, "examples") from error
    except QueueFull as error:
        raise busy("too many adaptations are waiting, of this client or in all", 30) from error
    return made.to_json()


@router.get("/v1/adapt/{id}")
async def adaptation(id: str, service: Parts, key: Client) -> dict[str, Any]:
    """How a search is doing."""
    return _adaptation(service, id, key).to_json()


@router.delete("/v1/adapt/{id}")
async def cancel(id: str, service: Parts, key: Client) -> dict[str, Any]:
    """Stop a search."""
    found = _adaptation(service, id, key)
    service.adaptations.cancel(found)
    return found.to_json()


def _adaptation(service: Service, id: str, key: Key) -> Any:
    try:
        return service.adaptations.get(id, None if key.admin else key.name)
    except SigmixError as error:
        raise from_sigmix(error, "id") from error


@router.post("/v1/feedback")
async def feedback(asked: Feedback, service: Parts, key: Client) -> dict[str, Any]:
    """How good an earlier reply was; the `bandit` policy learns from it."""
    bandit = service.bandit
    try:
        found = await run_in_threadpool(service.state.reply, asked.id)
        if found is None or (not key.admin and found["client"] != key.name):
            raise ApiError(404, f"there is no reply {asked.id!r} that could get feedback", code="not_found", param="id")
        learned = bandit is not None and found["arm"] is not None and found["context"] is not None
        if learned:
            assert bandit is not None
            first = await run_in_threadpool(bandit.learn, asked.id, found["arm"], found["context"], asked.reward)
        else:
            first = await run_in_threadpool(service.state.learn, asked.id, asked.reward, "", None)
    except SigmixError as error:
        raise from_sigmix(error) from error
    if not first:
        raise ApiError(409, f"the reply {asked.id!r} has its feedback", code="conflict", param="id")
    service.metrics.feedback.labels("good" if asked.reward > 0 else "bad" if asked.reward < 0 else "even").inc()
    why = None if learned else "the reply's mix was asked for, or is of several experts, or the bank has no probe"
    return {"id": asked.id, "object": "sigmix.feedback", "learned": learned, "reason": why}


@router.get("/health")
async def health(service: Parts) -> Response:
    """200 once the server is warm and takes requests, else 503."""
    state = "ok" if service.ready else "closing" if service.closing else "starting"
    return JSONResponse({"status": state}, 200 if service.ready else 503)


def mix_of(value: str | dict[str, Any], service: Service) -> Mix:
    """A mix that a request writes out.

    Raises:
        SigmixError: it is none, or names what is not there.
    """
    if isinstance(value, dict):
        mix = Mix.from_json(value)
    else:
        found = service.catalogue.resolve(value)
        if found is None:
            raise ApiError(400, "auto is not a mix", param="mix")
        mix = found
    service.engine.z(mix)
    return mix


# --- The routes that administrators use: experts, saved mixes, metrics.


def only_admins(request: Request) -> None:
    """Refuse everybody else.

    Raises:
        ApiError: the key is a user's.
    """
    if not key_of(request).admin:
        raise ApiError(403, "this needs an administrator's key", "permission_error", "forbidden")


admin_router = APIRouter(dependencies=[Depends(only_admins)])


@admin_router.get("/v1/experts")
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


@admin_router.post("/v1/experts", status_code=201)
async def load(asked: LoadExpert, service: Parts) -> dict[str, Any]:
    """Load an expert from one of the allowed folders."""
    try:
        name = await run_in_threadpool(service.load_expert, asked.path)
    except SigmixError as error:
        raise from_sigmix(error, "path") from error
    return {"id": name, "object": "sigmix.expert", "loaded": True}


@admin_router.delete("/v1/experts/{name}")
async def unload(name: str, service: Parts) -> dict[str, Any]:
    """Unload an expert that no request is using."""
    try:
        await run_in_threadpool(service.unload_expert, name)
    except SigmixError as error:
        found = from_sigmix(error, "name")
        raise ApiError(409, found.message, code="in_use") if found.status == 400 else found from error
    return {"id": name, "object": "sigmix.expert", "deleted": True}


@admin_router.post("/v1/mixes", status_code=201)
async def save(asked: SaveMix, service: Parts) -> dict[str, Any]:
    """Give a mix a name, under which it can be asked for."""
    try:
        mix = await run_in_threadpool(mix_of, asked.mix, service)
        await run_in_threadpool(service.catalogue.save_mix, asked.name, mix, {"made_by": "hand"})
    except SigmixError as error:
        raise from_sigmix(error, "mix") from error
    return {"id": asked.name, "object": "sigmix.mix", "mix": mix.id, **mix.to_json()}


@admin_router.delete("/v1/mixes/{name}")
async def drop(name: str, service: Parts) -> dict[str, Any]:
    """Forget a saved mix."""
    try:
        await run_in_threadpool(service.catalogue.drop_mix, name)
    except SigmixError as error:
        raise from_sigmix(error, "name") from error
    return {"id": name, "object": "sigmix.mix", "deleted": True}


@admin_router.get("/metrics")
async def metrics(service: Parts) -> Response:
    """Prometheus' text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
