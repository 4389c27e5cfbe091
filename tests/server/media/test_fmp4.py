"""Fragmented MP4 over the WebSocket and MJPEG over HTTP, read back."""

import asyncio
import io
import re
import struct
from typing import Any

import av
import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from server.backends.fake import FakeBackend
from server.media import fmp4
from server.media.frames import DISCONTINUITY, INIT, KEY

pytestmark = pytest.mark.anyio


def header(packet: bytes) -> tuple[int, ...]:
    return struct.unpack("!BBHHHQ", packet[:16])


def original(backend: FakeBackend, stream: dict[str, Any], index: int) -> Image.Image:
    rgb = backend._picture(backend._streams[stream["id"]], index)
    return Image.frombytes("RGB", (backend.width, backend.height), rgb)


async def test_what_a_viewer_gets_is_a_film(run_gateway: Any) -> None:
    backend = FakeBackend(width=132, height=98, chunk_seconds=0.02)  # rows that need padding, and cropping
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        seen = await gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 30)
        packets = [packet for _, packet in seen.frames]
        assert header(packets[0]) == (1, 3, 132, 98, INIT, 0)
        assert header(packets[1]) == (1, 3, 132, 98, KEY, 0)
        assert seen.pts[1:] == list(range(0, 30 * 5625, 5625))
        film = b"".join(packet[16:] for packet in packets)
        assert film[4:8] == b"ftyp"
        with av.open(io.BytesIO(film)) as container:
            video = container.streams.video[0]
            assert video.codec_context.name == "h264"
            assert video.codec_context.profile in ("Baseline", "Constrained Baseline")
            assert (video.width, video.height, video.time_base.denominator) == (132, 98, 90000)
            frames = list(container.decode(video))
        assert [frame.pts for frame in frames] == seen.pts[1:]
        assert {frame.duration for frame in frames} == {5625}
        assert [frame.key_frame for frame in frames] == [True] + [False] * 29
        for index in (0, 13, 29):
            gap = ImageChops.difference(frames[index].to_image(), original(backend, stream, index))
            assert sum(ImageStat.Stat(gap).mean) / 3 < 6


async def test_who_comes_later_starts_with_a_keyframe_of_its_time(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        first = asyncio.create_task(gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 40))
        await gateway.until(lambda: gateway.streams.get(stream["id"]).playback.shown > 5)
        late = await gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 5)
        flags = [header(packet)[4] for _, packet in late.frames]
        assert flags == [INIT, KEY, 0, 0, 0, 0]
        assert late.pts[1] > 5 * 5625
        film = b"".join(packet[16:] for _, packet in late.frames)
        with av.open(io.BytesIO(film)) as container:
            assert [frame.pts for frame in container.decode(video=0)] == late.pts[1:]
        # The first viewer has the same fragments, that keyframe among them.
        theirs = {packet for _, packet in (await first).frames}
        assert {packet for _, packet in late.frames[1:]} <= theirs


async def test_a_cut_is_flagged(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()

        def cut(seen: Any) -> bool:
            return any(header(packet)[4] & DISCONTINUITY for _, packet in seen.frames)

        watching = asyncio.create_task(gateway.watch(stream, "?format=fmp4", until=cut))
        await gateway.until(lambda: bool(gateway.streams.get(stream["id"]).playback.shown))
        changed = await gateway.patch(stream, prompt="a blue ball", transition="cut")
        assert changed.status_code == 200
        assert header((await watching).frames[-1][1])[4] & DISCONTINUITY


async def test_a_viewer_of_events_alone(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1)
        listener = asyncio.create_task(gateway.watch(stream, "?format=events"))
        live = gateway.streams.get(stream["id"])
        await gateway.until(lambda: bool(live.playback.received))
        # Nobody sees anything yet: the clock waits for who does.
        assert (live.playback.shown, len(live.audience.viewers)) == (0, 1)
        seen = await gateway.watch(stream)
        heard = await listener
        assert heard.frames == []
        assert heard.events[-1]["type"] == seen.events[-1]["type"] == "ended"
        assert len(seen.frames) == 16
        assert heard.of("chunk")[0]["shown"] == 0


@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
def test_nal_units(zeros: int) -> None:
    units = [b"\x67\x42\0\0\3\1", b"\x68\x01", b"\x65" + bytes(range(1, 200))]
    start = bytes(zeros) + b"\0\0\1"
    assert fmp4.nal_units(b"".join(start + unit for unit in units)) == units


# MJPEG over HTTP


async def parts(response: httpx.Response, count: int) -> list[tuple[dict[str, str], bytes]]:
    """The next parts: headers, body. Strict about every byte between them."""
    data, found = b"", []
    async for piece in response.aiter_raw():
        data += piece
        while match := re.match(rb"--frame\r\n((?:[\w-]+: [^\r]+\r\n)+)\r\n", data):
            fields = dict(line.split(": ") for line in match[1].decode().split("\r\n") if line)
            end = match.end() + int(fields["Content-Length"])
            if len(data) < end + 2:
                break
            assert data[end : end + 2] == b"\r\n"
            found.append((fields, data[match.end() : end]))
            data = data[end + 2 :]
            if len(found) == count:
                return found
    assert data == b"--frame--\r\n"
    return found


async def test_pictures_that_replace_each_other(run_gateway: Any) -> None:
    backend = FakeBackend(width=128, height=96, chunk_seconds=0.02)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=1.5)
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
            assert "content-length" not in response.headers
            expected = original(backend, stream, 0)
            found = await parts(response, 1000)
        assert [int(fields["X-Pts"]) for fields, _ in found] == list(range(0, 24 * 5625, 5625))
        assert {fields["Content-Type"] for fields, _ in found} == {"image/jpeg"}
        gap = ImageChops.difference(Image.open(io.BytesIO(found[0][1])), expected)
        assert sum(ImageStat.Stat(gap).mean) / 3 < 3


async def test_a_viewer_of_pictures_that_leaves(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response:
            assert len(await parts(response, 3)) == 3
            assert len(live.audience.viewers) == 1
        await gateway.until(lambda: not live.audience.viewers)


async def test_pictures_that_are_refused(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        assert (await gateway.http.get("/v1/streams/st_none/mjpeg")).status_code == 404
        with monkeypatch.context() as patch:
            patch.setattr("server.streams.audience.MAX_VIEWERS", 0)
            crowded = await gateway.http.get(f"/v1/streams/{stream['id']}/mjpeg")
            assert (crowded.status_code, crowded.json()["error"]["code"]) == (503, "too_many_viewers")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        over = await gateway.http.get(f"/v1/streams/{stream['id']}/mjpeg")
        assert (over.status_code, over.json()["error"]["code"]) == (409, "stream_ended")
