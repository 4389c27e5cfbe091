"""Writes MP4 files that can be read while they are written. Each writer is for one thread at a time."""

import asyncio
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from engine.wire import CLOCK_RATE
from server.media import fmp4
from server.media.encoder import VideoEncoder

FRAGMENT_SECONDS = 1.0
"""Longest fragment, in playback time: the readable part of a file lags what was added by at most this."""
KEY_SECONDS = 2
"""Interval of a clip's keyframes, which are the points that players can seek to."""
WEBP_QUALITY = 85


class Mp4Writer:
    """Writes encoded frames as fragmented MP4. A finished file states its duration and has an index for seeking."""

    def __init__(self, path: Path, width: int, height: int, fps: int) -> None:
        """`path` is an existing, empty file."""
        self.frames = 0
        self.size = 0
        """Readable bytes: up to the end of the last complete fragment."""
        self._shape = width, height
        self._period = CLOCK_RATE // fps
        self._parameters = b"", b""
        self._first = 0
        self._pending: list[tuple[list[bytes], int, bool]] = []
        self._fragments = 0
        self._keyframes: list[tuple[int, int]] = []
        self._file = path.open("r+b", buffering=0)

    def add(self, access_unit: bytes, pts: int, *, key: bool) -> None:
        """Add the next frame: an access unit in Annex B, shown at `pts` in 1/90000 s. The first must be a keyframe.
        Raises OSError."""
        units = fmp4.nal_units(access_unit)
        if not self.frames:
            kinds = {unit[0] & 31: unit for unit in units}
            self._parameters, self._first = (kinds[fmp4.SPS], kinds[fmp4.PPS]), pts
            self._write(fmp4.init_segment(*self._parameters, *self._shape))
        elif key or pts - self._pending[0][1] >= FRAGMENT_SECONDS * CLOCK_RATE:
            self._flush(pts)
        self._pending.append((units, pts, key))
        self.frames += 1

    def finish(self) -> None:
        """Write the last fragment, the index and the duration, and close the file. Raises OSError."""
        try:
            if self._pending:
                end = self._pending[-1][1] + self._period
                self._flush(end)
                self._write(fmp4.index(self._keyframes))
                self._file.seek(0)
                self._write_all(fmp4.init_segment(*self._parameters, *self._shape, end - self._first))
        finally:
            self.close()

    def close(self) -> None:
        """Close the file as it is, without index and duration. Safe to call again."""
        self._pending.clear()
        self._file.close()

    def _flush(self, end: int) -> None:
        """Write the pending frames as one fragment; the last of them is shown until `end`."""
        pending, self._pending = self._pending, []
        times = [pts - self._first for _, pts, _ in pending]
        ends = [*times[1:], end - self._first]
        if pending[0][2]:
            self._keyframes.append((times[0], self.size))
        samples = [
            fmp4.sample(units, after - time, key=key)
            for (units, _, key), time, after in zip(pending, times, ends, strict=True)
        ]
        self._fragments += 1
        self._write(fmp4.fragment(self._fragments, times[0], samples))

    def _write(self, data: bytes) -> None:
        self._write_all(data)
        self.size += len(data)

    def _write_all(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]


class ClipWriter(Mp4Writer):
    """Encodes the frames of a clip as H.264 and writes them."""

    def __init__(self, path: Path, width: int, height: int, fps: int) -> None:
        super().__init__(path, width, height, fps)
        self._encoder = VideoEncoder("h264", width, height, fps, None)
        self._key_frames = KEY_SECONDS * fps

    def add_rgb(self, frames: Iterable[memoryview]) -> None:
        """Encode and add the next frames, RGB24 of height x width x 3 bytes each. Raises OSError."""
        for rgb in frames:
            pts = self.frames * self._period
            encoded = self._encoder.encode(rgb, pts, key=self.frames % self._key_frames == 0)
            if encoded is None:
                raise RuntimeError("the encoder kept a frame to itself")
            self.add(bytes(encoded.packet), pts, key=encoded.key)


def webp(rgb: memoryview, width: int, height: int) -> bytes:
    """An RGB24 frame, height x width x 3 bytes, as a WebP picture."""
    image = Image.frombytes("RGB", (width, height), bytes(rgb))
    image.save(out := io.BytesIO(), "WEBP", quality=WEBP_QUALITY)
    return out.getvalue()


class GrowingFile:
    """A file that is being written, for readers who follow it. Used on the event loop only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Readable bytes."""
        self.ended = False
        self.complete = False
        """The file has ended and nothing is missing."""
        self._changed = asyncio.Event()

    def grow(self, size: int) -> None:
        """The first `size` bytes can be read now."""
        self.size = size
        self._wake_readers()

    def end(self, *, complete: bool) -> None:
        """The file will grow no more. Safe to call again."""
        if not self.ended:
            self.ended, self.complete = True, complete
            self._wake_readers()

    async def wait_beyond(self, position: int) -> bool:
        """Wait until more than `position` bytes can be read; False if the file ends before."""
        while self.size <= position and not self.ended:
            await self._changed.wait()
        return self.size > position

    def _wake_readers(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
