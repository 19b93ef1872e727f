"""Server in front of upstreams: the same answers, and what happens when an upstream fails."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from helpers_adapt import DOMAINS, big, engine_of, requests_of, routed
from helpers_serve import BODY, CHAT, TIMEOUT, bearer, live, raw_chat, serving, wait_until
from helpers_tiny import build_tiny, build_tokenizer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sigmix.adapt import OTHER
from sigmix.serve.auth import add_key

pytestmark = pytest.mark.usefixtures("cache")

COMPLETIONS = "/v1/completions"
ASK = {**BODY, "model": "math"}
BASE = "org/base"
NEVER = 1e6
"""Seconds between health checks: none but the first."""


def chunk(text: str, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None, "logprobs": None}
    return {"id": "theirs", "object": "chat.completion.chunk", "model": "theirs", "choices": [choice], **more}


def sse(*events: Any) -> list[str]:
    return [
        f"data: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n" for event in events
    ]


def reply(_: Request) -> Response:
    message = {"role": "assistant", "content": "hello", "reasoning_content": "hm"}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    answer = {"id": "theirs", "object": "chat.completion", "model": "theirs", "choices": choices, "usage": usage}
    return JSONResponse(answer)


class Fake:
    """Scripted upstream on a socket; its models are listed as by vLLM.

    Attributes:
        respond: answers a request for a completion, in the event loop.
        requests: (headers, body) of these requests.
        health: status of its health check.
        adapters: files of llama-server's adapters; None: it is another server.
    """

    def __init__(
        self, respond: Callable[[Request], Any] = reply, port: int = 0, adapters: list[str] | None = None
    ) -> None:
        self.respond, self.health, self.adapters = respond, 200, adapters
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.disconnected = threading.Event()  # a client has closed the connection of a stalled request
        routes = [
            Route("/health", lambda _: Response(status_code=self.health)),
            Route("/v1/models", self._models),
            Route("/lora-adapters", self._adapters),
            Route(CHAT, self._complete, methods=["POST"]),
            Route(COMPLETIONS, self._complete, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), port=port, log_config=None, lifespan="off", timeout_graceful_shutdown=1
        )
        self.server, self.socket = uvicorn.Server(config), config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def _models(self, _: Request) -> Response:
        adapter = {"id": "adapter", "object": "model", "parent": BASE}
        return JSONResponse({"object": "list", "data": [adapter, {"id": BASE, "object": "model", "parent": None}]})

    def _adapters(self, _: Request) -> Response:
        if self.adapters is None:
            return Response(status_code=404)
        return JSONResponse([{"id": id, "path": path, "scale": 0.0} for id, path in enumerate(self.adapters)])

    async def _complete(self, request: Request) -> Response:
        self.requests.append((dict(request.headers), await request.json()))
        answer = self.respond(request)
        return await answer if asyncio.iscoroutine(answer) else answer

    @property
    def models(self) -> list[str]:
        """Models of the requests."""
        return [body["model"] for _, body in self.requests]

    async def stall(self, request: Request) -> Response:
        """Never respond; the client has to disconnect."""
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.disconnected.set()
        return Response()

    def stalled_stream(self, *events: Any) -> Callable[[Request], Response]:
        """Send events, then nothing."""

        async def lines():
            try:
                for line in sse(*events):
                    yield line
                await asyncio.sleep(NEVER)
            finally:
                self.disconnected.set()

        return lambda _: StreamingResponse(lines(), media_type="text/event-stream")

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(TIMEOUT)
        assert not self.thread.is_alive()


def streaming(*parts: str, error: type[Exception] | None = None) -> Callable[[Request], Response]:
    """Answer with parts of a stream; ``error`` cuts the connection after them."""

    async def lines():
        for part in parts:
            yield part
        if error is not None:
            raise error

    return lambda _: StreamingResponse(lines(), media_type="text/event-stream")


@pytest.fixture
def fake():
    """Factory of scripted upstreams, which are stopped at the end."""
    made: list[Fake] = []

    def make(*args: Any, **options: Any) -> Fake:
        made.append(Fake(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """Server in front of one scripted upstream."""
    folder = tmp_path_factory.mktemp("scripted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        upstream = Fake()
        with serving(folder, upstream=[upstream.url], upstream_interval=NEVER, strategy="A") as client:
            client.fake = upstream
            yield client
        upstream.stop()


def metric(client, name: str, upstream: Fake | str) -> float:
    url = upstream if isinstance(upstream, str) else upstream.url
    return client.service.metrics.registry.get_sample_value(f"sigmix_upstream_{name}", {"upstream": url})


def healthy(client) -> int:
    return client.call("GET", "/health")[1]["upstreams"]["healthy"]


# --- The same answers


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """Server in front of an embedded server that needs a key."""
    folder = tmp_path_factory.mktemp("router")
    limits = {"max_new_tokens": 64, "strategy": "A"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIGMIX_CACHE", str(folder / "cache"))
        key = add_key(folder / "up" / "state" / "keys.json", "router")
        with (
            live(folder / "up", **limits) as upstream,
            serving(folder, upstream=[f"{upstream.url}/v1/"] * 2, upstream_key=key, **limits) as client,
        ):
            client.upstream = upstream
            yield client


@pytest.mark.parametrize("model", ["base", "math", "code:.3 + math:.7", "code:-0.5", "mine", "auto"])
@pytest.mark.parametrize(
    "path, body",
    [
        (CHAT, BODY),
        (CHAT, {**BODY, "n": 2, "temperature": 1.0, "seed": 5, "stop": ["e"], "logprobs": True, "top_logprobs": 2}),
        (CHAT, {**BODY, "guided_choice": ["one", "two"], "top_k": 3, "user": "me", "tools": []}),
        (COMPLETIONS, {"prompt": "one two", "max_tokens": 8}),
    ],
)
def test_answers_are_those_of_the_embedded_server(server, router, path, body, model):
    for client in (server, router):
        if model == "mine" and "mine" not in client.service.registry.mixes:
            assert client.call("POST", "/v1/mixes", {"name": "mine", "mix": "math:.5+code:.5"})[0] == 201
    body = {**body, "model": model}
    (status, expected, _), (same, found, _) = (client.call("POST", path, body) for client in (server, router))
    assert status == same == 200, found
    fields = ("object", "model", "system_fingerprint", "choices", "usage")
    assert {name: found[name] for name in fields} == {name: expected[name] for name in fields}
    decision = ("mix", "weights", "label", "reason", "scores", "evidence")
    assert {name: found["sigmix"][name] for name in decision} == {name: expected["sigmix"][name] for name in decision}
    body["stream_options"] = {"include_usage": True}
    events, streamed = (client.stream(body, path) for client in (server, router))
    assert len({event["id"] for event in streamed}) == 1
    assert streamed[0]["sigmix"]["mix"] == expected["sigmix"]["mix"]
    for event in [*events, *streamed]:
        for name in ("id", "created", "sigmix"):
            event.pop(name, None)
    assert streamed == events


def test_text_completions_with_several_prompts(server, router):
    body = {"prompt": ["one", "two three"], "model": "code", "max_tokens": 5, "n": 2, "echo": True, "logprobs": 1}
    (_, expected, _), (_, found, _) = (client.call("POST", COMPLETIONS, body) for client in (server, router))
    assert found["choices"] == expected["choices"]
    assert [one["mix"] for one in found["sigmix"]] == ["code", "code"]


def test_replies_receive_feedback(router):
    found = router.chat(model="math")[1]
    assert router.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 200
    assert router.call("POST", "/v1/feedback", {"id": found["id"], "reward": 1})[0] == 409


def test_other_routes(server, router):
    for path in ("/v1/models", "/v1/models/math", "/tokenizer_info"):
        (_, expected, _), (_, found, _) = (client.call("GET", path) for client in (server, router))
        if path == "/v1/models":
            mixes = {"mine"}
            expected, found = ([one["id"] for one in listed["data"]] for listed in (expected, found))
            assert set(found) - mixes == set(expected) - mixes
        else:
            assert found == {**expected, **({"created": found["created"]} if "created" in found else {})}
    sent = router.upstream.service.metrics.registry.get_sample_value
    before = sent("sigmix_request_seconds_count", {"route": COMPLETIONS})
    body = {"input": "one two", "model": "math"}
    expected, found = (client.call("POST", "/v1/embeddings", body)[1]["data"] for client in (server, router))
    assert found[0]["embedding"] == pytest.approx(expected[0]["embedding"], abs=1e-5)
    assert router.call("POST", "/v1/responses", {"input": "one"})[0] == 501
    assert router.call("GET", "/v1/fine_tuning/jobs")[0] == 403  # an administrator's request
    example = {"prompt": "one", "answer": "two"}
    assert router.call("POST", "/v1/adapt", {"examples": [example], "granularity": "layer"})[0] == 400
    assert sent("sigmix_request_seconds_count", {"route": COMPLETIONS}) == before


def test_health_and_metrics(router):
    status, found, _ = router.call("GET", "/health")
    assert (status, found) == (200, {"status": "ok", "compiled": False, "upstreams": {"all": 1, "healthy": 1}})
    url = router.service.settings.upstream[0]
    before = metric(router, "requests_total", url)
    assert router.chat(model="math")[0] == 200
    assert metric(router, "requests_total", url) == before + 1
    assert metric(router, "failures_total", url) == metric(router, "in_flight", url) == 0
    assert f'sigmix_upstream_healthy{{upstream="{url}"}} 1.0' in router.call("GET", "/metrics")[1]


# --- What is sent upstream


def test_auto_reaches_the_expert_of_the_router(tmp_path, fake):
    upstream = fake()
    experts = routed(engine_of(build_tiny, build_tokenizer()))
    with serving(tmp_path, experts, model=big(build_tiny), upstream=[upstream.url], strategy="D") as client:
        for name, label in (*DOMAINS.items(), (BASE, OTHER)):
            status, found = client.chat(requests_of(label, 300, 1)[0], model="auto")
            assert (status, found["model"], found["sigmix"]["label"]) == (200, "auto", label)
            assert upstream.models[-1] == name
            assert found["choices"][0]["message"]["reasoning_content"] == "hm"
        strategy = client.chat(requests_of("arithmetic", 300, 1)[0], sigmix={"strategy": "bandit"})[1]["sigmix"]
        assert strategy["mix"] == "adder"


def test_the_body_has_the_limits_and_defaults_of_this_server(tmp_path, fake):
    upstream = fake()
    schema = {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}}
    with serving(tmp_path, upstream=[upstream.url], max_new_tokens=9, default_temperature=0.5) as client:
        client.chat(
            model="base", max_tokens=None, max_completion_tokens=50, response_format=schema, user="me", seed=3,
            tool_choice="auto", stream_options={"include_usage": True}, sigmix={"strategy": "A"},
        )  # fmt: skip
        assert upstream.requests[0][1] == {
            "model": BASE, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 9, "temperature": 0.5,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "response_format": schema, "seed": 3,
        }  # fmt: skip
        client.chat(model="math", guided_regex="a+", continue_final_message=True, top_p=0.5)
        body = upstream.requests[1][1]
        assert (body["structured_outputs"], body["add_generation_prompt"]) == ({"regex": "a+"}, False)
        assert body["top_p"] == 0.5
        assert "guided_regex" not in body
        surrogate = {"unused": "\ud800"}
        assert client.chat(model="math", chat_template_kwargs=surrogate)[0] == 200
        assert upstream.requests.pop()[1]["chat_template_kwargs"] == surrogate
        template = client.service.engine.tokenizer.chat_template
        client.service.engine.tokenizer.chat_template = "{% if enable_thinking %}{% endif %}" + template
        client.chat(model="math")
        client.chat(model="math", chat_template_kwargs={"enable_thinking": True})
        thinking = [body["chat_template_kwargs"]["enable_thinking"] for _, body in upstream.requests[2:]]
        assert thinking == [False, True]


def test_llama_server_gets_scales_in_place_of_a_name(tmp_path, fake):
    upstream = fake(adapters=["/adapters/math.gguf", "code.v2.gguf"])
    with serving(tmp_path, upstream=[upstream.url]) as client:
        for model, scales in (("base", (0, 0)), ("math", (1, 0)), ("math:-0.5", (-0.5, 0))):
            assert client.chat(model=model, seed=3, presence_penalty=0)[0] == 200
            body = upstream.requests[-1][1]
            assert body["lora"] == [{"id": id, "scale": scale} for id, scale in enumerate(scales)]
            assert (body["model"], body["cache_prompt"], body["seed"]) == (BASE, False, 3)
            assert not {"repetition_penalty", "presence_penalty"} & body.keys()
            assert body["samplers"] == ["temperature", "min_p", "top_k", "top_p"]
        sent = len(upstream.requests)
        status, found = client.chat(model="math:0.5+code:0.5")  # the file has another name
        assert (status, found["error"]["param"]) == (404, "model")
        assert "--lora-scaled" in found["error"]["message"]
        for param, fields in (
            ("structured_outputs", {"guided_regex": "a+"}), ("repetition_penalty", {"repetition_penalty": 1.2}),
        ):  # fmt: skip
            status, found = client.chat(model="math", **fields)
            assert (status, found["error"]["param"]) == (400, param)
        assert len(upstream.requests) == sent
        assert client.chat(model="math", continue_final_message=False)[0] == 200
        prompt = {"prompt": "one", "model": "math", "echo": False, "best_of": 1}
        assert client.call("POST", COMPLETIONS, prompt)[0] == 200


def test_llama_server_beside_another_upstream(tmp_path, fake):
    llama, other = fake(adapters=["math.gguf"]), fake()
    with serving(tmp_path, upstream=[llama.url, other.url], upstream_interval=0.05) as client:
        assert client.chat(model="code")[0] == 200  # has no adapter
        assert client.chat(model="math", repetition_penalty=1.2)[0] == 200  # cannot have the field
        assert (len(llama.requests), other.models) == (0, ["code", "math"])
        other.health = 500
        wait_until(lambda: healthy(client) == 1)
        assert client.chat(model="math")[0] == 200
        assert client.chat(model="code")[0] == 503  # until the other one is back
        llama.adapters = ["code.gguf", "math.gguf"]  # started again
        wait_until(lambda: client.chat(model="code")[0] == 200)
        assert client.chat(model="math")[0] == 200
        assert [one["scale"] for one in llama.requests[-1][1]["lora"]] == [0.0, 1.0]


@pytest.mark.parametrize(
    "path, body, param",
    [
        (CHAT, {**BODY, "model": "maths"}, "model"),
        (CHAT, {**BODY, "model": "math+maths"}, "model"),
        (CHAT, {**BODY, "model": "math:x"}, "model"),
        (CHAT, {**BODY, "model": "layered"}, "model"),
        (CHAT, {**BODY, "sigmix": {"strategy": "D"}}, "sigmix.strategy"),
        (CHAT, {**BODY, "max_token": 3}, "max_token"),
        (CHAT, {"messages": [{"role": "user", "content": "one " * 400}], "model": "math"}, "messages"),
        (COMPLETIONS, {"prompt": ["one", "two"]}, "prompt"),
        (COMPLETIONS, {"prompt": "one", "model": "math", "best_of": 2}, "best_of"),
    ],
)
def test_invalid_requests_are_not_sent(scripted, path, body, param):
    scripted.fake.requests.clear()
    layers = {"name": "layered", "mix": {"weights": {"math": [1.0, 0.2]}}}
    assert scripted.call("POST", "/v1/mixes", layers)[0] == 201
    status, found, _ = scripted.call("POST", path, body)
    assert status in (400, 404)
    assert found["error"]["param"] == param
    assert scripted.fake.requests == []


def test_keys_and_limits(tmp_path, fake, caplog):
    caplog.set_level("DEBUG")
    upstream = fake()
    keys = tmp_path / "state" / "keys.json"
    user, one = add_key(keys, "alice", max_new_tokens=2), add_key(keys, "one", at_once=1)
    with serving(tmp_path, upstream=[upstream.url], upstream_key="sk-upstream") as client:
        for headers in ({}, bearer("wrong")):
            assert client.call("POST", CHAT, ASK, **headers)[0] == 401
        assert upstream.requests == []
        assert client.call("POST", CHAT, ASK, **bearer(user))[0] == 200
        ((headers, body),) = upstream.requests
        assert (headers["authorization"], body["max_tokens"]) == ("Bearer sk-upstream", 2)
        assert user not in json.dumps([headers, body])

        release = threading.Event()

        async def held(request: Request) -> Response:
            while not release.is_set():
                await asyncio.sleep(0.01)
            return reply(request)

        upstream.respond = held
        statuses: list[int] = []
        thread = threading.Thread(target=lambda: statuses.append(client.call("POST", CHAT, ASK, **bearer(one))[0]))
        thread.start()
        wait_until(lambda: len(upstream.requests) == 2)
        status, found, got = client.call("POST", CHAT, ASK, **bearer(one))
        assert (status, found["error"]["code"], "retry-after" in got) == (429, "rate_limit_exceeded", True)
        release.set()
        thread.join(TIMEOUT)
        assert statuses == [200]
    assert "sk-upstream" not in caplog.text


def test_the_queue_of_decisions_is_limited(tmp_path, fake):
    upstream = fake()
    with serving(tmp_path, upstream=[upstream.url], max_queue_size=2) as client:
        with client.queued_chats(2) as statuses:
            assert client.chat(model="math")[0] == 429
            assert upstream.requests == []
        assert statuses == [200, 200]
        assert client.service.scheduler.running() == []


# --- Failures


BUSY = {"message": "slow down", "type": "rate_limit_error", "code": "busy"}
TOO_LONG = {"message": "too long", "type": "BadRequestError", "param": "input_tokens", "code": 400}
FLAT = {"object": "error", "message": "no such model", "code": 404}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "answer, status, error",
    [
        (JSONResponse({"error": BUSY}, 429, {"retry-after": "7"}), 429, BUSY),
        (JSONResponse({"error": TOO_LONG}, 400), 400, {**TOO_LONG, "code": None}),
        (JSONResponse(FLAT, 404), 404, {"message": "no such model", "type": "invalid_request_error", "code": None}),
        (JSONResponse({"detail": [1]}, 422), 422, {"type": "invalid_request_error"}),
        (Response("Internal Server Error", 500), 500, {"type": "server_error"}),
        (Response("", 302, {"location": "/elsewhere"}), 502, {"code": "upstream"}),
        (JSONResponse({"error": "Unauthorized"}, 401), 502, {"code": "upstream"}),
        (Response("no JSON"), 502, {"code": "upstream"}),
        (JSONResponse([]), 502, {"code": "upstream"}),
    ],
)
def test_errors_of_an_upstream(scripted, answer, status, error, stream):
    upstream, failures = scripted.fake, metric(scripted, "failures_total", scripted.fake)
    upstream.requests.clear()
    upstream.respond = lambda _: answer
    got, found, headers = scripted.call("POST", CHAT, {**ASK, "stream": stream})
    assert got == status, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert found["error"].items() >= error.items()
    assert "retry-after" in headers or status != 429
    assert len(upstream.requests) == 1
    assert metric(scripted, "failures_total", upstream) == failures + (answer.status_code in (200, 500))
    assert healthy(scripted) == 1


@pytest.mark.parametrize("event, status", [({"error": {"message": "bad", "code": 400}}, 400), ("no JSON", 502)])
def test_the_first_event_of_a_stream_can_set_the_status(scripted, event, status):
    scripted.fake.respond = streaming(*sse(event))
    assert scripted.call("POST", CHAT, {**ASK, "stream": True})[0] == status


@pytest.mark.parametrize("stream", [False, True])
def test_another_upstream_gets_a_request_that_cannot_connect(tmp_path, fake, stream):
    dead, other = fake(), fake(streaming(*sse(chunk("a"), "[DONE]")) if stream else reply)
    with serving(tmp_path, upstream=[dead.url, other.url], upstream_interval=NEVER) as client:
        assert healthy(client) == 2
        dead.stop()
        for _ in range(2):
            assert client.call("POST", CHAT, {**ASK, "stream": stream})[0] == 200
        assert (len(dead.requests), len(other.requests)) == (0, 2)
        assert [metric(client, "failures_total", one) for one in (dead, other)] == [1, 0]
        assert [metric(client, "requests_total", one) for one in (dead, other)] == [1, 2]
        assert [metric(client, "healthy", one) for one in (dead, other)] == [0, 1]
        other.stop()
        for code in (503, 503):
            status, found, headers = client.call("POST", CHAT, {**ASK, "stream": stream})
            assert (status, found["error"]["code"], "retry-after" in headers) == (code, "upstream", True)
        status, found, _ = client.call("GET", "/health")
        assert (status, found["upstreams"]) == (503, {"all": 2, "healthy": 0})


def test_an_upstream_comes_back(tmp_path, fake):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with serving(tmp_path, upstream=[url], upstream_interval=0.02) as client:
        assert client.call("POST", CHAT, ASK)[0] == 503
        upstream = fake(port=port)
        wait_until(lambda: healthy(client) == 1)
        assert client.call("POST", CHAT, ASK)[0] == 200
        upstream.health = 503
        wait_until(lambda: healthy(client) == 0)
        assert client.call("POST", CHAT, ASK)[0] == 503
        upstream.health = 404  # a server without this route
        wait_until(lambda: healthy(client) == 1)
        assert client.call("POST", CHAT, ASK)[0] == 200


def test_the_least_busy_upstream_is_chosen(tmp_path, fake):
    release = threading.Event()

    async def held(request: Request) -> Response:
        while not release.is_set():
            await asyncio.sleep(0.01)
        return reply(request)

    both = fake(held), fake(held)
    with serving(tmp_path, upstream=[one.url for one in both]) as client:
        threads = [threading.Thread(target=client.call, args=("POST", CHAT, ASK)) for _ in range(4)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(lambda number=number: sum(len(one.requests) for one in both) == number)
        assert [metric(client, "in_flight", one) for one in both] == [2, 2]
        release.set()
        for thread in threads:
            thread.join(TIMEOUT)
        assert [metric(client, "in_flight", one) for one in both] == [0, 0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stalled_upstream(tmp_path, fake, stream):
    upstream = fake()
    upstream.respond = upstream.stall
    with serving(tmp_path, upstream=[upstream.url], request_timeout=3) as client:
        status, found, _ = client.call("POST", CHAT, {**ASK, "stream": stream})
        assert (status, found["error"]["code"]) == (504, "timeout")
        assert upstream.disconnected.wait(TIMEOUT)
        assert metric(client, "failures_total", upstream) == len(upstream.requests) == 1


def events_of(client, **more: Any) -> tuple[str, dict[str, Any]]:
    """(text, error) of a stream that ends with an error."""
    events = client.stream({**ASK, **more})
    text = "".join(event["choices"][0]["delta"]["content"] for event in events[:-1])
    return text, events[-1]["error"]


@pytest.mark.parametrize(
    "parts, error, code",
    [
        (sse(chunk("a"), chunk("b")), RuntimeError, "upstream"),
        (sse(chunk("a"), chunk("b")), None, "upstream"),  # without [DONE]
        ([*sse(chunk("a"), chunk("b")), "data: {\n\n"], None, "upstream"),
        (sse(chunk("a"), chunk("b"), {"error": {"message": "bad", "code": "their"}}, "[DONE]"), None, "their"),
    ],
)
def test_a_stream_that_fails_ends_with_an_error(tmp_path, fake, parts, error, code):
    both = [fake(streaming(*parts, error=error)) for _ in range(2)]
    with serving(tmp_path, upstream=[one.url for one in both]) as client:
        text, found = events_of(client)
        assert (text, found["code"]) == ("ab", code)
        assert sum(len(one.requests) for one in both) == 1
        assert metric(client, "failures_total", both[0]) == (code == "upstream")


def test_a_stalled_stream(tmp_path, fake):
    upstream = fake()
    upstream.respond = upstream.stalled_stream(chunk("a"), chunk("b"))
    with serving(tmp_path, upstream=[upstream.url], request_timeout=3) as client:
        text, found = events_of(client)
        assert (text, found["code"]) == ("ab", "timeout")
        assert upstream.disconnected.wait(TIMEOUT)


def test_events_that_arrive_in_odd_pieces(scripted):
    text = "é\u2028\x85\n😀"
    data = "".join([": ping\r\n\r\n", *sse(chunk(text)), "event: x\n", *sse("[DONE]")]).encode()

    async def pieces():
        for start in range(0, len(data), 3):
            yield data[start : start + 3]

    scripted.fake.respond = lambda _: StreamingResponse(pieces(), media_type="text/event-stream")
    (event,) = scripted.stream(ASK)
    assert event["choices"][0]["delta"]["content"] == text
    assert (event["model"], event["sigmix"]["mix"]) == ("math", "math")


# --- Sockets on both sides


def stream_from(port: int, **more: Any) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("POST", CHAT, json.dumps({**ASK, **more}), {"content-type": "application/json"})
    return connection.getresponse()


def next_event(answer: http.client.HTTPResponse) -> dict[str, Any]:
    line = answer.readline()
    assert answer.readline() == b"\n"
    return json.loads(line.removeprefix(b"data: "))


def test_pieces_are_passed_on_as_they_come(tmp_path, fake):
    more, done = threading.Event(), threading.Event()

    async def lines():
        for line, event in zip(sse(chunk("a"), chunk("b"), "[DONE]"), (more, done, done), strict=True):
            yield line
            while not event.is_set():
                await asyncio.sleep(0.01)

    upstream = fake(lambda _: StreamingResponse(lines(), media_type="text/event-stream"))
    with live(tmp_path, upstream=[upstream.url]) as client:
        answer = stream_from(client.port, stream=True)
        assert next_event(answer)["choices"][0]["delta"]["content"] == "a"
        more.set()
        assert next_event(answer)["choices"][0]["delta"]["content"] == "b"
        done.set()
        assert answer.read() == b"data: [DONE]\n\n"


def test_a_disconnect_cancels_the_request_upstream(tmp_path, fake):
    upstream = fake()
    with live(tmp_path, upstream=[upstream.url]) as client:
        for stream in (False, True):
            upstream.disconnected.clear()
            upstream.respond = upstream.stalled_stream(chunk("a")) if stream else upstream.stall
            with socket.create_connection(("127.0.0.1", client.port), timeout=TIMEOUT) as connection:
                connection.sendall(raw_chat({**ASK, "stream": stream}))
                if stream:
                    assert b" 200 " in connection.recv(4096)
                wait_until(lambda stream=stream: len(upstream.requests) == 1 + stream)
            assert upstream.disconnected.wait(TIMEOUT)
            wait_until(lambda: metric(client, "in_flight", upstream) == 0)
        assert metric(client, "failures_total", upstream) == 0


def test_shutdown_ends_open_streams(tmp_path, fake):
    upstream = fake()
    upstream.respond = upstream.stalled_stream(chunk("a"))
    with live(tmp_path, upstream=[upstream.url], shutdown_timeout=0.1) as client:
        answer = stream_from(client.port, stream=True)
        assert next_event(answer)["choices"][0]["delta"]["content"] == "a"
        client.service.close()
        assert next_event(answer)["error"]["code"] == "closing"
        assert answer.read() == b"data: [DONE]\n\n"
        assert client.call("POST", CHAT, ASK)[0] == 503
