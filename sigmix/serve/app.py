"""The application (FastAPI): routes, errors in OpenAI's format, the page, and the server around it (uvicorn)."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles

from sigmix.serve import routes
from sigmix.serve.auth import Gate, patient
from sigmix.serve.protocol import ApiError
from sigmix.serve.service import Service

log = logging.getLogger("sigmix.serve")


STATIC = Path(__file__).parent / "static"


def create_app(service: Service) -> Any:
    """The ASGI application of a service; it is started and closed with the application.

    Args:
        service: the server's parts.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        if not service.warm:
            service.start()
        yield
        service.close()

    app = FastAPI(title="sigmix", docs_url=None, redoc_url=None, lifespan=life)
    app.state.service = service
    app.include_router(routes.router)
    app.include_router(routes.admin_router)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(ApiError, _api)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _failed)
    gate = Gate(app, service.settings, service.keyring, service.metrics)
    if not service.settings.origins:
        return gate
    # outside of the gate: a browser asks first without a key, and is to be able to read why it was refused
    return CORSMiddleware(
        gate, allow_origins=service.settings.origins, allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["authorization", "content-type", "x-request-id"], expose_headers=["x-request-id", "retry-after"],
    )  # fmt: skip


async def _api(_: Request, error: Any) -> Response:
    return JSONResponse(error.body(), error.status, error.headers())


async def _invalid(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    message = first["msg"].removeprefix("Value error, ")
    param = ".".join(place) or None
    return JSONResponse(ApiError(400, f"{param or 'the body'}: {message}", param=param).body(), 400)


async def _http(_: Request, error: Any) -> Response:
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    body = ApiError(error.status_code, str(error.detail), code=code).body()
    return JSONResponse(body, error.status_code, getattr(error, "headers", None))


async def _failed(_: Request, error: Any) -> Response:
    log.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed on this request", "server_error", "internal").body(), 500)


class Server(uvicorn.Server):
    """A uvicorn server that, told to stop, takes no new requests and lets answers end.

    Args:
        service: the server's parts. port: 0 takes a free one.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self.service = service
        super().__init__(
            uvicorn.Config(
                create_app(service), host=settings.host, port=settings.port, log_config=None, access_log=False,
                server_header=False, limit_concurrency=2 * settings.connections + 16, timeout_keep_alive=20,
                timeout_graceful_shutdown=int(settings.grace_seconds) + 10, h11_max_incomplete_event_size=64 << 10,
                http=patient(settings.body_seconds), proxy_headers=False,
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to close at the first signal; a second one ends the server at once."""
        threading.Thread(target=self.service.close, daemon=True).start()
        super().handle_exit(sig, frame)
