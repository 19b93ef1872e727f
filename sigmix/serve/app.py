"""ASGI application (FastAPI) and the uvicorn server that runs it."""

from __future__ import annotations

import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from sigmix.serve import routes
from sigmix.serve.auth import AuthMiddleware, RequestLogMiddleware
from sigmix.serve.fine_tuning import routes as fine_tuning_routes
from sigmix.serve.protocol.errors import ApiError, internal_error, validation_error
from sigmix.serve.scheduler import ClosingError
from sigmix.serve.service import Service

STATIC = Path(__file__).parent / "static"

ERROR_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def create_app(service: Service) -> ASGIApp:
    """Return the ASGI application of a service; its lifespan starts and closes the service."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not service.started:
            service.start()
        async with service.upstreams or nullcontext():
            yield
        service.close()

    app = FastAPI(title="sigmix", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.include_router(routes.router)
    app.include_router(fine_tuning_routes.router)
    app.include_router(routes.admin_router)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    for error in (ApiError, ClosingError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(error, error_response)
    settings = service.settings
    wrapped: ASGIApp = AuthMiddleware(app, settings, service.keys)
    hosts = [settings.host, *settings.allowed_hosts] if settings.allowed_hosts else ["*"]
    if settings.loopback:  # against DNS rebinding
        hosts = ["localhost", "127.0.0.1", "[::1]", settings.host, *settings.allowed_hosts]
    wrapped = TrustedHostMiddleware(wrapped, allowed_hosts=hosts, www_redirect=False)
    wrapped = RequestLogMiddleware(wrapped, service.metrics)
    if settings.allowed_origins:  # outermost: preflight requests carry no key, and pages must be able to read errors
        wrapped = CORSMiddleware(
            wrapped, allow_origins=settings.allowed_origins, allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    return wrapped


async def error_response(request: Request, error: Exception) -> Response:
    """Return the response to an error, in OpenAI's format."""
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, ClosingError):
        return ApiError(503, str(error), "server_error", code="closing", retry_after=5).response()
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors(), error.body).response()
    if not isinstance(error, HTTPException):
        return internal_error().response()
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = f"there is no route {request.method} {request.url.path}; the documentation lists all routes"
    body = ApiError(error.status_code, message, code=ERROR_CODES.get(error.status_code)).body()
    return JSONResponse(body, error.status_code, error.headers)


class Server(uvicorn.Server):
    """uvicorn server that finishes running requests before it stops."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self.service = service
        super().__init__(
            uvicorn.Config(
                create_app(service), host=settings.host, port=settings.port, http="h11", ws="none", log_config=None,
                access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=20,
                limit_concurrency=settings.max_connections + 1, h11_max_incomplete_event_size=64 << 10,
                timeout_graceful_shutdown=int(settings.shutdown_timeout) + 10,
            )
        )  # fmt: skip

    def bind(self) -> socket.socket:
        """Bind and return the listening socket.

        Accepted connections inherit TCP_NODELAY; asyncio does not set it, and without it a streamed token can wait
        40 ms for the acknowledgement of the previous one.
        """
        bound = self.config.bind_socket()
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return bound

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting requests at the first signal; exit at the second one."""
        threading.Thread(target=self.service.close, daemon=True).start()
        super().handle_exit(sig, frame)
