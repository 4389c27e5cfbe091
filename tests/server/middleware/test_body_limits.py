"""Limits on request bodies: type, size and duration."""

import asyncio
import gzip
from typing import Any

import pytest

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


async def test_bodies(run_gateway: Any, monkeypatch: pytest.MonkeyPatch, error_of: Any) -> None:
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


async def test_an_upload_that_drips_is_let_go(run_gateway: Any, monkeypatch: pytest.MonkeyPatch, error_of: Any) -> None:
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


async def test_a_compressed_body_is_an_unsupported_media_type(run_gateway: Any) -> None:
    """RFC 9110, section 15.5.16: 415, with the encodings that are accepted."""
    async with run_gateway() as gateway:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        body = gzip.compress(b'{"prompt": "a"}')
        answer = await gateway.http.post("/v1/streams", content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
        assert answer.headers["accept-encoding"] == "identity"
        headers["content-encoding"] = "identity"
        plain = await gateway.http.post("/v1/streams", content=b'{"prompt": "a"}', headers=headers)
        assert plain.status_code == 201
