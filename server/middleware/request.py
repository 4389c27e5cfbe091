"""The ASGI middleware around every request: ids, security headers, the access log; and the exception handlers."""

import errno
import logging
import re
import secrets
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import schemas
from server.api.responses import abort_connection
from server.api.routing import base_url, methods_at, url_of
from server.auth.access import Access
from server.errors import ApiError, exhausted, request_id
from server.logs import redact
from server.protocols import descriptors_are_short
from server.tracing import Tracing

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger("livereel.http")

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EAGAIN)
"""Errors of a system that is out of descriptors, memory, disk space or processes."""
MAX_LOGGED_PATH = 200
"""Characters of a path that are logged and traced."""


class RequestMiddleware:
    """Gives each request an id and security headers, logs and traces it, and turns exceptions into error objects."""

    def __init__(self, app: ASGIApp, *, access: Access, tracing: Tracing) -> None:
        self._app = app
        self._access = access
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        id = headers.get("x-request-id", "")
        # A client's id is logged, so it must not be a key or a token.
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", id) or id != redact(id):
            id = f"req_{secrets.token_hex(12)}"
        request_id.set(id)
        with self._tracing.request(scope.get("method", "GET"), path_of(scope), headers) as span:
            await self._serve(scope, receive, send, headers, span)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: "Span | None") -> None:
        id, started, started_at = request_id.get(), False, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "websocket.accept":
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["x-request-id"] = id
                self._log(scope, 101, started_at, span)
            elif message["type"] == "http.response.start":
                started = True
                response_headers = MutableHeaders(scope=message)
                response_headers["x-request-id"] = id
                for name, value in (*security_headers(scope), *self._access.cors_headers(headers)):
                    response_headers.setdefault(name, value)
                self._log(scope, message["status"], started_at, span)
            await send(message)

        try:
            if scope["type"] == "http" and scope["method"] == "POST" and descriptors_are_short():
                raise exhausted()  # what it makes could take the last ones
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            return  # the client left before its request was complete: nobody to answer, nothing to log
        except Exception as error:
            if scope["type"] == "websocket":
                raise
            if isinstance(error, ApiError):
                await error.response(scope, receive, send_with_headers)
                return
            failure = ApiError(500, "internal_error", f"The server failed; its log has request {id}.")
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                failure = exhausted()
                logger.error("request %s failed: %s", id, error.strerror)
            else:
                logger.exception("request %s failed", id)
            if started:
                abort_connection(scope)  # the response must not look complete
                raise
            await failure.response(scope, receive, send_with_headers)

    def _log(self, scope: Scope, status: int, started_at: float, span: "Span | None") -> None:
        """Write the access log, where there are keys to tell senders apart. The query is left out: it may hold a token.

        Rejected requests of unknown senders are logged, other requests without a sender are not.
        """
        if span is not None:
            span.set_attribute("http.response.status_code", status)
        principal = scope.get("state", {}).get("principal")
        if self._access.keys is not None and (principal or status >= 400):
            path, name, method = path_of(scope), principal.name if principal else "-", scope.get("method", "GET")
            seconds = round(time.monotonic() - started_at, 4)
            extra = {"principal": name, "method": method, "path": path, "status": status, "seconds": seconds}
            logger.info("%s %s %s %d", name, method, path, status, extra=extra)


def path_of(scope: Scope) -> str:
    """The path as it was sent, percent-encoded and cut to what is logged."""
    path: bytes = scope["raw_path"]
    return path.decode("ascii", "replace")[:MAX_LOGGED_PATH]


def security_headers(scope: Scope) -> list[tuple[str, str]]:
    """Security and caching headers of every response. Pages may load nothing from another host."""
    # Some browsers do not count WebSockets as 'self', so they are named.
    host = base_url(scope).host
    sockets = f" ws://{host} wss://{host}" if host else ""
    policy = (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        f"connect-src 'self'{sockets}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    # API responses are outdated at once; the page's own files are revalidated.
    caching = "no-cache" if scope["path"] in ("/", "/docs") or scope["path"].startswith("/assets/") else "no-store"
    return [
        ("content-security-policy", policy),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cache-control", caching),
    ]


async def on_http_exception(request: Request, exception: Exception) -> Response:
    """FastAPI's handler for `HTTPException`: ours as they are, the framework's as error objects of the API."""
    assert isinstance(exception, HTTPException)
    if isinstance(exception, ApiError):
        return exception.response
    status, headers = exception.status_code, dict(exception.headers or {})
    if status == 404:
        error = ApiError(404, "not_found", f"There is nothing at this path: see {url_of(request, '/docs')}.")
    elif status == 405:
        # The framework reports the methods of one route only, and a path can have several routes.
        headers["Allow"] = ", ".join(methods_at(request.scope)) or headers.get("allow", "GET")
        headers.pop("allow", None)
        error = ApiError(405, "method_not_allowed", f"Use {headers['Allow']} here.", headers=headers)
    elif status == 400:
        error = ApiError(400, "invalid_json", "The body is not valid JSON in UTF-8.")
    else:
        error = ApiError(status, "http_error", HTTPStatus(status).phrase + ".", headers=headers)
    return error.response


async def on_validation_error(request: Request, exception: Exception) -> Response:
    """FastAPI's handler for a request body that violates its schema."""
    assert isinstance(exception, RequestValidationError)
    return schemas.explain(exception.errors()).response
