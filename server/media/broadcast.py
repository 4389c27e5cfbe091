"""One stream in one codec: every frame is encoded once, in a thread of its own, and handed to every viewer.

It starts with the first viewer who needs the codec and is closed after the last. Whoever joins, or has lost what the
frames build on, asks for a keyframe; one keyframe answers all who asked meanwhile.
"""

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine.wire import CLOCK_RATE
from server.aio import wait_until
from server.library.recording_writer import Tape
from server.media import fmp4
from server.media.encoder import Codec, EncodedFrame, VideoEncoder
from server.media.frames import Frame, Picture, fmp4_packet
from server.media.viewer import Viewer
from server.metrics import Metrics

logger = logging.getLogger("livereel.media")

KEY_SECONDS = 1.0
"""Keyframes on demand are at least this far apart, however many viewers ask: each costs everybody bandwidth."""
HOLD_SECONDS = 1.0
"""While playback stands still, the picture is sent again this often: to a receiver, silence would be a lost line."""
KEY_WAIT_SECONDS = 0.2
"""How long who asked for a keyframe waits for the next frame, before the picture on screen becomes one."""
MAX_PENDING = 2
"""Frames waiting for the encoder. One that cannot keep up skips frames, and delays none."""
MAX_PENDING_RECORDED = 64
"""While a recording wants every frame, viewers rather get them late, up to some seconds."""


class Broadcast:
    """The encoder of one stream and codec, and its viewers. `last` is the frame on screen, shown at `clock`."""

    def __init__(self, codec: Codec, fps: int, kbps: int, last: Picture, clock: int, metrics: Metrics) -> None:
        self._codec: Codec = codec
        self._fps = fps
        self._metrics = metrics
        self._viewers: set[Viewer] = set()
        self._tapes: set[Tape] = set()
        self._last, self._clock, self._media = last, clock - 1, -1
        self._shown_at = time.monotonic()
        self._pending: deque[tuple[Picture, int]] = deque()
        self._wake = asyncio.Event()
        self._ending = False
        self._key_wanted = True
        self._key_at = -KEY_SECONDS
        self._head = b""
        self._fragments = 0
        self._encoder = VideoEncoder(codec, last.width, last.height, fps, kbps)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"{codec} encoder")
        self._task = asyncio.create_task(self._run(), name=f"broadcast {codec}")

    def __len__(self) -> int:
        return len(self._viewers) + len(self._tapes)

    def join(self, viewer: Viewer) -> None:
        """A viewer more, who starts with a keyframe."""
        self._viewers.add(viewer)
        self.request_key()

    def leave(self, viewer: Viewer) -> None:
        """A viewer less. Safe to call again."""
        self._viewers.discard(viewer)

    def record(self, tape: Tape) -> None:
        """A recording more: it gets every frame from the next keyframe on."""
        self._tapes.add(tape)
        self.request_key()

    def stop_recording(self, tape: Tape) -> None:
        """The recording gets nothing more. Safe to call again."""
        self._tapes.discard(tape)

    def request_key(self) -> None:
        """Somebody can show nothing before the next keyframe."""
        self._key_wanted = True
        self._wake.set()

    def show(self, frame: Picture, clock: int) -> None:
        """The frame is due, at `clock` on the playback clock in 1/90000 s. Returns at once."""
        if len(self._pending) >= (MAX_PENDING_RECORDED if self._tapes else MAX_PENDING):
            self._pending.popleft()
            self._metrics.frames_dropped.labels("slow_encoder").inc()
        self._pending.append((frame, clock))
        self._wake.set()

    def finish(self) -> None:
        """Nothing more is shown: encode what waits, tell the recordings, and close."""
        self._ending = True
        self._wake.set()

    def close(self) -> None:
        """Stop encoding. Safe to call again."""
        # The task ends by itself: cancelled, its traceback would keep encoder and pixels for the garbage collector.
        self._pending.clear()
        self.finish()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        repeated = False
        try:
            while (item := await self._next()) is not None:
                frame, clock = item
                before, repeated = repeated, frame is self._last and self._media >= 0
                key = self._key_wanted and time.monotonic() - self._key_at >= KEY_SECONDS
                # Recordings leave repetitions out, so nothing that follows may build on one.
                key = key or bool(self._tapes and before and not repeated)
                if key:
                    self._key_wanted = False
                # The picture on screen, sent again, is later than itself.
                self._last, self._clock, self._shown_at = frame, max(clock, self._clock + 1), time.monotonic()
                self._media = max(frame.pts, self._media + 1)
                work = partial(self._encode, frame, self._clock, key)
                coded = await loop.run_in_executor(self._executor, work)
                end = time.monotonic()
                frame.encoded = frame.encoded or (self._shown_at, end)
                self._metrics.encode_seconds.labels(self._codec).observe(end - self._shown_at)
                if coded is not None:
                    self._deliver(frame, coded, repeated=repeated)
            for tape in list(self._tapes):
                tape.finish("stream_ended")
            self._executor.shutdown(wait=False)
        except Exception:
            logger.exception("the %s encoder failed", self._codec)
            for viewer in self._viewers:
                viewer.finish(1011)
            for tape in list(self._tapes):
                tape.finish("failed")

    def _encode(self, frame: Picture, clock: int, key: bool) -> EncodedFrame | None:
        """In the encoder's thread, which may have to make the picture first."""
        return self._encoder.encode(frame.rgb, clock, key=key)

    async def _next(self) -> tuple[Picture, int] | None:
        """The next frame that is due, or the one on screen once more when there has been none for a while; None when
        none is to come."""
        while not self._pending:
            if self._ending:
                return None
            self._wake.clear()
            again = self._shown_at + HOLD_SECONDS
            if self._key_wanted:
                again = max(self._shown_at + KEY_WAIT_SECONDS, self._key_at + KEY_SECONDS)
            now = time.monotonic()
            if now >= again:
                self._metrics.frames_repeated.labels("keyframe" if self._key_wanted else "held").inc()
                return self._last, self._clock + round((now - self._shown_at) * CLOCK_RATE)
            await wait_until(self._wake, again)
        return self._pending.popleft()

    def _deliver(self, frame: Picture, coded: EncodedFrame, *, repeated: bool) -> None:
        if coded.key:
            self._key_at = time.monotonic()
        for tape in list(self._tapes):
            if not repeated and isinstance(frame, Frame):
                tape.add(frame, coded)
            if tape.wants_key:
                self.request_key()
        fragment = b""
        for viewer in self._viewers:
            if viewer.format != "fmp4":
                dropped = viewer.frame(coded, key=coded.key)
            else:
                fragment = fragment or self._fragment(frame, coded)
                if coded.key and not viewer.started:
                    viewer.head(self._head)
                dropped = viewer.frame(fragment, key=coded.key)
            if dropped:
                self._metrics.frames_dropped.labels("slow_viewer").inc(dropped)
            if viewer.awaits_key:
                self.request_key()

    def _fragment(self, frame: Picture, coded: EncodedFrame) -> bytes:
        units = fmp4.nal_units(bytes(coded.packet))
        if coded.key:
            parameters = {unit[0] & 31: unit for unit in units}
            head = fmp4.init_segment(parameters[fmp4.SPS], parameters[fmp4.PPS], frame.width, frame.height)
            self._head = fmp4_packet(frame, frame.pts, head, head=True)
        self._fragments += 1
        sample = fmp4.sample(units, CLOCK_RATE // self._fps, key=coded.key)
        body = fmp4.fragment(self._fragments, self._media, [sample])
        return fmp4_packet(frame, self._media, body, key=coded.key)
