"""OpenAI's Responses API, on the chat completion of the same conversation. Responses are not stored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from sigmix.serve.protocol.base import MAX_TEXT, RequestModel, field_error
from sigmix.serve.protocol.builder import Choice, ResponseBuilder
from sigmix.serve.protocol.errors import ApiError, validation_error
from sigmix.serve.protocol.messages import FunctionDefinition, FunctionName, TextPart, text_of
from sigmix.serve.protocol.requests import ChatCompletionRequest, SigmixOptions, StreamOptions
from sigmix.serve.scheduler import Token
from sigmix.serve.tool_parser import ToolCall

ItemId = Annotated[str, Field(min_length=1, max_length=256)]

ITEM_TYPES = {"input": ("message", "function_call", "function_call_output"), "tools": ("function",)}
"""Supported types of items and tools."""

CHAT_FIELDS = {
    "response_format.json_schema.schema": "text.format.schema", "response_format": "text.format", "messages": "input",
}  # fmt: skip
"""Fields of this API by their names in the chat completion."""

LOGPROBS = "message.output_text.logprobs"


class ContentPart(TextPart):
    """Text part of an item."""

    ignored = frozenset({"annotations", "logprobs", "parsed"})  # in replies of clients and servers
    kinds = ("input_text", "output_text")

    type: Literal["input_text", "output_text"]  # type: ignore[assignment]


class MessageItem(RequestModel):
    """Message of a conversation."""

    ignored = frozenset({"id", "status", "phase"})

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[ContentPart]


class FunctionCallItem(RequestModel):
    """Function call of the model."""

    ignored = frozenset({"id", "parsed_arguments", "status"})

    type: Literal["function_call"]
    call_id: ItemId
    name: FunctionName
    arguments: str = Field(max_length=MAX_TEXT)


class FunctionCallOutputItem(RequestModel):
    """Result of a function call."""

    ignored = frozenset({"id", "status"})

    type: Literal["function_call_output"]
    call_id: ItemId
    output: str | list[ContentPart]


class TextFormat(RequestModel):
    """Format of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=64)
    description: str | None = Field(None, max_length=MAX_TEXT)
    strict: bool | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(RequestModel):
    """Options of the answer's text."""

    neutral: ClassVar = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class FunctionTool(FunctionDefinition):
    """Function tool."""

    type: Literal["function"]
    strict: bool = True


class Reasoning(RequestModel):
    """Options of reasoning; none is supported."""

    neutral: ClassVar = {"effort": ("none",)}


class NamedTool(RequestModel):
    """Choice of one function."""

    type: Literal["function"]
    name: FunctionName


class ResponsesRequest(RequestModel):
    """POST /v1/responses."""

    ignored = frozenset({
        "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier",
    })  # fmt: skip
    neutral: ClassVar = {"background": (False,), "truncation": ("disabled",)}
    successors: ClassVar = dict.fromkeys(("previous_response_id", "conversation"), "input for the whole conversation")

    model: str = Field("auto", description="auto, base, an expert, a saved mixture, or a mixture such as a:.7+b:.3.")
    input: (
        Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
        | Annotated[list[MessageItem | FunctionCallItem | FunctionCallOutputItem], Field(min_length=1, max_length=2048)]
    )
    instructions: str | None = Field(None, max_length=MAX_TEXT)
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: Reasoning | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    tools: list[FunctionTool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field([], max_length=16)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    metadata: dict[str, str] = Field({}, max_length=16)
    user: str | None = None
    store: bool = Field(False, description="Has no effect: responses are not stored.")
    sigmix: SigmixOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_types(cls, body: Any) -> Any:
        """Name the types of unsupported items and tools."""
        for name, types in ITEM_TYPES.items():
            given = body.get(name) if isinstance(body, dict) else None
            for number, one in enumerate(given if isinstance(given, list) else []):
                type = one.get("type", types[0]) if isinstance(one, dict) else None
                if isinstance(type, str) and type not in types:
                    raise field_error(f"{name}.{number}", f"has the type {type}; supported are {', '.join(types)}")
        return body

    @model_validator(mode="after")
    def _check_logprobs(self) -> ResponsesRequest:
        if self.top_logprobs and LOGPROBS not in self.include:
            raise field_error("top_logprobs", f"requires {LOGPROBS} in include")
        return self

    def chat_request(self) -> ChatCompletionRequest:
        """Return the request of the same chat completion.

        Raises:
            ApiError: options that exclude each other.
        """
        body: dict[str, Any] = {
            "model": self.model, "messages": self._messages(), "max_tokens": self.max_output_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream,
            "logprobs": LOGPROBS in self.include or None, "parallel_tool_calls": self.parallel_tool_calls,
            "top_logprobs": self.top_logprobs if LOGPROBS in self.include else None,
            "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools],
            "tool_choice": self.tool_choice,
            "sigmix": self.sigmix and self.sigmix.model_dump(),
        }  # fmt: skip
        if isinstance(self.tool_choice, NamedTool):
            body["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if (chosen := self.text.format) is not None:
            body["response_format"] = {"type": chosen.type}
            if chosen.type == "json_schema":
                body["response_format"]["json_schema"] = chosen.model_dump(by_alias=True, exclude={"type"})
        try:
            return ChatCompletionRequest(**body)
        except ValidationError as error:
            raise validation_error([{**one, "loc": ("body", *one["loc"])} for one in error.errors()], body) from error

    def _messages(self) -> list[dict[str, Any]]:
        """Return the messages of the conversation; one system message precedes the others."""
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        messages: list[dict[str, Any]] = first
        for item in items:
            if isinstance(item, FunctionCallItem):
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                function = {"name": item.name, "arguments": item.arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
            elif isinstance(item, FunctionCallOutputItem):
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
            elif item.role in ("system", "developer") and len(messages) == 1 and messages[0]["role"] == "system":
                messages[0]["content"] += f"\n\n{text_of(item.content)}"
            else:
                role = "system" if item.role == "developer" else item.role
                messages.append({"role": role, "content": text_of(item.content)})
        return messages


def responses_error(error: ApiError) -> ApiError:
    """Return an error of the chat completion with the field's name in this API."""
    param = error.param or ""
    for name, own in CHAT_FIELDS.items():
        if param == name or param.startswith(f"{name}."):
            error.param = own + param[len(name) :]
            if error.message.startswith(name):
                error.message = own + error.message[len(name) :]
            break
    return error


class ResponsesBuilder(ResponseBuilder):
    """Builder of the response and of the typed events of one request.

    Args:
        body: parsed body.
        temperature: of the request, or the server's default.
    """

    end = ""
    incremental = True  # a message after a function call is an item of its own

    def __init__(
        self, body: ResponsesRequest, temperature: float, fingerprint: str, token_bytes: Callable[[int], bytes]
    ) -> None:
        super().__init__(True, body.model, fingerprint, token_bytes, LOGPROBS in body.include)
        self.id = f"resp_{uuid.uuid4().hex}"
        given = body.model_dump(by_alias=True, exclude_none=True)
        echoed = "instructions max_output_tokens metadata model parallel_tool_calls tool_choice tools user".split()
        self._response: dict[str, Any] = {
            "id": self.id, "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "background": False, "error": None, "incomplete_details": None, "output": [], "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None}, "service_tier": "default", "store": False,
            "temperature": temperature, "text": {"format": {"type": "text"}, **given["text"]},
            "top_logprobs": body.top_logprobs or 0, "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled", "usage": None, **{name: given.get(name) for name in echoed},
        }  # fmt: skip
        self._events = 0
        self._message: dict[str, Any] | None = None  # open item

    def response(self, choices: Sequence[Choice], usage: dict[str, int], sigmix: Any) -> dict[str, Any]:
        self._complete(choices[0], usage)
        return self._response

    def first(self, indices: Sequence[int], echo: Choice, sigmix: Any) -> Iterator[str]:
        self._response["sigmix"] = sigmix
        yield self._event("response.created", response=self._response)
        yield self._event("response.in_progress", response=self._response)

    def delta(
        self, index: int, text: str, tokens: Sequence[Token], calls: Sequence[tuple[int, ToolCall]]
    ) -> Iterator[str]:
        if text or (self.logprobs and tokens):
            yield from self._open()
            assert self._message is not None
            logprobs = self._chat_logprobs(tokens)["content"] if self.logprobs else []
            part = self._message["content"][0]
            part["text"] += text
            part["logprobs"] += logprobs
            yield self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)
        for _, call in calls:
            yield from self._close("completed")
            yield from self._call(call)

    def last(self, index: int, choice: Choice) -> Iterator[str]:
        if not self._response["output"]:
            yield from self._open()
        yield from self._close("incomplete" if choice.finish_reason == "length" else "completed")

    def finish(self, choices: Sequence[Choice], usage: dict[str, int], include_usage: bool) -> Iterator[str]:
        self._complete(choices[0], usage)
        yield self._event(f"response.{self._response['status']}", response=self._response)

    def failed(self, error: ApiError) -> str:
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
        return self._event("response.failed", response=self._response)

    def _complete(self, choice: Choice, usage: dict[str, int]) -> None:
        cut = choice.finish_reason == "length"
        self._response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
                "total_tokens": usage["total_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            },
        }  # fmt: skip

    def _open(self) -> Iterator[str]:
        """Begin a message, unless one is open."""
        if self._message is not None:
            return
        self._message = {
            "id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "status": "in_progress",
            "content": [],
        }  # fmt: skip
        self._response["output"].append(self._message)
        yield self._item_event("response.output_item.added", self._message)
        self._message["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
        yield self._part_event("response.content_part.added", part=self._message["content"][0])

    def _close(self, status: str) -> Iterator[str]:
        """End the open message."""
        if self._message is None:
            return
        part = self._message["content"][0]
        yield self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._part_event("response.content_part.done", part=part)
        self._message["status"] = status
        yield self._item_event("response.output_item.done", self._message)
        self._message = None

    def _call(self, call: ToolCall) -> Iterator[str]:
        item = {"id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "call_id": call.id, "name": call.name,
                "arguments": "", "status": "in_progress"}  # fmt: skip
        self._response["output"].append(item)
        yield self._item_event("response.output_item.added", item)
        place = {"item_id": item["id"], "output_index": len(self._response["output"]) - 1}
        yield self._event("response.function_call_arguments.delta", **place, delta=call.arguments)
        arguments = {"name": call.name, "arguments": call.arguments}
        yield self._event("response.function_call_arguments.done", **place, **arguments)
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._item_event("response.output_item.done", item)

    def _item_event(self, type: str, item: dict[str, Any]) -> str:
        return self._event(type, output_index=len(self._response["output"]) - 1, item=item)

    def _part_event(self, type: str, **fields: Any) -> str:
        assert self._message is not None
        place = {"item_id": self._message["id"], "output_index": len(self._response["output"]) - 1, "content_index": 0}
        return self._event(type, **place, **fields)

    def _event(self, type: str, **fields: Any) -> str:
        event = {"type": type, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {type}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
