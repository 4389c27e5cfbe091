"""The gateway's handle on an engine: `start`, `send`, `health`, `stop`, and a callback for what the engine sends.

The messages in both directions are those of `engine.wire`. A backend adds where the engine runs and what happens when
it dies. `local` runs it as a child process; `fake` imitates one for tests and benchmarks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine import wire


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine process is gone, and its streams' state with it.

    With `retrying`, a replacement starts in `pause` seconds and can resume the streams. Without it, the streams are
    over; if an engine does come up again later, `wire.Ready` says so.
    """

    reason: str
    retrying: bool
    pause: float = 0.0


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine can take work now, and why not if it cannot."""

    ready: bool
    reason: str
    generation: int
    """Number of the current engine process: 0 before the first one, then counting from 1."""
    restart_in: float = 0.0
    """Seconds until the next engine process is started."""
    down_seconds: float = 0.0
    """How long the engine has been failing; 0 while it is up or starts for the first time."""


EngineEvent = wire.ToGateway | EngineLost
Deliver = Callable[[EngineEvent, bytes], None]
"""Called on the event loop for every event, in order. The second argument holds the pixels of a `wire.Frames`."""


class Backend(Protocol):
    """Where streams are generated."""

    async def start(self, deliver: Deliver) -> None:
        """Start the engine without waiting for it: it delivers `wire.Ready` once it can serve."""

    def send(self, message: wire.ToEngine) -> None:
        """Send a message to the engine. Without an engine it is dropped: `EngineLost` has been or will be delivered."""

    def health(self) -> Health:
        """The engine's current health."""

    async def stop(self) -> None:
        """End the engine and everything started for it. Nothing is delivered afterwards."""
