"""Everything that can go wrong under /v1, as one exception and one JSON object."""

import contextvars
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Of the request that is being served; empty outside of any."""


class ApiError(HTTPException):
    """A failure that the client is told about: `{"error": {"message", "type", "param", "code"}, "request_id"}`.

    `param` names the field at fault, if one is; `code` is stable and meant for programs, `message` for people.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code
        self.param = param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        if self.status_code == 401:
            type = "authentication_error"
        elif self.status_code == 403:
            type = "permission_error"
        elif self.status_code == 429:
            type = "rate_limit_error"
        elif self.status_code >= 500:
            type = "server_error"
        else:
            type = "invalid_request_error"
        error = {"message": self.detail, "type": type, "param": self.param, "code": self.code}
        return {"error": error, "request_id": request_id.get()}


def stream_not_found() -> ApiError:
    return ApiError(404, "stream_not_found", "No stream has this id: it never existed, or it ended a while ago.")


def not_found(kind: str) -> ApiError:
    message = f"No {kind} has this id: it never existed, was deleted, or has expired."
    return ApiError(404, f"{kind}_not_found", message)


def shutting_down() -> ApiError:
    message = "The server is shutting down: try another one."
    return ApiError(503, "shutting_down", message, headers={"Retry-After": "10"})


def busy(retry_after: int) -> ApiError:
    message = f"Every place is taken and the queue is full: try again in {retry_after} s."
    return ApiError(429, "queue_full", message, headers={"Retry-After": str(retry_after)})


def stream_ended(reason: str | None) -> ApiError:
    return ApiError(
        409, "stream_ended", f"The stream is over ({reason or 'finished'}) and cannot change: open a new one."
    )


def engine_unavailable() -> ApiError:
    message = "The engine is not up: see /readyz, and try again when it is."
    return ApiError(503, "engine_unavailable", message, headers={"Retry-After": "5"})


def exhausted() -> ApiError:
    message = "The server has run out of what its system gives it: try again soon."
    return ApiError(503, "exhausted", message, headers={"Retry-After": "5"})


def too_many_viewers() -> ApiError:
    message = "This stream has all the viewers that it can take."
    return ApiError(503, "too_many_viewers", message, headers={"Retry-After": "5"})
