"""Everything a client can get wrong: a clear error that names the field, and a server that does not mind."""

import asyncio
import json
from typing import Any

import pytest

from server.api.schemas import MAX_SEED
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"]
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    response.text.encode()  # nothing that was echoed is no Unicode
    return error


CREATE = [
    ("{}", "prompt", "missing_field"),
    ('{"prompt": ""}', "prompt", "prompt_empty"),
    ('{"prompt": "   "}', "prompt", "prompt_empty"),
    ('{"prompt": "\\u3000"}', "prompt", "prompt_empty"),
    ('{"prompt": null}', "prompt", "invalid_value"),
    ('{"prompt": 3}', "prompt", "invalid_value"),
    ('{"prompt": ["a"]}', "prompt", "invalid_value"),
    (json.dumps({"prompt": "x" * 4097}), "prompt", "prompt_too_long"),
    (json.dumps({"prompt": "é" * 2049}), "prompt", "prompt_too_long"),
    ('{"prompt": "a\\u0000b"}', "prompt", "prompt_character"),
    ('{"prompt": "a\\nb"}', "prompt", "prompt_character"),
    ('{"prompt": "a\\tb"}', "prompt", "prompt_character"),
    ('{"prompt": "a\\u007fb"}', "prompt", "prompt_character"),
    ('{"prompt": "a\\u0085b"}', "prompt", "prompt_character"),
    ('{"prompt": "a\\ud800b"}', "prompt", "prompt_character"),
    ('{"prompt": "\\udfff"}', "prompt", "prompt_character"),
    ('{"prompt": "a", "seed": true}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": "7"}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": 1.5}', "seed", "invalid_value"),
    ('{"prompt": "a", "seed": -1}', "seed", "invalid_value"),
    (json.dumps({"prompt": "a", "seed": MAX_SEED + 1}), "seed", "invalid_value"),
    (json.dumps({"prompt": "a", "seed": 10**400}), "seed", "invalid_value"),
    ('{"prompt": "a", "seed": NaN}', "seed", "invalid_value"),
    ('{"prompt": "a", "duration_s": 0}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": -1}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": 86401}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": NaN}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": Infinity}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": -Infinity}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": 1e999}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": true}', "duration_s", "invalid_value"),
    ('{"prompt": "a", "duration_s": "5"}', "duration_s", "invalid_value"),
    (json.dumps({"prompt": "a", "duration_s": 10**400}), "duration_s", "invalid_value"),
    ('{"prompt": "a", "model": 1}', "model", "invalid_value"),
    ('{"prompt": "a", "steps": 4}', "steps", "unknown_field"),
    ('{"prompt": "a", "<b>\\u00e9": 4}', "<b>\\xe9", "unknown_field"),
    ('{"prompt": "a", "\\ud800": 4}', None, "invalid_body"),
    ("[]", None, "invalid_body"),
    ('"a"', None, "invalid_body"),
    ("null", None, "invalid_body"),
    ("", None, "invalid_body"),
    ("{", None, "invalid_json"),
    ('{"prompt": "a",}', None, "invalid_json"),
    ('{"prompt": "a\nb"}', None, "invalid_json"),
    ("[" * 20000, None, "invalid_json"),
    (b'{"prompt": "\xff"}', None, "invalid_json"),
    (json.dumps({"prompt": "a"}).encode("utf-16"), None, None),
]


async def test_create(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for content, param, code in CREATE:
            response = await gateway.http.post("/v1/streams", content=content, headers=JSON)
            if code is None:  # valid JSON in another encoding: either answer is fine
                assert response.status_code in (201, 400)
                continue
            error = error_of(response, 400)
            assert (error["param"], error["code"]) == (param, code), content
            assert error["type"] == "invalid_request_error"
            if param:
                assert f"`{param}`" in error["message"]
        assert len(gateway.backend.sent) <= 1
        # What is right still works, at the very limits.
        seeds = [{"seed": seed} for seed in (MAX_SEED, 0, 7.0)]
        for fields in ({"prompt": "é" * 2048}, *seeds, {"duration_s": 86400}, {"model": None}):
            await gateway.open(**{"prompt": "a", **fields})


async def test_unknown_model(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for model in ("maxi", "", "../mini", "mini\n", "\udcff"):
            body = json.dumps({"prompt": "a", "model": model})
            response = await gateway.http.post("/v1/streams", content=body, headers=JSON)
            error = error_of(response, 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
            assert "mini" in error["message"]


CHANGE = [
    ("{}", None, "nothing_to_change"),
    ('{"prompt": null}', None, "nothing_to_change"),
    ('{"prompt": ""}', "prompt", "prompt_empty"),
    ('{"prompt": "a\\u0000"}', "prompt", "prompt_character"),
    ('{"prompt": "\\ud800"}', "prompt", "prompt_character"),
    (json.dumps({"prompt": "x" * 4097}), "prompt", "prompt_too_long"),
    ('{"prompt": 1}', "prompt", "invalid_value"),
    ('{"prompt": "a", "transition": "fade"}', "transition", "invalid_value"),
    ('{"prompt": "a", "transition": 1}', "transition", "invalid_value"),
    ('{"transition": "cut"}', "prompt", "missing_field"),
    ('{"paused": 1}', "paused", "invalid_value"),
    ('{"paused": "true"}', "paused", "invalid_value"),
    ('{"seed": 1}', "seed", "unknown_field"),
]


async def test_change(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        for content, param, code in CHANGE:
            response = await gateway.http.patch(f"/v1/streams/{stream['id']}", content=content, headers=JSON)
            error = error_of(response, 400)
            assert (error["param"], error["code"]) == (param, code), content
        assert (await gateway.get(stream))["prompt"] == "a red ball"


async def test_paths_and_methods(run_gateway: Any) -> None:
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
            ("PUT", "/v1/streams", "POST, GET"),
            ("DELETE", "/v1/streams", "POST, GET"),
            ("POST", f"/v1/streams/{unknown}", "GET, PATCH, DELETE"),
            ("POST", "/v1/models", "GET"),
            ("BREW", "/v1/streams", "POST, GET"),
        ):
            response = await gateway.http.request(method, path)
            assert error_of(response, 405)["code"] == "method_not_allowed"
            assert response.headers["allow"] == allow


async def test_bodies(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway() as gateway:
        post = gateway.http.post
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            foreign = {"content-type": kind, "origin": "http://elsewhere.example"}
            response = await post("/v1/streams", content='{"prompt": "a"}', headers=foreign)
            assert error_of(response, 415)["code"] == "unsupported_media_type"
        assert (
            await post(
                "/v1/streams", content='{"prompt": "a"}', headers={"content-type": "application/json; charset=utf-8"}
            )
        ).status_code == 201
        patch = gateway.http.patch
        response = await patch("/v1/streams/st_x", content=b" " * 65537, headers=JSON)
        assert error_of(response, 413)["code"] == "body_too_large"
        response = await post("/v1/streams", content=b" " * 12_000_000, headers=JSON)
        assert error_of(response, 413)["code"] == "body_too_large"

        async def chunks() -> Any:
            for _ in range(100):
                yield b" " * 1000

        response = await patch("/v1/streams/st_x", content=chunks(), headers=JSON)
        assert error_of(response, 413)["code"] == "body_too_large"

        monkeypatch.setattr("server.middleware.body_limits.BODY_SECONDS", 0.1)

        async def slow() -> Any:
            yield b'{"prompt": '
            await asyncio.sleep(0.4)
            yield b'"a"}'

        response = await post("/v1/streams", content=slow(), headers=JSON)
        assert error_of(response, 408)["code"] == "body_timeout"


def part(name: str, value: bytes = b"a", more: str = "", headers: bytes = b"") -> bytes:
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n'.encode()
    return head + headers + b"\r\n" + value + b"\r\n"


FILE = "; filename=a.png"
FORMS = {
    "a hundred thousand parts": part("prompt") * 100_000,
    "nine fields": b"".join(part(f"f{n}") for n in range(9)),
    "two files": part("prompt") + part("image", b"", FILE) + part("more", b"", FILE),
    "a long field": part("prompt", b"a" * 66_000),
    "a long file name": part("prompt") + part("image", b"x", f"; filename={'n' * 100_000}.png"),
    "a path for a file name": part("prompt") + part("image", b"x", "; filename=../../etc/passwd"),
    "many headers of a part": part("prompt", headers=b"X-A: b\r\n" * 50_000),
    "a long header of a part": part("prompt", headers=b"X-A: " + b"b" * 500_000 + b"\r\n"),
    "a header without end": b"--x\r\nContent-Disposition: " + b"a" * 1_000_000,
    "no name": b'--x\r\nContent-Disposition: form-data; filename="a"\r\n\r\na\r\n',
    "a long name": part("n" * 60_000),
    "no end": part("prompt")[:-2],
    "nothing": b"",
}


async def test_forms_are_bounded(run_gateway: Any) -> None:
    """Parts, their headers, names and sizes; what is refused leaves no stream and costs no time."""
    async with run_gateway() as gateway:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        for name, body in FORMS.items():
            end = b"" if name in ("no end", "nothing", "a header without end") else b"--x--\r\n"
            async with asyncio.timeout(10):
                response = await gateway.http.post("/v1/streams", content=body + end, headers=headers)
            assert response.status_code in (400, 413), (name, response.text)
            error = error_of(response, response.status_code)
            assert len(response.content) < 1000, name
            assert "passwd" not in str(error)
        for boundary in ("", "; boundary=", f"; boundary={'b' * 5000}", '; boundary="'):
            kind = {"content-type": f"multipart/form-data{boundary}"}
            error_of(await gateway.http.post("/v1/streams", content=part("prompt"), headers=kind), 400)
        assert (await gateway.http.get("/v1/streams")).json()["data"] == []


async def test_an_upload_that_drips_is_let_go(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.middleware.body_limits.BODY_SECONDS", 0.2)  # times three for who may bring a picture
    async with run_gateway() as gateway:

        async def dripping() -> Any:
            yield part("prompt") + part("image", b"", FILE)[:-2]
            for _ in range(30):
                await asyncio.sleep(0.05)
                yield b"x"

        headers = {"content-type": "multipart/form-data; boundary=x"}
        async with asyncio.timeout(4):
            response = await gateway.http.post("/v1/streams", content=dripping(), headers=headers)
        assert error_of(response, 408)["code"] == "body_timeout"


async def test_a_fault_of_ours_shows_nothing_of_the_inside(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_other_hosts_than_this_machine_are_refused_without_keys(run_gateway: Any) -> None:
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


async def test_prompts_stay_out_of_the_log(run_gateway: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "livereel")
    async with run_gateway() as gateway:
        stream = await gateway.open("a very private ball")
        await gateway.patch(stream, prompt="a very private cube")
        await gateway.http.post("/v1/streams", json={"prompt": "a very private\n"})
        gateway.backend.crash()
        await gateway.until(lambda: gateway.backend.health().ready)
    assert "private" not in caplog.text


async def test_a_refused_change_leaves_the_stream_as_it_was(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, refuse_steers=True)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        error = error_of(await gateway.patch(stream, prompt="a cube"), 409)
        assert error["code"] == "steer_refused"
        assert (await gateway.get(stream))["prompt"] == "a red ball"
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 20)
        assert not seen.of("prompt.applied")
