"""Frames as pictures: the header, the payload, and that viewers share the work."""

import asyncio
import io
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from server.media import frames
from server.media.frames import PictureEncoder, PictureFormat, encode_picture
from server.metrics import Metrics
from tests.server.media.samples import frame

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("format", "number"), [("mjpeg", 1), ("rgb24", 2)])
def test_the_header(format: PictureFormat, number: int) -> None:
    picture = encode_picture(frame(2**33), format)
    assert struct.unpack("!BBHHHQ", picture[:16]) == (1, number, 32, 16, 1, 90000 * 2**33)


def test_rgb24_is_the_pixels() -> None:
    assert encode_picture(frame(), "rgb24")[16:] == frame().rgb


def test_mjpeg_is_a_jpeg_close_to_the_pixels_with_all_its_colour() -> None:
    image = Image.open(io.BytesIO(encode_picture(frame(), "mjpeg")[16:]))
    assert (image.format, image.size, image.mode) == ("JPEG", (32, 16), "RGB")
    assert {component[1:3] for component in image.layer} == {(1, 1)}  # 4:4:4
    assert max(abs(a - b) for a, b in zip(image.tobytes(), frame().rgb, strict=True)) < 16


async def test_a_frame_is_encoded_once_per_format(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(frames, "encode_picture", lambda frame, format: calls.append(format) or b"picture")
    with ThreadPoolExecutor(2) as executor:
        metrics = Metrics()
        encoder, one = PictureEncoder(executor, metrics), frame()
        results = await asyncio.gather(*(encoder.encode(one, format) for format in ("mjpeg", "rgb24", "mjpeg")))
        # A viewer that is cancelled does not cancel the encoding for the others.
        waiting = asyncio.ensure_future(encoder.encode(one, "mjpeg"))
        waiting.cancel()
        assert await encoder.encode(one, "mjpeg") == b"picture"
    assert results == [b"picture"] * 3
    assert sorted(calls) == ["mjpeg", "rgb24"]
    text = metrics.render().decode()
    assert 'livereel_encode_seconds_count{codec="mjpeg"} 1.0' in text
