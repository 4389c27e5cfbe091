"""Exceptions: class by status, the fields of the server's error object, and answers that have none."""

import copy
import pickle

import pytest
from livereel import errors
from livereel.errors import api_error

from server.errors import ApiError as ServerError


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequest),
        (401, errors.AuthenticationFailed),
        (403, errors.PermissionDenied),
        (404, errors.NotFound),
        (409, errors.Conflict),
        (413, errors.InvalidRequest),
        (429, errors.RateLimited),
        (500, errors.ServerFault),
        (503, errors.ServerFault),
        (507, errors.ServerFault),
    ],
)
def test_the_servers_error_object(status: int, kind: type[errors.ApiError]) -> None:
    made = ServerError(status, "some_code", "Do this.", param="prompt", headers={"Retry-After": "5"})
    error = api_error(status, made.body, {"retry-after": "5", "x-request-id": "r1"})
    assert type(error) is kind and isinstance(error, errors.LivereelError)
    assert (error.status, error.code, error.message, str(error)) == (status, "some_code", "Do this.", "Do this.")
    assert (error.param, error.type, error.request_id, error.retry_after) == ("prompt", made.error["type"], "r1", 5)


@pytest.mark.parametrize("body", [None, [], {"error": "x"}, {"error": {}}, {"detail": "Bad Gateway"}])
def test_an_answer_of_something_else(body: object) -> None:
    error = api_error(502, body, {"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})
    assert error.code == "http_502" and "502" in error.message and error.retry_after is None


def test_errors_can_be_sent_to_other_processes() -> None:
    error = api_error(404, {"error": {"code": "stream_not_found", "message": "Gone."}, "request_id": "r1"}, {})
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is errors.NotFound and str(other) == "Gone."
        assert other.__dict__ == error.__dict__
    failed = errors.VideoFailed("numeric", "NaN", retryable=True)
    assert pickle.loads(pickle.dumps(failed)).__dict__ == failed.__dict__
