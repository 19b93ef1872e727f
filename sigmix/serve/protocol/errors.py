"""Error responses in OpenAI's format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.responses import JSONResponse

from sigmix.errors import ContextError, InputError, OutputError, PromptError, SigmixError, UnknownNameError


class ApiError(Exception):
    """Error response in OpenAI's format.

    Args:
        status: HTTP status.
        message: one sentence.
        type: OpenAI's error type.
        code: OpenAI's error code.
        param: request field that caused the error.
        retry_after: seconds after which to repeat the request.
    """

    def __init__(
        self, status: int, message: str, type: str = "invalid_request_error", *, code: str | None = None,
        param: str | None = None, retry_after: float | None = None,
    ) -> None:  # fmt: skip
        message = message.encode(errors="backslashreplace").decode()  # lone surrogates
        super().__init__(message)
        self.status, self.message, self.type, self.code = status, message, type, code
        self.param = None if param is None else param.encode(errors="backslashreplace").decode()
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after + 0.5)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: SigmixError, param: str | None = None) -> ApiError:
    """Convert an error of sigmix to an error response."""
    if isinstance(error, UnknownNameError):
        return ApiError(404, str(error), code="model_not_found" if param == "model" else "not_found", param=param)
    if isinstance(error, ContextError) and not isinstance(error, PromptError):
        return ApiError(400, str(error), code="context_length_exceeded", param=param)
    if isinstance(error, OutputError):
        return ApiError(503, str(error), "server_error", code="storage", param=param)
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(503, str(error), "server_error", param=param)


@contextmanager
def api_errors(param: str | None) -> Iterator[None]:
    """Convert errors of sigmix inside this context to error responses about a field."""
    try:
        yield
    except SigmixError as error:
        raise api_error(error, param) from error


def internal_error() -> ApiError:
    """Return the error of a fault of the server."""
    return ApiError(500, "internal server error", "server_error", code="internal")


def rate_limited(message: str, retry_after: float) -> ApiError:
    """Return a 429 error."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)


EXPECTED = {
    "string_type": "a string", "int_type": "an integer", "float_type": "a number", "bool_type": "true or false",
    "list_type": "a list", "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object",
    "literal_error": "{expected}", "finite_number": "a finite number", "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}", "less_than_equal": "at most {le}", "less_than": "below {lt}",
}  # fmt: skip
"""Expected value by pydantic's type of the error; the texts of several alternatives are joined."""

PROBLEMS = {
    "missing": "is missing",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must hold at least {min_length} items, not {actual_length}",
    "too_long": "must hold at most {max_length} items, not {actual_length}",
}
"""Problem by pydantic's type of the error."""

MISMATCH = {name for name in EXPECTED if name.endswith("_type")} | {"literal_error"}
"""Errors by which an alternative of a union does not apply at all."""

Details = Mapping[str, Any]


def validation_error(errors: Sequence[Details], body: Any) -> ApiError:
    """Convert pydantic's errors of a request body to an error response about the first wrong field."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {errors[0]['ctx']['error']} at character {errors[0]['loc'][-1]}"
        )
    if errors[0]["loc"][0] == "query":
        errors = [error for error in errors if error["loc"][0] == "query"]
        body = {}
        for one in errors:  # of a parameter, or of a model of them
            body |= one["input"] if len(one["loc"]) == 1 else {one["loc"][1]: one["input"]}
    if not isinstance(body, dict):
        return ApiError(400, "the body must be a JSON object, with the header content-type: application/json")
    chosen = _first([FieldError(error, body) for error in errors])
    error, param = chosen[0], ".".join(map(str, chosen[0].path)) or None
    if error.type in EXPECTED:
        expected = dict.fromkeys(EXPECTED[other.type].format(**other.context) for other in chosen)
        given = json.dumps(error.input, default=str)
        problem = f"must be {' or '.join(expected)}, not {given if len(given) <= 60 else given[:60] + '…'}"
    elif error.type in PROBLEMS:
        problem = PROBLEMS[error.type].format(**error.context)
    else:
        problem = error.message
    return ApiError(400, f"{param or 'the body'} {problem}", param=param)


class FieldError:
    """One of pydantic's errors.

    Args:
        details: as in `ValidationError.errors`, of a body at "body".

    Attributes:
        loc: location with pydantic's names of a union's alternatives.
        path: location in the request.
        tags: indices in ``loc`` of names of alternatives.
    """

    def __init__(self, details: Details, body: Any) -> None:
        self.type, self.input, self.context = details["type"], details["input"], details.get("ctx", {})
        self.message = re.sub(r"^\w+ should ", "must ", details["msg"].removeprefix("Value error, "))
        self.loc = details["loc"][1:]
        self.tags: list[int] = []
        path: list[str | int] = []
        for number, part in enumerate(self.loc):
            inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
            if inside or (self.type == "missing" and number == len(self.loc) - 1):
                path.append(part)
                body = body[part] if inside else None
            else:
                self.tags.append(number)
        self.path = (*path, *filter(None, [self.context.get("field")]))

    @property
    def progress(self) -> tuple[tuple[int, ...], bool]:
        """Sort key: how far into the value an alternative of a union applies."""
        return tuple(part if isinstance(part, int) else 0 for part in self.path), self.type not in MISMATCH


def _first(errors: Sequence[FieldError], depth: int = 0) -> list[FieldError]:
    """Return the first error; of a union, that of the best alternative, or several of equal rank."""
    tag = next((tag for tag in errors[0].tags if tag >= depth), None)
    if tag is None:
        return [errors[0]]
    start = errors[0].loc[:tag]
    alternatives: dict[Any, list[FieldError]] = {}
    for error in errors:
        if error.loc[:tag] == start and len(error.loc) > tag:
            alternatives.setdefault(error.loc[tag], []).append(error)
    heads = [head for group in alternatives.values() for head in _first(group, tag + 1)]
    best = max(heads, key=lambda head: head.progress)
    return [head for head in heads if head.path == best.path and head.progress == best.progress]
