"""How many denoising steps a stream's chunks get: fewer while generation cannot keep up, more when it can again.

Pure: no clock is read and nothing is sent here.
"""

from collections import deque

from server.streams.playback import Arrival

DOWN_SPEED, DOWN_CHUNKS = 1.05, 3
"""A stream that is about to run dry loses a step if its speed, averaged over this many chunks, is below this. Speed is
playback time over generation time."""
UP_SPEED, UP_CHUNKS = 1.3, 10
"""A stream gets a step back if its speed, averaged over this many chunks, is above this."""
DRY_CHUNKS = 0.5
"""A stream is about to run dry if its newest chunk came less than this part of a chunk before it was due. Speed alone
does not tell: with other streams' chunks in between it may be barely faster than real time and still be safe."""
MAX_UP_CHUNKS = 160
"""A stream that loses a step soon after it got one back waits twice as long before the next try, up to this many
chunks."""


class Quality:
    """Decides how many denoising steps the next chunk gets: between half the model's number and all of it.

    Pass every chunk that arrives to `arrive`. It changes the number by one step at a time, and judges a change only by
    chunks that were generated after it.
    """

    def __init__(self, steps: int) -> None:
        """`steps` is the model's own number."""
        self.steps = steps
        """Steps that the next chunk should get."""
        self.applied = steps
        """Steps that the newest chunk was generated with."""
        self._best, self._worst = steps, -(-steps // 2)
        self._recent: deque[Arrival] = deque(maxlen=UP_CHUNKS)
        self._since_change = 0
        """Chunks since the last change."""
        self._rising = False
        """Whether the last change added a step."""
        self._patience = UP_CHUNKS
        """Chunks to wait after a change before adding a step."""

    @property
    def level(self) -> int:
        """Steps fewer than the model's own number; 0 is the best quality."""
        return self._best - self.applied

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return self._best - self._worst + 1

    def arrive(self, arrival: Arrival, steps: int) -> bool:
        """Judge a chunk that was generated with `steps` steps. True if `self.steps` has changed for the next chunk."""
        self.applied = steps
        if steps != self.steps:
            return False  # begun before the last change
        self._since_change += 1
        if arrival.taken is None:
            return False
        self._recent.append(arrival)
        if self._running_dry(arrival) and self.steps > self._worst and self._speed(DOWN_CHUNKS) < DOWN_SPEED:
            if self._rising and self._since_change <= 2 * UP_CHUNKS:
                self._patience = min(2 * self._patience, MAX_UP_CHUNKS)
            self._change(-1)
            return True
        if self.steps < self._best and self._since_change >= self._patience and self._speed(UP_CHUNKS) > UP_SPEED:
            self._change(1)
            return True
        return False

    def _running_dry(self, newest: Arrival) -> bool:
        """Whether the stream is about to run dry: not if it gains slack, as after an opening at full load."""
        if newest.slack is None or newest.slack >= DRY_CHUNKS * newest.played:
            return False
        before = self._recent[-DOWN_CHUNKS].slack if len(self._recent) >= DOWN_CHUNKS else None
        return newest.slack < 0 or before is None or newest.slack <= before

    def _speed(self, chunks: int) -> float:
        """Average speed of the newest `chunks` chunks; with fewer than that, a speed that changes nothing."""
        if len(self._recent) < chunks:
            return (DOWN_SPEED + UP_SPEED) / 2
        newest = list(self._recent)[-chunks:]
        return sum(each.played for each in newest) / max(1e-9, sum(each.taken or 0.0 for each in newest))

    def _change(self, by: int) -> None:
        self.steps += by
        self._rising, self._since_change = by > 0, 0
        self._recent.clear()
