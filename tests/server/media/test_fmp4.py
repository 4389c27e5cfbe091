"""Fragmented MP4 over the WebSocket, decoded."""

import asyncio
import io
import struct
from typing import Any

import av
import pytest
from PIL import ImageChops, ImageStat

from server.backends.fake import FakeBackend
from server.media import fmp4
from server.media.frames import DISCONTINUITY, INIT, KEY
from tests.server.media.samples import original

pytestmark = pytest.mark.anyio


def header(packet: bytes) -> tuple[int, ...]:
    return struct.unpack("!BBHHHQ", packet[:16])


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
