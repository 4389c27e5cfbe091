"""The ASGI middleware that applies `server.auth.access` to every request and WebSocket."""

import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from server.api.responses import abort_connection
from server.api.routing import base_url
from server.api.websocket import UNAUTHENTICATED, close_or_abort, reject_handshake
from server.auth.access import OWNED_PATH, Access, is_public, unauthenticated
from server.errors import ApiError
from server.streams.registry import Registry

MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024
"""Of all headers of a request together. The HTTP parser bounds only incomplete headers, not what arrives at once."""


class AuthMiddleware:
    """Authenticates, rate-limits and authorizes everything that reaches the routes, mounted applications included."""

    def __init__(self, app: ASGIApp, *, access: Access, streams: Registry) -> None:
        self._app = app
        self._access = access
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        access, headers, is_socket = self._access, Headers(scope=scope), scope["type"] == "websocket"
        method, path = "GET" if is_socket else scope["method"], scope["path"]
        try:
            check_header_limits(headers)
            access.check_host(headers)
            if method == "OPTIONS" and is_preflight(headers) and headers.get("origin") in access.origins:
                await preflight_response()(scope, receive, send)
                return
            if is_socket and not access.origin_allowed(headers, base_url(scope).forwarded_host):
                await send({"type": "websocket.close"})  # before the handshake completes, this is a 403
                return
            if not is_socket and is_public(method, path):
                await self._app(scope, receive, send)
                return
            now = time.monotonic()
            principal = access.authenticate(headers, scope["query_string"], now)
            scope.setdefault("state", {})["principal"] = principal
            owned = OWNED_PATH.fullmatch(path)
            # Count before any further check, so that failing requests are limited too.
            rate_headers = access.count_request(principal, now)
        except ApiError as error:
            if not is_socket:
                raise
            await reject_handshake(scope, receive, send, error)
            return
        started = False

        async def send_with_rate_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(rate_headers)
            await send(message)

        try:
            access.authorize(principal, method, path, self._streams.owner(owned[2]) if owned else None)
            async with access.lease(principal) as lease:
                await self._app(scope, receive, send_with_rate_headers)
        except ApiError as error:
            if is_socket:
                await reject_handshake(scope, receive, send, error)
                return
            error.headers = {**rate_headers, **(error.headers or {})}
            raise
        except TimeoutError:
            if not lease.expired():
                raise
            revoked = unauthenticated("The API key was taken away.")
            if is_socket:
                await close_or_abort(WebSocket(scope, receive, send), UNAUTHENTICATED, revoked.code)
            elif started:
                abort_connection(scope)  # the response must not look complete
            else:
                raise revoked from None


def check_header_limits(headers: Headers) -> None:
    """Raise `ApiError` for headers that are too large, too many, or ambiguous about the body's length."""
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEAD_BYTES:
        message = f"Send at most {MAX_HEAD_BYTES} bytes of headers."
        raise ApiError(431, "headers_too_large", message, headers={"Connection": "close"})
    if len(headers.raw) > MAX_HEADERS:
        raise ApiError(431, "too_many_headers", f"Send at most {MAX_HEADERS} headers.", headers={"Connection": "close"})
    if "transfer-encoding" in headers and "content-length" in headers:
        # A proxy that trusts one and a server that trusts the other would see different requests (smuggling).
        message = "Send Content-Length or Transfer-Encoding, not both."
        raise ApiError(400, "ambiguous_length", message, headers={"Connection": "close"})


def is_preflight(headers: Headers) -> bool:
    """Whether this is a CORS preflight, which a browser sends by itself and without credentials."""
    return "access-control-request-method" in headers


def preflight_response() -> Response:
    """The answer to a CORS preflight from an allowed origin."""
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, If-Match, X-Request-Id",
            "Access-Control-Max-Age": "600",
        },
    )
