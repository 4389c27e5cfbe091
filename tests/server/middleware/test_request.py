"""What the outermost middleware adds and hides: error objects, request ids, logs without prompts."""

from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_paths_and_methods(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        unknown = "st_" + "0" * 24
        for method, path, status, code in (
            ("GET", "/v1", 404, "not_found"),
            ("GET", "/v1/nothing", 404, "not_found"),
            ("GET", "/v1/streams/", 404, "not_found"),
            ("POST", "/v1/nothing", 404, "not_found"),
            ("GET", f"/v1/streams/{unknown}", 404, "stream_not_found"),
            ("DELETE", f"/v1/streams/{unknown}", 404, "stream_not_found"),
            ("GET", "/v1/streams/%00%ff%0d%0a", 404, "stream_not_found"),
            ("GET", "/v1/streams/%2e%2e%2fx", 404, "not_found"),
            ("GET", f"/v1/streams/{unknown}/ws", 404, "not_found"),
        ):
            assert error_of(await gateway.http.request(method, path), status)["code"] == code
        response = await gateway.http.patch(f"/v1/streams/{unknown}", json={"paused": True})
        assert error_of(response, 404)["code"] == "stream_not_found"
        for method, path, allow in (
            ("PUT", "/v1/streams", "POST, GET, HEAD"),
            ("DELETE", "/v1/streams", "POST, GET, HEAD"),
            ("POST", f"/v1/streams/{unknown}", "GET, HEAD, PATCH, DELETE"),
            ("POST", "/v1/models", "GET, HEAD"),
            ("BREW", "/v1/streams", "POST, GET, HEAD"),
        ):
            response = await gateway.http.request(method, path)
            assert error_of(response, 405)["code"] == "method_not_allowed"
            assert response.headers["allow"] == allow


async def test_a_fault_of_ours_shows_nothing_of_the_inside(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, error_of: Any
) -> None:
    async with run_gateway() as gateway:

        def broken(*_: Any) -> None:
            raise ZeroDivisionError("a secret of the inside")

        monkeypatch.setattr(gateway.streams, "open", broken)
        response = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers={"x-request-id": "look-here"})
        error = error_of(response, 500)
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        assert "look-here" in error["message"]
        assert "secret" not in response.text
        assert "Zero" not in response.text


async def test_prompts_stay_out_of_the_log(run_gateway: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "livereel")
    async with run_gateway() as gateway:
        stream = await gateway.open("a very private ball")
        await gateway.patch(stream, prompt="a very private cube")
        await gateway.http.post("/v1/streams", json={"prompt": "a very private\n"})
        gateway.backend.crash()
        await gateway.until(lambda: gateway.backend.health().ready)
    assert "private" not in caplog.text


async def test_request_ids(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for path in ("/", "/livez", "/v1/streams", "/v1/nothing"):
            assert (await gateway.http.get(path)).headers["x-request-id"].startswith("req_")
        mine = await gateway.http.get("/livez", headers={"x-request-id": "abc-123"})
        assert mine.headers["x-request-id"] == "abc-123"
        strange = await gateway.http.get("/livez", headers={"x-request-id": "a b<script>"})
        assert strange.headers["x-request-id"].startswith("req_")
