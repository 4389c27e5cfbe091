"""The errors of the HTTP API: one exception, and the JSON object that clients get for it."""

import contextvars
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the request that is being served; empty outside of any request."""

ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""Error type by status. Every other 4xx is an `invalid_request_error`, every 5xx a `server_error`."""


class ApiError(HTTPException):
    """An error that is reported to the client: `{"error": {"message", "type", "param", "code"}, "request_id"}`.

    `param` names the request field at fault, if there is one. `code` is stable and meant for programs, `message` for
    people.
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
    def error(self) -> dict[str, Any]:
        """The error object: `message`, `type`, `param` and `code`."""
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        type = ERROR_TYPES.get(self.status_code, default)
        return {"message": self.detail, "type": type, "param": self.param, "code": self.code}

    @property
    def body(self) -> dict[str, Any]:
        """The whole response body: the error object and the id of the request that is being served."""
        return {"error": self.error, "request_id": request_id.get()}

    @property
    def response(self) -> JSONResponse:
        """The response that reports this error."""
        return JSONResponse(self.body, self.status_code, dict(self.headers or {}))


def stream_not_found() -> ApiError:
    return ApiError(404, "stream_not_found", "No stream has this id: it never existed, or it ended a while ago.")


def not_found(kind: str) -> ApiError:
    message = f"No {kind} has this id: it never existed, was deleted, or has expired."
    return ApiError(404, f"{kind}_not_found", message)


def file_removed() -> ApiError:
    return ApiError(410, "file_removed", "The file was removed from the server's data folder by hand.")


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
