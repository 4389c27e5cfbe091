"""Tokens: short-lived credentials for one stream, for browsers and guests that must not have an API key."""

import base64
import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Literal

TOKEN_PREFIX = "lrt_"
MAX_TOKEN_LENGTH = 512

TokenScope = Literal["view", "control"]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token allows: one scope on one stream until `expires`."""

    stream: str
    scope: TokenScope
    expires: float
    """Seconds on this process's monotonic clock, so that changing the system time does not extend a token."""
    key: int
    """Serial of the API key that issued the token. Revoking the key revokes the token."""


class Tokens:
    """Issues and verifies tokens under a secret that lives as long as the process and is never stored.

    A token is `lrt_PAYLOAD.MAC`. Both parts are base64url; the MAC is HMAC-SHA256 over the encoded payload. The
    algorithm is fixed, so the token does not name one.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def issue(self, grant: Grant) -> str:
        """The token's text."""
        fields = [grant.stream, grant.scope, grant.expires, grant.key]
        payload = base64url_encode(json.dumps(fields, separators=(",", ":")).encode())
        return f"{TOKEN_PREFIX}{payload}.{self._mac(payload)}"

    def read(self, token: str, now: float) -> Grant | None:
        """The token's grant; None if the token is malformed, forged or expired at `now` (monotonic seconds)."""
        payload, dot, mac = token.removeprefix(TOKEN_PREFIX).partition(".")
        if not dot or len(token) > MAX_TOKEN_LENGTH or not token.isascii():
            return None
        # The encoded text is compared, not the decoded bytes, so that each token has exactly one spelling.
        if not hmac.compare_digest(mac, self._mac(payload)):
            return None
        stream, scope, expires, key = json.loads(base64url_decode(payload))
        return Grant(stream, scope, expires, key) if now < expires else None

    def _mac(self, payload: str) -> str:
        return base64url_encode(hmac.digest(self._secret, payload.encode(), hashlib.sha256))


def base64url_encode(data: bytes) -> str:
    """Base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def base64url_decode(text: str) -> bytes:
    """The inverse of `base64url_encode`."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
