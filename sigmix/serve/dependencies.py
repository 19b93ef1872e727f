"""Dependencies that routes share: the service, the client's key, blocking calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from sigmix.serve.auth import ApiKey
from sigmix.serve.protocol.errors import ApiError, api_errors
from sigmix.serve.service import Service

P = ParamSpec("P")
T = TypeVar("T")


def get_service(request: Request) -> Service:
    """Return the server's parts."""
    return request.app.state.service


def get_key(request: Request) -> ApiKey:
    """Return the API key of the client."""
    return request.state.key


def require_admin(request: Request) -> None:
    """Reject clients without an administrator's key.

    Raises:
        ApiError: status 403.
    """
    if not get_key(request).admin:
        raise ApiError(403, "administrator's key required", "permission_error", code="forbidden")


ServiceDep = Annotated[Service, Depends(get_service)]
KeyDep = Annotated[ApiKey, Depends(get_key)]


async def in_thread(param: str | None, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in the thread pool; report an error of sigmix for the field ``param``."""
    with api_errors(param):
        return await run_in_threadpool(function, *args, **kwargs)
