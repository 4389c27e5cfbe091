"""A token bucket: how many requests may come, and how soon.

Pure: times are seconds of any one monotonic clock, passed in.
"""

import math


class TokenBucket:
    """Allows `per_minute` requests at once, and then as many a minute, spread evenly."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._tokens = float(per_minute)
        self._refilled_at = now

    @property
    def left(self) -> int:
        """How many requests may come at once now."""
        return int(self._tokens)

    @property
    def full_in(self) -> float:
        """Seconds from the last request until the bucket is full again."""
        return (self._per_minute - self._tokens) * 60 / self._per_minute

    def take(self, now: float) -> int:
        """Take a token for a request. Returns 0, or, without a token, whole seconds until the next try may succeed."""
        refilled = (now - self._refilled_at) * self._per_minute / 60
        self._tokens, self._refilled_at = min(float(self._per_minute), self._tokens + refilled), now
        if self._tokens < 1:
            return max(1, math.ceil((1 - self._tokens) * 60 / self._per_minute))
        self._tokens -= 1
        return 0
