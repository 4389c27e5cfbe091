"""The gateway as an ASGI application: routes and middleware as lists, and the life of what they share."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.staticfiles import StaticFiles

from server.api import mjpeg, outputs, recordings, schemas, server, streams, videos, whep
from server.api.idempotency import Idempotency
from server.api.websocket import watch
from server.auth.access import OWNED_PATH, Access, is_public
from server.auth.keys import Keys
from server.backends.base import Backend
from server.config import Config
from server.egress.outputs import Outputs
from server.metrics import Metrics
from server.middleware.auth import AuthMiddleware
from server.middleware.body_limits import BodyLimitMiddleware
from server.middleware.request import RequestMiddleware, on_http_exception, on_validation_error
from server.streams.registry import Streams
from server.tracing import Tracing

logger = logging.getLogger("livereel.app")

DESCRIPTION = """Real-time text-to-video: a prompt becomes live video, and changes while it plays.

Open a stream with `POST /v1/streams` and connect to its `ws_url`. Text messages are JSON events, each with `type`,
`seq` and `ts`: `stream.started`, `queue.position`, `state`, `chunk`, `prompt.applied`, `quality.changed`,
`output.state`, `stall`, `engine.restarted`, `draining`, `error`, `ended`. `state` says as `reason` why a stream is
paused: `asked` or `unwatched`. Binary messages are one frame each: a 16-byte header in network order (u8 version = 1,
u8 format: 1 JPEG, 2 RGB24 or 3 fragmented MP4, u16 width, u16 height, u16 flags, u64 presentation time in 1/90000 s),
then the payload. `?format=` is `mjpeg` (the default), `rgb24`, `fmp4` (H.264 for Media Source Extensions as `video/mp4;
codecs="avc1.42c01f"`; flags: 1 the scene starts afresh, 2 keyframe, 4 the init segment, which comes first) or `events`
(no frames). `whep_url` is the stream over WebRTC, `/v1/streams/{id}/mjpeg` for an `<img>`. With `?alpha=stacked` each
of them has every frame above its matte, in a picture of twice the height (see `PUT /v1/streams/{id}/matte`);
`/overlay/{id}` is a page for OBS that shows it.

Where the server has keys, send one as `Authorization: Bearer KEY`. A viewer that cannot, or should not have it, gets a
token for one stream from `POST /v1/streams/{id}/tokens`, and sends it in the same header or as `?token=`; `ws_url`
carries one already.

`/v1/videos` makes clips as OpenAI's API does; what that has no field for is in `extra`. `POST
/v1/streams/{id}/recordings` records a live stream, and `/v1/recordings` is where its films are.

`POST /v1/streams`, `/v1/videos` and a remix take an `Idempotency-Key`: who did not hear the answer may send the request
again, and gets what the first one made."""


ROUTES = [
    *streams.ROUTES,
    *server.ROUTES,
    *whep.ROUTES,
    *mjpeg.ROUTES,
    *outputs.ROUTES,
    *videos.ROUTES,
    *recordings.ROUTES,
]


def create_app(config: Config, backend: Backend, tracing: Tracing | None = None) -> FastAPI:
    """Put the gateway together. The backend and the traces start and stop with the application's lifespan."""
    tracing = tracing or Tracing()
    metrics = Metrics()
    registry = Streams(config, backend, metrics, tracing)
    whep_sessions = whep.WhepSessions(config, registry, metrics)
    pushed = Outputs(config, registry, metrics)
    access = Access(Keys(config.keys) if config.keys else None, config.origins)
    ledger = Idempotency()
    access.holders += [registry.keep_keys, whep_sessions.keep_keys, pushed.keep_keys, ledger.keep_keys]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await registry.start()
        watchers = [
            asyncio.create_task(watch_keys(access), name="keys"),
            asyncio.create_task(watch_lag(metrics), name="event loop lag"),
        ]
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            await pushed.stop()
            await registry.stop()
            await whep_sessions.stop()
            await asyncio.to_thread(tracing.close)

    app = Api(
        title="Livereel",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=[
            Middleware(RequestMiddleware, access=access, tracing=tracing),
            Middleware(AuthMiddleware, access=access, streams=registry),
            Middleware(BodyLimitMiddleware, access=access),
        ],
        exception_handlers={
            HTTPException: on_http_exception,
            RequestValidationError: on_validation_error,
        },
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.streams = registry
    app.state.metrics = metrics
    app.state.whep_sessions = whep_sessions
    app.state.outputs = pushed
    app.state.config = config
    app.state.routes = ROUTES
    app.state.access = access
    app.state.idempotency = ledger
    for route in ROUTES:
        # FastAPI would document its own 422 unless an error is declared for everything else.
        statuses: tuple[int | str, ...] = (*route.errors, "default")
        errors: dict[int | str, dict[str, Any]] = {status: {"model": schemas.ErrorBody} for status in statuses}
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
    app.mount("/assets/overlay", StaticFiles(directory=server.OVERLAY))
    app.mount("/assets/js", StaticFiles(directory=server.JS))
    app.mount("/assets", StaticFiles(directory=server.WEB))
    return app


class Api(FastAPI):
    """FastAPI, whose description also says what a request needs to be let in."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None and self.state.access.keys is not None:
            schema = super().openapi()
            schema["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer", "description": "An API key, or a token for one stream."},
                "token": {"type": "apiKey", "in": "query", "name": "token", "description": "A token for one stream."},
            }
            for path, methods in schema["paths"].items():
                owned = OWNED_PATH.fullmatch(path)
                shown = ["key", "token"] if owned and owned[1] == "stream" else ["key"]
                for method, operation in methods.items():
                    operation["security"] = [] if is_public(method.upper(), path) else [{each: []} for each in shown]
        return super().openapi()


LAG_SECONDS = 0.05
"""How often the event loop is asked how late it is."""


async def watch_lag(metrics: Metrics) -> None:
    """Measure how late the event loop runs what is due."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        metrics.loop_lag_seconds.observe(max(0.0, loop.time() - due))


KEYS_SECONDS = 0.5
"""How often the file of keys is looked at."""


async def watch_keys(access: Access) -> None:
    """Notice when the file of keys changes."""
    while access.keys is not None:
        await asyncio.sleep(KEYS_SECONDS)
        reload_keys(access)


def reload_keys(access: Access, *, force: bool = False) -> None:
    """Read the keys again if their file has changed; a file that is no good leaves those that there are."""
    try:
        if access.reload(force=force):
            logger.info("the keys were read again")
    except ValueError as error:
        logger.error("the keys stay as they were: %s", error)
