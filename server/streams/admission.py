"""Which streams the engine generates now, which are queued, and which are refused.

Pure: times are seconds of any one monotonic clock, passed in. A stream's cost is the share of the engine that it
needs to play at 1:1: the time to generate a chunk over the time that the chunk plays. Streams are admitted while their
costs add up to at most the part of the engine that may be promised. One stream alone is always admitted, so that a
model slower than real time still plays, with stalls.

Streams may have owners, and a priority that weighs an owner's share. Next is a stream of the owner with the fewest live
streams in proportion to its priority. Equal owners take turns: three for priority 3 to one for priority 1; within a
turn the higher priority goes first, then the earlier request. So neither priority nor many requests keep anybody out.
The queue has a limit, but an owner without any stream can always join it, so that others cannot keep that owner out: it
holds at most `queue_limit` streams and one for each owner.
"""

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

PROMISED = 0.9
"""Part of the engine's time that may be promised if the engine names none; the rest absorbs jitter."""

RETRY_SECONDS = (1, 60)
"""Bounds of Retry-After. The upper one is used, too, if no live stream has a known end."""


def cost(chunk_seconds: float, chunk_frames: int, fps: int) -> float:
    """Share of the engine that one stream needs: generation time of a chunk over its playback time."""
    return chunk_seconds * fps / chunk_frames


def capacity(stream_cost: float, promised: float = PROMISED) -> int:
    """How many streams of this cost play at 1:1 at once, if this part of the engine may be promised."""
    # The tiny term keeps 0.9 / 0.3 at 3: floating point makes it 2.9999999999999996.
    return max(1, math.floor(promised / stream_cost + 1e-9)) if stream_cost > 0 else 1_000_000


@dataclass(frozen=True, slots=True)
class QueuePosition:
    """A stream's position in the queue: 1 is next. `wait` is an estimate in seconds; None if there is none."""

    position: int
    wait: float | None


@dataclass(frozen=True, slots=True)
class Full:
    """Refused because the queue is full; try again after `retry_after` seconds."""

    retry_after: int


@dataclass(frozen=True, slots=True)
class OverLimit:
    """Refused because the owner has `limit` streams; try again after `retry_after` seconds, or end one."""

    limit: int
    retry_after: int


@dataclass(slots=True)
class _Live:
    model: str
    ends_at: float | None
    owner: str | None


@dataclass(frozen=True, slots=True)
class _Queued:
    model: str
    owner: str | None
    priority: int


class Admission:
    """The live streams, which share the engine, and the queue. Before `set_costs` every stream is queued."""

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        self._costs: Mapping[str, float] = {}
        self._promised = PROMISED
        self._live: dict[str, _Live] = {}
        self._queue: dict[str, _Queued] = {}
        self._turns: dict[str | None, Fraction] = {}
        """Turns that each owner has had, weighed by priority; the owner with the fewest is next. Nobody has fewer than
        the one who was served last, so that nobody saves up turns by staying away."""
        self._last_turn = Fraction(0)

    def set_costs(self, costs: Mapping[str, float], promised: float = PROMISED) -> None:
        """Set each model's cost of a stream, and the part of the engine that may be promised. Follow with `admit`."""
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
        """Queue a stream. Returns why it is refused: the queue is full, or the owner has `limit` streams; else None.

        Follow with `admit`.
        """
        has = self._live_of(owner) + sum(queued.owner == owner for queued in self._queue.values())
        if limit is not None and has >= limit:
            return OverLimit(limit, self._retry_after(now, owner))
        newcomer = owner is not None and has == 0
        if len(self._queue) >= self._queue_limit and not newcomer and not self._fits_next(model):
            return Full(self._retry_after(now))
        self._queue[stream] = _Queued(model, owner, priority)
        return None

    def admit(self) -> list[str]:
        """Take streams from the queue while the engine has room for them; returns them in order."""
        admitted = []
        for stream in self._order():
            queued = self._queue[stream]
            if not self._fits(queued.model):
                break
            del self._queue[stream]
            self._live[stream] = _Live(queued.model, None, queued.owner)
            self._last_turn = self._turn(queued.owner)
            self._turns[queued.owner] = self._last_turn + Fraction(1, queued.priority)
            admitted.append(stream)
        if not self._queue:
            self._turns.clear()  # without a queue nobody waits for another
        return admitted

    def expect_end(self, stream: str, ends_at: float | None) -> None:
        """Note when a live stream will end, for estimates of the wait; None if that is not known."""
        if live := self._live.get(stream):
            live.ends_at = ends_at

    def release(self, stream: str) -> None:
        """Remove a stream that is over or leaves the queue. Follow with `admit`."""
        self._live.pop(stream, None)
        self._queue.pop(stream, None)

    def positions(self, now: float) -> dict[str, QueuePosition]:
        """The position of every queued stream, in order."""
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
        """The queued streams, in the order in which they would be admitted now."""
        lines: dict[str | None, list[tuple[int, int, str]]] = {}
        for arrival, (stream, each) in enumerate(self._queue.items()):
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
        # With a queue limit of 0 a stream is admitted at once or refused; otherwise the head of the queue goes first.
        return not self._queue and self._fits(model)

    def _retry_after(self, now: float, owner: str | None = None) -> int:
        """Seconds until a live stream ends: any, or one of an owner's."""
        low, high = RETRY_SECONDS
        live = [each for each in self._live.values() if owner is None or each.owner == owner]
        ends = [each.ends_at for each in live if each.ends_at is not None]
        return min(high, max(low, math.ceil(min(ends) - now))) if ends else high
