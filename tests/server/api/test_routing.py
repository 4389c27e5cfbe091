"""Routes as data, and the URLs that responses contain."""

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from server.api.routing import Route, routes_at, socket_url, wants_alpha, with_token
from server.errors import ApiError


def request(host: str = "localhost", query: str = "", scheme: str = "http", path: str = "/", **state: Any) -> Request:
    return Request(
        {
            "type": "http",
            "method": "GET",
            "scheme": scheme,
            "path": path,
            "query_string": query.encode(),
            "headers": [(b"host", host.encode())],
            "app": SimpleNamespace(state=SimpleNamespace(**state)),
        }
    )


@pytest.mark.parametrize(
    ("host", "scheme", "url"),
    [
        ("localhost:8000", "http", "ws://localhost:8000/v1/streams/st_1/ws"),
        ("live.example", "https", "wss://live.example/v1/streams/st_1/ws"),
        ("[::1]:80", "ws", "ws://[::1]:80/v1/streams/st_1/ws"),
        ("a b", "http", "/v1/streams/st_1/ws"),
        ("", "http", "/v1/streams/st_1/ws"),
    ],
)
def test_socket_url(host: str, scheme: str, url: str) -> None:
    assert socket_url(request(host, scheme=scheme), "st_1") == url


def test_a_token_is_added_to_a_url_unless_it_is_empty() -> None:
    assert with_token("ws://localhost/ws", "lrt_x.y") == "ws://localhost/ws?token=lrt_x.y"
    assert with_token("ws://localhost/ws", "") == "ws://localhost/ws"


def test_alpha_is_none_or_stacked() -> None:
    assert [wants_alpha(request(query=query)) for query in ("", "alpha=none", "alpha=stacked")] == [False, False, True]
    with pytest.raises(ApiError) as caught:
        wants_alpha(request(query="alpha=yes"))
    assert (caught.value.status_code, caught.value.param) == (400, "alpha")


def test_routes_are_found_by_path() -> None:
    routes = [Route("GET", "/v1/streams", None), Route("GET", "/v1/streams/{id}", None), Route("PUT", "/v1/x", None)]
    found = routes_at(request(path="/v1/streams/st_1", routes=routes).scope)
    assert found == [routes[1]]
    assert routes_at(request(path="/v1/streams/st_1/ws", routes=routes).scope) == []
