"""uvicorn's hardened protocols: deadlines, and limits on connections."""

import asyncio
import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from server import protocols
from server.backends.fake import FakeBackend

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


@pytest.mark.parametrize(("proxies", "refused"), [((), True), (("10.0.0.0/8",), False), (("10.0.0.9",), True)])
def test_a_trusted_proxy_is_not_one_peer(proxies: tuple[str, ...], refused: bool) -> None:
    class Protocol:
        client = ("10.0.0.5", 80)
        config = SimpleNamespace(forwarded_allow_ips=[*proxies])

    crowd = {Protocol() for _ in range(protocols.MAX_CONNECTIONS_PER_PEER + 1)}
    newest: Any = next(iter(crowd))
    newest.connections = crowd
    assert protocols.too_many_connections(newest) is refused


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_film_that_is_broken_off_ends_in_an_error(run_gateway: Start, version: str) -> None:
    """Over HTTP/1.0 the end of the connection is the end of the film, unless it is a reset (RFC 9112, 8)."""
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.3)) as gateway:
        made = await gateway.http.post("/v1/videos", json={"prompt": "a", "seconds": "600"})
        path = f"/v1/videos/{made.json()['id']}"
        await gateway.until(lambda: gateway.streams.clips.get(made.json()["id"]).recorded > 0)
        reader, writer = await asyncio.open_connection(*gateway.address.split(":"))
        writer.write(f"GET {path}/content HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
        assert b" 200 " in await asyncio.wait_for(reader.readline(), 10)
        assert await asyncio.wait_for(reader.readuntil(b"moof"), 20)
        assert (await gateway.http.delete(path)).status_code == 200
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()


async def test_text_that_is_not_utf8_closes_the_socket_and_logs_nothing(
    run_gateway: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """RFC 6455, section 8.1: the connection is closed with 1007."""
    async with run_gateway() as gateway, gateway.connect(await gateway.open(), "?format=events") as socket:
        await socket.send(b"\xff\xfe", text=True)
        await asyncio.wait_for(socket.wait_closed(), 10)
        assert socket.close_code == 1007
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@pytest.mark.parametrize("kind", ["ping", "pong", "text", "fragment"])
async def test_a_flood_of_frames_closes_the_socket_and_harms_nobody(run_gateway: Start, kind: str) -> None:
    """RFC 6455, section 7.4.1: 1008. A ping a second and the events of other viewers go on."""
    frame = {"ping": 0x89, "pong": 0x8A, "text": 0x81, "fragment": 0x01}[kind]
    async with run_gateway() as gateway:
        stream = await gateway.live()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.frames) > 40))
        async with gateway.connect(stream, "?format=events") as socket:
            assert socket.transport is not None
            for _ in range(5):
                await (await socket.ping())
            flood = bytes([frame, 0x81, 0, 0, 0, 0, 0x61]) + bytes([0x80, 0x80, 0, 0, 0, 0]) * (kind == "fragment")
            with contextlib.suppress(OSError):
                socket.transport.write(flood * (protocols.MAX_FRAMES_PER_MINUTE + 10))
            async with asyncio.timeout(10):
                await socket.wait_closed()
            assert socket.close_code in (1008, 1006)  # TCP may drop the frame together with what nobody reads
        await gateway.until(lambda: gateway.stream_of(stream).audience.watching == 1)
        seen = await watching
        assert not seen.of("stall") and seen.close_code is None
