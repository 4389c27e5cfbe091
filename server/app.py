"""The gateway as an ASGI application: routes and middleware as lists, and the life of what they share."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from server import http
from server.backends.base import Backend
from server.config import Config
from server.metrics import Metrics
from server.streams import Streams
from server.websocket import watch

DESCRIPTION = """Real-time text-to-video: a prompt becomes live video, and changes while it plays.

Open a stream with `POST /v1/streams` and connect to its `ws_url`. Text messages are JSON events, each with `type`,
`seq` and `ts`: `stream.started`, `queue.position`, `state`, `chunk`, `prompt.applied`, `stall`, `engine.restarted`,
`draining`, `error`, `ended`. Binary messages are one frame each: a 16-byte header in network byte order (u8 version
= 1, u8 format: 1 JPEG or 2 RGB24, u16 width, u16 height, u16 flags, u64 presentation time in 1/90000 s), then the
payload. `?format=` is `mjpeg` (the default) or `rgb24`."""


def create_app(config: Config, backend: Backend) -> FastAPI:
    """Put the gateway together. The backend starts and stops with the application's lifespan."""
    metrics = Metrics()
    streams = Streams(config, backend, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await streams.start()
        try:
            yield
        finally:
            await streams.stop()

    app = FastAPI(
        title="Livereel",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=[Middleware(http.Envelope)],
        exception_handlers={
            HTTPException: http.on_http_exception,
            RequestValidationError: http.on_validation_error,
        },
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.streams = streams
    app.state.metrics = metrics
    for route in http.ROUTES:
        # FastAPI would document its own 422 unless an error is declared for everything else.
        statuses: tuple[int | str, ...] = (*route.errors, "default")
        errors: dict[int | str, dict[str, Any]] = dict.fromkeys(statuses, http.ERROR)
        options = {"responses": errors} if route.path.startswith("/v1") else {}
        app.add_api_route(
            route.path,
            route.endpoint,
            methods=[route.method],
            response_model=route.model,
            status_code=route.status,
            **{**options, **route.options},
        )
    app.add_api_websocket_route("/v1/streams/{id}/ws", watch)
    app.mount("/assets", StaticFiles(directory=http.WEB))
    return app
