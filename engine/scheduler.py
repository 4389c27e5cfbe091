"""Which stream gets the next chunk: the one whose playback runs dry first; a clip only when no stream would wait."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What the scheduler knows of a stream.

    `due` is the time, in seconds of the caller's clock, at which its next chunk must be on screen; chunks with an
    index below `limit` are allowed. A clip, which nobody watches while it is made, is `background`: it is never due.
    """

    chunk: int
    limit: int
    due: float
    background: bool = False


def pick(claims: Mapping[str, Claim], now: float = 0.0, step_seconds: float = 0.0) -> str | None:
    """The stream with the earliest due time among those that may generate; the first opened wins a tie.

    Where none may, the first clip that may, if after a step of `step_seconds` for it, which nothing interrupts, every
    stream could still have its next chunk in time. None when nothing should be generated now.
    """
    allowed = [name for name, claim in claims.items() if claim.chunk < claim.limit]
    live = [name for name in allowed if not claims[name].background]
    if live or not allowed:
        return min(live, key=lambda name: claims[name].due, default=None)
    # A stream that may generate nothing and is overdue all the same is paused: nobody waits for it.
    dues = sorted(claim.due for claim in claims.values() if not claim.background and claim.due > now)
    in_time = all(now + step_seconds * (2 + before) <= due for before, due in enumerate(dues))
    return allowed[0] if in_time else None
