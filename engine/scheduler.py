"""Which stream gets the next chunk: the one whose playback runs out of frames first.

A newly opened stream waits until its first chunks make no playing stream late, or for `PATIENCE_SECONDS`. Clips
(`background`) get the time that live streams leave.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Demand:
    """What the scheduler knows of a stream. Times are in seconds of the caller's clock."""

    chunk: int
    """Index of the chunk that it needs next."""
    limit: int
    """Chunks with an index below it may be generated now."""
    due: float
    """When chunk `chunk` must be on screen."""
    background: bool = False
    """A clip: nobody watches while it is generated, so it is never due."""
    opened: float | None = None
    """When a stream that shows nothing yet was opened; None once it plays."""


def pick(demands: Mapping[str, Demand], now: float = 0.0, step_seconds: float = 0.0) -> str | None:
    """The stream to generate a chunk of now; None when none should be.

    The playing stream with the earliest due time, the first opened on a tie; but before it, the newly opened stream
    that has waited longest, if all playing streams would still have their next chunks in time after two steps of
    `step_seconds` for it (it soon needs a second chunk). Where no live stream may generate, the first clip that may,
    if the streams would still be in time after one step, which nothing interrupts.
    """
    allowed = [name for name, demand in demands.items() if demand.chunk < demand.limit]
    playing = [name for name in allowed if not demands[name].background and demands[name].opened is None]
    new = {name: opened for name in allowed if (opened := demands[name].opened) is not None}
    dues = _due_times(demands, now)
    if new:
        first = min(new, key=lambda name: new[name])
        if not playing or now - new[first] > PATIENCE_SECONDS or _all_in_time(dues, now + step_seconds, step_seconds):
            return first
    if playing:
        return min(playing, key=lambda name: demands[name].due)
    return allowed[0] if allowed and _all_in_time(dues, now, step_seconds) else None


def batch_with(
    demands: Mapping[str, Demand], first: str, candidates: Collection[str], now: float, step_seconds: float, limit: int
) -> list[str]:
    """The streams whose chunks to generate in one batch with that of `first`, which `pick` chose.

    Those are the most urgent of `candidates`, which make at most `limit` with `first`, and only as many as leave
    `first` in time: a batch is expected to take a step of `step_seconds` per chunk. A newly opened stream gets no
    batch. Clips are batched with clips, while all streams would still have their next chunk in time.
    """
    demand = demands[first]
    if demand.opened is not None:
        return []
    others = [
        name
        for name in candidates
        if name != first and demands[name].chunk < demands[name].limit and demands[name].opened is None
        if demands[name].background == demand.background
    ]
    if demand.background:
        others = others[: limit - 1]
        dues = _due_times(demands, now)
        while others and not _all_in_time(dues, now + len(others) * step_seconds, step_seconds):
            others.pop()
        return others
    if step_seconds > 0:
        limit = min(limit, int((demand.due - now) / step_seconds))
    return sorted(others, key=lambda name: demands[name].due)[: max(0, limit - 1)]


def _due_times(demands: Mapping[str, Demand], now: float) -> list[float]:
    """When each playing stream needs its next chunk.

    A stream that is overdue and yet may generate nothing is paused: nobody waits for it.
    """
    return [
        demand.due
        for demand in demands.values()
        if not demand.background and demand.opened is None and (demand.due > now or demand.chunk < demand.limit)
    ]


def _all_in_time(dues: Iterable[float], now: float, step_seconds: float) -> bool:
    """Whether after one step for another stream, and then one for each of these in turn, none of these is late."""
    return all(now + step_seconds * (2 + before) <= due for before, due in enumerate(sorted(dues)))
