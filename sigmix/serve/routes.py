"""HTTP routes: OpenAI's API, sigmix's additions, and administration."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from sigmix.adapt.two_pass import AUTO
from sigmix.engine.tokenization import chat_template, check_tokens
from sigmix.errors import ConfigError, SigmixError, UnknownNameError
from sigmix.experts.metadata import thaw
from sigmix.experts.mix import Mix
from sigmix.serve.adaptation import Adaptation
from sigmix.serve.auth import ApiKey
from sigmix.serve.dependencies import KeyDep, ServiceDep, in_thread, require_admin
from sigmix.serve.fair_queue import QueueFullError
from sigmix.serve.forward import ForwardHandler
from sigmix.serve.protocol.base import as_prompts
from sigmix.serve.protocol.builder import ResponseBuilder, embeddings_response
from sigmix.serve.protocol.errors import ApiError, api_error, api_errors, rate_limited
from sigmix.serve.protocol.requests import (
    AdaptRequest,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    FeedbackRequest,
    LoadExpertRequest,
    SaveMixRequest,
    TokenizeRequest,
)
from sigmix.serve.protocol.responses import ResponsesBuilder, ResponsesRequest, responses_error
from sigmix.serve.registry import BASE
from sigmix.serve.request import RequestHandler
from sigmix.serve.scheduler import MAX_PREFILL_TOKENS
from sigmix.serve.service import Service
from sigmix.serve.tool_parser import JsonParser

ADAPTATION_RETRY_SECONDS = 30.0


router = APIRouter()
admin_router = APIRouter(dependencies=[Depends(require_admin)])


# --- Generation


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatCompletionRequest, request: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the next message of a conversation."""
    return await (await _chat_handler(body, request, service, key)).respond()


def _handler(service: Service) -> type[RequestHandler]:
    return RequestHandler if service.upstreams is None else ForwardHandler


async def _chat_handler(
    body: ChatCompletionRequest, request: Request, service: Service, key: ApiKey, builder: ResponseBuilder | None = None
) -> RequestHandler:
    turns = [message.turn() for message in body.messages]
    user = next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")
    if body.model == AUTO and not user.strip():
        raise ApiError(400, "messages must contain a non-empty user message for the model auto", param="messages")
    new_parser = None
    if (tools := body.rendered_tools()) and service.upstreams is None:
        required = body.required_functions()
        parser = JsonParser if required else await in_thread("tools", service.tool_call_parser, tools)
        new_parser = partial(parser, tools, body.parallel_tool_calls)
    ids = await in_thread("messages", service.encode_chat, turns, **body.template_options())
    return _handler(service)(service, request, key, body, [(ids, user)], new_parser=new_parser, builder=builder)


@router.post("/v1/responses")
async def responses(body: ResponsesRequest, request: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Generate the next items of a conversation, in the format of OpenAI's Responses API."""
    if service.upstreams is not None:
        raise ApiError(501, "a server with upstreams has no responses; use POST /v1/chat/completions", "server_error")
    temperature = service.settings.default_temperature if body.temperature is None else body.temperature
    builder = ResponsesBuilder(body, temperature, service.fingerprint, service.token_bytes)
    try:
        return await (await _chat_handler(body.chat_request(), request, service, key, builder)).respond()
    except ApiError as error:
        raise responses_error(error) from error


@router.post("/v1/completions")
async def completions(body: CompletionRequest, request: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Continue bare text, without a chat template."""
    given = as_prompts(body.prompt)
    limit = min(service.settings.max_queue_size, service.settings.max_queue_size_per_client)
    if not 1 <= len(given) <= limit:
        raise ApiError(400, f"prompt must hold 1 to {limit} prompts, not {len(given)}", param="prompt")
    prompts, echoes = [], []
    for number, prompt in enumerate(given):
        place = f"prompt.{number}" if len(given) > 1 else "prompt"
        if isinstance(prompt, str):
            prompts.append((await in_thread(place, service.encode_text, prompt), prompt))
            echoes.append(prompt)
            continue
        await in_thread(place, service.fit_context, prompt, body.token_limit())
        prompts.append((prompt, await in_thread(place, service.decode, prompt)))
        echoes.append(await in_thread(place, service.decode, prompt, skip_special_tokens=False))
    return await _handler(service)(service, request, key, body, prompts, echoes if body.echo else None).respond()


@router.post("/v1/embeddings")
async def embeddings(body: EmbeddingsRequest, request: Request, service: ServiceDep, key: KeyDep) -> Response:
    """Return the mean of the last hidden states over the tokens of each text, scaled to length 1."""
    with api_errors("model"):
        mix = service.registry.resolve(body.model)
    if mix is None:
        raise ApiError(400, "auto has no embeddings; use base, an expert or a mixture for all of them", param="model")
    size = service.engine.model.config.get_text_config().hidden_size
    if body.dimensions not in (None, size):
        raise ApiError(400, f"dimensions must be {size}, not {body.dimensions}", param="dimensions")
    rows = []
    for number, text in enumerate(as_prompts(body.input)):
        place = f"input.{number}" if isinstance(body.input, list) else "input"
        rows.append(await in_thread(place, service.encode_text, text) if isinstance(text, str) else text)
        await in_thread(place, service.fit_context, rows[-1], 0)
    vectors: dict[int, torch.Tensor] = {}
    deadline = time.monotonic() + service.settings.request_timeout
    for batch in by_length([len(row) for row in rows], MAX_PREFILL_TOKENS):
        if await request.is_disconnected():
            return Response(status_code=499)
        try:
            with api_errors("model"):
                call = service.embeddings([rows[number] for number in batch], mix)
                vectors |= zip(batch, await asyncio.wait_for(call, deadline - time.monotonic()), strict=True)
        except asyncio.TimeoutError as error:
            raise ApiError(504, "timeout", "server_error", code="timeout", retry_after=5) from error
    ordered = [vectors[number] for number in range(len(rows))]
    response = embeddings_response(body.model, ordered, sum(map(len, rows)), body.encoding_format, mix.id)
    return JSONResponse(response)


# --- Tokenizer, as in vLLM's server


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """Return the token ids of a text."""
    ids = await in_thread("prompt", service.encode_text, body.prompt, body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.engine.context_length}


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> dict[str, Any]:
    """Return the text of token ids."""
    await in_thread("tokens", check_tokens, service.engine.model, body.tokens, "the text")
    return {"prompt": await in_thread("tokens", service.decode, body.tokens, skip_special_tokens=False)}


@router.get("/tokenizer_info")
async def tokenizer_info(service: ServiceDep) -> dict[str, Any]:
    """Return the special tokens and the chat template."""
    tokenizer = service.engine.tokenizer
    special = {name: getattr(tokenizer, name, None) for name in ("bos_token", "eos_token", "pad_token")}
    return {"tokenizer_class": type(tokenizer).__name__, **special, "chat_template": chat_template(tokenizer)}


# --- Models


@router.get("/v1/models")
async def list_models(service: ServiceDep) -> dict[str, Any]:
    """List all models: `auto`, `base`, experts and saved mixtures."""
    return {"object": "list", "data": _models(service)}


@router.delete("/v1/models/{name:path}")
async def delete_model(name: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Delete a fine-tuned model."""
    await in_thread("model", service.fine_tuning.delete_model, name, key)
    return {"id": name, "object": "model", "deleted": True}


@router.get("/v1/models/{name:path}")
async def get_model(name: str, service: ServiceDep) -> dict[str, Any]:
    """Return one model; ``name`` may be a mixture expression."""
    for model in _models(service):
        if model["id"] == name:
            return model
    with api_errors("model"):
        mix = service.registry.resolve(name)
    assert mix is not None
    return _model(service, name, "mix", mix=mix.id)


def _models(service: Service) -> list[dict[str, Any]]:
    models = [
        _model(service, AUTO, "auto", strategy=service.default_strategy, strategies=sorted(service.strategies)),
        _model(service, BASE, "base", base=service.settings.base),
    ]
    for name, expert in service.registry.experts.items():
        metadata = {key: thaw(expert.meta.get(key)) for key in ("domain", "task", "description", "metrics")}
        model = service.registry.model_names.get(name, name)
        models.append(_model(service, model, "expert", expert=name, positions=expert.positions, **metadata))
    for name, (mix, saved) in service.registry.mixes.items():
        metadata = {key: value for key, value in saved.items() if key != "client"}
        models.append(_model(service, name, "mix", mix=mix.id, **mix.to_json(), **metadata))
    return models


def _model(service: Service, name: str, kind: str, **metadata: Any) -> dict[str, Any]:
    sigmix = {"kind": kind, **metadata}
    return {"id": name, "object": "model", "created": service.created, "owned_by": "sigmix", "sigmix": sigmix}


# --- Adaptation and feedback


@router.post("/v1/adapt", status_code=202)
async def adapt(body: AdaptRequest, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Start a background search for a mixture on labelled examples."""
    if body.granularity == "layer" and service.upstreams is not None:
        raise ApiError(400, "granularity must be model on a server with upstreams", param="granularity")
    if len(body.examples) > service.settings.max_examples:
        raise ApiError(400, f"at most {service.settings.max_examples} examples", param="examples")
    for number, one in enumerate(body.examples):
        await in_thread(f"examples.{number}", service.check_example, one.prompt, one.answer, body.max_tokens)
    try:
        adaptation = await run_in_threadpool(service.adaptations.submit, body, key.owner)
    except SigmixError as error:
        raise api_error(error, "score" if isinstance(error, UnknownNameError) else "name") from error
    except QueueFullError as error:
        raise rate_limited("too many queued adaptations", ADAPTATION_RETRY_SECONDS) from error
    return adaptation.to_json()


@router.get("/v1/adapt/{id}")
async def get_adaptation(id: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Return status, trace and result of a search."""
    return _adaptation(service, id, key).to_json()


@router.delete("/v1/adapt/{id}")
async def cancel_adaptation(id: str, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Cancel a search."""
    adaptation = _adaptation(service, id, key)
    service.adaptations.cancel(adaptation)
    return adaptation.to_json()


def _adaptation(service: Service, id: str, key: ApiKey) -> Adaptation:
    with api_errors("id"):
        return service.adaptations.get(id, key.owner)


@router.post("/v1/feedback")
async def feedback(body: FeedbackRequest, service: ServiceDep, key: KeyDep) -> dict[str, Any]:
    """Reward an earlier reply; the strategy `bandit` learns from it."""
    reply = await in_thread(None, service.store.reply, body.id)
    if reply is None or (not key.admin and reply["client"] != key.name):
        raise ApiError(404, f"no reply {body.id!r} that can receive feedback", code="not_found", param="id")
    arm, context = reply["arm"], reply["context"]
    learned = service.bandit is not None and arm is not None and context is not None
    if learned:
        assert service.bandit is not None
        saved = await in_thread(None, service.bandit.learn, body.id, arm, context, body.reward)
    else:
        saved = await in_thread(None, service.store.learn, body.id, body.reward)
    if not saved:
        raise ApiError(409, f"reply {body.id!r} already has feedback", code="conflict", param="id")
    service.metrics.feedback.labels("good" if body.reward > 0 else "bad" if body.reward < 0 else "even").inc()
    reason = None if learned else "the mixture was given or has several experts, or the router did not decide"
    return {"id": body.id, "object": "sigmix.feedback", "learned": learned, "reason": reason}


@router.get("/health")
async def health(service: ServiceDep) -> Response:
    """Return 200 once the server accepts requests, else 503; and whether a compiled decode step is in use."""
    stopped = "closing" if service.closing else "failed" if service.started else "starting"
    status = "ok" if service.ready else stopped
    step = service.engine.decode_step
    body: dict[str, Any] = {"status": status, "compiled": step is not None and step.active}
    if (upstreams := service.upstreams) is not None:  # without addresses: this route needs no key
        body["upstreams"] = {"all": len(upstreams.all), "healthy": len(upstreams.healthy)}
        if status == "ok" and not upstreams.healthy:
            body["status"] = "no healthy upstream"
    return JSONResponse(body, 200 if body["status"] == "ok" else 503)


# --- Administration


@admin_router.get("/v1/experts")
async def list_experts(service: ServiceDep) -> dict[str, Any]:
    """List the experts with their metadata and running requests, and the folders to load others from."""
    keys = ("domain", "task", "description", "license", "metrics")
    experts = [
        {
            "id": name, "object": "sigmix.expert", "num_parameters": sum(z.numel() for z in expert.z.values()),
            "digest": expert.digest, "positions": expert.positions, "running_requests": service.scheduler.users(name),
            **{key: thaw(expert.meta.get(key)) for key in keys},
        }
        for name, expert in service.registry.experts.items()
    ]  # fmt: skip
    return {"object": "list", "data": experts, "folders": [str(folder) for folder in service.registry.expert_folders]}


@admin_router.post("/v1/experts", status_code=201)
async def load_expert(body: LoadExpertRequest, service: ServiceDep) -> dict[str, Any]:
    """Load an expert from one of the allowed folders."""
    name = await in_thread("path", service.load_expert, body.path)
    return {"id": name, "object": "sigmix.expert", "loaded": True}


@admin_router.delete("/v1/experts/{name}")
async def unload_expert(name: str, service: ServiceDep) -> dict[str, Any]:
    """Unload an expert that no running request uses."""
    try:
        await run_in_threadpool(service.unload_expert, name)
    except ConfigError as error:
        raise ApiError(409, str(error), code="in_use") from error
    except SigmixError as error:
        raise api_error(error, "name") from error
    return {"id": name, "object": "sigmix.expert", "deleted": True}


@admin_router.post("/v1/mixes", status_code=201)
async def save_mix(body: SaveMixRequest, service: ServiceDep) -> dict[str, Any]:
    """Save a mixture under a name that requests can use as ``model``."""

    def save() -> Mix:
        mix = service.registry.resolve(body.mix) if isinstance(body.mix, str) else Mix(body.mix.weights)
        if mix is None:
            raise ConfigError("auto is not a mixture", remedy="name experts, for example a:0.7+b:0.3")
        service.engine.z(mix)  # checks the experts and the shape of the weights
        service.registry.save_mix(body.name, mix, {"made_by": "hand"})
        return mix

    await in_thread("name", service.registry.check_mix_name, body.name)
    mix = await in_thread("mix", save)
    return {"id": body.name, "object": "sigmix.mix", "mix": mix.id, **mix.to_json()}


@admin_router.delete("/v1/mixes/{name}")
async def delete_mix(name: str, service: ServiceDep) -> dict[str, Any]:
    """Delete a saved mixture."""
    await in_thread("name", service.registry.delete_mix, name)
    return {"id": name, "object": "sigmix.mix", "deleted": True}


@admin_router.get("/metrics")
async def metrics(service: ServiceDep) -> Response:
    """Return Prometheus metrics."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def by_length(lengths: Sequence[int], limit: float = float("inf")) -> Iterator[list[int]]:
    """Yield the numbers of prompts to read in one pass: padding is at most as long as the prompts.

    Args:
        limit: tokens of one pass, padding included; a longer prompt is read alone.
    """
    part: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if part and (lengths[number] > 2 * lengths[part[0]] or lengths[number] * (len(part) + 1) > limit):
            yield part
            part = []
        part.append(number)
    if part:
        yield part
