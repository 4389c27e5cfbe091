"""The gateway as an ASGI application: its routes, its middleware, and the objects that they share."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from server.api import mjpeg, openapi, outputs, recordings, server, streams, videos, websocket, whep
from server.api.idempotency import Idempotency
from server.api.openapi import DESCRIPTION, GatewayApp
from server.api.response_schemas import ErrorBody
from server.api.responses import StoredFiles
from server.api.routing import GetRoute, Route
from server.auth.access import Access
from server.auth.keys import Keys
from server.backends.base import Backend
from server.config import Config
from server.egress.outputs import Outputs
from server.metrics import Metrics
from server.middleware.auth import AuthMiddleware
from server.middleware.body_limits import BodyLimitMiddleware
from server.middleware.proxy import ProxyMiddleware
from server.middleware.request import RequestMiddleware, on_http_exception, on_validation_error
from server.streams.registry import Registry
from server.tracing import Tracing

logger = logging.getLogger("livereel.app")

LAG_SECONDS = 0.05
"""How often the event loop's lag is measured."""
KEYS_SECONDS = 0.5
"""How often the key file is checked for changes."""

ROUTES = [
    *streams.ROUTES,
    *server.ROUTES,
    *openapi.ROUTES,
    *whep.ROUTES,
    *mjpeg.ROUTES,
    *outputs.ROUTES,
    *videos.ROUTES,
    *recordings.ROUTES,
]


def create_app(config: Config, backend: Backend, tracing: Tracing | None = None) -> FastAPI:
    """Assemble the gateway. Its lifespan starts and stops the backend, and closes the traces.

    Raises `ValueError` if the keys cannot be read.
    """
    tracing = tracing or Tracing()
    metrics = Metrics()
    registry = Registry(config, backend, metrics, tracing)
    whep_sessions = whep.WhepSessions(config, metrics)
    stream_outputs = Outputs(config, registry, metrics)
    access = Access(Keys(config.keys) if config.keys else None, config.origins)
    idempotency = Idempotency()
    access.holders += [registry, whep_sessions, stream_outputs, idempotency]

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await registry.start()
        watchers = [
            asyncio.create_task(watch_keys(access), name="keys"),
            asyncio.create_task(measure_lag(metrics), name="event loop lag"),
        ]
        try:
            yield
        finally:
            for watcher in watchers:
                watcher.cancel()
            await stream_outputs.stop()
            await registry.stop()
            await whep_sessions.stop()
            await asyncio.to_thread(tracing.close)

    app = GatewayApp(
        title="Livereel",
        version="0.1.0",
        description=DESCRIPTION,
        lifespan=lifespan,
        middleware=[
            Middleware(ProxyMiddleware, trusted=config.trusted_proxies, root_path=config.root_path),
            Middleware(RequestMiddleware, access=access, tracing=tracing),
            Middleware(AuthMiddleware, access=access, streams=registry),
            Middleware(BodyLimitMiddleware, access=access, uploads=registry.uploads),
        ],
        exception_handlers={
            HTTPException: on_http_exception,
            RequestValidationError: on_validation_error,
        },
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,  # `openapi.ROUTES` has a route for it
    )
    app.state.config = config
    app.state.metrics = metrics
    app.state.access = access
    app.state.streams = registry
    app.state.whep_sessions = whep_sessions
    app.state.outputs = stream_outputs
    app.state.idempotency = idempotency
    app.state.routes = ROUTES
    app.router.route_class = GetRoute
    for route in ROUTES:
        add_route(app, route)
    app.add_api_websocket_route("/v1/streams/{id}/ws", websocket.watch)
    app.mount("/assets/overlay", StoredFiles(directory=server.OVERLAY))
    app.mount("/assets/js", StoredFiles(directory=server.JS))
    app.mount("/assets", StoredFiles(directory=server.WEB))
    return app


def add_route(app: FastAPI, route: Route) -> None:
    """Add one endpoint. The routes of the API document their errors."""
    documented = {}
    if route.path.startswith("/v1"):
        # Without a default error FastAPI would document its own 422, which is never sent.
        documented = {"responses": {status: {"model": ErrorBody} for status in (*route.errors, "default")}}
    app.add_api_route(
        route.path,
        route.endpoint,
        methods=[route.method],
        response_model=route.model,
        status_code=route.status,
        **{**documented, **route.options},
    )


async def measure_lag(metrics: Metrics) -> None:
    """Measure, for ever, by how much the event loop runs timers late."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_SECONDS
        await asyncio.sleep(LAG_SECONDS)
        metrics.loop_lag_seconds.observe(max(0.0, loop.time() - due))


async def watch_keys(access: Access) -> None:
    """Reload the keys whenever their file changes; returns at once if there are none."""
    while access.keys is not None:
        await asyncio.sleep(KEYS_SECONDS)
        reload_keys(access)


def reload_keys(access: Access, *, force: bool = False) -> None:
    """Reload the keys if their file has changed, or in any case. An invalid file leaves the current keys in force."""
    try:
        if access.reload(force=force):
            logger.info("the keys were read again")
    except ValueError as error:
        logger.error("the keys stay as they were: %s", error)
