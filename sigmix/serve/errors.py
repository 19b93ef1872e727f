"""Errors in OpenAI's format: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from sigmix.errors import ContextError, InputError, OutputError, SigmixError, UnknownNameError


class ApiError(Exception):
    """What a client is told in place of an answer.

    Args:
        status: HTTP status. message: what was found, what was expected, how to mend it.
        kind: OpenAI's ``type``. code: a short name. param: the field of the request. retry: seconds to wait.
    """

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None,
        param: str | None = None, retry: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.retry = retry

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After, where there is something to wait for."""
        return {} if self.retry is None else {"Retry-After": str(max(1, round(self.retry + 0.5)))}


def from_sigmix(error: SigmixError, param: str | None = None) -> ApiError:
    """Our own errors as a client sees them."""
    if isinstance(error, UnknownNameError):
        return ApiError(404, str(error), code="model_not_found" if param == "model" else "not_found", param=param)
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded", param=param)
    if isinstance(error, OutputError):
        return ApiError(503, str(error), "server_error", "storage", param)
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param)
    return ApiError(503, str(error), "server_error", param=param)


def busy(message: str, retry: float) -> ApiError:
    """429: come back later."""
    return ApiError(429, message, "rate_limit_error", "rate_limit_exceeded", retry=retry)
