"""OpenAI's schema: requests, responses, errors, and the objects that sigmix adds.

Request fields that would change an answer and are not supported are rejected; all other unknown fields are ignored.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import JSONResponse

from sigmix.adapt import Decision
from sigmix.errors import ContextError, InputError, OutputError, SigmixError, UnknownNameError
from sigmix.serve.scheduler import Token

MAX_TEXT = 1 << 20
"""Characters of one text field."""

MIN_LOGPROB = -9999.0
"""Lowest log-probability in a response, as in OpenAI's API; JSON has no infinity."""

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a text completion without one, as in OpenAI's API."""

Name = Annotated[str, Field(min_length=1, max_length=1024)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]

# --- Requests


class RequestModel(BaseModel):
    """Base class of request bodies."""

    model_config = ConfigDict(extra="ignore", strict=False)


class TextPart(RequestModel):
    """Text part of a message."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)


class ChatMessage(RequestModel):
    """Message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="Text, or a list of text parts.")

    def turn(self) -> dict[str, str]:
        """Return the message as a chat template expects it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(RequestModel):
    """Streaming options."""

    include_usage: bool = False


class SigmixOptions(RequestModel):
    """Options that OpenAI's API does not have."""

    strategy: str | None = Field(None, max_length=64, description="Strategy of `auto`: A, B, D or bandit.")


class GenerationOptions(RequestModel):
    """Fields of chat completions and of text completions."""

    unsupported: ClassVar[tuple[str, ...]] = ("presence_penalty", "frequency_penalty", "logit_bias")

    model: Name = Field("auto", description="auto, base, an expert, a saved mixture, or a mixture such as a:.7+b:.3.")
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=256)
    sigmix: SigmixOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _reject_unsupported(self) -> GenerationOptions:
        if found := [name for name in self.unsupported if getattr(self, name)]:
            raise ValueError(f"unsupported: {', '.join(found)}; leave out")
        return self

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def token_limit(self) -> int | None:
        """Return the requested number of new tokens."""
        return self.max_tokens


class ChatCompletionRequest(GenerationOptions):
    """POST /v1/chat/completions."""

    unsupported = (*GenerationOptions.unsupported, "tools", "functions")

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise ValueError("unsupported: response_format other than text")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs: true")
        return self

    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def logprob_count(self) -> int | None:
        """Return the number of most probable tokens to report; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationOptions):
    """POST /v1/completions."""

    unsupported = (*GenerationOptions.unsupported, "echo", "suffix")

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, le=1)

    def token_limit(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    def logprob_count(self) -> int | None:
        """Return the number of most probable tokens to report; None: no log-probabilities."""
        return self.logprobs


class LoadExpertRequest(RequestModel):
    """POST /v1/experts."""

    path: Name = Field(description="Folder of the expert, inside one of the allowed folders.")


class SaveMixRequest(RequestModel):
    """POST /v1/mixes."""

    name: Name
    mix: str | dict[str, Any] = Field(description="a:.7+b:.3, or {'weights': {…}} with α per layer or matrix.")


class LabelledExample(RequestModel):
    """Prompt with its reference answer."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    answer: str = Field(min_length=1, max_length=4096)


class AdaptRequest(RequestModel):
    """POST /v1/adapt."""

    examples: list[LabelledExample] = Field(min_length=1, max_length=1024)
    name: Name | None = Field(None, description="Name of the saved mixture. Default: derived from the id.")
    score: str = Field("exact", max_length=64, description="Grader of replies: exact or number.")
    method: Literal["cem", "cma-es"] = "cem"
    settings: Literal["light", "full"] = "light"
    granularity: Literal["model", "layer"] = "model"
    max_tokens: int = Field(16, ge=1, le=256)
    seed: int = Field(0, ge=0, lt=2**31)


class FeedbackRequest(RequestModel):
    """POST /v1/feedback."""

    id: Name = Field(description="Id of the reply.")
    reward: float = Field(ge=-1, le=1, description="1 for a right reply, -1 for a wrong one.")


# --- Responses


@dataclass
class Choice:
    """One completion as received so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""


def decision_json(decision: Decision, queue_seconds: float) -> dict[str, Any]:
    """Return the ``sigmix`` object of a response: the mixture and the reason for it."""
    evidence = dict(decision.evidence)
    return {
        "mix": decision.mix.id, **decision.mix.to_json(), "label": decision.label, "reason": decision.reason,
        "scores": evidence.pop("probabilities", None), "evidence": evidence, "pass1_tokens": decision.tokens,
        "pass1_seconds": round(decision.seconds, 4), "queue_seconds": round(queue_seconds, 4),
    }  # fmt: skip


class ResponseBuilder:
    """Builder of the response objects of one request.

    Args:
        chat: chat completion, not text completion.
        model: as in the request.
        fingerprint: of the base model.
        token_text: maps a token id to its text.
        logprobs: include log-probabilities.
    """

    def __init__(
        self, chat: bool, model: str, fingerprint: str, token_text: Callable[[int], str], logprobs: bool
    ) -> None:
        self.chat, self.token_text, self.logprobs = chat, token_text, logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._head = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def response(self, choices: Sequence[Choice], usage: dict[str, int], sigmix: Any) -> dict[str, Any]:
        """Return a whole response."""
        listed = []
        for index, choice in enumerate(choices):
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            content = {"message": message} if self.chat else {"text": choice.text}
            listed.append(self._choice(index, content, choice.tokens, 0, choice.finish_reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": listed, "usage": usage, "sigmix": sigmix}

    def chunk(self, choices: Sequence[dict[str, Any]], **extra: Any) -> dict[str, Any]:
        """Return one event of a stream."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), **extra}

    def first(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the choices of the first chunk, without text."""
        content = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(index, content) for index in indices] if self.chat else []

    def delta(self, index: int, text: str, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Return new text of a streamed choice; ``offset`` is its position in the choice's text."""
        return self._choice(index, {"delta": {"content": text}} if self.chat else {"text": text}, tokens, offset)

    def last(self, index: int, finish_reason: str) -> dict[str, Any]:
        """Return the end of a streamed choice."""
        return self._choice(index, {"delta": {}} if self.chat else {"text": ""}, finish_reason=finish_reason)

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Token] | None = None, offset: int = 0,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        logprobs = None
        if self.logprobs and tokens is not None:
            logprobs = self._chat_logprobs(tokens) if self.chat else self._text_logprobs(tokens, offset)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(id)
        encoded = None if "�" in text else list(text.encode())  # None: part of a character
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": encoded}

    def _text_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        texts = [self.token_text(token.id) for token in tokens]
        top = [{self.token_text(id): max(logprob, MIN_LOGPROB) for id, logprob in token.top} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in tokens],
            "top_logprobs": top if any(top) else None,
            "text_offset": list(accumulate(map(len, texts), initial=offset))[:-1],
        }


def sse(value: Any) -> str:
    """Format a value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# --- Errors


class ApiError(Exception):
    """Error response in OpenAI's format.

    Args:
        status: HTTP status.
        message: one sentence.
        type: OpenAI's error type.
        code: OpenAI's error code.
        param: request field that caused the error.
        retry_after: seconds after which to repeat the request.
    """

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error", *, code: str | None = None,
        param: str | None = None, retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: SigmixError, param: str | None = None) -> ApiError:
    """Convert an error of sigmix to an error response."""
    if isinstance(error, UnknownNameError):
        return ApiError(404, str(error), code="model_not_found" if param == "model" else "not_found", param=param)
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded", param=param)
    if isinstance(error, OutputError):
        return ApiError(503, str(error), "server_error", code="storage", param=param)
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(503, str(error), "server_error", param=param)


def rate_limited(message: str, retry_after: float) -> ApiError:
    """Return a 429 error."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)
