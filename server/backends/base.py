"""The gateway's handle on an engine: four verbs, and the engine's messages in return.

What goes to the engine and what comes back are the messages of `engine.wire`; a backend adds where the engine runs
and what happens when it dies. `local` runs one as a child process, `fake` pretends.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from engine import wire


@dataclass(frozen=True, slots=True)
class Lost:
    """The engine is gone, and with it every stream it held.

    With `retrying` a new one is on its way and can take the streams up. Without, they are over; `wire.Ready` tells if
    one ever comes up again.
    """

    reason: str
    retrying: bool


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine can take work now, and if not, why not."""

    ready: bool
    reason: str
    generation: int
    """Number of the current engine process: 1 is the first, 0 is none yet."""


EngineEvent = wire.ToGateway | Lost
Deliver = Callable[[EngineEvent, bytes], None]
"""Called on the event loop for every message, in order; the second argument holds the pixels of `wire.Frames`."""


class Backend(Protocol):
    """Where streams are generated."""

    async def start(self, deliver: Deliver) -> None:
        """Begin to bring the engine up, without waiting for it: `wire.Ready` tells when it is."""

    def send(self, message: wire.ToEngine) -> None:
        """Hand a message to the engine. Dropped when there is none: `Lost` was or will be delivered."""

    def health(self) -> Health:
        """How the engine is."""

    async def stop(self) -> None:
        """End the engine and everything started for it. Delivers nothing any more."""
