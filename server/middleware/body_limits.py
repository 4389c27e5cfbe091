"""The ASGI middleware that limits request bodies: their size, their duration, their type and their origin."""

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.forms import MAX_BODY_BYTES, MAX_UPLOAD_BYTES, is_form, media_type
from server.api.routing import base_url, routes_at
from server.auth.access import Access
from server.errors import ApiError
from server.uploads.queue import UploadQueue

UPLOADS = {("POST", "/v1/streams"), ("POST", "/v1/videos")}
"""Requests that may bring a picture."""
BODY_SECONDS = 10.0
"""How long a request body may take to arrive; one that may bring a picture three times as long."""


class BodyLimitMiddleware:
    """Rejects bodies that are too large, too slow, of the wrong type, or from a web page of another origin."""

    def __init__(self, app: ASGIApp, *, access: Access, uploads: UploadQueue) -> None:
        self._app = app
        self._access = access
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin_allowed = self._access.origin_allowed(headers, base_url(scope).forwarded_host)
        check_headers(scope, headers, origin_allowed)
        if not origin_allowed and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            message = "This page may not use the server: the operator must allow its origin with --origins."
            raise ApiError(403, "origin_not_allowed", message)
        limit = max_body_bytes(scope)
        if limit == MAX_BODY_BYTES:
            await self._app(scope, LimitedReceive(receive, limit, BODY_SECONDS), send)
            return
        with self._uploads.hold(declared_bytes(headers) - MAX_BODY_BYTES) as arrive:
            await self._app(scope, LimitedReceive(receive, limit, 3 * BODY_SECONDS, arrive), send)


class LimitedReceive:
    """An ASGI `receive` that raises `ApiError` once a body exceeds `limit` bytes or takes longer than `seconds`.

    `arrive` is called with the size so far of what exceeds the body of a request without an upload.
    """

    def __init__(
        self, receive: Receive, limit: int, seconds: float, arrive: Callable[[int], None] = lambda size: None
    ) -> None:
        self._receive = receive
        self._arrive = arrive
        self._size, self._limit = 0, limit
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()  # waits for the client to disconnect, for as long as the response takes
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "body_timeout", "The request body took too long.") from None
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._size > self._limit:
            raise body_too_large(self._limit)
        self._arrive(max(0, self._size - MAX_BODY_BYTES))
        return message


def check_headers(scope: Scope, headers: Headers, origin_allowed: bool) -> None:
    """Raise `ApiError` for a body whose declared size or type is not accepted, before any of it is read."""
    if not scope["path"].startswith("/v1/") or scope["method"] not in ("POST", "PATCH", "PUT"):
        return
    limit = max_body_bytes(scope)
    if declared_bytes(headers) > limit:
        raise body_too_large(limit)
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        message = "Send the body without `Content-Encoding`: it is not decompressed here."
        raise ApiError(415, "unsupported_encoding", message, headers={"Accept-Encoding": "identity"})
    route = next((route for route in routes_at(scope) if route.method == scope["method"]), None)
    if route is None or route.accepts in ("", media_type(headers)):
        return
    # A web page may send a form to any host without asking (no preflight), so a form could open streams on the
    # visitor's own machine. It must come from our own page, an allowed origin, or no browser at all.
    if is_form(headers) and limit == MAX_UPLOAD_BYTES and origin_allowed:
        return
    what = "JSON" if route.accepts == "application/json" else "SDP"
    message = f"Send {what}, with `Content-Type: {route.accepts}`."
    accept = {f"Accept-{scope['method'].title()}": route.accepts}
    raise ApiError(415, "unsupported_media_type", message, headers=accept)


def declared_bytes(headers: Headers) -> int:
    """The body's size by its `Content-Length`; 0 without one."""
    length = headers.get("content-length", "0")
    return int(length[:20]) if length.isdecimal() else 0


def max_body_bytes(scope: Scope) -> int:
    """Largest body that this request may have."""
    return MAX_UPLOAD_BYTES if (scope["method"], scope["path"]) in UPLOADS else MAX_BODY_BYTES


def body_too_large(limit: int) -> ApiError:
    return ApiError(413, "body_too_large", f"The body is too large: send at most {limit} bytes.")
