"""Packets, the queue of one viewer, and the encoder that viewers share."""

import asyncio
import gc
import io
import random
import struct
import weakref
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import av
import pytest
from PIL import Image

from server.media import broadcast
from server.media import frames as packets
from server.media.broadcast import MAX_PENDING, Broadcast
from server.media.encoder import Codec, EncodedFrame, VideoEncoder
from server.media.frames import DISCONTINUITY, Encoder, Format, Frame, encode
from server.media.viewer import MAX_EVENTS, MAX_FRAMES, Viewer
from server.metrics import Metrics

pytestmark = pytest.mark.anyio


def frame(index: int = 0, width: int = 32, height: int = 16) -> Frame:
    pixels = Image.linear_gradient("L").resize((width, height)).convert("RGB").tobytes()
    return Frame(index, 90000 * index, width, height, DISCONTINUITY, memoryview(pixels))


@pytest.mark.parametrize(("format", "number"), [("mjpeg", 1), ("rgb24", 2)])
def test_the_header(format: Format, number: int) -> None:
    packet = encode(frame(2**33), format)
    assert struct.unpack("!BBHHHQ", packet[:16]) == (1, number, 32, 16, 1, 90000 * 2**33)


def test_rgb24_is_the_pixels() -> None:
    assert encode(frame(), "rgb24")[16:] == frame().rgb


def test_mjpeg_is_a_jpeg_close_to_the_pixels_with_all_its_colour() -> None:
    image = Image.open(io.BytesIO(encode(frame(), "mjpeg")[16:]))
    assert (image.format, image.size, image.mode) == ("JPEG", (32, 16), "RGB")
    assert {component[1:3] for component in image.layer} == {(1, 1)}  # 4:4:4
    assert max(abs(a - b) for a, b in zip(image.tobytes(), frame().rgb, strict=True)) < 16


async def test_a_frame_is_encoded_once_per_format(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(packets, "encode", lambda frame, format: calls.append(format) or b"packet")
    with ThreadPoolExecutor(2) as executor:
        metrics = Metrics()
        encoder, one = Encoder(executor, metrics), frame()
        results = await asyncio.gather(*(encoder.packet(one, format) for format in ("mjpeg", "rgb24", "mjpeg")))
        # One viewer that gives up does not take the packet from the others.
        waiting = asyncio.ensure_future(encoder.packet(one, "mjpeg"))
        waiting.cancel()
        assert await encoder.packet(one, "mjpeg") == b"packet"
    assert results == [b"packet"] * 3
    assert sorted(calls) == ["mjpeg", "rgb24"]
    text = metrics.render().decode()
    assert 'livereel_encode_seconds_count{codec="mjpeg"} 1.0' in text


async def test_a_viewer_gets_everything_in_order() -> None:
    viewer = Viewer("mjpeg")
    viewer.event("one")
    viewer.frame(b"two")
    viewer.event("three")
    viewer.finish(1000)
    assert [await viewer.next() for _ in range(4)] == ["one", b"two", "three", None]


async def test_a_slow_viewer_loses_the_oldest_frames_and_no_event() -> None:
    viewer = Viewer("mjpeg")
    dropped = 0
    for number in range(100):
        dropped += viewer.frame(bytes([number]))
        if number % 10 == 0:
            viewer.event(str(number))
        assert len(viewer) <= MAX_FRAMES + 10
    assert dropped == viewer.dropped == 100 - MAX_FRAMES
    items = [await viewer.next() for _ in range(len(viewer))]
    assert [item for item in items if isinstance(item, str)] == [str(number) for number in range(0, 100, 10)]
    assert [item[0] for item in items if isinstance(item, bytes)] == list(range(100 - MAX_FRAMES, 100))


async def test_a_viewer_that_takes_no_events_is_overrun() -> None:
    viewer = Viewer("mjpeg")
    for number in range(MAX_EVENTS):
        viewer.event(str(number))
    assert not viewer.overrun
    viewer.event("one too many")
    assert viewer.overrun
    assert len(viewer) == 0
    viewer.event("more")
    assert viewer.frame(b"more") == 1
    assert len(viewer) == 0
    assert await viewer.next() is None


async def test_a_waiting_viewer_wakes_up() -> None:
    viewer = Viewer("mjpeg")
    waiting = asyncio.create_task(viewer.next())
    await asyncio.sleep(0)
    viewer.frame(b"frame")
    assert await waiting == b"frame"
    waiting = asyncio.create_task(viewer.next())
    await asyncio.sleep(0)
    viewer.finish(1011)
    assert await waiting is None


# frames that build on each other


async def test_who_is_too_slow_for_coded_frames_goes_on_at_a_keyframe() -> None:
    viewer = Viewer("fmp4")
    names = [f"{number}" for number in range(40)]
    keys = {0, 20, 23}
    dropped = sum(viewer.frame(name.encode(), key=int(name) in keys) for name in names[:20])
    # Frames 0 to 7 fill the queue; with the ninth nothing in it can be shown without what is lost.
    assert dropped == viewer.dropped == 20
    assert viewer.awaits_key
    assert len(viewer) == 0
    for name in names[20:30]:
        viewer.frame(name.encode(), key=int(name) in keys)
    # 20 to 27 filled it again; 28 made room by dropping 20 to 22, up to the next keyframe.
    assert [await viewer.next() for _ in range(len(viewer))] == [str(n).encode() for n in range(23, 30)]
    assert viewer.dropped == 23
    assert not viewer.awaits_key


async def test_who_has_just_come_misses_nothing() -> None:
    viewer = Viewer("h264", events=False)
    viewer.event("not for it")
    assert viewer.frame(b"before", key=False) == 0
    viewer.head(b"head")
    assert viewer.frame(b"key", key=True) == 0
    assert viewer.frame(b"after", key=False) == 0
    assert [await viewer.next() for _ in range(3)] == [b"head", b"key", b"after"]
    assert viewer.dropped == 0


async def test_the_head_of_a_film_outlives_its_frames() -> None:
    viewer = Viewer("fmp4")
    viewer.head(b"head")
    for number in range(100):
        viewer.frame(b"frame", key=number == 0)
    assert len(viewer) == 1
    assert await viewer.next() == b"head"


def noise(index: int = 0, width: int = 128, height: int = 96) -> Frame:
    grain = bytes(96 + level // 4 for level in range(256))  # all of it would be too much for any quantizer
    pixels = random.Random(index).randbytes(width * height * 3).translate(grain)
    return Frame(index, 5625 * index, width, height, 0, memoryview(pixels))


def is_key(codec: Codec, data: bytes) -> bool:
    """What the bitstream itself says: the first bit of a VP8 frame, an IDR slice in H.264."""
    return not data[0] & 1 if codec == "vp8" else any(unit[0] & 31 == 5 for unit in data.split(b"\0\0\1")[1:])


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_frames_in_packets_out_one_for_one(codec: Codec) -> None:
    encoder = VideoEncoder(codec, 128, 96, 16, 2500)
    decoder = av.CodecContext.create("h264" if codec == "h264" else "libvpx", "r")
    shown = 0
    for index in range(40):
        coded = encoder.encode(frame(index, 128, 96).rgb, 5625 * index, key=index in (0, 17))
        assert coded is not None
        assert (coded.packet.pts, coded.packet.time_base.denominator) == (5625 * index, 90000)
        assert coded.key == is_key(codec, bytes(coded.packet)) == (index in (0, 17))
        if codec == "h264":  # nothing but this packet is needed to start with it
            types = [unit[0] & 31 for unit in bytes(coded.packet).split(b"\0\0\1")[1:]]
            assert ({7, 8} <= set(types)) == coded.key
        shown += len(decoder.decode(av.Packet(bytes(coded.packet))))
    assert shown >= 39  # H.264's decoder may hold one back


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_the_bitrate_is_a_ceiling(codec: Codec) -> None:
    """Noise costs whatever it is given."""
    sizes = []
    encoder = VideoEncoder(codec, 320, 192, 16, 500)
    for index in range(64):
        coded = encoder.encode(noise(index, 320, 192).rgb, 5625 * index, key=index in (0, 32))
        assert coded is not None
        sizes.append(len(bytes(coded.packet)))
    mean = 500_000 / 8 / 16
    assert sum(sizes[16:]) / len(sizes[16:]) < 1.3 * mean
    assert sizes[32] < 6 * mean
    generous = VideoEncoder(codec, 320, 192, 16, 5000)
    more = [generous.encode(noise(index, 320, 192).rgb, 5625 * index, key=index == 0) for index in range(32)]
    assert sum(len(bytes(coded.packet)) for coded in more[16:] if coded) > 3 * sum(sizes[16:32])


@asynccontextmanager
async def broadcasting(codec: Codec, last: Frame) -> AsyncIterator[tuple[Broadcast, Metrics]]:
    metrics = Metrics()
    sender = Broadcast(codec, 16, 2500, last, last.pts, metrics)
    try:
        yield sender, metrics
    finally:
        sender.close()


async def taken(viewer: Viewer, count: int) -> list[EncodedFrame]:
    items = [await asyncio.wait_for(viewer.next(), 5) for _ in range(count)]
    assert all(isinstance(item, EncodedFrame) for item in items)
    return items  # type: ignore[return-value]


async def test_keyframes_asked_for_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "KEY_SECONDS", 0.0)
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        viewers = [Viewer("vp8", events=False) for _ in range(5)]
        for viewer in viewers:
            sender.join(viewer)
        sender.show(frame(1, 128, 96), 5625)
        firsts = [(await taken(viewer, 1))[0] for viewer in viewers]
        assert len(set(map(id, firsts))) == 1  # not copies: one packet for all
        assert firsts[0].key
        keys = []
        for index in range(2, 12):
            if index == 6:
                for _ in range(10):
                    sender.request_key()
            sender.show(frame(index, 128, 96), 5625 * index)
            keys += [coded.key for coded in await taken(viewers[0], 1)]
        assert keys == [index == 6 for index in range(2, 12)]


async def test_keyframes_are_rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "KEY_SECONDS", 1e6)
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        sender._key_at = -1e9
        viewer = Viewer("vp8", events=False)
        sender.join(viewer)
        for index in range(1, 8):
            sender.request_key()
            sender.show(frame(index, 128, 96), 5625 * index)
            [coded] = await taken(viewer, 1)
            assert coded.key == (index == 1)


async def test_an_encoder_that_cannot_keep_up_skips_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    async with broadcasting("h264", frame(0, 128, 96)) as (sender, metrics):
        viewer = Viewer("h264", events=False)
        sender.join(viewer)
        for index in range(1, 11):  # at once: it gets no turn in between
            sender.show(frame(index, 128, 96), 5625 * index)
        times = [coded.packet.pts for coded in await taken(viewer, MAX_PENDING)]
        assert times == [9 * 5625, 10 * 5625]
        assert 'reason="slow_encoder"} 8.0' in metrics.render().decode()


async def test_an_encoder_that_fails_lets_its_viewers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with broadcasting("h264", frame(0, 128, 96)) as (sender, _):
        viewer = Viewer("h264", events=False)
        sender.join(viewer)
        sender.show(frame(1, 64, 64), 5625)  # of another size
        assert await asyncio.wait_for(viewer.next(), 5) is None
        assert viewer.close_code == 1011


async def test_closing_just_as_a_frame_comes(caplog: pytest.LogCaptureFixture) -> None:
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        viewer = Viewer("vp8", events=False)
        sender.join(viewer)
        sender.show(frame(1, 128, 96), 5625)
        await taken(viewer, 1)
        await asyncio.sleep(0)  # it waits for the next frame again
        sender.show(frame(2, 128, 96), 11250)
        await asyncio.sleep(0)
    await asyncio.wait([sender._task])
    assert sender._task.exception() is None
    assert caplog.records == []


async def test_what_was_closed_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        async with broadcasting("h264", frame(0, 128, 96)) as (sender, _):
            viewer = Viewer("h264", events=False)
            sender.join(viewer)
            sender.show(frame(1, 128, 96), 5625)
            await taken(viewer, 1)
            held = weakref.ref(sender)
            task = sender._task
        await asyncio.wait([task])
        del sender, task
        async with asyncio.timeout(5):  # the encoder's thread may have it in its hands yet
            while held() is not None:
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
