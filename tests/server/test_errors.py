"""The error object: its type follows from the status, and it carries the id of the request."""

import json

import pytest

from server.errors import ApiError, request_id


@pytest.mark.parametrize(
    ("status", "type"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_the_type_follows_from_the_status(status: int, type: str) -> None:
    error = ApiError(status, "some_code", "Some message.", param="seed")
    assert error.error == {"message": "Some message.", "type": type, "param": "seed", "code": "some_code"}


def test_the_response_has_the_error_its_headers_and_the_requests_id() -> None:
    token = request_id.set("req_1")
    try:
        response = ApiError(503, "busy", "Try again.", headers={"Retry-After": "5"}).response
    finally:
        request_id.reset(token)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    body = json.loads(response.body)
    assert body["error"]["code"] == "busy"
    assert body["request_id"] == "req_1"
