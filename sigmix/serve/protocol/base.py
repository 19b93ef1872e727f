"""Base class of request bodies."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_TEXT = 1 << 20  # characters of one text field

Name = Annotated[str, Field(min_length=1, max_length=1024)]


def field_error(field: str, problem: str) -> PydanticCustomError:
    """Return an error to raise in a validator of a model; ``problem`` follows the path of the field."""
    field = field.encode(errors="backslashreplace").decode()  # lone surrogates
    return PydanticCustomError("field", "{problem}", {"field": field, "problem": problem})


class RequestModel(BaseModel):
    """Base class of request bodies. null is an absent field, as in OpenAI's API; unknown fields are errors.

    Attributes:
        ignored: fields that do not change an answer.
        neutral: values of unsupported fields that do not change an answer.
        successors: fields that replace unsupported ones.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ignored: ClassVar[frozenset[str]] = frozenset()
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    successors: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = [field.alias or name for name, field in cls.model_fields.items()]
        body = {name: value for name, value in body.items() if value is not None and name not in cls.ignored}
        for name in [name for name in body if name not in fields]:
            if body[name] not in cls.neutral.get(name, ()):
                near = difflib.get_close_matches(name, fields, n=1, cutoff=0.85)
                hint = f"did you mean {near[0]}?" if near else "leave it out"
                hint = f"use {cls.successors[name]}" if name in cls.successors else hint
                raise field_error(name, f"is not supported; {hint}")
            del body[name]
        return body


def as_prompts(given: Any) -> list[str | list[int]]:
    """Return a list of texts or of token-id lists, from a list of them or from one of them."""
    return given if isinstance(given, list) and not (given and isinstance(given[0], int)) else [given]
