"""Which stream gets the next chunk: the one whose playback runs dry first.

A stream that shows nothing yet does not make those that play run dry: it begins when there is time for it, or when it
has waited for `PATIENCE_SECONDS`. A clip gets what all streams leave.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Demand:
    """What the scheduler knows of a stream.

    `due` is the time, in seconds of the caller's clock, at which its next chunk must be on screen; chunks with an
    index below `limit` are allowed. A clip, which nobody watches while it is made, is `background`: it is never due.
    `opened` is when a stream was opened that shows nothing yet, None of one that plays.
    """

    chunk: int
    limit: int
    due: float
    background: bool = False
    opened: float | None = None


def pick(claims: Mapping[str, Demand], now: float = 0.0, step_seconds: float = 0.0) -> str | None:
    """The stream with the earliest due time among those that may generate and play; the first opened wins a tie.

    Before them, the stream that has waited longest for its first chunk, if after two steps of `step_seconds` for it
    all that play could still have their next chunk in time: it soon wants a second one. Where no stream may, the first
    clip that may, if they could after one step, which nothing interrupts. None when nothing should be generated now.
    """
    allowed = [name for name, claim in claims.items() if claim.chunk < claim.limit]
    playing = [name for name in allowed if not claims[name].background and claims[name].opened is None]
    waiting = {name: opened for name in allowed if (opened := claims[name].opened) is not None}
    dues = _dues(claims, now)
    if waiting:
        first = min(waiting, key=lambda name: waiting[name])
        if not playing or now - waiting[first] > PATIENCE_SECONDS or _in_time(dues, now + step_seconds, step_seconds):
            return first
    if playing:
        return min(playing, key=lambda name: claims[name].due)
    return allowed[0] if allowed and _in_time(dues, now, step_seconds) else None


def batch_with(
    claims: Mapping[str, Demand], first: str, alike: Collection[str], now: float, step_seconds: float, most: int
) -> list[str]:
    """Those of `alike` whose chunks are made in one batch with that of `first`, which `pick` chose: at most `most` with
    it, the most urgent ones, and no more than leave it in time.

    A batch is expected to take a step of `step_seconds` for each of its chunks. One that shows nothing yet goes alone,
    and clips go with clips, while all streams could still have their next chunk in time.
    """
    claim = claims[first]
    if claim.opened is not None:
        return []
    others = [
        name
        for name in alike
        if name != first and claims[name].chunk < claims[name].limit and claims[name].opened is None
        if claims[name].background == claim.background
    ]
    if claim.background:
        others = others[: most - 1]
        while others and not _in_time(_dues(claims, now), now + len(others) * step_seconds, step_seconds):
            others.pop()
        return others
    if step_seconds > 0:
        most = min(most, int((claim.due - now) / step_seconds))
    return sorted(others, key=lambda name: claims[name].due)[: max(0, most - 1)]


def _dues(claims: Mapping[str, Demand], now: float) -> list[float]:
    """When streams that play need their next chunk.

    One that may generate nothing and is overdue all the same is paused: nobody waits for it.
    """
    return [
        claim.due
        for claim in claims.values()
        if not claim.background and claim.opened is None and (claim.due > now or claim.chunk < claim.limit)
    ]


def _in_time(dues: Iterable[float], now: float, step_seconds: float) -> bool:
    """Whether a step for somebody else, and then one for each of these in turn, makes none of them late."""
    return all(now + step_seconds * (2 + before) <= due for before, due in enumerate(sorted(dues)))
