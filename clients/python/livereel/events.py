"""What happens to a stream, as the server reports it over the WebSocket: one class per type of event."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from livereel.models import Failure, State, StreamInfo, Transition
from livereel.parsing import parse


@dataclass(frozen=True, slots=True)
class Event:
    """An event; also the class of types that this package does not know. `fields` is the whole JSON object."""

    type: str
    seq: int
    ts: float
    """Unix time."""
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StreamStarted(Event):
    """The first event of every connection."""

    stream: StreamInfo


@dataclass(frozen=True, slots=True)
class QueuePosition(Event):
    """The stream's place in the queue has changed; 1 is next."""

    position: int
    wait_s: float | None


@dataclass(frozen=True, slots=True)
class StateChanged(Event):
    """The stream has another state. `reason` says why it is paused."""

    state: State
    reason: Literal["asked", "unwatched"] | None


@dataclass(frozen=True, slots=True)
class Chunk(Event):
    """A chunk has been generated. `pts` is in 1/90000 s."""

    index: int
    pts: int
    frames: int
    gen_ms: float
    shown: int
    """Frames shown so far."""


@dataclass(frozen=True, slots=True)
class PromptApplied(Event):
    """The next frame is the first under a new prompt. `pts` is in 1/90000 s."""

    chunk_index: int
    pts: int
    prompt: str
    transition: Transition
    latency_s: float
    """From the request to the picture."""


@dataclass(frozen=True, slots=True)
class QualityChanged(Event):
    """From this chunk on, the stream has another number of denoising steps."""

    level: int
    steps: int
    reason: str
    chunk_index: int
    pts: int


@dataclass(frozen=True, slots=True)
class OutputState(Event):
    """An output has another state."""

    output: str
    url: str
    state: Literal["waiting", "connecting", "live", "ended"]
    error: Failure | None
    retry_in_s: float | None


@dataclass(frozen=True, slots=True)
class Stall(Event):
    """A due frame is missing (`began`), or is there again (`ended`, after `seconds`)."""

    phase: Literal["began", "ended"]
    seconds: float | None


@dataclass(frozen=True, slots=True)
class EngineRestarted(Event):
    """The stream goes on in a new engine process."""

    generation: int


@dataclass(frozen=True, slots=True)
class Draining(Event):
    """The server shuts down in `seconds`."""

    seconds: float


@dataclass(frozen=True, slots=True)
class StreamError(Event):
    """Something broke. The stream goes on unless an `Ended` follows."""

    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Ended(Event):
    """The stream is over: finished, deleted, idle, shutting_down, revoked or failed."""

    reason: str


KINDS: dict[str, type[Event]] = {
    "stream.started": StreamStarted,
    "queue.position": QueuePosition,
    "state": StateChanged,
    "chunk": Chunk,
    "prompt.applied": PromptApplied,
    "quality.changed": QualityChanged,
    "output.state": OutputState,
    "stall": Stall,
    "engine.restarted": EngineRestarted,
    "draining": Draining,
    "error": StreamError,
    "ended": Ended,
}
"""Class by the event's `type`."""


def parse_event(fields: Mapping[str, Any]) -> Event:
    """The event of a JSON object."""
    return parse(KINDS.get(str(fields.get("type")), Event), {**fields, "fields": fields})
