"""Packets, and the queue of one viewer."""

import asyncio
import io
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from server.media import packets
from server.media.packets import DISCONTINUITY, Encoder, Format, Frame, encode
from server.media.viewer import MAX_EVENTS, MAX_FRAMES, Viewer

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
        encoder, one = Encoder(executor), frame()
        results = await asyncio.gather(*(encoder.packet(one, format) for format in ("mjpeg", "rgb24", "mjpeg")))
        # One viewer that gives up does not take the packet from the others.
        waiting = asyncio.ensure_future(encoder.packet(one, "mjpeg"))
        waiting.cancel()
        assert await encoder.packet(one, "mjpeg") == b"packet"
    assert results == [b"packet"] * 3
    assert sorted(calls) == ["mjpeg", "rgb24"]


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
