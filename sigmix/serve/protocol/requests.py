"""Request bodies: OpenAI's schema and the fields that sigmix adds."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sigmix.engine.generation import SamplingParams

MAX_TEXT = 1 << 20
"""Characters of one text field."""

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a text completion without one, as in OpenAI's API."""

Name = Annotated[str, Field(min_length=1, max_length=1024)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]

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

    def sampling_params(self, max_new_tokens: int, default_temperature: float) -> SamplingParams:
        """Return the sampling options of a choice, without a seed."""
        temperature = default_temperature if self.temperature is None else self.temperature
        return SamplingParams(max_new_tokens, temperature > 0, temperature, 1.0 if self.top_p is None else self.top_p)


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
