"""What requests hold. Fields that would change an answer and are not supported are refused, others are ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sigmix.adapt import Decision
from sigmix.errors import ContextError, InputError, OutputError, SigmixError, UnknownNameError
from sigmix.serve.scheduler import Token

MAX_TEXT = 1 << 20


Name = Annotated[str, Field(min_length=1, max_length=1024)]


StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Asked(BaseModel):
    """The base of all requests: unknown fields are ignored, as OpenAI's clients send more and more of them."""

    model_config = ConfigDict(extra="ignore", strict=False)


class Text(Asked):
    """A part of a message."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)


class Message(Asked):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Text] = Field(description="Text, or parts that are text.")

    def words(self) -> str:
        """The text of all parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Asked):
    """How an answer is streamed."""

    include_usage: bool = False


class Sigmix(Asked):
    """What only this server knows."""

    policy: str | None = Field(
        None, max_length=64, description="What `auto` decides by in this request: A, B, D or bandit."
    )


class Generate(Asked):
    """What chat and plain completions share."""

    model: Name = Field("auto", description="auto, base, an expert, a saved mix, or a mix such as a:.7+b:.3.")
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | list[StopString] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    user: str | None = Field(None, max_length=256)
    sigmix: Sigmix | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > 16:
            raise ValueError("at most 16 stop strings")
        return value

    @model_validator(mode="after")
    def _supported(self) -> Generate:
        if self.presence_penalty or self.frequency_penalty:
            raise ValueError("presence_penalty and frequency_penalty are not supported; leave them out or 0")
        if self.logit_bias:
            raise ValueError("logit_bias is not supported; leave it out")
        return self

    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class Chat(Generate):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _plain(self) -> Chat:
        if self.tools or self.functions:
            raise ValueError("tools are not supported; leave them out")
        if self.response_format and self.response_format.get("type", "text") != "text":
            raise ValueError("response_format can only be of type text")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        return self

    def limit(self) -> int | None:
        """Tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens


class Completion(Generate):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _plain(self) -> Completion:
        if self.echo or self.suffix or (self.best_of or 1) > 1:
            raise ValueError("echo, suffix and best_of are not supported; leave them out")
        return self

    def limit(self) -> int | None:
        """Tokens of an answer."""
        return self.max_tokens


class LoadExpert(Asked):
    """POST /v1/experts."""

    path: Name = Field(description="Folder of the expert, inside one of the allowed folders.")


class SaveMix(Asked):
    """POST /v1/mixes."""

    name: Name
    mix: str | dict[str, Any] = Field(description="a:.7+b:.3, or {'weights': {…}} with α per layer or matrix.")


class Labelled(Asked):
    """An example of a task: a prompt and a right answer."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    answer: str = Field(min_length=1, max_length=4096)


class Adapt(Asked):
    """POST /v1/adapt."""

    examples: list[Labelled] = Field(min_length=1, max_length=1024)
    name: Name | None = Field(None, description="Of the mix that is saved; default: one made of the job's id.")
    score: str = Field("exact", max_length=64, description="How replies are judged: exact or number.")
    method: Literal["cem", "cma-es"] = "cem"
    settings: Literal["light", "full"] = "light"
    granularity: Literal["model", "layer"] = "model"
    max_tokens: int = Field(16, ge=1, le=256)
    seed: int = Field(0, ge=0, lt=2**31)


class Feedback(Asked):
    """POST /v1/feedback."""

    id: Name = Field(description="Id of the reply.")
    reward: float = Field(ge=-1, le=1, description="1 is right, -1 is wrong.")


# --- OpenAI's objects from what the batcher tells.


@dataclass
class Choice:
    """One answer, collected."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str = ""


def about(decision: Decision, waited: float) -> dict[str, Any]:
    """The ``sigmix`` object of a reply: what was decided and why."""
    evidence = dict(decision.evidence)
    return {
        "mix": decision.mix.id, **decision.mix.to_json(), "label": decision.label, "reason": decision.reason,
        "scores": evidence.pop("probabilities", None), "evidence": evidence, "pass1_tokens": decision.tokens,
        "pass1_seconds": round(decision.seconds, 4), "waited_seconds": round(waited, 4),
    }  # fmt: skip


def usage(read: int, written: int) -> dict[str, int]:
    """The ``usage`` object; pass one's tokens are not in it, they stand in ``sigmix``."""
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Form:
    """What chat and plain completions have in common.

    Args:
        id: of the reply. model: as it was asked for. created: time of the request. fingerprint: of the base.
        text_of: a token's text.
    """

    prefix = object = chunk = ""

    def __init__(self, id: str, model: str, created: int, fingerprint: str, text_of: Any) -> None:
        self.head: dict[str, Any] = {"id": id, "created": created, "model": model, "system_fingerprint": fingerprint}
        self.text_of = text_of

    def whole(self, choices: Sequence[dict[str, Any]], counts: dict[str, int], sigmix: Any) -> dict[str, Any]:
        """A reply that is not streamed."""
        return {**self.head, "object": self.object, "choices": list(choices), "usage": counts, "sigmix": sigmix}

    def part(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """One event of a stream."""
        return {**self.head, "object": self.chunk, "choices": list(choices), **more}


class ChatForm(Form):
    """chat.completion and chat.completion.chunk."""

    prefix, object, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, found: Choice, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        told = {"content": [self.told(token) for token in found.tokens], "refusal": None} if logprobs else None
        message = {"role": "assistant", "content": found.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": told, "finish_reason": found.finish}

    def first(self, index: int) -> dict[str, Any]:
        """What a streamed answer begins with."""
        return self.delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, tokens: Sequence[Token], logprobs: bool, _: int) -> dict[str, Any]:
        """More of a streamed answer."""
        told = {"content": [self.told(token) for token in tokens], "refusal": None} if logprobs else None
        return {**self.delta(index, {"content": text}), "logprobs": told}

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """What a streamed answer ends with."""
        return self.delta(index, {}, finish)

    @staticmethod
    def delta(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A choice of a chunk."""
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}

    def told(self, token: Token) -> dict[str, Any]:
        """A token with its log-probability and the most probable ones."""
        best = [self._one(id, logprob) for id, logprob in token.best]
        return {**self._one(token.id, token.logprob), "top_logprobs": best}

    def _one(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.text_of(id)
        known = None if "�" in text else list(text.encode())  # a part of a character has no text of its own
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": known}


class PlainForm(Form):
    """text_completion."""

    prefix, object, chunk = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, found: Choice, logprobs: bool) -> dict[str, Any]:
        """A whole answer."""
        told = self.told(found.tokens, 0) if logprobs else None
        return {"index": index, "text": found.text, "logprobs": told, "finish_reason": found.finish}

    def first(self, index: int) -> None:
        """Nothing."""

    def piece(self, index: int, text: str, tokens: Sequence[Token], logprobs: bool, offset: int) -> dict[str, Any]:
        """More of a streamed answer."""
        told = self.told(tokens, offset) if logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": None}

    def last(self, index: int, finish: str) -> dict[str, Any]:
        """What a streamed answer ends with."""
        return {"index": index, "text": "", "logprobs": None, "finish_reason": finish}

    def told(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Log-probabilities in the old format."""
        texts = [self.text_of(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        best = [{self.text_of(id): max(logprob, -9999.0) for id, logprob in token.best} for token in tokens]
        return {
            "tokens": texts, "token_logprobs": [max(token.logprob, -9999.0) for token in tokens],
            "top_logprobs": best if any(best) else None, "text_offset": offsets,
        }  # fmt: skip


# --- Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}.


class ApiError(Exception):
    """What a client is told in place of an answer.

    Args:
        status: HTTP status. message: what was found, what was expected, how to mend it.
        kind: OpenAI's ``type``. code: a short name. param: the field of the request. retry: seconds to wait.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, retry: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry = retry

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, where there is something to wait for."""
        return {} if self.retry is None else {"Retry-After": str(max(1, round(self.retry + 0.5)))}


def from_sigmix(error: SigmixError, param: str | None = None) -> ApiError:
    """Our own errors as a client sees them."""
    if isinstance(error, UnknownNameError):
        return ApiError(404, str(error), code="model_not_found" if param == "model" else "not_found", param=param)
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded", param=param)
    if isinstance(error, OutputError):
        return ApiError(503, str(error), "server_error", "storage", param)
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(503, str(error), "server_error", param=param)


def busy(message: str, retry: float) -> ApiError:
    """429: come back later."""
    return ApiError(429, message, "rate_limit_error", "rate_limit_exceeded", retry=retry)
