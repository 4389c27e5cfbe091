"""The playback clock of one stream: decides from the time and the frames that have arrived which frame is due.

Pure: no clock is read and nothing is sent here. `now` is in seconds, of the same monotonic clock in every call. Frames
are counted from the start of the stream; frame k is due k periods after the anchor. After an underrun, a pause or a
late call the anchor moves, so that missed time is never made up by a burst of frames.
"""

from collections import deque
from dataclasses import dataclass

SLACK_CHUNKS = 1.0
"""A chunk may be started this many chunks, plus the time to generate it, before its first frame is due. More of it
bridges longer delays, but lets a prompt change reach the screen later: frames that have arrived are still shown."""

MAX_LEAD_CHUNKS = 2.0
"""An engine, however slow, never runs further ahead of playback than this."""

RECENT_CHUNKS = 8
"""The slowest of this many chunks says how long the next one may take."""

FIRST_FRAME_SECONDS = 1.0
"""The first frame counts as due this long after the stream is opened: that makes it urgent, but less so than a stream
that is about to stall, because a slower start is less annoying than a stall."""

START_UNWATCHED_SECONDS = 5.0
"""How long the first frame waits for a viewer before the clock starts without one."""

GRACE_PERIODS = 0.5
"""A frame that is missing for longer than this many frame periods is a stall; a shorter delay is invisible."""


START_MARGIN_CHUNKS = 0.25
"""What `start_delay` adds, in chunks, for times that vary."""

OPENING_CHUNKS = 1.2
"""What `start_delay` adds, in chunks, while other streams wait for their first chunk. The engine takes a new stream
first only where the playing ones stay in time after two chunks for it (`engine.scheduler`)."""


def start_delay(*, streams: int, opening: bool, chunk_seconds: float, played: float, first_played: float) -> float:
    """Seconds to wait with a stream's first frame, so that its second chunk comes in time.

    Until then the engine may generate a chunk of `chunk_seconds` for each of its `streams` streams, which play for
    `played` seconds, the first one for `first_played`. `opening` says whether others still wait for their first chunk.
    0 where the engine cannot keep up anyway.
    """
    if streams * chunk_seconds > played:
        return 0.0
    chunks = streams + START_MARGIN_CHUNKS + (OPENING_CHUNKS if opening else 0.0)
    return max(0.0, chunks * chunk_seconds - first_played)


@dataclass(frozen=True, slots=True)
class Show:
    """Frame `frame` is due: show it now."""

    frame: int
    late: float
    """Seconds after its deadline."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due before `until`; None means before another method is called."""

    until: float | None


@dataclass(frozen=True, slots=True)
class StallBegan:
    """Frame `frame` is due and has not arrived: the last one stays on screen."""

    frame: int


@dataclass(frozen=True, slots=True)
class StallEnded:
    """Playback continues after a stall of `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The last frame has been on screen for its full period."""


Action = Show | Wait | StallBegan | StallEnded | Finished


@dataclass(frozen=True, slots=True)
class Grant:
    """Chunks with an index below `limit` may be generated; the first that is missing is due in `due_in` seconds."""

    limit: int
    due_in: float


@dataclass(frozen=True, slots=True)
class Arrival:
    """How timely a chunk arrived, for `Quality` to decide on. Times are in seconds."""

    played: float
    """Playback time of the chunk."""
    taken: float | None
    """From when the engine could begin the chunk to its arrival, other streams' chunks in between included. None if
    that says nothing about speed: for a stream's first chunk, and after a pause."""
    slack: float | None
    """How long before its first frame was due; negative if it was late, None before the clock runs."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    index: int
    first_frame: int
    frames: int


class Playback:
    """One stream's clock. Call `tick` until it returns `Wait`, and again at that time or when a chunk arrives."""

    def __init__(self, *, fps: int, chunk_frames: int, first_chunk_frames: int) -> None:
        self.fps = fps
        self.received = 0
        """Frames that have arrived."""
        self.shown = 0
        """Frames that have been shown; also the index of the next frame."""
        self.stalls = 0
        self.paused = False
        self.complete = False
        """No further frame will arrive."""
        self.held_seconds = 0.0
        """How far stalls and pauses have put the clock behind media time since the first frame."""
        self._period = 1.0 / fps
        self._chunk_frames = chunk_frames
        self._first_chunk_frames = first_chunk_frames
        self._chunks: deque[_Chunk] = deque()
        self._next_chunk = 0
        self._anchor: tuple[float, int] | None = None
        self._first_due: float | None = None
        self._first_ready_at = 0.0
        self._start_delay = 0.0
        self._stalled_since: float | None = None
        self._stalled_seconds = 0.0
        self._generation: deque[float] = deque(maxlen=RECENT_CHUNKS)
        self._granted = 0
        self._due_moved = True
        self._could_begin: deque[float] = deque()
        """When each granted chunk that has not arrived was granted, the next one first."""
        self._arrived_at: float | None = None

    # what has arrived

    @property
    def next_chunk(self) -> int:
        """Index of the next chunk to arrive."""
        return self._next_chunk

    @property
    def chunk_on_screen(self) -> int:
        """Index of the chunk that the latest shown frame belongs to; 0 before the first."""
        return self._chunks[0].index if self._chunks else 0

    @property
    def buffered_seconds(self) -> float:
        """Playback time of the frames that have arrived and are not shown yet."""
        return (self.received - self.shown) * self._period

    def stalled_seconds(self, now: float) -> float:
        """Total time of all stalls, including one that still lasts."""
        ongoing = now - self._stalled_since if self._stalled_since is not None else 0.0
        return self._stalled_seconds + ongoing

    def arrive(self, frames: int, gen_seconds: float, now: float, *, start_delay: float = 0.0) -> Arrival:
        """Count the next chunk, with this many frames, which took `gen_seconds` to generate.

        After the first chunk playback waits for `start_delay` seconds or the next chunk.
        """
        taken = None
        if self._could_begin:
            granted_at = self._could_begin.popleft()
            if self._arrived_at is not None:
                taken = now - max(granted_at, self._arrived_at)
        self._arrived_at = now
        slack = None if self._anchor is None else self._due(self.received) - now
        self._generation.append(gen_seconds)
        if self.received == 0:
            self._first_ready_at = now
            self._start_delay = start_delay
        else:
            self._start_delay = 0.0
        self._chunks.append(_Chunk(self._next_chunk, self.received, frames))
        self._next_chunk += 1
        self.received += frames
        self._due_moved = True
        return Arrival(frames * self._period, taken, slack)

    def finish(self) -> None:
        """No more frames will arrive: play those that have, and end."""
        self.complete = True

    def pause(self, now: float) -> StallEnded | None:
        """Hold the frame on screen from now on. This ends a stall: a paused stream does not stall."""
        self.paused = True
        self._arrived_at = None
        return self._settle_stall(now)

    def resume(self, now: float) -> None:
        """End the pause: the next frame is due now."""
        self.paused = False
        if self._anchor is not None:
            self._re_anchor(now)

    # decisions

    def tick(self, now: float, *, watched: bool) -> Action:
        """Decide what is due at `now`. Without `watched`, the first frame waits for a viewer for a while."""
        if self.paused:
            return Wait(None)
        if self._anchor is None:
            if self.received == 0:
                return Finished() if self.complete else Wait(None)
            start = self._first_ready_at + (self._start_delay if watched else START_UNWATCHED_SECONDS)
            if now < start and not (watched and self.complete):
                return Wait(start)
            self._re_anchor(now)
        due = self._due(self.shown)
        if now < due:
            return Wait(due)
        if self.shown < self.received or self.complete:
            if ended := self._settle_stall(now):
                self._re_anchor(now)
                return ended
            return self._show(now, due) if self.shown < self.received else Finished()
        if self._stalled_since is not None:
            return Wait(None)
        missed = due + GRACE_PERIODS * self._period
        if now < missed:
            return Wait(missed)
        self.stalls += 1
        self._stalled_since = due
        return StallBegan(self.shown)

    @property
    def next_length(self) -> int:
        """Frames of the next chunk to arrive, unless it begins a new scene."""
        return self._chunk_frames if self._next_chunk else self._first_chunk_frames

    @property
    def granted_frames(self) -> int:
        """Frames that have arrived, or belong to chunks that the engine may be generating."""
        chunks = max(0, self._granted - self._next_chunk)
        return self.received + (self.next_length + (chunks - 1) * self._chunk_frames if chunks else 0)

    def grant(self, now: float, *, one_chunk: bool = False) -> Grant | None:
        """The chunks that the engine may generate; None if it has been told the same before.

        With `one_chunk` never more than the next one, so that something can be told the engine between two chunks. A
        paused stream grants nothing but its first chunks, without which there is no frame to pause on.
        """
        if self.complete or (self.paused and self.received):
            return None
        limit, start = self._next_chunk, self.received
        lead = SLACK_CHUNKS * self._chunk_frames + max(self._generation, default=0.0) * self.fps
        while start <= self.shown + min(lead, MAX_LEAD_CHUNKS * self._chunk_frames):
            start += self._chunk_frames if start else self._first_chunk_frames
            limit += 1
        if one_chunk:
            limit = min(limit, self._next_chunk + 1)
        limit = max(limit, self._granted)
        if limit == self._granted and not self._due_moved:
            return None
        self._could_begin.extend([now] * (limit - max(self._granted, self._next_chunk)))
        self._granted, self._due_moved = limit, False
        if self._anchor is not None:
            return Grant(limit, self._due(self.received) - now)
        if self._first_due is None:
            self._first_due = now + FIRST_FRAME_SECONDS
        if not self.received:
            return Grant(limit, self._first_due - now)
        return Grant(limit, self.buffered_seconds + max(0.0, self._first_ready_at + self._start_delay - now))

    def forget_grant(self) -> None:
        """Start anew: another engine process has taken over, which knows of no grant."""
        self._granted, self._due_moved = 0, True
        self._could_begin.clear()
        self._arrived_at = None

    # the clock itself

    def _due(self, frame: int) -> float:
        assert self._anchor is not None
        at, anchored = self._anchor
        return at + (frame - anchored) * self._period

    def _re_anchor(self, now: float) -> None:
        if self._anchor is not None:
            self.held_seconds += now - self._due(self.shown)
        self._anchor = (now, self.shown)
        self._due_moved = True

    def _show(self, now: float, due: float) -> Show:
        late = now - due
        if late >= self._period:
            self._re_anchor(now)
        action = Show(self.shown, late)
        while self._chunks[0].first_frame + self._chunks[0].frames <= self.shown:
            self._chunks.popleft()
        self.shown += 1
        return action

    def _settle_stall(self, now: float) -> StallEnded | None:
        if self._stalled_since is None:
            return None
        seconds = now - self._stalled_since
        self._stalled_since = None
        self._stalled_seconds += seconds
        return StallEnded(seconds)
