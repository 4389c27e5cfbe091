"""uvicorn's hardened protocols: deadlines, and limits on connections."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from server import protocols

pytestmark = pytest.mark.anyio

Start = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /livez HTT",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n",
        b"POST /v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
    ],
)
async def test_who_drips_is_let_go(run_gateway: Start, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(protocols, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(protocols, "REQUEST_SECONDS", 0.3)
    async with run_gateway() as gateway:
        reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
        writer.write(sent)
        left = await asyncio.wait_for(reader.read(), 10)
        assert b" 200 " not in left and b" 201 " not in left
        writer.close()
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_connections_are_bounded(run_gateway: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "MAX_CONNECTIONS", 5)
    async with run_gateway() as gateway:
        opened = [await asyncio.open_connection(*gateway.address.split(":")) for _ in range(8)]
        answers = []
        for reader, writer in opened:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                answers.append(await asyncio.wait_for(reader.read(), 10))
            writer.close()
        assert sum(b"too_many_connections" in answer for answer in answers) >= 3
        assert any(b" 200 " in answer for answer in answers)
