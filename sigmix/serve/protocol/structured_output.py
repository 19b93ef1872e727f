"""Fields of structured output: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and ``guided_*``."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from sigmix.engine.structured_output import StructuredOutput
from sigmix.errors import StructuredOutputError
from sigmix.serve.protocol.base import RequestModel, field_error

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
