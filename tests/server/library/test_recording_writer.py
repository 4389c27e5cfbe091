"""The queue and the file of a recording. `tests/server/api/test_recordings.py` decodes whole ones."""

import asyncio
import errno
import random
from pathlib import Path

import av
import pytest
from av.error import FFmpegError

from server.library import recording_writer
from server.library.films import Film, FilmFormat
from server.library.mp4 import GrowingFile
from server.library.recording_writer import RecordingWriter, WebmWriter
from server.media.encoder import VideoEncoder
from server.media.frames import Frame
from tests.server.library.disk import full_at

pytestmark = pytest.mark.anyio


def pixels(index: int) -> Frame:
    return Frame(index, 5625 * index, 64, 48, 0, memoryview(bytes(64 * 48 * 3)))


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(container.streams.video[0]))


def readable(path: Path) -> list[av.VideoFrame]:
    try:
        return decode(path)
    except FFmpegError:
        return []  # it has not begun


async def test_a_writer_that_cannot_keep_up_ends_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_writer, "MAX_QUEUE_BYTES", 5 * 64 * 48 * 3)
    path = tmp_path / "film.webm"
    path.touch()
    writer = RecordingWriter("webm", 16, GrowingFile(path), lambda: False)
    for index in range(9):  # before it gets to write anything
        writer.add(pixels(index))
    assert await writer.run() == "too_slow"
    assert len(decode(path)) == writer.frames == 6


async def test_a_full_store_ends_the_recording(tmp_path: Path) -> None:
    path = tmp_path / "film.webm"
    path.touch()
    ended: list[bool] = []
    writer = RecordingWriter("webm", 16, GrowingFile(path), lambda: True)
    writer.on_end = lambda: ended.append(True)
    writer.add(pixels(0))
    assert await writer.run() == "storage_full"
    writer.add(pixels(1))  # too late
    assert (writer.frames, ended) == (1, [True])
    assert writer.film == Film(), "nothing of it is in the file"


async def test_mp4_starts_with_a_keyframe(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.touch()
    writer = RecordingWriter("mp4", 16, GrowingFile(path), lambda: False)
    writer.add(pixels(0))
    assert writer.wants_key and writer.frames == 0
    writer.finish("stopped")
    assert await writer.run() == "stopped"
    assert path.stat().st_size == 0


FORMATS: list[FilmFormat] = ["mp4", "webm"]


def noise(index: int) -> Frame:
    return Frame(index, 5625 * index, 64, 48, 0, memoryview(random.Random(index).randbytes(64 * 48 * 3)))


class Encoded:
    """Adds frames to a recording as a stream does."""

    def __init__(self, writer: RecordingWriter) -> None:
        self._writer = writer
        self._encoder = VideoEncoder("h264", 64, 48, 16, 300)

    def add(self, frame: Frame) -> None:
        encoded = self._encoder.encode(frame.rgb, frame.pts, key=frame.index == 0)
        self._writer.add(frame, encoded if self._writer.format == "mp4" else None)


def begin(folder: Path, format: FilmFormat) -> tuple[Path, RecordingWriter, Encoded]:
    path = folder / f"film.{format}"
    path.touch()
    writer = RecordingWriter(format, 16, GrowingFile(path), lambda: False)
    return path, writer, Encoded(writer)


@pytest.mark.parametrize("format", FORMATS)
async def test_a_full_disk_ends_the_recording_with_what_is_on_it(tmp_path: Path, format: FilmFormat) -> None:
    path, writer, stream = begin(tmp_path, format)
    for index in range(100):
        stream.add(noise(index))
    with full_at(150_000):
        assert await writer.run() == "storage_full"
    assert writer.film is not None
    assert writer.film.frames == len(decode(path)) > 16
    assert writer.film.size == writer.growth.size == path.stat().st_size <= 150_000
    with av.open(str(path)) as container:
        assert container.duration == pytest.approx(1e6 * writer.film.frames / 16, abs=1e3)


@pytest.mark.parametrize("format", FORMATS)
async def test_a_disk_that_fills_up_at_the_end(tmp_path: Path, format: FilmFormat) -> None:
    path, writer, stream = begin(tmp_path, format)
    for index in range(40):
        stream.add(noise(index))
    running = asyncio.create_task(writer.run())
    while not writer.growth.size:
        await asyncio.sleep(0.01)
    with full_at(writer.growth.size + 10):  # the last part does not fit, nor does the index
        writer.finish("stopped")
        assert await running == "storage_full"
    assert writer.film is not None
    assert writer.film.frames == len(decode(path)) == 32


@pytest.mark.parametrize("format", FORMATS)
async def test_a_file_is_read_while_it_grows(tmp_path: Path, format: FilmFormat) -> None:
    """A still scene too, of which little is to be written."""
    path, writer, stream = begin(tmp_path, format)
    running = asyncio.create_task(writer.run())
    for second in range(3):
        for index in range(16 * second, 16 * (second + 1) + 1):
            if index == 0 or index > 16 * second:
                stream.add(pixels(index))
        async with asyncio.timeout(10):
            while len(readable(path)) < 16 * (second + 1):
                await asyncio.sleep(0.01)
        part = tmp_path / "part"
        part.write_bytes(path.read_bytes()[: writer.growth.size])
        assert len(decode(part)) == len(decode(path)) >= 16 * (second + 1)
    writer.finish("stopped")
    await running


async def test_whatever_breaks_ends_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("SPS")

    path = tmp_path / "film.webm"
    path.touch()
    monkeypatch.setattr(WebmWriter, "add", broken)
    monkeypatch.setattr(WebmWriter, "close", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    writer = RecordingWriter("webm", 16, GrowingFile(path), lambda: False)
    writer.add(pixels(0))
    assert await writer.run() == "failed"
    assert writer.film == Film()
    assert "Input/output error" in caplog.text
