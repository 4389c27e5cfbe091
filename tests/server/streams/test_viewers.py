"""Viewers that behave badly: none of them delays a stream or another viewer, or costs memory without bound."""

import asyncio
import base64
import contextlib
import gc
import json
import os
import socket
import weakref
from typing import Any

import pytest
import websockets

from server.backends.fake import FakeBackend
from server.media.viewer import MAX_EVENTS, MAX_FRAMES

pytestmark = pytest.mark.anyio


def never_reading(gateway: Any, stream: dict[str, Any], query: str) -> socket.socket:
    """A WebSocket client that shakes hands and then never reads."""
    key = base64.b64encode(os.urandom(16)).decode()
    return asking(
        gateway,
        f"GET /v1/streams/{stream['id']}/ws{query} HTTP/1.1\r\nHost: {gateway.address}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n",
    )


def connected(gateway: Any) -> socket.socket:
    """Its kernel keeps nearly nothing for it. A buffer that may grow (to 32 MiB where Linux is new) can keep a film."""
    host, port = gateway.address.split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    client.setblocking(False)
    return client


def asking(gateway: Any, request: str) -> socket.socket:
    """A client that sends this and never reads."""
    client = connected(gateway)
    client.sendall(request.encode())
    return client


def reset(client: socket.socket) -> bool:
    """Whether the connection itself is gone."""
    try:
        while client.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


async def test_a_client_that_never_reads(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.websocket.SEND_SECONDS", 0.5)
    monkeypatch.setattr("server.api.websocket.CLOSE_SECONDS", 0.1)
    # 1.2 MB a frame: the buffers of the kernel are full at once.
    backend = FakeBackend(width=832, height=480, fps=16, chunk_seconds=0.01)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.frames) >= 32))
        client = never_reading(gateway, stream, "?format=rgb24")
        try:
            await gateway.until(lambda: len(live.audience.viewers) == 2)
            slow = next(viewer for viewer in live.audience.viewers if viewer.format == "rgb24")
            longest = 0

            def gone() -> bool:
                nonlocal longest
                longest = max(longest, len(slow))
                return slow not in live.audience.viewers

            await gateway.until(gone, 10)
            assert longest <= MAX_FRAMES + MAX_EVENTS
            assert len(gateway.streams.get(stream["id"]).audience.viewers) <= 1
            metrics = (await gateway.http.get("/metrics")).text
            assert "livereel_viewers_dropped_total 1.0" in metrics
            seen = await watching
            # The other viewer has lost nothing, and nothing came late.
            assert seen.pts == list(range(0, 32 * 5625, 5625))
            assert seen.frames[-1][0] - seen.frames[0][0] == pytest.approx(31 / 16, abs=0.2)
            assert (await gateway.get(stream))["stalls"] == 0
            await gateway.until(lambda: reset(client))
        finally:
            client.close()


async def test_a_client_that_never_reads_its_pictures(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.mjpeg.SEND_SECONDS", 0.5)
    async with run_gateway(FakeBackend(width=1664, height=960, fps=16, chunk_seconds=0.01)) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        watching = asyncio.create_task(gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 40))
        path = f"/v1/streams/{stream['id']}/mjpeg"
        client = asking(gateway, f"GET {path} HTTP/1.1\r\nHost: {gateway.address}\r\n\r\n")
        try:
            await gateway.until(lambda: len(live.audience.viewers) == 2)
            slow = next(viewer for viewer in live.audience.viewers if viewer.format == "mjpeg")
            await gateway.until(lambda: slow not in live.audience.viewers, 20)
            assert len(slow) <= MAX_FRAMES
            assert "livereel_viewers_dropped_total 1.0" in (await gateway.http.get("/metrics")).text
            await gateway.until(lambda: reset(client))
            seen = await watching
            assert seen.pts[1:] == list(range(0, 40 * 5625, 5625))
        finally:
            client.close()


async def test_a_slow_viewer_gets_new_frames_and_every_event(run_gateway: Any) -> None:
    backend = FakeBackend(width=832, height=480, fps=16, chunk_seconds=0.01)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=1.5)
        live = gateway.streams.get(stream["id"])
        events, pts, code = [], [], None
        slow = connected(gateway)
        async with gateway.connect(stream, "?format=rgb24", sock=slow, max_queue=1, max_size=None) as viewer:
            try:
                while True:
                    item = await viewer.recv()
                    if isinstance(item, str):
                        events.append(item)
                        continue
                    pts.append(int.from_bytes(item[8:16]))
                    # With the first frame in its hands it reads no more until the stream is over.
                    await gateway.until(lambda: live.session.state.over)
            except websockets.ConnectionClosed as closed:
                code = closed.rcvd and closed.rcvd.code
        assert code == 1000
        assert MAX_FRAMES <= len(pts) < 24
        assert pts == sorted(pts)
        assert pts[-1] == 23 * 5625
        told = [json.loads(event) for event in events]
        assert [event["seq"] for event in told] == list(range(told[0]["seq"], told[0]["seq"] + len(told)))
        assert told[-1]["type"] == "ended"
        assert "livereel_frames_dropped_total" in (metrics := (await gateway.http.get("/metrics")).text)
        assert 'livereel_frames_dropped_total{reason="slow_viewer"} 0.0' not in metrics


@pytest.mark.parametrize("first", ["client", "server"])
async def test_nothing_of_a_viewer_waits_for_the_garbage_collector(run_gateway: Any, first: str) -> None:
    """With hundreds that come and go, the collector would stop the server for some tens of milliseconds each time."""
    async with run_gateway() as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        gc.collect()
        gc.disable()
        try:
            watching = asyncio.create_task(
                gateway.watch(stream, until=lambda seen: first == "client" and len(seen.frames) > 8)
            )
            await gateway.until(lambda: bool(live.audience.viewers))
            viewer = weakref.ref(next(iter(live.audience.viewers)))
            if first == "server":
                await gateway.http.delete(f"/v1/streams/{stream['id']}")
            await watching
            await gateway.until(lambda: viewer() is None)
        finally:
            gc.enable()


async def test_clients_that_vanish(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        tasks = len(asyncio.all_tasks())
        for _ in range(10):
            async with gateway.connect(stream) as viewer:
                await viewer.recv()
                viewer.transport.abort()
        await gateway.until(lambda: not live.audience.viewers)
        await gateway.until(lambda: len(asyncio.all_tasks()) <= tasks + 2)
        assert 'livereel_viewers{format="mjpeg"} 0.0' in (await gateway.http.get("/metrics")).text
        assert (await gateway.get(stream))["state"] == "live"


async def test_what_a_client_says_is_ignored(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        async with gateway.connect(stream) as viewer:
            for item in ("hello", "{", b"\xff\x00", '{"type": "delete"}'):
                await viewer.send(item)
            frames = 0
            while frames < 5:
                frames += isinstance(await viewer.recv(), bytes)


@pytest.mark.parametrize(("message", "count", "code"), [("x", 500, 1008), (b"x" * 70_000, 1, 1009)])
async def test_a_client_that_says_too_much(run_gateway: Any, message: Any, count: int, code: int) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        other = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.frames) > 10))
        async with gateway.connect(stream) as viewer:
            with contextlib.suppress(websockets.ConnectionClosed):
                for _ in range(count):
                    await viewer.send(message)
            await viewer.wait_closed()
            assert viewer.close_code == code
        assert len((await other).frames) > 10


async def test_no_compression_is_offered(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        async with websockets.connect(stream["ws_url"], compression="deflate") as viewer:
            assert "Sec-WebSocket-Extensions" not in viewer.response.headers


async def test_viewers_are_limited(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.audience.MAX_VIEWERS", 1)
    async with run_gateway() as gateway:
        stream = await gateway.open()
        async with gateway.connect(stream) as viewer:
            await viewer.recv()
            seen = await gateway.watch(stream)
            assert seen.of("error")[0]["code"] == "too_many_viewers"
            assert seen.close_code == 1013


async def test_a_peer_that_only_pings_is_dropped(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.protocols.MAX_PONG_BYTES", 20_000)
    async with run_gateway() as gateway:
        stream = await gateway.open()
        client = never_reading(gateway, stream, "")
        ping = b"\x89\xfd\0\0\0\0" + b"p" * 125  # the mask is zero
        try:
            async with asyncio.timeout(10):
                while True:
                    with contextlib.suppress(BlockingIOError):
                        client.send(ping * 500)
                    await asyncio.sleep(0.001)
        except ConnectionError:
            pass
        finally:
            client.close()
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_what_is_over_keeps_no_chunk(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.MAX_LAST_FRAMES", 2)
    async with run_gateway() as gateway:
        ended = []
        for _ in range(3):
            stream = await gateway.open(duration_s=0.5)
            await gateway.watch(stream)
            ended.append(gateway.streams.get(stream["id"]))
        await gateway.until(lambda: ended[0].audience.on_screen is None)
        for live in ended[1:]:
            assert live.audience.on_screen.rgb.obj == bytes(
                live.audience.on_screen.rgb
            )  # a frame of its own, no view of a whole chunk
            assert len(live.audience.on_screen.rgb.obj) == 64 * 48 * 3
