"""What requests hold. Fields that would change an answer and are not supported are refused, others are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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
