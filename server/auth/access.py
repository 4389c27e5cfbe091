"""Who may do what: API keys, tokens for one stream, origins, and the gate before every route.

Without keys the server is for this machine alone, and everybody on it may do everything; then the Host header must name
this machine, so that no web page reaches the server through a name of its own (DNS rebinding). With keys everything
that `PUBLIC` does not list needs one, also routes that are added later.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Iterable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth import keys as key_files
from server.auth.keys import IMPLIED, Key, Keys
from server.config import is_loopback
from server.errors import ApiError, not_found, stream_not_found
from server.rate_limit import TokenBucket
from server.streams.registry import Streams

PUBLIC = {"/livez", "/readyz", "/", "/docs"}
"""For GET, and so is what lies under /assets/ and /overlay/. Probes carry no key, and a page must load before it can
ask for one: its files are the same in every Livereel. What it shows comes from routes that are not public."""

RULES: tuple[tuple[str, str, key_files.Scope], ...] = (
    ("GET", r"/metrics", "metrics"),
    ("PUT", r"/v1/loras", "admin"),
    (r"\w+", r"/v1/streams/[^/]+/whep(/.*)?", "view"),
    (r"\w+", r"/v1/streams/[^/]+/outputs(/.*)?", "control"),
)
"""Method, path and scope of what does not follow from the method: reading needs `view`, everything else `control`."""

OWNED_PATH = re.compile(r"/v1/(stream|video|recording)s/([^/]+)(?:/.*)?", re.DOTALL)
"""What belongs to somebody, and its id."""

TOKEN_PREFIX = "lrt_"
TOKEN_SECONDS = 600
"""Life of the tokens in `ws_url`: enough to connect, and to connect again."""
MAX_TOKEN_LENGTH = 512
TOKEN_REQUESTS_PER_MINUTE = 600
"""Of all who have tokens for the same stream; they do not spend what the key may."""
MAX_RATES = 4096

UNAUTHENTICATED, FORBIDDEN = 4401, 4403
"""WebSocket close codes."""

Granted = Literal["view", "control"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Whoever sent a request."""

    name: str
    """For the log."""
    scopes: frozenset[key_files.Scope]
    key: Key | None = None
    """None where no keys are configured."""
    stream: str | None = None
    """The one stream that a token is for."""
    token: str = ""

    @property
    def owner(self) -> str | None:
        """Who owns what it opens; None where there is nobody to tell apart."""
        return self.key.owner if self.key else None

    def sees(self, id: str, owner: str | None) -> bool:
        """Whether a stream, clip or recording of this owner exists for it."""
        if self.stream is not None:
            return id == self.stream
        return "admin" in self.scopes or owner == self.owner


LOCAL = Principal("local", IMPLIED["admin"])


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token says."""

    stream: str
    scope: Granted
    expires: float
    """Seconds of this process's monotonic clock, which nobody can set."""
    key: int
    """Serial of the key that it was made with: taken away, it takes the token along."""


class Tokens:
    """Makes and reads tokens. The secret lives as long as the process, as streams do, and is never stored.

    A token is `lrt_PAYLOAD.MAC`, both base64url, and the MAC HMAC-SHA256 of the payload's text. There is one
    algorithm, so none is named.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def issue(self, grant: Grant) -> str:
        """The token's text."""
        fields = [grant.stream, grant.scope, grant.expires, grant.key]
        payload = encode(json.dumps(fields, separators=(",", ":")).encode())
        return f"{TOKEN_PREFIX}{payload}.{self._mac(payload)}"

    def read(self, token: str, now: float) -> Grant | None:
        """What the token grants; None when it is not ours or has expired."""
        payload, dot, mac = token.removeprefix(TOKEN_PREFIX).partition(".")
        if not dot or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            return None
        # Compared as text, so that there is one spelling of each token.
        if not hmac.compare_digest(mac, self._mac(payload)):
            return None
        stream, scope, expires, key = json.loads(decode(payload))
        return Grant(stream, scope, expires, key) if now < expires else None

    def _mac(self, payload: str) -> str:
        return encode(hmac.digest(self._secret, payload.encode(), hashlib.sha256))


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Access:
    """The rules of one gateway, applied to one request after the other."""

    def __init__(self, keys: Keys | None, origins: Iterable[str] = ()) -> None:
        self.keys = keys
        self.origins = frozenset(origins)
        self._tokens = Tokens()
        self._rates: OrderedDict[str, tuple[int, TokenBucket]] = OrderedDict()
        self._leases: dict[asyncio.Timeout, Principal] = {}
        self.holders: list[Callable[[Container[int]], None]] = []
        """Called with the serials of the keys that there are, whenever these have changed: to end what was begun under
        any other."""

    def check_host(self, headers: Headers) -> None:
        """Without keys: refuse a request that was sent to another name than this machine's."""
        host = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d{1,5})?", headers.get("host", ""))
        if self.keys is None and not (host and is_loopback((host[1] or host[2]).lower())):
            raise ApiError(
                421,
                "host_not_allowed",
                "Without API keys this server answers only to localhost, 127.0.0.1 and [::1]: use one of these, or "
                "start it with --keys.",
            )

    def identify(self, headers: Headers, query: bytes, now: float) -> Principal:
        """Who sent the request: a key or a token in `Authorization`, or a token in the query; raises `ApiError`."""
        if self.keys is None:
            return LOCAL
        shown = headers.getlist("authorization")
        if shown:
            scheme, _, credential = shown[0].partition(" ")
            if len(shown) > 1 or scheme.lower() != "bearer":
                raise unauthenticated("Send one `Authorization: Bearer KEY`.")
            credential = credential.strip()
            if not credential.startswith(TOKEN_PREFIX):
                if key := self.keys.find(credential):
                    return Principal(key.name, key.scopes, key)
                raise unauthenticated("No such API key.")
        else:
            # A key never belongs into an address, which browsers and proxies write down: only tokens are looked for.
            credentials = [value for name, value in parse_qsl(query.decode("latin-1")) if name == "token"]
            if len(credentials) != 1:
                raise unauthenticated("Send an API key: `Authorization: Bearer KEY`.")
            credential = credentials[0]
        grant = self._tokens.read(credential, now)
        key = self.keys.current(grant.key) if grant else None
        if grant is None or key is None or grant.scope not in key.scopes:
            raise unauthenticated("The token is not valid, or has expired: ask for a new one.")
        return Principal(f"{key.name} (token)", IMPLIED[grant.scope], key, grant.stream, credential)

    def authorize(self, principal: Principal, method: str, path: str, owner: str | None) -> None:
        """Refuse what the principal may not do, with `ApiError`. `owner` is that of what the path names."""
        if match := OWNED_PATH.fullmatch(path):
            if not principal.sees(match[2], owner):
                # As if it did not exist: whether it does is nobody's business.
                raise stream_not_found() if match[1] == "stream" else not_found(match[1])
        elif principal.stream is not None:
            raise ApiError(403, "token_scope", "The token is for one stream: use an API key here.")
        scope = needed(method, path)
        if scope not in principal.scopes:
            raise ApiError(403, "scope_missing", f"This needs an API key with the scope `{scope}`.")

    def spend(self, principal: Principal, now: float) -> dict[str, str]:
        """Count a request; returns headers that say how many are left, or raises `ApiError` when none is."""
        if principal.key is None:
            return {}
        if principal.stream is None:
            name, limit = principal.key.name, principal.key.requests_per_minute
        else:
            name, limit = f"stream {principal.stream}", TOKEN_REQUESTS_PER_MINUTE
        known, rate = self._rates.pop(name, (0, None))
        if rate is None or known != limit:
            rate = TokenBucket(limit, now)
        self._rates[name] = limit, rate
        if len(self._rates) > MAX_RATES:
            self._rates.popitem(last=False)
        wait = rate.take(now)
        headers = {
            "x-ratelimit-limit-requests": str(limit),
            "x-ratelimit-remaining-requests": str(rate.left),
            "x-ratelimit-reset-requests": f"{rate.full_in:.3f}s",
        }
        if wait:
            message = f"More than {limit} requests a minute: try again in {wait} s."
            raise ApiError(429, "rate_limited", message, headers={**headers, "Retry-After": str(wait)})
        return headers

    def grant(self, principal: Principal, stream: str, scope: Granted = "view", seconds: float = TOKEN_SECONDS) -> str:
        """A token for one stream; empty where no keys are configured. Whoever came with one gets no other."""
        if principal.key is None or principal.stream is not None:
            return principal.token
        return self._tokens.issue(Grant(stream, scope, time.monotonic() + seconds, principal.key.serial))

    @contextlib.asynccontextmanager
    async def lease(self, principal: Principal) -> AsyncIterator[asyncio.Timeout]:
        """Do something for the principal for as long as its key is there: then this ends as a timeout does."""
        async with asyncio.timeout(None) as lease:
            self._leases[lease] = principal
            try:
                yield lease
            finally:
                del self._leases[lease]

    def reload(self, *, insist: bool = False) -> bool:
        """Read the keys again as `Keys.reload` does, and end what goes on under those that are gone."""
        if self.keys is None or not self.keys.reload(insist=insist):
            return False
        serials = self.keys.serials
        for lease, principal in self._leases.items():
            if principal.key and principal.key.serial not in serials and lease.when() is None:
                lease.reschedule(asyncio.get_running_loop().time())
        for keep in self.holders:
            keep(serials)
        return True

    def origin_allowed(self, headers: Headers) -> bool:
        """Whether a browser says that the page which sends this came from here, or from where the operator allows.

        Programs say nothing. Every request that changes something and every WebSocket is checked.
        """
        origins = headers.getlist("origin")
        if not origins:
            return True
        if len(origins) > 1:
            return False
        ours = re.fullmatch(r"https?://([^/?#@\s]+)", origins[0].lower())
        return origins[0] in self.origins or bool(ours and ours[1] == headers.get("host", "").lower())

    def cors(self, headers: Headers) -> list[tuple[str, str]]:
        """Headers that let a page of an allowed origin read the response. There are no cookies to send along."""
        if not self.origins:
            return [("cross-origin-resource-policy", "same-origin")]
        origin = headers.get("origin", "")
        if origin not in self.origins:
            return [("vary", "Origin")]
        exposed = (
            "Location, Link, Retry-After, Idempotent-Replayed, X-Request-Id, X-Ratelimit-Limit-Requests, "
            "X-Ratelimit-Remaining-Requests, X-Ratelimit-Reset-Requests"
        )
        return [("vary", "Origin"), ("access-control-allow-origin", origin), ("access-control-expose-headers", exposed)]


def needed(method: str, path: str) -> key_files.Scope:
    """The scope that a request needs. A WebSocket counts as GET."""
    for methods, paths, scope in RULES:
        if re.fullmatch(methods, method) and re.fullmatch(paths, path, re.DOTALL):
            return scope
    return "view" if method in ("GET", "HEAD", "OPTIONS") else "control"


def public(method: str, path: str) -> bool:
    """Whether anybody may have this."""
    return method in ("GET", "HEAD") and (path in PUBLIC or path.startswith(("/assets/", "/overlay/")))


def unauthenticated(message: str) -> ApiError:
    return ApiError(401, "unauthenticated", message, headers={"WWW-Authenticate": "Bearer"})


def access_of(connection: HTTPConnection) -> Access:
    """The application's rules."""
    access = connection.app.state.access
    assert isinstance(access, Access)
    return access


def principal_of(connection: HTTPConnection) -> Principal:
    """Who sent this request, as the gate found."""
    principal = connection.state.principal
    assert isinstance(principal, Principal)
    return principal


def signed(connection: HTTPConnection, stream: str, url: str) -> str:
    """The address, with a token to view the stream where one is needed: browsers cannot send headers everywhere."""
    return with_token(url, access_of(connection).grant(principal_of(connection), stream))


def with_token(url: str, token: str) -> str:
    """The address, which has no query yet, with the token unless it is empty."""
    return f"{url}?token={token}" if token else url


EndSocket = Callable[[Scope, Receive, Send, ApiError], Awaitable[None]]


class Gate:
    """Before every route, mounted applications and sockets included: nothing passes that the rules do not let."""

    def __init__(
        self, app: ASGIApp, *, access: Access, streams: Streams, refuse: EndSocket, cut_off: EndSocket
    ) -> None:
        """`refuse` ends a socket that is not accepted yet, `cut_off` any, and a response that has begun."""
        self._app = app
        self._access = access
        self._streams = streams
        self._refuse, self._cut_off = refuse, cut_off

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        access, headers, socket = self._access, Headers(scope=scope), scope["type"] == "websocket"
        method, path = "GET" if socket else scope["method"], scope["path"]
        try:
            check_head(headers)
            access.check_host(headers)
            if method == "OPTIONS" and is_preflight(headers) and headers.get("origin") in access.origins:
                await preflight()(scope, receive, send)
                return
            if socket and not access.origin_allowed(headers):
                await send({"type": "websocket.close"})  # before the handshake is done, this is a 403
                return
            if not socket and public(method, path):
                await self._app(scope, receive, send)
                return
            now = time.monotonic()
            principal = access.identify(headers, scope["query_string"], now)
            scope.setdefault("state", {})["principal"] = principal
            owned = OWNED_PATH.fullmatch(path)
            # Counted before anything else is looked at, so that nobody may try without bound.
            left = access.spend(principal, now)
        except ApiError as error:
            if not socket:
                raise
            await self._refuse(scope, receive, send, error)
            return
        started = False

        async def send_with_limits(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(left)
            await send(message)

        try:
            access.authorize(principal, method, path, self._streams.owner(owned[2]) if owned else None)
            async with access.lease(principal) as lease:
                await self._app(scope, receive, send_with_limits)
        except ApiError as error:
            if socket:
                await self._refuse(scope, receive, send, error)
                return
            error.headers = {**left, **(error.headers or {})}
            raise
        except TimeoutError:
            if not lease.expired():
                raise
            revoked = unauthenticated("The API key was taken away.")
            if not socket and not started:
                raise revoked from None
            await self._cut_off(scope, receive, send, revoked)


MAX_HEADERS = 100
MAX_HEAD_BYTES = 16 * 1024
"""Of all headers together. The HTTP parser bounds only what it has to wait for, not what arrives at once."""


def check_head(headers: Headers) -> None:
    """Refuse a request with headers that no client of ours sends."""
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEAD_BYTES:
        message = f"Send at most {MAX_HEAD_BYTES} bytes of headers."
        raise ApiError(431, "headers_too_large", message, headers={"Connection": "close"})
    if len(headers.raw) > MAX_HEADERS:
        raise ApiError(431, "too_many_headers", f"Send at most {MAX_HEADERS} headers.", headers={"Connection": "close"})
    if "transfer-encoding" in headers and "content-length" in headers:
        # A proxy that believes the one and a server that believes the other see different requests.
        message = "Send Content-Length or Transfer-Encoding, not both."
        raise ApiError(400, "ambiguous_length", message, headers={"Connection": "close"})


def is_preflight(headers: Headers) -> bool:
    """Whether a browser asks on its own what a page may send; it sends no key with that."""
    return "access-control-request-method" in headers


def preflight() -> Response:
    """What a page of an allowed origin may send."""
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS",
            "Access-Control-Allow-Headers": "Authorization, Content-Type, Idempotency-Key, If-Match, X-Request-Id",
            "Access-Control-Max-Age": "600",
        },
    )
