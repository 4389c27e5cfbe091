"""The clock that films age by: unix time that does not jump when the machine's clock is set.

It counts the seconds since the machine was started, also while that is suspended, and goes on where an earlier server's
clock was: exactly if the machine has run since, otherwise from the last moment that was saved. The time that the
machine was off does not count, for nothing but the machine's clock could tell how long that was.
"""

import time
from pathlib import Path

import msgspec

STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""Unlike `CLOCK_MONOTONIC`, Linux's boot time runs on while the machine is suspended."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
MIN_JUMP = 1.0
"""Smaller differences between this clock and the machine's are not corrected in what is shown."""


class State(msgspec.Struct, frozen=True):
    """What is saved of a clock."""

    boot: str
    """Names the run of the machine; empty if it has no name."""
    offset: float
    """What is added to the seconds since the machine was started."""
    now: float
    """The clock when it was saved."""


class FilmClock:
    """A clock of unix time, which is right when it is made for the first time and runs steadily from then on."""

    def __init__(self, saved: bytes = b"") -> None:
        """`saved` is what `save` returned to an earlier server; anything else makes a new clock."""
        try:
            state = msgspec.json.decode(saved, type=State)
        except msgspec.MsgspecError:
            state = None
        self.new = state is None
        """Whether no earlier clock goes on."""
        self._boot = _boot()
        if state is None:
            self._offset = time.time() - _steady()
        elif self._boot and self._boot == state.boot:
            self._offset = state.offset
        else:
            self._offset = state.now - _steady()
        self._ahead = 0.0

    def now(self) -> float:
        """Unix time in seconds."""
        return _steady() + self._offset

    def shown(self, at: float) -> float:
        """What the machine's clock will show when this clock shows `at`."""
        ahead = time.time() - self.now()
        if abs(ahead - self._ahead) >= MIN_JUMP:
            self._ahead = ahead
        return at + self._ahead

    def save(self) -> bytes:
        """The state that a later server's clock goes on from."""
        return msgspec.json.encode(State(self._boot, self._offset, self.now()))


def _steady() -> float:
    return time.clock_gettime(STEADY)


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""
