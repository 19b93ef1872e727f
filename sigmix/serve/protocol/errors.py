"""Error responses in OpenAI's format."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from sigmix.errors import ContextError, InputError, OutputError, SigmixError, UnknownNameError


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
        super().__init__(message)
        self.status, self.message, self.type, self.code, self.param = status, message, type, code, param
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
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded", param=param)
    if isinstance(error, OutputError):
        return ApiError(503, str(error), "server_error", code="storage", param=param)
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(503, str(error), "server_error", param=param)


def rate_limited(message: str, retry_after: float) -> ApiError:
    """Return a 429 error."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after=retry_after)
