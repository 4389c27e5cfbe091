"""Stamps on pictures, and the latencies computed from them."""

import io
import time
from typing import Any

import pytest
from PIL import Image, ImageDraw

from server.backends.fake import FakeBackend, stamp
from server.bench import latency

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("damage", [False, True])
def test_stamps_are_read_as_they_were_written(damage: bool) -> None:
    image = Image.new("RGB", (256, 256), (90, 90, 90))
    stamp(ImageDraw.Draw(image), 256, 65536 + 77, 2**32 + 123_456, 200)
    if damage:
        ImageDraw.Draw(image).rectangle((0, 0, 256, 8), (0, 0, 0))
    image.save(out := io.BytesIO(), "JPEG", quality=40)  # lossy, as a codec is
    rgb = Image.open(out).convert("RGB").tobytes()
    assert latency.read_stamp(rgb, 256) == (None if damage else (77, 123_456, 200))


def test_latency_is_from_a_frames_making_to_its_showing() -> None:
    end = latency.CYCLE_MS
    canvas: latency.Sightings = [(1, 1000, 0, end + 1300.0), (2, end - 50, 0, 2 * end + 150.0), (3, 5, 0, 25.0)]
    raw: latency.Sightings = [(1, 1000, 0, end + 1250.0), (3, 5, 0, 15.0)]
    found = latency.Observation(canvas, raw, 0)
    assert found.from_engine == [300.0, 200.0, 20.0]
    assert found.from_gateway == [50.0, 10.0]
    assert latency.percentiles([4.0, 1.0, 3.0, 2.0]) == "3 / 4"
    assert latency.percentiles([]) == "-"


async def test_stamped_pictures_say_when_they_were_made(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(stamped=True, chunk_seconds=0.1)) as gateway:
        stream = await gateway.open("a", seed=1)
        before = time.time() * 1000
        seen = await gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) >= 12)
        after = time.time() * 1000
    stamps = [latency.read_stamp(packet[16:], 256) for _, packet in seen.frames]
    assert [each[0] for each in stamps] == list(range(len(stamps)))
    assert all(-500 < latency.milliseconds(each[1], after) <= after - before + 500 for each in stamps)
