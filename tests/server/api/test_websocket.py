"""Watching over a WebSocket: frames as binary messages, events as text, and sockets that are refused."""

import asyncio
import io
import struct
from typing import Any

import pytest
import websockets
from PIL import Image

from server.media import frames

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("format", ["mjpeg", "rgb24"])
async def test_binary_frames(run_gateway: Any, format: str) -> None:
    async with run_gateway() as gateway:
        seen = await gateway.watch(await gateway.open(duration_s=0.2), f"?format={format}")
        packet = seen.frames[0][1]
        assert struct.unpack("!BBHHHQ", packet[:16]) == (1, 1 if format == "mjpeg" else 2, 64, 48, 0, 0)
        if format == "mjpeg":
            assert Image.open(io.BytesIO(packet[16:])).size == (64, 48)
        else:
            assert len(packet) == 16 + 64 * 48 * 3


async def test_a_late_joiner_gets_a_snapshot_and_the_frame_on_screen(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 5)
        await gateway.patch(stream, paused=True)
        seen = await gateway.watch(stream, until=lambda seen: len(seen.order) == 2)
        assert seen.order == ["stream.started", "frame"]
        assert seen.events[0]["stream"]["state"] == "paused"
        assert seen.pts[0] == 5625 * ((await gateway.get(stream))["frames_shown"] - 1)


async def test_viewers_share_one_encoding_and_one_clock(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, real = [], frames.encode_picture
    monkeypatch.setattr(
        frames, "encode_picture", lambda frame, format: encoded.append(frame.index) or real(frame, format)
    )
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1)
        all_seen = await asyncio.gather(*(gateway.watch(stream) for _ in range(5)))
        packets_seen = [[packet for _, packet in seen.frames] for seen in all_seen]
        assert all(len(frames) >= 15 and frames == packets_seen[0][-len(frames) :] for frames in packets_seen)
        assert sorted(encoded) == list(range(16))


async def test_watching_after_the_end(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.2)
        await gateway.watch(stream)
        seen = await gateway.watch(stream)
        assert seen.order == ["stream.started", "frame", "ended"]
        assert seen.close_code == 1000


@pytest.mark.parametrize(
    ("path", "close_code", "param"), [("{id}/ws?format=gif", 1008, "format"), ("st_unknown/ws", 4404, None)]
)
async def test_a_socket_that_cannot_be_served(run_gateway: Any, path: str, close_code: int, param: str | None) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        seen = await gateway.watch({"ws_url": f"ws://{gateway.address}/v1/streams/{path.format(id=stream['id'])}"})
        assert seen.order == ["error"]
        assert seen.events[0]["param"] == param
        assert {"seq", "ts", "code", "message"} <= seen.events[0].keys()
        assert seen.close_code == close_code


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1.evil:80"])
async def test_a_socket_from_another_site_is_refused(run_gateway: Any, origin: str) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with gateway.connect(stream, origin=origin):
                pass
        assert refused.value.response.status_code == 403
        async with gateway.connect(stream, origin=f"http://{gateway.address}"):
            pass
