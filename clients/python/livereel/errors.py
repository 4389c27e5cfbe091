"""What can go wrong, as exceptions. Each message says what to do."""

from collections.abc import Mapping
from typing import Any


class LivereelError(Exception):
    """Base of every exception that this package raises on purpose."""

    code: str = "failed"
    """Stable, and meant for programs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ConnectionFailed(LivereelError):
    """The server could not be reached, or the connection broke and could not be restored in time."""

    code = "unreachable"


class StreamFailed(LivereelError):
    """The stream that is being watched has failed. `code` is stable and meant for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class VideoFailed(StreamFailed):
    """The clip could not be made. `retryable` says whether the same request may succeed if it is sent again."""

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(code, message)
        self.retryable = retryable


class ApiError(LivereelError):
    """The server refused a request.

    `code` is stable and meant for programs, `message` for people. `param` names the field at fault, if there is one;
    `retry_after` is in seconds, if the server gave it; `request_id` finds the request in the server's log.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str = "",
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after


class InvalidRequest(ApiError):
    """400 and every 4xx without a class of its own: a field is wrong, and `param` names it."""


class AuthenticationFailed(ApiError):
    """401: the API key or token is missing, wrong or expired."""


class PermissionDenied(ApiError):
    """403: the API key or token may not do this."""


class NotFound(ApiError):
    """404: there is no such stream, clip, recording, output or model."""


class Conflict(ApiError):
    """409: what was asked for does not fit the state, such as a change to a stream that has ended."""


class RateLimited(ApiError):
    """429: too many requests, or the queue for streams is full. See `retry_after`."""


class ServerFault(ApiError):
    """5xx: the server cannot answer now. See `retry_after`."""


CLASSES: dict[int, type[ApiError]] = {
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: NotFound,
    409: Conflict,
    429: RateLimited,
}
"""Exception by HTTP status. Every other 4xx is `InvalidRequest`, every 5xx `ServerFault`."""


def api_error(status: int, body: Any, headers: Mapping[str, str]) -> ApiError:
    """The exception for an answer that is no success. `body` is its decoded JSON, or None; header names are lower case.

    An answer that is not the API's error object (a proxy's page, say) becomes an error with the code `http_STATUS`.
    """
    body = body if isinstance(body, dict) else {}
    error = body.get("error") if isinstance(body.get("error"), dict) else {}
    kind = CLASSES.get(status, ServerFault if status >= 500 else InvalidRequest)
    return kind(
        status,
        str(error.get("code") or f"http_{status}"),
        str(error.get("message") or f"The server answered with the HTTP status {status}: is this a Livereel server?"),
        type=str(error.get("type") or ""),
        param=error.get("param"),
        request_id=body.get("request_id") or headers.get("x-request-id"),
        retry_after=seconds(headers.get("retry-after")),
    )


def seconds(header: str | None) -> float | None:
    """The value of a `Retry-After` header, if it is a number of seconds (RFC 9110, 10.2.3)."""
    return float(header) if header is not None and header.isascii() and header.isdigit() else None


def _rebuild(kind: type[LivereelError], args: tuple[Any, ...], fields: dict[str, Any]) -> LivereelError:
    """Restore a pickled error: exceptions are otherwise made anew from `args`, which is the message alone."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error
