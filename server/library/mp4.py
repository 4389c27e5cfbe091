"""Video into files that can be read while they are written. What writes is for one thread at a time."""

import asyncio
import io
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from engine.wire import CLOCK_RATE
from server.media import fmp4
from server.media.encoder import VideoEncoder

FRAGMENT_SECONDS = 1.0
"""Playback time of a fragment at most: how far the readable part of a file is behind what was written to it."""
KEY_SECONDS = 2
"""In a clip every so many seconds are a keyframe: places to jump to."""
WEBP_QUALITY = 85


class Mp4File:
    """Coded frames as fragmented MP4. What is finished says its length and has an index, like any film."""

    def __init__(self, path: Path, width: int, height: int, fps: int) -> None:
        """`path` is an empty file."""
        self.frames = 0
        self.size = 0
        """Bytes that can be read, up to the end of a fragment."""
        self._shape = width, height
        self._period = CLOCK_RATE // fps
        self._parameters = b"", b""
        self._first = 0
        self._pending: list[tuple[list[bytes], int, bool]] = []
        self._fragments = 0
        self._keyframes: list[tuple[int, int]] = []
        self._file = path.open("r+b", buffering=0)

    def add(self, access_unit: bytes, pts: int, *, key: bool) -> None:
        """The next frame, in Annex B, shown at `pts` in 1/90000 s. The first is a keyframe. Raises OSError."""
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
        """Make it a whole film. Raises OSError."""
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
        """Leave it as it is. Safe to call again."""
        self._pending.clear()
        self._file.close()

    def _flush(self, end: int) -> None:
        """Write the frames that wait as a fragment; the last of them lasts until `end`."""
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


class ClipFile(Mp4File):
    """Every frame of a clip, encoded as it comes."""

    def __init__(self, path: Path, width: int, height: int, fps: int) -> None:
        super().__init__(path, width, height, fps)
        self._encoder = VideoEncoder("h264", width, height, fps, None)
        self._key_frames = KEY_SECONDS * fps

    def add_rgb(self, frames: Iterable[memoryview]) -> None:
        """The next frames, each height x width x 3 bytes. Raises OSError."""
        for rgb in frames:
            pts = self.frames * self._period
            coded = self._encoder.encode(rgb, pts, key=self.frames % self._key_frames == 0)
            if coded is None:
                raise RuntimeError("the encoder kept a frame to itself")
            self.add(bytes(coded.packet), pts, key=coded.key)


def webp(rgb: memoryview, width: int, height: int) -> bytes:
    """A frame as a picture."""
    image = Image.frombytes("RGB", (width, height), bytes(rgb))
    image.save(out := io.BytesIO(), "WEBP", quality=WEBP_QUALITY)
    return out.getvalue()


class Growth:
    """How far a file has come, for those who read it meanwhile. Lives on the event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        """Bytes that can be read."""
        self.over = False
        self.whole = False
        """Over, and nothing is missing."""
        self._changed = asyncio.Event()

    def grow(self, size: int) -> None:
        """This much can be read."""
        self.size = size
        self._tell()

    def end(self, *, whole: bool) -> None:
        """Nothing more comes. Safe to call again."""
        if not self.over:
            self.over, self.whole = True, whole
            self._tell()

    async def beyond(self, place: int) -> bool:
        """Wait until there is more than `place` bytes; False when there never will be."""
        while self.size <= place and not self.over:
            await self._changed.wait()
        return self.size > place

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
