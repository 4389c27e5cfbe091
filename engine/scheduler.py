"""Which stream gets the next chunk: the one whose playback runs dry first."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """What the scheduler knows of a stream.

    `due` is the time, in seconds of the caller's clock, at which its next chunk must be on screen; chunks with an
    index below `limit` are allowed.
    """

    chunk: int
    limit: int
    due: float


def pick(claims: Mapping[str, Claim]) -> str | None:
    """The stream with the earliest due time among those that may generate; the first opened wins a tie."""
    allowed = [name for name, claim in claims.items() if claim.chunk < claim.limit]
    return min(allowed, key=lambda name: claims[name].due, default=None)
