"""Who may use the engine now, who waits, who is turned away.

Pure: times are seconds of any one monotonic clock, handed in. A stream's cost is the share of the engine that it
needs to play at 1:1: the time to generate a chunk over the time that the chunk plays. Streams are admitted while their
costs add up to at most what the engine says may be promised of it; one stream alone is always admitted, so that a
model slower than real time still plays, with stalls.

Streams may have owners, and a priority that weighs an owner's share. The next place goes to the owner with the fewest
live streams for his priority. Among equals they take turns, three of priority 3 for one of priority 1; within a turn
the higher priority goes first, then whoever came first. No priority keeps anybody out, and no number of requests does.
The queue has a limit, but an owner who has no stream at all always gets into it, so that others cannot keep him out: it
holds at most `queue_limit` streams and one for each owner.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

PROMISED = 0.9
"""Part of the engine that may be promised where it does not say; the rest absorbs jitter."""

RETRY_SECONDS = (1, 60)
"""Bounds of Retry-After. The upper one also stands for 'nobody knows', when endless streams hold the engine."""


def cost(chunk_seconds: float, chunk_frames: int, fps: int) -> float:
    """Share of the engine that one stream needs: generation time over playback time of a chunk."""
    return chunk_seconds * fps / chunk_frames


def capacity(stream_cost: float, promised: float = PROMISED) -> int:
    """How many streams of this cost play at 1:1 at once, where such a part of the engine may be promised."""
    # The tiny term keeps 0.9 / 0.3 at 3: floating point makes it 2.9999999999999996.
    return max(1, math.floor(promised / stream_cost + 1e-9)) if stream_cost > 0 else 1_000_000


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """A place in the queue: 1 is next. `wait` is an estimate in seconds, None when no live stream has a known end."""

    position: int
    wait: float | None


@dataclass(frozen=True, slots=True)
class Full:
    """The queue is full; try again after `retry_after` seconds."""

    retry_after: int


@dataclass(frozen=True, slots=True)
class OverLimit:
    """The owner has `limit` streams already; try again after `retry_after` seconds, or end one."""

    limit: int
    retry_after: int


@dataclass(slots=True)
class _Live:
    model: str
    ends_at: float | None
    owner: str | None


@dataclass(frozen=True, slots=True)
class _Waiting:
    model: str
    owner: str | None
    priority: int


class Admission:
    """The engine's places and the queue before them. Without costs (engine not up yet) everybody waits."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._costs: Mapping[str, float] = {}
        self._promised = PROMISED
        self._live: dict[str, _Live] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._turns: dict[str | None, Fraction] = {}
        """How many turns each owner has had, weighed by priority: the fewest is next. They count as at least those of
        whoever was served last, so that nobody comes back with turns to spare."""
        self._last_turn = Fraction(0)

    def set_costs(self, costs: Mapping[str, float], promised: float = PROMISED) -> None:
        """The engine's models and their costs, measured while it warmed up, and the part of the engine that may be
        promised. Follow with `admit`."""
        self._costs, self._promised = costs, promised

    def request(
        self,
        stream: str,
        model: str,
        now: float,
        *,
        owner: str | None = None,
        limit: int | None = None,
        priority: int = 1,
    ) -> Full | OverLimit | None:
        """Join the queue, or be refused: because it is full, or because the owner has `limit` streams already.

        Follow with `admit`, which empties the queue as far as it can.
        """
        has = self._live_of(owner) + sum(waiting.owner == owner for waiting in self._waiting.values())
        if limit is not None and has >= limit:
            return OverLimit(limit, self._retry_after(now, owner))
        newcomer = owner is not None and has == 0
        if len(self._waiting) >= self._queue_limit and not newcomer and not self._fits_next(model):
            return Full(self._retry_after(now))
        self._waiting[stream] = _Waiting(model, owner, priority)
        return None

    def admit(self) -> list[str]:
        """Give places to those who are next, while they fit; returns them in order."""
        admitted = []
        for stream in self._order():
            waiting = self._waiting[stream]
            if not self._fits(waiting.model):
                break
            del self._waiting[stream]
            self._live[stream] = _Live(waiting.model, None, waiting.owner)
            self._last_turn = self._turn(waiting.owner)
            self._turns[waiting.owner] = self._last_turn + Fraction(1, waiting.priority)
            admitted.append(stream)
        if not self._waiting:
            self._turns.clear()  # nobody has had to wait for another
        return admitted

    def expect_end(self, stream: str, ends_at: float | None) -> None:
        """When a live stream will end, so that those who wait can be told; None when nobody knows."""
        if live := self._live.get(stream):
            live.ends_at = ends_at

    def release(self, stream: str) -> None:
        """The stream is over or has left the queue. Follow with `admit`."""
        self._live.pop(stream, None)
        self._waiting.pop(stream, None)

    def places(self, now: float) -> dict[str, QueuePosition]:
        """Every waiting stream with its place, in order."""
        ends = sorted(live.ends_at for live in self._live.values() if live.ends_at is not None)
        waits = [max(0.0, end - now) for end in ends]
        return {
            stream: QueuePosition(position, waits[position - 1] if position <= len(waits) else None)
            for position, stream in enumerate(self._order(), start=1)
        }

    @property
    def load(self) -> float:
        """Share of the engine that the live streams need."""
        return sum(self._costs.get(live.model, 0.0) for live in self._live.values())

    def _order(self) -> list[str]:
        """Those who wait, in the order in which places would go to them now."""
        lines: dict[str | None, list[tuple[int, int, str]]] = {}
        for arrival, (stream, each) in enumerate(self._waiting.items()):
            lines.setdefault(each.owner, []).append((-each.priority, arrival, stream))
        has = {owner: self._live_of(owner) for owner in lines}
        turns = {owner: self._turn(owner) for owner in lines}

        def rank(owner: str | None) -> tuple[Fraction, Fraction, int, int]:
            priority, arrival, _ = lines[owner][-1]
            return Fraction(has[owner], -priority), turns[owner], priority, arrival

        for line in lines.values():
            line.sort(reverse=True)  # the next one is last
        heads = [(rank(owner), owner) for owner in lines]  # no two ranks are the same
        heapq.heapify(heads)
        order = []
        while heads:
            _, owner = heapq.heappop(heads)
            priority, _, stream = lines[owner].pop()
            order.append(stream)
            has[owner] += 1
            turns[owner] += Fraction(1, -priority)
            if lines[owner]:
                heapq.heappush(heads, (rank(owner), owner))
        return order

    def _turn(self, owner: str | None) -> Fraction:
        return max(self._turns.get(owner, self._last_turn), self._last_turn)

    def _live_of(self, owner: str | None) -> int:
        return sum(live.owner == owner for live in self._live.values())

    def _fits(self, model: str) -> bool:
        if model not in self._costs:
            return False
        if not self._live:
            return True
        return self.load + self._costs[model] <= self._promised + 1e-9

    def _fits_next(self, model: str) -> bool:
        # Only with an empty queue (a limit of 0) may a newcomer go straight in; otherwise the head goes first.
        return not self._waiting and self._fits(model)

    def _retry_after(self, now: float, owner: str | None = None) -> int:
        """When a place comes free: any, or one of an owner's."""
        low, high = RETRY_SECONDS
        live = [each for each in self._live.values() if owner is None or each.owner == owner]
        ends = [each.ends_at for each in live if each.ends_at is not None]
        return min(high, max(low, math.ceil(min(ends) - now))) if ends else high
