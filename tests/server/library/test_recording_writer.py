"""The queue and the file of a recording. `tests/server/api/test_recordings.py` decodes whole ones."""

from pathlib import Path

import av
import pytest

from server.library import recording_writer
from server.library.mp4 import GrowingFile
from server.library.recording_writer import RecordingWriter
from server.media.frames import Frame

pytestmark = pytest.mark.anyio


def pixels(index: int) -> Frame:
    return Frame(index, 5625 * index, 64, 48, 0, memoryview(bytes(64 * 48 * 3)))


def decode(path: Path) -> list[av.VideoFrame]:
    with av.open(str(path)) as container:
        return list(container.decode(container.streams.video[0]))


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


async def test_mp4_starts_with_a_keyframe(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.touch()
    writer = RecordingWriter("mp4", 16, GrowingFile(path), lambda: False)
    writer.add(pixels(0))
    assert writer.wants_key and writer.frames == 0
    writer.finish("stopped")
    assert await writer.run() == "stopped"
    assert path.stat().st_size == 0
