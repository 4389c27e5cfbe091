"""Who may use the engine now, who waits, who is turned away.

Pure: times are seconds of any one monotonic clock, handed in. A stream's cost is the share of the engine that it
needs to play at 1:1: the time to generate a chunk over the time that the chunk plays. Streams are admitted in the
order they came, while their costs add up to at most `SHARE` of the engine; one stream alone is always admitted, so
that a model slower than real time still plays, with stalls.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SHARE = 0.9
"""Part of the engine that may be promised; the rest absorbs jitter."""

RETRY_SECONDS = (1, 60)
"""Bounds of Retry-After. The upper one also stands for 'nobody knows', when endless streams hold the engine."""


def cost(chunk_seconds: float, chunk_frames: int, fps: int) -> float:
    """Share of the engine that one stream needs: generation time over playback time of a chunk."""
    return chunk_seconds * fps / chunk_frames


def capacity(stream_cost: float) -> int:
    """How many streams of this cost play at 1:1 at once."""
    # The tiny term keeps 0.9 / 0.3 at 3: floating point makes it 2.9999999999999996.
    return max(1, math.floor(SHARE / stream_cost + 1e-9)) if stream_cost > 0 else 1_000_000


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue: 1 is next. `wait` is an estimate in seconds, None when no live stream has a known end."""

    position: int
    wait: float | None


@dataclass(frozen=True, slots=True)
class Full:
    """The queue is full; try again after `retry_after` seconds."""

    retry_after: int


@dataclass(slots=True)
class _Live:
    model: str
    ends_at: float | None


class Admission:
    """The engine's places and the queue before them. Without costs (engine not up yet) everybody waits."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._costs: Mapping[str, float] = {}
        self._live: dict[str, _Live] = {}
        self._waiting: dict[str, str] = {}

    def set_costs(self, costs: Mapping[str, float]) -> None:
        """The engine's models and their costs, measured while it warmed up. Follow with `admit`."""
        self._costs = costs

    def request(self, stream: str, model: str, now: float) -> Full | None:
        """Join the queue, or be refused because it is full. Follow with `admit`, which empties it as far as it can."""
        if len(self._waiting) >= self._queue_limit and not self._fits_next(model):
            return Full(self._retry_after(now))
        self._waiting[stream] = model
        return None

    def admit(self) -> list[str]:
        """Give places to those at the head of the queue; returns them in order."""
        admitted = []
        while self._waiting:
            stream, model = next(iter(self._waiting.items()))
            if not self._fits(model):
                break
            del self._waiting[stream]
            self._live[stream] = _Live(model, None)
            admitted.append(stream)
        return admitted

    def expect_end(self, stream: str, ends_at: float | None) -> None:
        """When a live stream will end, so that those who wait can be told; None when nobody knows."""
        if live := self._live.get(stream):
            live.ends_at = ends_at

    def release(self, stream: str) -> None:
        """The stream is over or has left the queue. Follow with `admit`."""
        self._live.pop(stream, None)
        self._waiting.pop(stream, None)

    def places(self, now: float) -> dict[str, Place]:
        """Every waiting stream with its place, in order."""
        ends = sorted(live.ends_at for live in self._live.values() if live.ends_at is not None)
        waits = [max(0.0, end - now) for end in ends]
        return {
            stream: Place(position, waits[position - 1] if position <= len(waits) else None)
            for position, stream in enumerate(self._waiting, start=1)
        }

    def _fits(self, model: str) -> bool:
        if model not in self._costs:
            return False
        if not self._live:
            return True
        load = sum(self._costs.get(live.model, 0.0) for live in self._live.values())
        return load + self._costs[model] <= SHARE + 1e-9

    def _fits_next(self, model: str) -> bool:
        # Only with an empty queue (a limit of 0) may a newcomer go straight in; otherwise the head goes first.
        return not self._waiting and self._fits(model)

    def _retry_after(self, now: float) -> int:
        low, high = RETRY_SECONDS
        ends = [live.ends_at for live in self._live.values() if live.ends_at is not None]
        return min(high, max(low, math.ceil(min(ends) - now))) if ends else high
