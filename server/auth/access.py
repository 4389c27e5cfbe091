"""Authentication and authorization: who sent a request, and whether they may do what it asks.

Without API keys the server is meant for this machine alone and every request may do everything. The Host header must
then name this machine, so that a web page cannot reach the server through DNS rebinding. With keys, every path that
`PUBLIC` does not list needs a key or a token, including routes that are added later.
"""

import asyncio
import contextlib
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qsl

from starlette.datastructures import Headers

from server.auth.keys import IMPLIED, Key, Keys, Scope
from server.auth.revocation import KeyHolder, end_revoked
from server.auth.tokens import TOKEN_PREFIX, Grant, Tokens, TokenScope
from server.config import is_loopback
from server.errors import ApiError, not_found, stream_not_found
from server.rate_limit import TokenBucket

PUBLIC = {"/livez", "/readyz", "/", "/docs"}
"""Paths that GET needs no key for, besides those under /assets/ and /overlay/.

Probes carry no key, and a page must load before it can ask for one. The page's files are the same in every Livereel;
what the page shows comes from routes that are not public.
"""

RULES: tuple[tuple[str, str, Scope], ...] = (
    ("GET", r"/metrics", "metrics"),
    ("PUT", r"/v1/loras", "admin"),
    (r"\w+", r"/v1/streams/[^/]+/whep(/.*)?", "view"),
    (r"\w+", r"/v1/streams/[^/]+/outputs(/.*)?", "control"),
)
"""Method, path and required scope, where the method alone does not decide: reads need `view`, all else `control`."""

OWNED_PATH = re.compile(r"/v1/(stream|video|recording)s/([^/]+)(?:/.*)?", re.DOTALL)
"""Paths of resources that belong to an owner. Groups: kind and id."""

TOKEN_SECONDS = 600
"""Lifetime of the tokens in `ws_url`: enough to connect, and to reconnect."""
TOKEN_REQUESTS_PER_MINUTE = 600
"""Request limit shared by all tokens for the same stream. It does not count against the key's own limit."""
MAX_RATES = 4096
"""How many rate counters are kept; the one that was used least recently is dropped first."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The authenticated sender of a request."""

    name: str
    """For the log."""
    scopes: frozenset[Scope]
    key: Key | None = None
    """None where no keys are configured."""
    stream: str | None = None
    """The one stream that a token is for; None for a key."""
    token: str = ""

    @property
    def owner(self) -> str | None:
        """Owner of what this principal creates; None where no keys are configured."""
        return self.key.owner if self.key else None

    def sees(self, id: str, owner: str | None) -> bool:
        """Whether this principal may know of the stream, clip or recording `id`, which belongs to `owner`."""
        if self.stream is not None:
            return id == self.stream
        return "admin" in self.scopes or owner == self.owner


LOCAL = Principal("local", IMPLIED["admin"])
"""Everybody, where no keys are configured."""


class Access:
    """The access rules of one gateway: authentication, authorization, rate limits, origins, revocation."""

    def __init__(self, keys: Keys | None, origins: Iterable[str] = ()) -> None:
        """`origins` are the web origins that the operator allows besides the gateway's own."""
        self.keys = keys
        self.origins = frozenset(origins)
        self._tokens = Tokens()
        self._rates: OrderedDict[str, tuple[int, TokenBucket]] = OrderedDict()
        self._leases: dict[asyncio.Timeout, Principal] = {}
        self.holders: list[KeyHolder] = [self]
        """Where to look for what revoked keys have started, whenever the keys change."""

    def check_host(self, headers: Headers) -> None:
        """Without keys: raise `ApiError` if the request was sent to a host name other than this machine's."""
        if not self.serves_host(headers.get("host", "")):
            raise ApiError(
                421,
                "host_not_allowed",
                "Without API keys this server answers only to localhost, 127.0.0.1 and [::1]: use one of these, or "
                "start it with --keys.",
            )

    def serves_host(self, host: str) -> bool:
        """Whether requests to this host, with an optional port, are served: without keys only to this machine's."""
        name = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]]+))(?::\d{1,5})?", host)
        return self.keys is not None or bool(name and is_loopback((name[1] or name[2]).lower()))

    def authenticate(self, headers: Headers, query: bytes, now: float) -> Principal:
        """The sender of a request, by the key or token in `Authorization` or the token in the query.

        `now` is in monotonic seconds. Raises `ApiError` 401 if there is no valid credential.
        """
        if self.keys is None:
            return LOCAL
        given = headers.getlist("authorization")
        if given:
            scheme, _, credential = given[0].partition(" ")
            if len(given) > 1 or scheme.lower() != "bearer":
                raise unauthenticated("Send one `Authorization: Bearer KEY`.")
            credential = credential.strip()
            if not credential.startswith(TOKEN_PREFIX):
                if key := self.keys.find(credential):
                    return Principal(key.name, key.scopes, key)
                raise unauthenticated("No such API key.")
        else:
            # Browsers and proxies log URLs, so a key is never accepted in one: only tokens are looked for.
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
        """Raise `ApiError` if the principal may not do this. `owner` owns the resource that the path names."""
        if match := OWNED_PATH.fullmatch(path):
            if not principal.sees(match[2], owner):
                # Report it as missing, so that the answer does not reveal whether it exists.
                raise stream_not_found() if match[1] == "stream" else not_found(match[1])
        elif principal.stream is not None:
            raise ApiError(403, "token_scope", "The token is for one stream: use an API key here.")
        scope = required_scope(method, path)
        if scope not in principal.scopes:
            raise ApiError(403, "scope_missing", f"This needs an API key with the scope `{scope}`.")

    def count_request(self, principal: Principal, now: float) -> dict[str, str]:
        """Count a request against the rate limit; returns the headers that report what is left.

        Raises `ApiError` 429 when the limit is exceeded.
        """
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

    def issue_token(
        self, principal: Principal, stream: str, scope: TokenScope = "view", seconds: float = TOKEN_SECONDS
    ) -> str:
        """A token for one stream, empty where no keys are configured.

        A principal that came with a token gets that token back: tokens do not issue tokens.
        """
        if principal.key is None or principal.stream is not None:
            return principal.token
        return self._tokens.issue(Grant(stream, scope, time.monotonic() + seconds, principal.key.serial))

    @contextlib.asynccontextmanager
    async def lease(self, principal: Principal) -> AsyncIterator[asyncio.Timeout]:
        """Run the body while the principal's key is valid; revoking the key ends it with `TimeoutError`."""
        async with asyncio.timeout(None) as lease:
            self._leases[lease] = principal
            try:
                yield lease
            finally:
                del self._leases[lease]

    def reload(self, *, force: bool = False) -> bool:
        """Reload the keys as `Keys.reload` does, and end what revoked keys started; returns whether they were read."""
        if self.keys is None or not self.keys.reload(force=force):
            return False
        for holder in self.holders:
            end_revoked(holder, self.keys.serials)
        return True

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The requests and connections that run under a lease; see `KeyHolder`."""
        for lease, principal in self._leases.items():
            if principal.key and lease.when() is None:
                yield principal.key.serial, partial(lease.reschedule, asyncio.get_running_loop().time())

    def origin_allowed(self, headers: Headers, forwarded_host: str = "") -> bool:
        """Whether the request comes from the gateway's own page, an allowed origin, or no browser at all.

        The page is at the host of the Host header, or at `forwarded_host`, which trusted proxies name, if it is served.
        Programs send no Origin header. Every request that changes something and every WebSocket is checked.
        """
        origins = headers.getlist("origin")
        if not origins:
            return True
        if len(origins) > 1:
            return False
        page = re.fullmatch(r"https?://([^/?#@\s]+)", origins[0].lower())
        hosts = [headers.get("host", "").lower()]
        if forwarded_host and self.serves_host(forwarded_host):
            hosts.append(forwarded_host.lower())
        return origins[0] in self.origins or bool(page and page[1] in hosts)

    def cors_headers(self, headers: Headers) -> list[tuple[str, str]]:
        """Response headers that let a page of an allowed origin read the response. No cookies are involved."""
        if not self.origins:
            return [("cross-origin-resource-policy", "same-origin")]
        origin = headers.get("origin", "")
        if origin not in self.origins:
            return [("vary", "Origin")]
        exposed = (
            "Location, Link, ETag, Accept-Patch, Retry-After, Idempotent-Replayed, X-Request-Id, "
            "X-Ratelimit-Limit-Requests, X-Ratelimit-Remaining-Requests, X-Ratelimit-Reset-Requests"
        )
        return [("vary", "Origin"), ("access-control-allow-origin", origin), ("access-control-expose-headers", exposed)]


def required_scope(method: str, path: str) -> Scope:
    """The scope that a request needs. HEAD and a WebSocket handshake count as GET."""
    method = "GET" if method == "HEAD" else method
    for methods, paths, scope in RULES:
        if re.fullmatch(methods, method) and re.fullmatch(paths, path, re.DOTALL):
            return scope
    return "view" if method in ("GET", "OPTIONS") else "control"


def is_public(method: str, path: str) -> bool:
    """Whether a request needs no key."""
    return method in ("GET", "HEAD") and (path in PUBLIC or path.startswith(("/assets/", "/overlay/")))


def unauthenticated(message: str) -> ApiError:
    return ApiError(401, "unauthenticated", message, headers={"WWW-Authenticate": "Bearer"})
