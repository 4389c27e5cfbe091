"""Writes a recording of a live stream: every frame shown goes through the recording's own queue into a file.

Neither a slow disk nor a slow encoder delays the stream. If the queue overflows, the recording ends; the file up to
then has no gap.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import av
from av.video.stream import VideoStream

from engine.wire import CLOCK_RATE
from server.library.films import Film, FilmFormat, repair
from server.library.mp4 import FRAGMENT_SECONDS, GrowingFile, Mp4Writer
from server.library.store import out_of_space
from server.media.encoder import TIME_BASE, EncodedFrame, Yuv420Converter, add_alpha
from server.media.frames import Frame
from server.media.matte import Matte

logger = logging.getLogger("livereel.media")
T = TypeVar("T")

MEDIA_TYPES: dict[FilmFormat, str] = {"mp4": "video/mp4", "webm": "video/webm"}

MAX_QUEUE_BYTES = 256 << 20
"""Frames queued for the encoder or the disk: some seconds of pixels, or many minutes of H.264."""

Reason = Literal["stopped", "stream_ended", "storage_full", "too_slow", "failed", "file_removed"]


class _Output:
    """The file that FFmpeg writes a container to.

    After an error it discards what is written, so that the container can be closed, which writes as well.
    """

    def __init__(self, path: Path) -> None:
        self.error: OSError | None = None
        """The first error."""
        self.size = 0
        """Bytes of the file."""
        self._file = path.open("r+b", buffering=0)

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        try:
            while view and self.error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self.error = error
        self.size = max(self.size, self._file.tell())
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close_file(self) -> None:
        """Close the file; FFmpeg must be done with it. Raises OSError."""
        self._file.close()


class WebmWriter:
    """Encodes frames as VP9 and writes them as WebM, optionally with an alpha channel.

    Frames are written in clusters, each at once, of `FRAGMENT_SECONDS` at most.
    """

    def __init__(self, path: Path, width: int, height: int, fps: int, *, alpha: bool = False) -> None:
        """`path` is an existing, empty file."""
        self.size = 0
        """Readable bytes: up to the end of the last complete cluster."""
        self._first = -1
        self._output = _Output(path)
        # The next frame begins a cluster if it comes later than this after the cluster's first.
        limit = {"cluster_time_limit": str(round(1000 * FRAGMENT_SECONDS) - 1)}
        self._container = av.open(self._output, "w", format="webm", options=limit)
        options = {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0", "auto-alt-ref": "0", "crf": "24"}
        stream = self._container.add_stream("libvpx-vp9", rate=fps, options={**options, "b": "0"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuva420p" if alpha else "yuv420p"
        if alpha:
            stream.metadata["alpha_mode"] = "1"  # tells players that the file has alpha
        stream.time_base = stream.codec_context.time_base = Fraction(1, CLOCK_RATE)
        stream.codec_context.gop_size = 2 * fps
        stream.codec_context.thread_count = 1
        self._stream = stream
        self._alpha = alpha
        self._converter = Yuv420Converter()

    def add(self, rgb: memoryview, pts: int, matte: Matte | None) -> None:
        """Encode and add the next frame: RGB24, height x width x 3 bytes, shown at `pts` in 1/90000 s. The matte makes
        its alpha channel; without one it is opaque. Raises OSError."""
        self._first = pts if self._first < 0 else self._first
        width, height = self._stream.width, self._stream.height
        frame = self._converter.convert(rgb, width, height)
        if self._alpha:
            opaque = bytes([255]) * (width * height)
            frame = add_alpha(frame, opaque if matte is None else matte.opacity(rgb, width, height))
        frame.pts, frame.time_base = pts - self._first, TIME_BASE
        self._mux(frame)

    def finish(self) -> None:
        """Flush the encoder, write duration and index, and close the file. Raises OSError."""
        self._mux(None)
        self.close()
        self._check()

    def close(self) -> None:
        """Close the file as it is. Safe to call again. Raises OSError."""
        self._container.close()
        self._output.close_file()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        self._container.mux(self._stream.encode(frame))
        self._check()

    def _check(self) -> None:
        if self._output.error is not None:
            raise self._output.error
        self.size = self._output.size


class RecordingWriter:
    """Writes one recording: `add` queues every frame as it is shown, `run` writes the queue until the end."""

    def __init__(
        self, format: FilmFormat, fps: int, growth: GrowingFile, full: Callable[[], bool], *, alpha: bool = False
    ) -> None:
        """`growth` names an existing, empty file. `full` says whether the store is full. `alpha` is for WebM only."""
        self.format, self._alpha = format, alpha
        self.frames = 0
        """Frames recorded."""
        self.lost = 0
        """Frames shown but not recorded, because an encoder skipped them."""
        self.began_at = self.ended_at = 0
        """Presentation time of the first frame's start and the last frame's end, in 1/90000 s."""
        self.growth = growth
        self.on_end: Callable[[], None] | None = None
        """Called once, when the recording accepts no more frames."""
        self.film: Film | None = None
        """What the file holds; None until `run` returns."""
        self._full = full
        self._fps = fps
        self._next_index = -1
        self._size = 0, 0
        self._queue: deque[tuple[int, memoryview | EncodedFrame, Matte | None]] = deque()
        """Presentation time; pixels for WebM or the encoded frame for MP4; matte. No pixels are kept for MP4."""
        self._queued_bytes = 0
        self._reason: Reason | None = None
        self._wake = asyncio.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="recording")

    @property
    def wants_key(self) -> bool:
        """Whether an MP4 recording still waits for the keyframe that it must start with."""
        return self.format == "mp4" and not self.frames

    def add(self, frame: Frame, encoded: EncodedFrame | None = None, matte: Matte | None = None) -> None:
        """Queue the frame on screen: for MP4 with its encoded form, for WebM with its matte. Returns at once."""
        if self._reason is not None or (self.wants_key and not (encoded and encoded.key)):
            return
        if not self.frames:
            self.began_at, self._next_index = frame.pts, frame.index
            self._size = frame.width, frame.height
        self.lost += frame.index - self._next_index
        self._next_index = frame.index + 1
        self.frames += 1
        self.ended_at = frame.pts + CLOCK_RATE // self._fps
        self._queue.append((frame.pts, encoded or frame.rgb, matte))
        self._queued_bytes += encoded.packet.size if encoded else len(frame.rgb)
        if self._queued_bytes > MAX_QUEUE_BYTES:
            self.finish("too_slow")
        self._wake.set()

    def finish(self, reason: Reason) -> None:
        """Accept no more frames; `run` writes what is queued and closes the file. Safe to call again."""
        if self._reason is None:
            self._reason = reason
            if self.on_end:
                self.on_end()
        self._wake.set()

    async def run(self) -> Reason:
        """Write until the recording ends, and return the reason. `film` is what can be played then, whatever the reason
        is. The caller ends `growth`."""
        writer: Mp4Writer | WebmWriter | None = None
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
                if writer is None:
                    writer = await self._in_thread(self._open_file)
                await self._in_thread(partial(_write, writer, batch))
                self.growth.grow(writer.size)
            if writer is not None:
                await self._in_thread(writer.finish)
        except Exception as error:
            self._break_off(error)
        self.film = Film()
        try:
            self.film = await self._in_thread(partial(self._close_file, writer))
        except FileNotFoundError:
            self._reason = "file_removed"
        except Exception as error:
            self._break_off(error)
        self.growth.grow(self.film.size)
        self._executor.shutdown(wait=False)
        assert self._reason is not None
        return self._reason

    def _break_off(self, error: Exception) -> None:
        """End the recording for an error of its file or its encoder."""
        if out_of_space(error):
            logger.error("a recording ended: %s", error)
            reason: Reason = "storage_full"
        else:
            logger.error("a recording failed", exc_info=error)
            reason = "failed"
        self.finish(reason)
        self._reason = reason
        self._queue.clear()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _close_file(self, writer: Mp4Writer | WebmWriter | None) -> Film:
        """Close the file, if that has not been done, and repair it."""
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            logger.error("the file of a recording could not be closed: %s", error)
        return repair(self.growth.path, self.format)

    def _open_file(self) -> Mp4Writer | WebmWriter:
        if self.format == "mp4":
            return Mp4Writer(self.growth.path, *self._size, self._fps)
        return WebmWriter(self.growth.path, *self._size, self._fps, alpha=self._alpha)


def _write(
    writer: Mp4Writer | WebmWriter, batch: Iterable[tuple[int, memoryview | EncodedFrame, Matte | None]]
) -> None:
    for pts, frame, matte in batch:
        if isinstance(frame, EncodedFrame):
            assert isinstance(writer, Mp4Writer)
            writer.add(bytes(frame.packet), pts, key=frame.key)
        else:
            assert isinstance(writer, WebmWriter)
            writer.add(frame, pts, matte)
