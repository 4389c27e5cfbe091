"""Requests that are sent again because nobody heard the answer: what they made is made once.

A client that sends `Idempotency-Key` with a request (draft-ietf-httpapi-idempotency-key-header-07) may send it again,
and gets what the first one made. Keys of one client are none of another's.
"""

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from server.errors import ApiError

HEADER = "Idempotency-Key"
KEY = r"^[\x21-\x7e][\x20-\x7e]{0,254}$"
REPLAYED = {"Idempotent-Replayed": "true"}
"""Headers of an answer that was given before."""

KEPT_SECONDS = 24 * 3600.0
MAX_CLAIMS = 8192
"""Of all clients together; beyond that, the oldest of whoever has most are forgotten before their time."""


@dataclass(slots=True)
class Claim:
    """A request that nobody but its sender may send again."""

    fingerprint: str
    since: float
    made: str | None = None
    """Id of what the request has made. Set it before the claim is left; without it nothing has happened."""
    replayed: bool = False
    """`made` is of an earlier request: answer with that."""


def fingerprint(operation: str, payload: Any, *uploads: bytes) -> str:
    """What tells requests apart: the operation, such as `POST /v1/streams`, and its checked body."""
    digest = hashlib.sha256(json.dumps([operation, payload], sort_keys=True).encode())
    for upload in uploads:
        digest.update(hashlib.sha256(upload).digest())
    return digest.hexdigest()


class Idempotency:
    """What was asked for under which key, by client: the serial of an API key, or None where there are none.

    Times are seconds of any one monotonic clock.
    """

    def __init__(self) -> None:
        self._claims: dict[int | None, OrderedDict[str, Claim]] = {}
        self._count = 0

    @contextmanager
    def claim(self, client: int | None, key: str | None, fingerprint: str, now: float) -> Iterator[Claim]:
        """Do something once: either `replayed`, or to be done here, whereupon `made` is to be set.

        Without a key it is always to be done. Whoever fails or makes nothing may try again under the same key.

        Raises:
            ApiError: the key is none (400), is of another request (422), or of one that is still going on (409).
        """
        if key is None:
            yield Claim(fingerprint, now)
            return
        if not re.fullmatch(KEY, key):
            message = f"`{HEADER}` must be 1 to 255 characters of ASCII without control characters."
            raise ApiError(400, "invalid_idempotency_key", message, param=HEADER)
        self._forget(now)
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

    def keep_keys(self, serials: Container[int]) -> None:
        """Forget what was asked for under all other API keys."""
        for client in [client for client in self._claims if client is not None and client not in serials]:
            self._count -= len(self._claims.pop(client))

    def _forget(self, now: float) -> None:
        for client, claims in list(self._claims.items()):
            while claims and now - next(iter(claims.values())).since >= KEPT_SECONDS:
                self._drop(client, next(iter(claims)))
        while self._count >= MAX_CLAIMS:
            client, claims = max(self._claims.items(), key=lambda item: len(item[1]))
            self._drop(client, next(iter(claims)))

    def _drop(self, client: int | None, key: str) -> None:
        del self._claims[client][key]
        self._count -= 1
        if not self._claims[client]:
            del self._claims[client]
