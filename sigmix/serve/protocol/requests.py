"""Request bodies: OpenAI's schema and the fields that sigmix adds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sigmix.engine.generation import SamplingParams

MAX_TEXT = 1 << 20
"""Characters of one text field."""

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a text completion without one, as in OpenAI's API."""

Name = Annotated[str, Field(min_length=1, max_length=1024)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]


def field_error(field: str, problem: str) -> PydanticCustomError:
    """Return an error to raise in a validator of a model; ``problem`` follows the path of the field."""
    field = field.encode(errors="backslashreplace").decode()  # lone surrogates
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": problem})


class RequestModel(BaseModel):
    """Base class of request bodies. null is an absent field, as in OpenAI's API; unknown fields are errors.

    Attributes:
        ignored: fields that do not change an answer.
        neutral: values of unsupported fields that do not change an answer.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        body = {name: value for name, value in body.items() if value is not None and name not in cls.ignored}
        for name in [name for name in body if name not in cls.model_fields]:
            if body[name] not in cls.neutral.get(name, ()):
                near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.85)
                hint = f"did you mean {near[0]}?" if near else "leave it out"
                raise field_error(name, f"is not supported; {hint}")
            del body[name]
        return body


class TextPart(RequestModel):
    """Text part of a message."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, part: Any) -> Any:
        if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
            raise PydanticCustomError("part", "is a part of type {kind}; only text parts are supported", {"kind": kind})
        return part


class ChatMessage(RequestModel):
    """Message of a conversation."""

    ignored = frozenset({"refusal"})
    neutral = {"annotations": ([],), "tool_calls": ([],)}  # in replies of clients and servers

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] = Field(description="Text, or a list of text parts.")

    def turn(self) -> dict[str, str]:
        """Return the message as a chat template expects it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(RequestModel):
    """Streaming options."""

    ignored = frozenset({"include_obfuscation"})  # padding of events

    include_usage: bool = False


class SigmixOptions(RequestModel):
    """Options that OpenAI's API does not have."""

    strategy: str | None = Field(None, max_length=64, description="Strategy of `auto`: A, B, D or bandit.")


class GenerationOptions(RequestModel):
    """Fields of chat completions and of text completions."""

    ignored = frozenset({
        "audio", "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "store", "user",
    })  # fmt: skip
    neutral = {
        "add_generation_prompt": (True,), "best_of": (1,), "continue_final_message": (False,), "echo": (False,),
        "frequency_penalty": (0,), "function_call": ("none", "auto"), "functions": ([],), "ignore_eos": (False,),
        "include_stop_str_in_output": (False,), "length_penalty": (1,), "logit_bias": ({},), "min_p": (0,),
        "min_tokens": (0,), "modalities": (["text"],), "presence_penalty": (0,), "priority": (0,),
        "reasoning_effort": ("none",), "repetition_penalty": (1,), "response_format": ({"type": "text"},),
        "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "stop_token_ids": ([],),
        "suffix": ("",), "tool_choice": ("none", "auto"), "tools": ([],), "top_k": (-1, 0),
        "use_beam_search": (False,), "verbosity": ("medium",),
    }  # fmt: skip

    model: str = Field("auto", description="auto, base, an expert, a saved mixture, or a mixture such as a:.7+b:.3.")
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    sigmix: SigmixOptions | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def choice_count(self) -> int:
        """Return the number of choices to generate for each prompt."""
        return self.n

    def token_limit(self) -> int | None:
        """Return the requested number of new tokens."""
        return self.max_tokens

    def sampling_params(self, max_new_tokens: int, default_temperature: float) -> SamplingParams:
        """Return the sampling options of a choice, without a seed."""
        temperature = default_temperature if self.temperature is None else self.temperature
        return SamplingParams(max_new_tokens, temperature > 0, temperature, 1.0 if self.top_p is None else self.top_p)


class ChatCompletionRequest(GenerationOptions):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "requires logprobs: true")
        return self

    def token_limit(self) -> int | None:
        return min(filter(None, (self.max_completion_tokens, self.max_tokens)), default=None)

    def logprob_count(self) -> int | None:
        """Return the number of most probable tokens to report; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationOptions):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=0)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_best_of(self) -> CompletionRequest:
        if self.choice_count() < self.n:
            raise field_error("best_of", f"must be at least n, which is {self.n}")
        if self.stream and self.choice_count() > self.n:
            raise field_error("best_of", "above n cannot be streamed; leave out stream")
        return self

    def choice_count(self) -> int:
        return self.best_of or self.n

    def token_limit(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

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
