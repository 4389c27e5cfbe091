"""One stream in one codec: each frame is encoded once, in the broadcast's own thread, and queued for every viewer.

A broadcast starts with the first viewer who needs the codec and is closed after the last one. Viewers that join or have
lost frames request a keyframe; one keyframe answers all requests that are pending.
"""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine.wire import CLOCK_RATE
from server.aio import wait_until
from server.library.recording_writer import RecordingWriter
from server.media import fmp4
from server.media.encoder import Codec, EncodedFrame, VideoEncoder
from server.media.frames import AnyFrame, Frame, fmp4_message
from server.media.viewer import Viewer
from server.metrics import Metrics

logger = logging.getLogger("livereel.media")

KEY_SECONDS = 1.0
"""Shortest interval between requested keyframes, however many viewers ask: each costs all viewers bandwidth."""
HOLD_SECONDS = 1.0
"""While playback stalls, the frame on screen is sent again this often: receivers take silence for a lost connection."""
KEY_WAIT_SECONDS = 0.2
"""How long a request for a keyframe waits for the next frame before the frame on screen is encoded again as one."""
MAX_PENDING = 2
"""Frames queued for the encoder. An encoder that cannot keep up skips frames instead of delaying them."""
MAX_PENDING_RECORDED = 64
"""The same while recording: a recording needs every frame, so viewers may get them some seconds late."""


class Broadcast:
    """The encoder of one stream and codec, with its viewers and recordings. `last` is the frame on screen, which was
    shown at `clock` (in 1/90000 s)."""

    def __init__(self, codec: Codec, fps: int, kbps: int, last: AnyFrame, clock: int, metrics: Metrics) -> None:
        self._codec: Codec = codec
        self._fps = fps
        self._metrics = metrics
        self._viewers: set[Viewer] = set()
        self._recordings: set[RecordingWriter] = set()
        self._last, self._clock, self._media = last, clock - 1, -1
        self._shown_at = time.monotonic()
        self._pending: deque[tuple[AnyFrame, int]] = deque()
        self._wake = asyncio.Event()
        self._ending = False
        self.failed = False
        """The encoder has failed, and nothing more comes."""
        self._key_wanted = True
        self._key_at = -KEY_SECONDS
        self._init_segment = b""
        self._fragments = 0
        self._encoder = VideoEncoder(codec, last.width, last.height, fps, kbps)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{codec} encoder")
        self._task = asyncio.create_task(self._run(), name=f"broadcast {codec}")

    def __len__(self) -> int:
        return len(self._viewers) + len(self._recordings)

    def join(self, viewer: Viewer) -> None:
        """Add a viewer, who starts with a keyframe."""
        self._viewers.add(viewer)
        self.request_key()

    def leave(self, viewer: Viewer) -> None:
        """Remove a viewer. Safe to call again."""
        self._viewers.discard(viewer)

    def record(self, writer: RecordingWriter) -> None:
        """Add a recording, which gets every frame from the next keyframe on."""
        self._recordings.add(writer)
        self.request_key()

    def stop_recording(self, writer: RecordingWriter) -> None:
        """Remove a recording. Safe to call again."""
        self._recordings.discard(writer)

    def request_key(self) -> None:
        """Encode a keyframe soon: a receiver cannot decode anything before it."""
        self._key_wanted = True
        self._wake.set()

    def show(self, frame: AnyFrame, clock: int) -> None:
        """Queue the frame that is due at `clock`, on the playback clock in 1/90000 s. Returns at once."""
        if len(self._pending) >= (MAX_PENDING_RECORDED if self._recordings else MAX_PENDING):
            self._pending.popleft()
            self._metrics.frames_dropped.labels("slow_encoder").inc()
        self._pending.append((frame, clock))
        self._wake.set()

    def finish(self) -> None:
        """The stream has ended: encode what is queued, finish the recordings, and close."""
        self._ending = True
        self._wake.set()

    def close(self) -> None:
        """Stop encoding. Safe to call again."""
        # The task ends by itself. If it were cancelled, its traceback would keep encoder and pixels alive in a cycle.
        self._pending.clear()
        self.finish()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        repeated = False
        try:
            while (item := await self._next()) is not None:
                frame, clock = item
                was_repeated, repeated = repeated, frame is self._last and self._media >= 0
                key = self._key_wanted and time.monotonic() - self._key_at >= KEY_SECONDS
                # Recordings omit repeated frames, so no later frame may depend on one.
                key = key or bool(self._recordings and was_repeated and not repeated)
                if key:
                    self._key_wanted = False
                # A frame that is sent again needs a later time than before.
                self._last, self._clock, self._shown_at = frame, max(clock, self._clock + 1), time.monotonic()
                self._media = max(frame.pts, self._media + 1)
                work = partial(self._encode, frame, self._clock, key)
                encoded = await loop.run_in_executor(self._executor, work)
                end = time.monotonic()
                frame.encode_period = frame.encode_period or (self._shown_at, end)
                self._metrics.encode_seconds.labels(self._codec).observe(end - self._shown_at)
                if encoded is not None:
                    self._deliver(frame, encoded, repeated=repeated)
            for writer in list(self._recordings):
                writer.finish("stream_ended")
        except Exception:
            logger.exception("the %s encoder failed", self._codec)
            self.failed = True
            for viewer in self._viewers:
                viewer.finish(1011)
            for writer in list(self._recordings):
                writer.finish("failed")
        finally:
            self._executor.shutdown(wait=False)

    def _encode(self, frame: AnyFrame, clock: int, key: bool) -> EncodedFrame | None:
        """Runs in the encoder's thread, because a stacked frame computes its pixels here."""
        return self._encoder.encode(frame.rgb, clock, key=key)

    async def _next(self) -> tuple[AnyFrame, int] | None:
        """Wait for the next frame. After a while without one, the frame on screen again; None at the end."""
        while not self._pending:
            if self._ending:
                return None
            self._wake.clear()
            repeat_at = self._shown_at + HOLD_SECONDS
            if self._key_wanted:
                repeat_at = max(self._shown_at + KEY_WAIT_SECONDS, self._key_at + KEY_SECONDS)
            now = time.monotonic()
            if now >= repeat_at:
                self._metrics.frames_repeated.labels("keyframe" if self._key_wanted else "held").inc()
                return self._last, self._clock + round((now - self._shown_at) * CLOCK_RATE)
            await wait_until(self._wake, repeat_at)
        return self._pending.popleft()

    def _deliver(self, frame: AnyFrame, encoded: EncodedFrame, *, repeated: bool) -> None:
        if encoded.key:
            self._key_at = time.monotonic()
        for writer in list(self._recordings):
            if not repeated and isinstance(frame, Frame):
                writer.add(frame, encoded)
            if writer.wants_key:
                self.request_key()
        fragment = b""
        for viewer in self._viewers:
            if viewer.format != "fmp4":
                dropped = viewer.frame(encoded, key=encoded.key)
            else:
                fragment = fragment or self._fragment(frame, encoded)
                if encoded.key and not viewer.started:
                    viewer.init_segment(self._init_segment)
                dropped = viewer.frame(fragment, key=encoded.key)
            if dropped:
                self._metrics.frames_dropped.labels("slow_viewer").inc(dropped)
            if viewer.awaits_key:
                self.request_key()

    def _fragment(self, frame: AnyFrame, encoded: EncodedFrame) -> bytes:
        units = fmp4.nal_units(bytes(encoded.packet))
        if encoded.key:
            by_type = {unit[0] & 31: unit for unit in units}
            init = fmp4.init_segment(by_type[fmp4.SPS], by_type[fmp4.PPS], frame.width, frame.height)
            self._init_segment = fmp4_message(frame, frame.pts, init, init=True)
        self._fragments += 1
        sample = fmp4.sample(units, CLOCK_RATE // self._fps, key=encoded.key)
        body = fmp4.fragment(self._fragments, self._media, [sample])
        return fmp4_message(frame, self._media, body, key=encoded.key)
