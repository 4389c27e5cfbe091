"""A recording of a live stream: every frame that is shown goes through a queue of its own into a file.

Neither the disk nor an encoder makes the stream wait. What does not fit the queue ends the recording; what is in the
file until then has no gap.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
from av.error import FFmpegError
from av.video.stream import VideoStream

from engine.wire import CLOCK_RATE
from server.library.mp4 import Growth, Mp4File
from server.media.encoder import TIME_BASE, EncodedFrame, picture, with_alpha
from server.media.frames import Frame
from server.media.matte import Matte

logger = logging.getLogger("livereel.media")

FilmFormat = Literal["mp4", "webm"]
"""MP4 takes the H.264 that viewers get, as it is; WebM is encoded for itself, as VP9."""
MEDIA_TYPES: dict[FilmFormat, str] = {"mp4": "video/mp4", "webm": "video/webm"}

MAX_QUEUE_BYTES = 256 << 20
"""Of frames that wait for the encoder or the disk: some seconds of pixels, or many minutes of H.264."""

Reason = Literal["stopped", "stream_ended", "storage_full", "too_slow", "failed"]


class WebmFile:
    """VP9 in WebM, encoded as it comes, with an alpha channel if wanted."""

    def __init__(self, path: Path, width: int, height: int, fps: int, *, alpha: bool = False) -> None:
        """`path` is an empty file."""
        self.size = 0
        self._path = path
        self._first = -1
        self._container = av.open(str(path), "w", format="webm")
        options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0", "crf": "24"}
        stream = self._container.add_stream("libvpx-vp9", rate=fps, options={**options, "b": "0"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuva420p" if alpha else "yuv420p"
        if alpha:
            stream.metadata["alpha_mode"] = "1"  # by which players know
        stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK_RATE)
        stream.codec_context.gop_size = 2 * fps
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._alpha = alpha

    def add(self, rgb: memoryview, pts: int, matte: Matte | None) -> None:
        """The next frame, height x width x 3 bytes, shown at `pts` in 1/90000 s, and what is transparent of it: without
        a matte nothing. Raises OSError or FFmpegError."""
        self._first = pts if self._first < 0 else self._first
        width, height = self._stream.width, self._stream.height
        shown = picture(rgb, width, height)
        if self._alpha:
            shown = with_alpha(
                shown, bytes([255]) * (width * height) if matte is None else matte.opacity(rgb, width, height)
            )
        shown.pts, shown.time_base = pts - self._first, TIME_BASE
        self._container.mux(self._stream.encode(shown))
        self.size = self._path.stat().st_size

    def finish(self) -> None:
        """Make it a whole film, with its length and an index."""
        self._container.mux(self._stream.encode(None))
        self.close()
        self.size = self._path.stat().st_size

    def close(self) -> None:
        """Leave it as it is. Safe to call again."""
        self._container.close()


class Tape:
    """One recording. `take` is called with every frame as it is shown, `run` writes until the end."""

    def __init__(
        self, format: FilmFormat, fps: int, growth: Growth, full: Callable[[], bool], *, alpha: bool = False
    ) -> None:
        """The file of `growth` is empty; `full` says that there is no room any more. `alpha` is for WebM."""
        self.format, self._alpha = format, alpha
        self.frames = 0
        """That were taken."""
        self.lost = 0
        """That were shown meanwhile, and missed because an encoder skipped them."""
        self.began_at = self.ended_at = 0
        """Presentation time of the first frame, and of the end of the last, in 1/90000 s."""
        self.growth = growth
        self.on_end: Callable[[], None] | None = None
        """Called when it takes no more frames."""
        self._full = full
        self._fps = fps
        self._next_index = -1
        self._size = 0, 0
        self._queue: deque[tuple[int, memoryview | EncodedFrame, Matte | None]] = deque()
        """Presentation time, what the film takes of the frame, and what is transparent; no pixels are kept for the sake
        of a packet."""
        self._queued_bytes = 0
        self._reason: Reason | None = None
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tape")

    @property
    def wants_key(self) -> bool:
        """It can begin with nothing but a keyframe."""
        return self.format == "mp4" and not self.frames

    def take(self, frame: Frame, coded: EncodedFrame | None = None, matte: Matte | None = None) -> None:
        """The frame on screen; for MP4 as it is encoded, for WebM with what is transparent. Returns at once."""
        if self._reason is not None or (self.wants_key and not (coded and coded.key)):
            return
        if not self.frames:
            self.began_at, self._next_index = frame.pts, frame.index
            self._size = frame.width, frame.height
        self.lost += frame.index - self._next_index
        self._next_index = frame.index + 1
        self.frames += 1
        self.ended_at = frame.pts + CLOCK_RATE // self._fps
        self._queue.append((frame.pts, coded or frame.rgb, matte))
        self._queued_bytes += coded.packet.size if coded else len(frame.rgb)
        if self._queued_bytes > MAX_QUEUE_BYTES:
            self.finish("too_slow")
        self._wake.set()

    def finish(self, reason: Reason) -> None:
        """Nothing more comes: write what waits, and close the file. Safe to call again."""
        if self._reason is None:
            self._reason = reason
            if self.on_end:
                self.on_end()
        self._wake.set()

    async def run(self) -> Reason:
        """Write until the end; says why it came. What was written can be played, however that was. The caller ends
        `growth`."""
        film: Mp4File | WebmFile | None = None
        loop = asyncio.get_running_loop()
        try:
            while self._queue or self._reason is None:
                if self._full():
                    self.finish("storage_full")
                    self._queue.clear()
                    break
                if not self._queue:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                batch, self._queue, self._queued_bytes = self._queue, deque(), 0
                if film is None:
                    film = await loop.run_in_executor(self._executor, self._begin)
                await loop.run_in_executor(self._executor, _write, film, batch)
                self.growth.grow(film.size)
            if film is not None:
                await loop.run_in_executor(self._executor, film.finish)
                self.growth.grow(film.size)
        except (OSError, FFmpegError, RuntimeError):
            logger.exception("a recording failed")
            self.finish("failed")
            self._reason = "failed"
            if film is not None:
                await loop.run_in_executor(self._executor, film.close)
        finally:
            self._executor.shutdown(wait=False)
        assert self._reason is not None
        return self._reason

    def _begin(self) -> Mp4File | WebmFile:
        if self.format == "mp4":
            return Mp4File(self.growth.path, *self._size, self._fps)
        return WebmFile(self.growth.path, *self._size, self._fps, alpha=self._alpha)


def _write(film: Mp4File | WebmFile, batch: Iterable[tuple[int, memoryview | EncodedFrame, Matte | None]]) -> None:
    for pts, taken, matte in batch:
        if isinstance(taken, EncodedFrame):
            assert isinstance(film, Mp4File)
            film.add(bytes(taken.packet), pts, key=taken.key)
        else:
            assert isinstance(film, WebmFile)
            film.add(taken, pts, matte)
