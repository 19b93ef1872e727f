"""Messages of a conversation and function tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from sigmix.serve.protocol.base import MAX_TEXT, RequestModel, field_error

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class TextPart(RequestModel):
    """Text part of a message."""

    kinds: ClassVar[tuple[str, ...]] = ("text",)

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind not in cls.kinds:
            context = {"kind": kind, "kinds": " and ".join(cls.kinds)}
            raise PydanticCustomError("part", "is a part of type {kind}; supported are parts of type {kinds}", context)
        return part


def text_of(content: str | Sequence[TextPart]) -> str:
    """Return a text, or the texts of parts one after the other."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class FunctionCall(RequestModel):
    """Called function; ``arguments`` is the text of a JSON object."""

    ignored = frozenset({"parsed_arguments"})  # of OpenAI's client

    name: FunctionName
    arguments: str = Field("", max_length=MAX_TEXT)


class MessageToolCall(RequestModel):
    """Tool call of an assistant's message."""

    ignored = frozenset({"index"})

    id: str | None = Field(None, max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    """Message of a conversation."""

    ignored = frozenset({"parsed", "refusal"})
    neutral: ClassVar = {"annotations": ([],), "type": ("message", "text")}  # in histories of clients
    successors: ClassVar = {"function_call": "tool_calls"}

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(None, description="Text, or a list of text parts.")
    name: str | None = Field(None, max_length=256)
    tool_calls: list[MessageToolCall] = Field([], max_length=128)
    tool_call_id: str | None = Field(None, max_length=256)
    reasoning_content: str | None = Field(None, max_length=MAX_TEXT)

    @model_validator(mode="after")
    def _check_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise field_error("tool_calls", f"belong to messages of role assistant, not {self.role}")
        if self.tool_call_id is not None and self.role != "tool":
            raise field_error("tool_call_id", f"belongs to messages of role tool, not {self.role}")
        if self.content is None and not self.tool_calls:
            raise field_error("content", "is missing; only messages with tool_calls may have none")
        return self

    def turn(self) -> dict[str, Any]:
        """Return the message as a chat template expects it."""
        absent = {"role", "content"} | (set() if self.tool_calls else {"tool_calls"})
        role = "system" if self.role == "developer" else self.role
        content = text_of(self.content or "")
        return {"role": role, "content": content, **self.model_dump(exclude=absent, exclude_none=True)}


class FunctionDefinition(RequestModel):
    """Function that the model may call; ``parameters`` is a JSON schema."""

    name: FunctionName
    description: str | None = Field(None, max_length=MAX_TEXT)
    parameters: dict[str, Any] = Field({"type": "object", "properties": {}})
    strict: bool = False

    @model_validator(mode="after")
    def _check_parameters(self) -> FunctionDefinition:
        if self.parameters.get("type", "object") != "object":
            raise field_error("parameters", "must be a schema of type object")
        return self


class Tool(RequestModel):
    """Function tool."""

    type: Literal["function"]
    function: FunctionDefinition

    def rendered(self) -> dict[str, Any]:
        """Return the tool as a chat template expects it."""
        return {"type": "function", "function": self.function.model_dump(exclude={"strict"}, exclude_none=True)}
