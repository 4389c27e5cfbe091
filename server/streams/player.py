"""The pacing loop of one stream: shows each frame when `playback` says that it is due.

`playback` decides; the player waits, encodes ahead, hands frames to the audience, and announces stalls and prompt
changes at the frame where they happen.
"""

import asyncio
import contextvars
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from engine import wire
from server.aio import wait_until
from server.media.frames import DISCONTINUITY, Frame
from server.metrics import Metrics
from server.streams.audience import Audience
from server.streams.playback import Arrival, Finished, Playback, Show, StallBegan, StallEnded, Wait
from server.streams.session import Session
from server.tracing import Chunks

logger = logging.getLogger("livereel.streams")


@dataclass(frozen=True, slots=True)
class PromptChange:
    """A change of prompt that the engine applies from chunk `chunk` on; `asked_at` is on the monotonic clock."""

    prompt: str
    transition: wire.Transition
    asked_at: float
    chunk: int


class PlayerListener(Protocol):
    """What a player tells the stream that owns it."""

    def on_first_packet(self) -> None:
        """The first frame is encoded. May be called again with later ones."""

    def on_first_shown(self) -> None:
        """The first frame is on screen."""

    def on_idle(self) -> None:
        """Nothing is due: a good time to ask for more chunks."""

    def on_finished(self) -> None:
        """The last frame has been on screen for its full period."""

    def on_player_error(self) -> None:
        """The player failed, and plays nothing more."""


class Player:
    """Plays the frames of one stream to its audience at 1:1 speed."""

    def __init__(
        self,
        session: Session,
        playback: Playback,
        audience: Audience,
        chunks: Chunks,
        metrics: Metrics,
        listener: PlayerListener,
    ) -> None:
        """`chunks` traces the way of each chunk to the screen."""
        self.playback = playback
        self._session = session
        self._audience = audience
        self._chunks = chunks
        self._metrics = metrics
        self._listener = listener
        self._frames: deque[Frame] = deque()
        """Those that have arrived and are not shown yet."""
        self._prompt_changes: dict[int, PromptChange] = {}
        """By the index of the first frame that shows them."""
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, context: contextvars.Context) -> None:
        """Start to play, in a task whose logs and spans belong to `context`."""
        self._task = asyncio.create_task(self._play(), name=f"player {self._session.id}", context=context)
        self._task.add_done_callback(self._forget_task)

    def stop(self) -> None:
        """Play nothing more, and drop the frames that are left."""
        self._frames.clear()
        self._prompt_changes.clear()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def stopped(self) -> None:
        """Wait until the task has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def wake(self) -> None:
        """Look again at what is due: something has changed."""
        self._wake.set()

    def add(self, chunk: wire.Frames, count: int, pixels: bytes, *, start_delay: float = 0.0) -> Arrival:
        """Take the first `count` frames of a chunk, and begin to encode the one that is due next.

        `pixels` holds frames x height x width x 3 bytes of RGB24. After the first chunk playback waits for
        `start_delay` seconds or the next one.
        """
        now, first, size = time.monotonic(), self.playback.received, chunk.width * chunk.height * 3
        view = memoryview(pixels)
        frames = [
            Frame(
                index=first + k,
                pts=chunk.pts + k * wire.CLOCK_RATE // self.playback.fps,
                width=chunk.width,
                height=chunk.height,
                flags=DISCONTINUITY if chunk.discontinuity and k == 0 else 0,
                rgb=view[k * size : (k + 1) * size],
            )
            for k in range(count)
        ]
        self._frames += frames
        self._chunks.arrived(chunk.chunk, frames, (now - chunk.gen_seconds, now))
        arrival = self.playback.arrive(count, chunk.gen_seconds, now, start_delay=start_delay)
        if arrival.slack is not None and not self.playback.paused:
            self._metrics.slack_seconds.observe(arrival.slack)
        self._encode_ahead()
        return arrival

    def announce(self, frame: int, change: PromptChange) -> None:
        """Tell viewers of the change when frame `frame` is shown, the first under the new prompt."""
        self._prompt_changes[frame] = change

    def pause(self) -> None:
        """Hold the frame on screen."""
        if ended := self.playback.pause(time.monotonic()):
            self._on_stall_ended(ended.seconds)
        self.wake()

    def resume(self) -> None:
        """Go on: the next frame is due now."""
        self.playback.resume(time.monotonic())
        self._listener.on_idle()
        self.wake()

    async def _play(self) -> None:
        try:
            while not self._session.state.over:
                self._wake.clear()
                match self.playback.tick(time.monotonic(), watched=self._audience.needed):
                    case Show(late=late):
                        await self._show(late)
                    case StallBegan():
                        self._metrics.stalls.inc()
                        self._publish("stall", phase="began")
                    case StallEnded(seconds=seconds):
                        self._on_stall_ended(seconds)
                    case Finished():
                        self._listener.on_finished()
                    case Wait(until=until):
                        self._encode_ahead()
                        self._listener.on_idle()
                        await wait_until(self._wake, until)
        except Exception:
            logger.exception("stream %s failed in the gateway", self._session.id)
            self._listener.on_player_error()

    async def _show(self, late: float) -> None:
        """Show the next frame, which is `late` seconds late."""
        begun, frame = time.monotonic(), self._frames.popleft()
        clock = frame.pts + round(self.playback.held_seconds * wire.CLOCK_RATE)
        packets = await self._audience.show(frame, clock)
        if self._session.state.over:
            return
        if change := self._prompt_changes.pop(frame.index, None):
            self._publish_change(frame, change)
        self._audience.deliver(packets)
        self._chunks.sent(frame, (begun, time.monotonic()))
        self._metrics.frames_shown.inc()
        self._metrics.played_seconds.inc(1 / self.playback.fps)
        self._metrics.frame_late_seconds.observe(late)
        if frame.index == 0:
            self._listener.on_first_shown()

    def _publish_change(self, frame: Frame, change: PromptChange) -> None:
        seconds = time.monotonic() - change.asked_at
        self._metrics.steer_seconds.observe(seconds)
        self._publish(
            "prompt.applied",
            chunk_index=change.chunk,
            pts=frame.pts,
            prompt=change.prompt,
            transition=change.transition,
            latency_s=round(seconds, 3),
        )

    def _encode_ahead(self) -> None:
        """Begin to encode the next frame before it is due."""
        if not self._frames:
            return
        first = self._session.time_to_first_frame_s is None
        packets = self._audience.encode(self._frames[0], default="mjpeg" if first else None)
        if first:
            packets[0].add_done_callback(lambda _: self._listener.on_first_packet())

    def _on_stall_ended(self, seconds: float) -> None:
        self._metrics.stalled_seconds.inc(seconds)
        self._publish("stall", phase="ended", seconds=round(seconds, 3))
        self._listener.on_idle()

    def _publish(self, type: str, **fields: Any) -> None:
        self._audience.publish([self._session.event(type, time.time(), **fields)])

    def _forget_task(self, _: asyncio.Task[None]) -> None:
        self._task = None  # a cancelled task holds its frames, and with them pixels
