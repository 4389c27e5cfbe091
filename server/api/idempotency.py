"""Idempotent requests: a request that is retried under the same `Idempotency-Key` creates its resource only once.

The retry gets the resource that the first request created (draft-ietf-httpapi-idempotency-key-header-07). Each client
has its own namespace of keys.
"""

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.requests import Request

from server.api.routing import principal_of
from server.errors import ApiError

HEADER = "Idempotency-Key"
KEY = r"^[\x21-\x7e][\x20-\x7e]{0,254}$"
REPLAYED = {"Idempotent-Replayed": "true"}
"""Headers of a response to a retried request."""

KEPT_SECONDS = 24 * 3600.0
MAX_CLAIMS = 8192
"""Of all clients together. Beyond that, the client with the most claims loses its oldest ones early."""

PARAMETER = {
    "name": HEADER,
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": KEY},
    "description": "Sent again with the same request within a day, it gets what the first one made, with the header "
    "`Idempotent-Replayed: true`.",
}
"""The header's description for OpenAPI."""


@dataclass(slots=True)
class Claim:
    """A request that was sent under an idempotency key."""

    fingerprint: str
    since: float
    made: str | None = None
    """Id of the resource that the request created. Set it before the context ends; unset means that it failed."""
    replayed: bool = False
    """An earlier request created `made`: answer with that."""


def fingerprint(operation: str, payload: Any, *uploads: bytes) -> str:
    """SHA-256 of a request: the operation, such as `POST /v1/streams`, its validated body and its uploads."""
    digest = hashlib.sha256(json.dumps([operation, payload], sort_keys=True).encode())
    for upload in uploads:
        digest.update(hashlib.sha256(upload).digest())
    return digest.hexdigest()


class Idempotency:
    """The claims of all clients. A client is the serial of an API key, or None where no keys are configured.

    Times are monotonic seconds.
    """

    def __init__(self) -> None:
        self._claims: dict[int | None, OrderedDict[str, Claim]] = {}
        self._count = 0

    @contextmanager
    def claim(self, client: int | None, key: str | None, fingerprint: str, now: float) -> Iterator[Claim]:
        """Claim the right to create a resource under a key, for the duration of the context.

        If the claim is `replayed`, `made` is the id of the existing resource; otherwise the caller creates it and sets
        `made`. Without a key the caller always creates it. If the context ends with `made` unset, the key is released.

        Raises:
            ApiError: the key is malformed (400), belongs to another request (422), or to one in progress (409).
        """
        if key is None:
            yield Claim(fingerprint, now)
            return
        if not re.fullmatch(KEY, key):
            message = f"`{HEADER}` must be 1 to 255 characters of ASCII without control characters."
            raise ApiError(400, "invalid_idempotency_key", message, param=HEADER)
        self._expire(now)
        mine = self._claims.get(client, OrderedDict[str, Claim]())
        if known := mine.get(key):
            if known.fingerprint != fingerprint:
                message = f"`{HEADER}` was sent with another request before: use a new one for each."
                raise ApiError(422, "idempotency_key_reused", message, param=HEADER)
            if known.made is None:
                message = f"The request with this `{HEADER}` is still going on: try again in a second."
                raise ApiError(409, "request_in_progress", message, param=HEADER, headers={"Retry-After": "1"})
            yield Claim(fingerprint, known.since, known.made, replayed=True)
            return
        claim = mine[key] = Claim(fingerprint, now)
        self._claims[client] = mine
        self._count += 1
        try:
            yield claim
        finally:
            if claim.made is None and self._claims.get(client) is mine and mine.get(key) is claim:
                self._drop(client, key)

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The claims of each client; see `KeyHolder`."""
        for client in self._claims:
            yield client, partial(self._drop_client, client)

    def _expire(self, now: float) -> None:
        for client, claims in list(self._claims.items()):
            while claims and now - next(iter(claims.values())).since >= KEPT_SECONDS:
                self._drop(client, next(iter(claims)))
        while self._count >= MAX_CLAIMS:
            client, claims = max(self._claims.items(), key=lambda item: len(item[1]))
            self._drop(client, next(iter(claims)))

    def _drop_client(self, client: int | None) -> None:
        self._count -= len(self._claims.pop(client))

    def _drop(self, client: int | None, key: str) -> None:
        del self._claims[client][key]
        self._count -= 1
        if not self._claims[client]:
            del self._claims[client]


def claim(request: Request, operation: str, payload: Any, *uploads: bytes) -> AbstractContextManager[Claim]:
    """`Idempotency.claim` for the sender and the `Idempotency-Key` header of this request."""
    claims: Idempotency = request.app.state.idempotency
    client, keys = principal_of(request).key, request.headers.getlist(HEADER)
    return claims.claim(
        client.serial if client else None,
        ", ".join(keys) if keys else None,
        fingerprint(operation, payload, *uploads),
        time.monotonic(),
    )
