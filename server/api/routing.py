"""Routes as data, and what an endpoint looks up through its connection: the streams, the sender, URLs."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from server.auth.access import Access, Principal
from server.errors import ApiError
from server.streams.registry import Registry


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint, and what FastAPI has to know about it."""

    method: str
    path: str
    endpoint: Any
    model: Any = None
    """Response model."""
    status: int = 200
    errors: tuple[int, ...] = ()
    """Statuses of the errors that OpenAPI documents."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `FastAPI.add_api_route`."""
    accepts: str = "application/json"
    """Media type of the request body; empty if the endpoint reads none."""


def routes_at(scope: Scope) -> Sequence[Route]:
    """The application's routes for the path of a request, one for each method."""
    routes: Sequence[Route] = scope["app"].state.routes
    return [route for route in routes if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", route.path), scope["path"])]


def methods_at(scope: Scope) -> list[str]:
    """The methods that the path of a request answers, for an `Allow` header."""
    methods = [route.method for route in routes_at(scope)]
    if "GET" in methods and "HEAD" not in methods:
        methods.insert(methods.index("GET") + 1, "HEAD")
    return methods


class GetRoute(APIRoute):
    """FastAPI's route, except that one for GET answers HEAD too: the same status and headers (RFC 9110, 9.3.2).

    The endpoint sees the method HEAD. The HTTP protocol discards the body, so only endpoints whose body is large,
    endless or has an effect need to look at it.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return super().matches({**scope, "method": "GET"} if self._is_head(scope) else scope)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._is_head(scope):
            await self.app(scope, receive, send)
        else:
            await super().handle(scope, receive, send)

    def _is_head(self, scope: Scope) -> bool:
        return scope["type"] == "http" and scope["method"] == "HEAD" and "GET" in (self.methods or ())


def streams_of(connection: HTTPConnection) -> Registry:
    """The application's streams."""
    streams = connection.app.state.streams
    assert isinstance(streams, Registry)
    return streams


def access_of(connection: HTTPConnection) -> Access:
    """The application's access rules."""
    access = connection.app.state.access
    assert isinstance(access, Access)
    return access


def principal_of(connection: HTTPConnection) -> Principal:
    """The sender of this request, as `AuthMiddleware` authenticated it."""
    principal = connection.state.principal
    assert isinstance(principal, Principal)
    return principal


def wants_alpha(connection: HTTPConnection) -> bool:
    """Whether `?alpha=stacked` asks for frames stacked on their mattes. Raises `ApiError` for an unknown value."""
    alpha = connection.query_params.get("alpha", "none")
    if alpha not in ("none", "stacked"):
        raise ApiError(400, "invalid_value", "`alpha` must be none or stacked.", param="alpha")
    return alpha == "stacked"


BASE_URL = "livereel.base_url"
"""Key of the client's `BaseUrl` in a request's scope, where `server.middleware.proxy` puts it."""


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """The URL of this server as the client of a request sees it."""

    scheme: str
    """http or https."""
    host: str
    """With the port; empty if it is malformed."""
    prefix: str = ""
    """Path prefix, such as `/live`."""
    forwarded_host: str = ""
    """`host`, if trusted proxies named it."""
    absolute: bool = False
    """Whether URLs name scheme and host, because proxies told either; otherwise they are paths."""

    def url(self, path: str) -> str:
        """The URL of a path of this server, as a reference for the client."""
        origin = f"{self.scheme}://{self.host}" if self.absolute and self.host else ""
        return origin + self.prefix + path


def base_url(scope: Scope) -> BaseUrl:
    """The URL of this server as the client of a request sees it."""
    base = scope.get(BASE_URL)
    return base if isinstance(base, BaseUrl) else make_base_url(scope)


def make_base_url(scope: Scope, *, scheme: str = "", host: str = "", prefix: str = "") -> BaseUrl:
    """The base URL from the request itself, and from what proxies told of it, where they did."""
    own_scheme = "https" if scope["scheme"] in ("https", "wss") else "http"
    own_host = Headers(scope=scope).get("host", "")
    told, scheme = bool(host or scheme), scheme or own_scheme
    host = host.removesuffix(":443" if scheme == "https" else ":80")
    return BaseUrl(scheme, host or (own_host if is_host(own_host) else ""), prefix, host, told)


def url_of(connection: HTTPConnection, path: str) -> str:
    """The URL of a path of this server for this client: absolute where proxies told of a host, else the path."""
    return base_url(connection.scope).url(path)


def is_host(text: str) -> bool:
    """Whether `text` is a host name or address with an optional port, as in a Host header."""
    host = r"[A-Za-z0-9.\-_]+(:\d{1,5})?|\[[0-9A-Fa-f:.]+\](:\d{1,5})?"
    return len(text) <= 261 and re.fullmatch(host, text) is not None


def ws_url(connection: HTTPConnection, id: str) -> str:
    """URL of the stream's WebSocket for this client, with a view token where the server has keys.

    Browsers cannot send an Authorization header with a WebSocket, so the URL carries the credential.
    """
    token = access_of(connection).issue_token(principal_of(connection), id)
    return with_token(socket_url(connection, id), token)


def socket_url(connection: HTTPConnection, id: str) -> str:
    """URL of the stream's WebSocket without a token: absolute, or only the path if the Host header is malformed."""
    base = base_url(connection.scope)
    path = f"{base.prefix}/v1/streams/{id}/ws"
    return f"{base.scheme.replace('http', 'ws')}://{base.host}{path}" if base.host else path


def with_token(url: str, token: str) -> str:
    """The URL, which has no query yet, with `?token=`; unchanged if the token is empty."""
    return f"{url}?token={token}" if token else url
