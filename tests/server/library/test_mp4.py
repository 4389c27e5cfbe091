"""MP4 files that are read while they are written. `tests/server/api/test_videos.py` decodes whole ones."""

import asyncio
import io
from pathlib import Path

import av
import pytest
from PIL import Image

from server.library.mp4 import ClipWriter, GrowingFile, webp

pytestmark = pytest.mark.anyio


def grey(level: int) -> memoryview:
    return memoryview(bytes([level]) * (64 * 48 * 3))


def test_what_can_be_read_is_playable_before_the_file_is_finished(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.touch()
    writer = ClipWriter(path, 64, 48, 16)
    writer.add_rgb(grey(5 * index) for index in range(40))
    part = path.read_bytes()[: writer.size]
    with av.open(io.BytesIO(part)) as container:
        readable = len(list(container.decode(video=0)))
    assert 16 <= readable < 40  # whole fragments of a second at most
    writer.finish()
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert container.duration == 2_500_000
    assert [frame.pts for frame in frames] == [5625 * index for index in range(40)]
    assert path.stat().st_size == writer.size


async def test_readers_wait_for_a_growing_file(tmp_path: Path) -> None:
    file = GrowingFile(tmp_path / "a")
    reading = asyncio.create_task(file.wait_beyond(10))
    file.grow(10)
    await asyncio.sleep(0)
    assert not reading.done()
    file.grow(11)
    assert await reading
    file.end(complete=True)
    file.end(complete=False)  # the first call counts
    assert file.complete
    assert not await file.wait_beyond(11)


def test_webp_is_a_picture_of_the_frame() -> None:
    image = Image.open(io.BytesIO(webp(grey(100), 64, 48)))
    assert (image.format, image.size) == ("WEBP", (64, 48))
    assert all(abs(value - 100) < 4 for value in image.convert("RGB").getpixel((5, 5)))
