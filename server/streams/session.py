"""The life of one stream: its state, its figures, and the events that tell viewers about both.

Pure: no clock is read and nothing is sent here. Methods that change the session return the events to publish, in order;
`ts` is unix time in seconds. A transition that `TRANSITIONS` does not list is a programming error and raises.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from server.streams.admission import QueuePosition

Event = dict[str, Any]
"""A JSON object with at least `type`, `seq` and `ts`."""

PauseReason = Literal["asked", "unwatched"]

RECENT_CHUNKS = 8
"""The real-time factor is an average over this many chunks."""


class State(StrEnum):
    """Where a stream is in its life."""

    QUEUED = "queued"
    STARTING = "starting"
    LIVE = "live"
    PAUSED = "paused"
    ENDED = "ended"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether the stream has ended or failed."""
        return self in (State.ENDED, State.FAILED)


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.STARTING, State.ENDED, State.FAILED}),
    State.STARTING: frozenset({State.LIVE, State.PAUSED, State.ENDED, State.FAILED}),
    State.LIVE: frozenset({State.PAUSED, State.ENDED, State.FAILED}),
    State.PAUSED: frozenset({State.LIVE, State.ENDED, State.FAILED}),
    State.ENDED: frozenset(),
    State.FAILED: frozenset(),
}


@dataclass(slots=True, kw_only=True)
class Session:
    """One stream, as clients see it. `created_at` is unix time."""

    id: str
    model: str
    prompt: str
    seed: int
    duration_s: float | None
    created_at: float
    width: int | None = None
    height: int | None = None
    fps: int | None = None
    state: State = State.QUEUED
    seq: int = 0
    """Sequence number of the newest event; 0 before the first."""
    pause_reason: PauseReason | None = None
    """Why playback is paused, or will be from the first frame on."""
    queue: QueuePosition | None = None
    frames_generated: int = 0
    time_to_first_frame_s: float | None = None
    """From the request to the first frame ready to be sent."""
    error: dict[str, Any] | None = None
    ended_reason: str | None = None
    ended_at: float | None = None
    _recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=RECENT_CHUNKS))

    @property
    def real_time_factor(self) -> float | None:
        """Generation time over playback time of the recent chunks; None before the first."""
        played = sum(seconds for _, seconds in self._recent)
        return sum(seconds for seconds, _ in self._recent) / played if played else None

    def event(self, type: str, ts: float, **fields: Any) -> Event:
        """A new event, with the next sequence number."""
        self.seq += 1
        return {"type": type, "seq": self.seq, "ts": ts, "stream_id": self.id, **fields}

    # the queue

    def wait(self, position: QueuePosition, ts: float) -> list[Event]:
        """Note the position in the queue; an event tells viewers if it has changed."""
        moved = self.queue is None or self.queue.position != position.position
        self.queue = position
        if not moved:
            return []
        return [self.event("queue.position", ts, position=position.position, wait_s=position.wait)]

    def admit(self, ts: float) -> list[Event]:
        """The stream leaves the queue: the engine has room for it."""
        self.queue = None
        return self._enter(State.STARTING, ts)

    # playing

    def chunk(
        self, *, index: int, pts: int, frames: int, gen_seconds: float, shown: int, paused: bool, ts: float
    ) -> list[Event]:
        """A chunk has arrived. The first one makes the stream live, or paused if that was asked for before.

        `shown` is how many frames have been shown, for viewers by WebRTC, who see no presentation times.
        """
        assert self.fps is not None
        self.frames_generated += frames
        self._recent.append((gen_seconds, frames / self.fps))
        gen_ms = round(gen_seconds * 1e3, 3)
        events = [self.event("chunk", ts, index=index, pts=pts, frames=frames, gen_ms=gen_ms, shown=shown)]
        if self.state is State.STARTING:
            events += self._enter(State.PAUSED if paused else State.LIVE, ts)
        return events

    def pause(self, reason: PauseReason | None, ts: float) -> list[Event]:
        """Pause playback for a reason, or resume it with None. Before the first frame the state does not change yet."""
        self.pause_reason = reason
        target = State.PAUSED if reason else State.LIVE
        if self.state is target or self.state in (State.QUEUED, State.STARTING):
            return []
        return self._enter(target, ts)

    def quality(self, *, steps: int, level: int, better: bool, chunk: int, pts: int, ts: float) -> list[Event]:
        """From this chunk on the stream is generated with `steps` denoising steps."""
        reason = "time_to_spare" if better else "running_dry"
        return [self.event("quality.changed", ts, level=level, steps=steps, reason=reason, chunk_index=chunk, pts=pts)]

    # the end

    def end(self, reason: str, ts: float) -> list[Event]:
        """End the stream, because it is finished or somebody asked for it."""
        self.queue, self.ended_reason, self.ended_at = None, reason, ts
        return [*self._enter(State.ENDED, ts), self.event("ended", ts, reason=reason)]

    def fail(self, code: str, message: str, ts: float, *, retryable: bool = True) -> list[Event]:
        """End the stream because something broke."""
        self.queue, self.ended_reason, self.ended_at = None, "failed", ts
        self.error = {"code": code, "message": message}
        events = [self.event("error", ts, code=code, message=message, retryable=retryable)]
        return [*events, *self._enter(State.FAILED, ts), self.event("ended", ts, reason="failed")]

    def _enter(self, state: State, ts: float) -> list[Event]:
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"a stream cannot go from {self.state} to {state}")
        self.state = state
        if state is not State.PAUSED:
            return [self.event("state", ts, state=state)]
        return [self.event("state", ts, state=state, reason=self.pause_reason)]
