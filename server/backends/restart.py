"""When a failed engine process is replaced. Pure: no clock is read and nothing is started here.

A standby takes over at once, twice in a row. Otherwise, and from then on, a pause comes first, which doubles with each
failure up to a limit. What was up for a quiet time before it failed begins a new row. After `MAX_FAILURES` in a row the
streams are given up; the engine is still tried again, after the longest pause each time.
"""

from dataclasses import dataclass

MAX_FAILURES = 6
"""Failures in a row after which streams are not kept any longer: about half a minute, and the time to load."""
FREE_TAKEOVERS = 2
"""Failures in a row after which a standby takes over without a pause."""


@dataclass(frozen=True, slots=True)
class Restart:
    """What follows a failure: a `pause` in seconds, and whether streams wait for the next engine (`retrying`)."""

    pause: float
    retrying: bool


class RestartPolicy:
    """Counts the failures of one engine. Times are monotonic seconds."""

    def __init__(self, first: float, longest: float, quiet: float, max_failures: int = MAX_FAILURES) -> None:
        """Pauses last from `first` to `longest` seconds; an engine that was up for `quiet` seconds is sound."""
        self._first, self._longest, self._quiet, self._max_failures = first, longest, quiet, max_failures
        self.failures = 0
        """In a row."""
        self.failing_since: float | None = None
        """When the first failed; None while the engine is up."""
        self._up_since: float | None = None
        self._was_up = False

    def up(self, now: float) -> None:
        """The engine is ready."""
        self._up_since, self._was_up, self.failing_since = now, True, None

    def fail(self, now: float, *, standby: bool, hopeless: bool = False) -> Restart:
        """The engine has failed. `standby`: one can take over. `hopeless`: it says that it cannot start.

        Before an engine has been up for the first time, nobody is kept waiting for one that cannot start.
        """
        if self._up_since is not None and now - self._up_since >= self._quiet:
            self.failures = 0
        self._up_since = None
        self.failures += 1
        if self.failing_since is None:
            self.failing_since = now
        if self.failures >= self._max_failures or (hopeless and not self._was_up):
            return Restart(self._longest if self.failures >= self._max_failures else self._pause(0), retrying=False)
        if standby and self.failures <= FREE_TAKEOVERS:
            return Restart(0.0, retrying=True)
        return Restart(self._pause(FREE_TAKEOVERS if standby else 0), retrying=True)

    def _pause(self, free: int) -> float:
        return min(self._longest, self._first * 2.0 ** (self.failures - free - 1))
