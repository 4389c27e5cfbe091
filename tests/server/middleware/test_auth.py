"""What the authentication middleware checks before any route: hosts, origins, preflights and headers."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets

from server.auth import keys

pytestmark = pytest.mark.anyio

Start = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


async def test_without_keys_only_this_machines_names_are_answered(run_gateway: Start) -> None:
    async with run_gateway() as gateway:
        port = gateway.address.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", "127.0.0.1", "[::1]:80"):
            assert (await gateway.http.get("/v1/streams", headers={"host": host})).status_code == 200
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "localhost@evil.example", ""):
            response = await gateway.http.get("/v1/streams", headers={"host": host})
            assert response.status_code in (400, 421), host


OPEN = {"prompt": "a red ball"}


async def test_pages_from_elsewhere_change_and_watch_nothing(run_gateway: Start) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        foreign = {"origin": "https://evil.example"}
        assert (await gateway.http.post("/v1/streams", json=OPEN, headers=foreign)).status_code == 403
        path = f"/v1/streams/{stream['id']}"
        assert (await gateway.http.delete(path, headers=foreign)).status_code == 403
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(stream["ws_url"], additional_headers=foreign)
        assert refused.value.response.status_code == 403
        ours = {"origin": f"http://{gateway.address}"}
        async with websockets.connect(stream["ws_url"], additional_headers=ours) as socket:
            await socket.recv()
        assert "access-control-allow-origin" not in (await gateway.http.get(path, headers=foreign)).headers


async def test_origins_that_the_operator_allows(run_gateway: Start, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "studio", "studio", ["control"], 4, 1000)
    page = "https://studio.example"
    async with run_gateway(keys=path, origins=(page,)) as gateway:
        headers = {"authorization": f"Bearer {key}", "origin": page}
        response = await gateway.http.post("/v1/streams", json=OPEN, headers=headers)
        assert response.status_code == 201
        assert response.headers["access-control-allow-origin"] == page
        asked = {"origin": page, "access-control-request-method": "POST"}
        preflight = await gateway.http.options("/v1/streams", headers=asked)
        assert preflight.status_code == 204 and "Authorization" in preflight.headers["access-control-allow-headers"]
        other = await gateway.http.options("/v1/streams", headers={**asked, "origin": "https://evil.example"})
        assert other.status_code in (401, 403)


def code(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


async def test_too_many_or_too_long_headers(run_gateway: Start) -> None:
    async with run_gateway() as gateway:
        many = await gateway.http.get("/v1/streams", headers=[(f"x-{i}", "1") for i in range(200)])
        assert many.status_code == 431
        long = await gateway.http.get("/v1/streams", headers={"x-long": "a" * 20_000})
        assert code(long) == (431, "headers_too_large")
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_other_hosts_than_this_machine_are_refused_without_keys(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        for host, start in (("[::1]:9", "ws://[::1]:9/v1"), ("LocalHost", "ws://LocalHost/v1"), ("127.0.0.2:1", "ws:")):
            response = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers={"host": host})
            assert response.status_code == 201
            assert response.json()["ws_url"].startswith(start)
        strange = (
            "a.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "a b",
            "x<y",
            "[::1",
            "10.0.0.1",
            "",
        )
        for host in (*strange, "localhost:80:80", "evil@localhost", "localhost/", "0.0.0.0"):
            for method, path in (("POST", "/v1/streams"), ("GET", "/"), ("GET", "/livez"), ("GET", "/assets/app.js")):
                response = await gateway.http.request(method, path, headers={"host": host})
                assert error_of(response, 421)["code"] == "host_not_allowed"
                assert "<" not in response.headers["content-security-policy"]
