"""Which stream gets the next chunk: the one whose playback runs dry first.

A stream that shows nothing yet does not make those that play run dry: it begins when there is time for it, or when it
has waited for `PATIENCE_SECONDS`. A clip gets what all streams leave.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PATIENCE_SECONDS = 2.0


@dataclass(frozen=True)
class Claim:
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


def pick(claims: Mapping[str, Claim], now: float = 0.0, step_seconds: float = 0.0) -> str | None:
    """The stream with the earliest due time among those that may generate and play; the first opened wins a tie.

    Before them, the stream that has waited longest for its first chunk, if after two steps of `step_seconds` for it
    all that play could still have their next chunk in time: it soon wants a second one. Where no stream may, the first
    clip that may, if they could after one step, which nothing interrupts. None when nothing should be generated now.
    """
    allowed = [name for name, claim in claims.items() if claim.chunk < claim.limit]
    playing = [name for name in allowed if not claims[name].background and claims[name].opened is None]
    waiting = {name: opened for name in allowed if (opened := claims[name].opened) is not None}
    # A stream that may generate nothing and is overdue all the same is paused: nobody waits for it.
    dues = [
        claim.due
        for name, claim in claims.items()
        if not claim.background and claim.opened is None and (claim.due > now or name in playing)
    ]
    if waiting:
        first = min(waiting, key=lambda name: waiting[name])
        if not playing or now - waiting[first] > PATIENCE_SECONDS or _in_time(dues, now + step_seconds, step_seconds):
            return first
    if playing:
        return min(playing, key=lambda name: claims[name].due)
    return allowed[0] if allowed and _in_time(dues, now, step_seconds) else None


def _in_time(dues: Iterable[float], now: float, step_seconds: float) -> bool:
    """Whether a step for somebody else, and then one for each of these in turn, makes none of them late."""
    return all(now + step_seconds * (2 + before) <= due for before, due in enumerate(sorted(dues)))
