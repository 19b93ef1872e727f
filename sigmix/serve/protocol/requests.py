"""Request bodies: OpenAI's schema and the fields that sigmix adds."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sigmix.engine.generation import SamplingParams
from sigmix.engine.structured_output import StructuredOutput
from sigmix.engine.tokenization import TEMPLATE_ARGUMENTS
from sigmix.errors import StructuredOutputError
from sigmix.serve.protocol.base import MAX_TEXT, Name, RequestModel, as_prompts, field_error
from sigmix.serve.protocol.messages import ChatMessage, Tool
from sigmix.serve.tool_parser import required_calls

DEFAULT_COMPLETION_TOKENS = 16  # max_tokens of a text completion without one, as in OpenAI's API

MAX_INPUTS = 2048  # texts of one request for embeddings, as in OpenAI's API

StopString = Annotated[str, Field(min_length=1, max_length=256)]
PromptText = Annotated[str, Field(max_length=MAX_TEXT)]
Schema = dict[str, Any] | str


class JsonSchema(RequestModel):
    """Schema of ``response_format``; it is always enforced, as by OpenAI with ``strict: true``."""

    ignored = frozenset({"description", "name", "strict"})

    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(RequestModel):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise field_error("json_schema", "is missing")
        if self.type != "json_schema" and self.json_schema is not None:
            raise field_error("json_schema", "requires the type json_schema")
        return self

    def output(self) -> StructuredOutput | None:
        """Return the constraint; None: any text."""
        if self.json_schema is not None:
            return StructuredOutput(json=self.json_schema.schema_)
        return StructuredOutput(json_object=True) if self.type == "json_object" else None


class StructuredOutputs(RequestModel):
    """vLLM's ``structured_outputs``; see `StructuredOutput` for the constraints."""

    ignored = frozenset({"disable_fallback"})
    neutral: ClassVar = {"disable_any_whitespace": (False,), "disable_additional_properties": (False,)}

    json_: Schema | None = Field(None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        try:
            self.output()
        except StructuredOutputError:
            names = ", ".join(field.alias or name for name, field in StructuredOutputs.model_fields.items())
            raise field_error("", f"must hold exactly one of {names}") from None
        return self

    def output(self) -> StructuredOutput:
        """Return the constraint."""
        return StructuredOutput(self.json_, self.json_object, self.regex, self.choice, self.grammar)


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
        "audio", "guided_decoding_backend", "metadata", "prediction", "prompt_cache_key", "prompt_cache_options",
        "prompt_cache_retention", "request_id", "safety_identifier", "service_tier", "store", "user",
    })  # fmt: skip
    neutral: ClassVar = {
        "add_generation_prompt": (True,), "best_of": (1,), "continue_final_message": (False,), "echo": (False,),
        "function_call": ("none", "auto"), "functions": ([],), "ignore_eos": (False,),
        "include_stop_str_in_output": (False,), "length_penalty": (1,), "min_tokens": (0,), "modalities": (["text"],),
        "parallel_tool_calls": (True, False), "priority": (0,), "reasoning_effort": ("none",),
        "return_token_ids": (False,), "return_tokens_as_token_ids": (False,), "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,), "stop_token_ids": ([],), "suffix": ("",),
        "tool_choice": ("none", "auto"), "tools": ([],), "use_beam_search": (False,), "verbosity": ("medium",),
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
    top_k: int = Field(0, ge=-1, description="-1 and 0: all tokens.")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    sigmix: SigmixOptions | None = None

    @model_validator(mode="after")
    def _check_generation(self) -> GenerationOptions:
        for token in self.logit_bias:
            if not re.fullmatch("[0-9]{1,9}", token):
                raise field_error("logit_bias", f"must map token ids to numbers; {token!r} is not a token id")
        if len(outputs := list(self._outputs())) > 1:
            raise field_error(outputs[1], f"excludes {outputs[0]}; give one of them")
        return self

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

    def sampling_params(self, default_temperature: float) -> SamplingParams:
        """Return the sampling options of a choice, without a seed and a limit of tokens."""
        names = {one.name for one in fields(SamplingParams)} - {"seed"}
        given = {"temperature": default_temperature, **self.model_dump(include=names, exclude_none=True)}
        given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(do_sample=given["temperature"] > 0, **given)

    def structured_output(self) -> tuple[str, StructuredOutput | None]:
        """Return the constraint on the text, and the name of its field."""
        return next(iter(self._outputs().items()), ("", None))

    def _outputs(self) -> dict[str, StructuredOutput]:
        outputs: dict[str, StructuredOutput] = {}
        if self.response_format is not None and (output := self.response_format.output()) is not None:
            outputs["response_format"] = output
        if self.structured_outputs is not None:
            outputs["structured_outputs"] = self.structured_outputs.output()
        for name in ("json", "regex", "choice", "grammar"):
            if (value := getattr(self, f"guided_{name}")) is not None:
                outputs[f"guided_{name}"] = StructuredOutput(**{name: value})
        return outputs


class ChatCompletionRequest(GenerationOptions):
    """POST /v1/chat/completions."""

    successors: ClassVar = {"functions": "tools", "function_call": "tool_choice"}

    messages: list[ChatMessage] = Field(min_length=1, max_length=2048)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | Tool = "auto"
    parallel_tool_calls: bool = True
    add_generation_prompt: bool | None = Field(None, description="Default: unless continue_final_message.")
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field({}, description="Variables of the chat template.")

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise field_error("top_logprobs", "requires logprobs: true")
        if self.continue_final_message and self.add_generation_prompt:
            raise field_error("continue_final_message", "excludes add_generation_prompt; set one to false")
        for name in self.chat_template_kwargs:
            if name in TEMPLATE_ARGUMENTS:
                raise field_error(f"chat_template_kwargs.{name}", "is not a variable of a chat template; leave it out")
        if not self.tools and self.tool_choice not in ("none", "auto"):
            raise field_error("tool_choice", "requires tools")
        if self.rendered_tools() and (outputs := super()._outputs()):
            raise field_error(next(iter(outputs)), "excludes tools; set tool_choice to none")
        names = [tool.function.name for tool in self.tools]
        if isinstance(self.tool_choice, Tool) and self.tool_choice.function.name not in names:
            raise field_error("tool_choice.function.name", f"must be one of {', '.join(names)}")
        if repeated := [name for name in names if names.count(name) > 1]:
            raise field_error("tools", f"hold the function {repeated[0]} twice")
        return self

    def token_limit(self) -> int | None:
        return min(filter(None, (self.max_completion_tokens, self.max_tokens)), default=None)

    def logprob_count(self) -> int | None:
        """Return the number of most probable tokens to report; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def _outputs(self) -> dict[str, StructuredOutput]:
        outputs = super()._outputs()
        if functions := self.required_functions():
            several = self.parallel_tool_calls and self.tool_choice == "required"
            outputs["tools"] = StructuredOutput(json=required_calls(functions, several))
        return outputs

    def required_functions(self) -> list[dict[str, Any]]:
        """Return the functions of which the reply must be calls; empty: it may be text."""
        choice = self.tool_choice
        if choice == "none" or choice == "auto":
            return []
        functions = [tool.function.model_dump() for tool in self.tools]
        return [one for one in functions if choice == "required" or one["name"] == choice.function.name]

    def rendered_tools(self) -> list[dict[str, Any]]:
        """Return the tools that the model may call, as a chat template expects them."""
        return [] if self.tool_choice == "none" else [tool.rendered() for tool in self.tools]

    def template_options(self) -> dict[str, Any]:
        """Return the options of `encode_turns`."""
        return {
            "tools": self.rendered_tools(), "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message, **self.chat_template_kwargs,
        }  # fmt: skip


class CompletionRequest(GenerationOptions):
    """POST /v1/completions."""

    neutral: ClassVar = {**GenerationOptions.neutral, "add_special_tokens": (True,)}

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


class EmbeddingsRequest(RequestModel):
    """POST /v1/embeddings."""

    ignored = frozenset({"user"})

    model: str = Field("base", description="base, an expert, a saved mixture, or a mixture such as a:.7+b:.3.")
    input: PromptText | list[PromptText] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Size of the model's hidden states.")

    @model_validator(mode="after")
    def _check_count(self) -> EmbeddingsRequest:
        if not 1 <= (count := len(as_prompts(self.input))) <= MAX_INPUTS:
            raise field_error("input", f"must hold 1 to {MAX_INPUTS} texts, not {count}")
        return self


class TokenizeRequest(RequestModel):
    """POST /tokenize."""

    ignored = frozenset({"model"})

    prompt: str = Field(max_length=MAX_TEXT)
    add_special_tokens: bool = True


class DetokenizeRequest(RequestModel):
    """POST /detokenize."""

    ignored = frozenset({"model"})

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]


class LoadExpertRequest(RequestModel):
    """POST /v1/experts."""

    path: Name = Field(description="Folder of the expert, inside one of the allowed folders.")


class MixWeights(RequestModel):
    """Mixture by its weights, numbers, or lists (per layer) or mappings (per matrix) of them."""

    weights: dict[str, Any]


class SaveMixRequest(RequestModel):
    """POST /v1/mixes."""

    name: Name
    mix: str | MixWeights = Field(description="a:.7+b:.3, or {'weights': {…}} with α per layer or matrix.")


class LabelledExample(RequestModel):
    """Prompt with its reference answer."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    answer: str = Field(min_length=1, max_length=4096)


class AdaptRequest(RequestModel):
    """POST /v1/adapt."""

    examples: list[LabelledExample] = Field(min_length=1, max_length=1024)
    name: Name | None = Field(None, description="Name of the saved mixture. Default: derived from the id.")
    score: str = Field("exact", max_length=64, description="Grader of replies: exact, number, final or json.")
    method: Literal["cem", "cma-es"] = "cem"
    settings: Literal["light", "full"] = "light"
    granularity: Literal["model", "layer"] = "model"
    max_tokens: int = Field(16, ge=1, le=256)
    seed: int = Field(0, ge=0, lt=2**31)


class FeedbackRequest(RequestModel):
    """POST /v1/feedback."""

    id: Name = Field(description="Id of the reply.")
    reward: float = Field(ge=-1, le=1, description="1 for a right reply, -1 for a wrong one.")
