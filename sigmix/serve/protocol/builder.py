"""Response objects of chat and text completions, whole or streamed."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sigmix.adapt import Decision
from sigmix.engine.detokenizer import token_text
from sigmix.serve.protocol.errors import ApiError
from sigmix.serve.scheduler import Token
from sigmix.serve.tool_parser import ToolCall

MIN_LOGPROB = -9999.0  # lowest log-probability in a response, as in OpenAI's API; JSON has no infinity


@dataclass
class Choice:
    """One completion as received so far, or the prompt before it."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = ""
    calls: list[ToolCall] = field(default_factory=list)

    @property
    def mean_logprob(self) -> float:
        """Log-probability per token; 0 without tokens."""
        return sum(token.logprob or 0.0 for token in self.tokens) / max(len(self.tokens), 1)


def decision_json(decision: Decision, queue_seconds: float) -> dict[str, Any]:
    """Return the ``sigmix`` object of a response: the mixture and the reason for it."""
    evidence = dict(decision.evidence)
    return {
        "mix": decision.mix.id, **decision.mix.to_json(), "label": decision.label, "reason": decision.reason,
        "scores": evidence.pop("probabilities", None), "evidence": evidence, "pass1_tokens": decision.tokens,
        "pass1_seconds": round(decision.seconds, 4), "queue_seconds": round(queue_seconds, 4),
    }  # fmt: skip


class ResponseBuilder:
    """Builder of the response objects of one request, a chat completion if ``chat``, else a text completion.

    Attributes:
        head: fields that the whole response and every event of a stream share.
    """

    incremental = False  # True: a whole response, too, is built from the events of its stream

    def __init__(
        self, chat: bool, model: str, fingerprint: str, token_bytes: Callable[[int], bytes], logprobs: bool
    ) -> None:
        self.chat, self.token_bytes, self.logprobs = chat, token_bytes, logprobs
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.head = {"id": self.id, "created": int(time.time()), "model": model, "system_fingerprint": fingerprint}

    def response(self, choices: Sequence[Choice], usage: dict[str, int], sigmix: Any) -> dict[str, Any]:
        """Return a whole response."""
        listed = []
        for index, choice in enumerate(choices):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": [_call(call) for call in choice.calls]}
            content = {"message": message} if self.chat else {"text": choice.text}
            listed.append(self._choice(index, content, choice.tokens, choice.finish_reason))
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": listed, "usage": usage, "sigmix": sigmix}

    # Events of a stream

    end = "data: [DONE]\n\n"  # last line of a stream

    def first(self, indices: Sequence[int], echo: Choice, sigmix: Any) -> Iterator[str]:
        """Yield the event of started choices, without text, or with that of the prompt."""
        content = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": echo.text}
        choices = [self._choice(index, content, echo.tokens or None) for index in indices]
        yield self._chunk(choices, sigmix=sigmix)

    def delta(
        self, index: int, text: str, tokens: Sequence[Token], calls: Sequence[tuple[int, ToolCall]]
    ) -> Iterator[str]:
        """Yield the events of new text, tokens and numbered tool calls of a choice."""
        if text or (self.logprobs and tokens):
            content = {"delta": {"content": text}} if self.chat else {"text": text}
            yield self._chunk([self._choice(index, content, tokens)])
        for number, call in calls:
            whole = _call(call)
            head = {"index": number, **whole, "function": {**whole["function"], "arguments": ""}}
            for part in (head, {"index": number, "function": {"arguments": call.arguments}}):
                yield self._chunk([self._choice(index, {"delta": {"tool_calls": [part]}})])

    def last(self, index: int, choice: Choice) -> Iterator[str]:
        """Yield the event of a finished choice."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        yield self._chunk([self._choice(index, content, finish_reason=choice.finish_reason)])

    def finish(self, choices: Sequence[Choice], usage: dict[str, int], include_usage: bool) -> Iterator[str]:
        """Yield the events of the end of a stream."""
        if include_usage:
            yield self._chunk([], usage=usage)

    def failed(self, error: ApiError) -> str:
        """Return the event of an error."""
        return sse(error.body())

    def _chunk(self, choices: Sequence[dict[str, Any]], **extra: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return sse({**self.head, "object": kind, "choices": list(choices), **extra})

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Token] | None = None,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        logprobs = None
        if self.logprobs and tokens is not None:
            logprobs = self._chat_logprobs(tokens) if self.chat else self._text_logprobs(tokens)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {**self._token(token.id, token.logprob), "top_logprobs": [self._token(*top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float | None) -> dict[str, Any]:
        data = self.token_bytes(id)
        return {"token": token_text(data), "logprob": _finite(logprob), "bytes": list(data)}

    def _text_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "tokens": [token_text(self.token_bytes(token.id)) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if any(token.top for token in tokens) else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float | None] | None:
        """Return the most probable tokens and the token itself, in this order; of equal texts all but one by id."""
        if token.logprob is None:
            return None
        top: dict[str, float | None] = {}
        for id, logprob in dict([*token.top, (token.id, token.logprob)]).items():
            text = token_text(self.token_bytes(id))
            top[f"token_id:{id}" if text in top else text] = _finite(logprob)
        return top


def embeddings_response(
    model: str, vectors: Sequence[torch.Tensor], tokens: int, encoding_format: str, mix: str
) -> dict[str, Any]:
    """Return the response with float32 vectors; base64 is that of their little-endian bytes."""

    def encode(vector: torch.Tensor) -> str | list[float]:
        if encoding_format == "float":
            return vector.tolist()
        return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()

    data = [{"object": "embedding", "index": index, "embedding": encode(one)} for index, one in enumerate(vectors)]
    return {
        "object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "sigmix": {"mix": mix, "pooling": "mean", "normalized": True},
    }  # fmt: skip


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float | None) -> float | None:
    """Return a log-probability that JSON can hold."""
    return None if logprob is None else logprob if logprob > MIN_LOGPROB else MIN_LOGPROB


def sse(value: Any) -> str:
    """Format a value as a server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
