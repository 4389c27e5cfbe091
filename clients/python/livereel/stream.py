"""What a synchronous and an asynchronous stream have in common: what is known of it, kept up to date by its events."""

from dataclasses import replace

from livereel.events import Chunk, Ended, Event, PromptApplied, QueuePosition, StateChanged, StreamError, StreamStarted
from livereel.frames import Format, Frame
from livereel.models import Failure, State, StreamInfo
from livereel.protocol import Items, observed, only, watch


class StreamState:
    """What is known of a stream: from the server's last answer, and from the events that were seen since."""

    def __init__(self, info: StreamInfo) -> None:
        self.info = info

    @property
    def id(self) -> str:
        return self.info.id

    @property
    def state(self) -> State:
        return self.info.state

    @property
    def prompt(self) -> str:
        """The prompt that was sent last; before its picture comes, an event `PromptApplied` does."""
        return self.info.prompt

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.state}>"

    def observe(self, event: Event) -> None:
        """Note what an event says about the stream."""
        match event:
            case StreamStarted():
                self.info = event.stream
            case StateChanged():
                self.info = replace(self.info, state=event.state, pause_reason=event.reason, queue_position=None)
            case QueuePosition():
                self.info = replace(self.info, queue_position=event.position, queue_wait_s=event.wait_s)
            case Chunk():
                self.info = replace(self.info, frames_generated=self.info.frames_generated + event.frames)
            case PromptApplied():
                self.info = replace(self.info, prompt=event.prompt)
            case StreamError():
                self.info = replace(self.info, error=Failure(event.code, event.message))
            case Ended():
                state: State = "failed" if event.reason == "failed" else "ended"
                self.info = replace(self.info, state=state, ended_reason=event.reason)


def events_and_frames(
    stream: StreamState, format: Format = "mjpeg", *, alpha: bool = False, reconnect_s: float = 60
) -> Items[Event | Frame]:
    """Events and frames, in order, over one connection. Arguments and exceptions are those of `frames`."""
    return observed(watch(stream.id, format, alpha=alpha, reconnect_s=reconnect_s), stream.observe)


def frames(
    stream: StreamState, format: Format = "mjpeg", *, alpha: bool = False, reconnect_s: float = 60
) -> Items[Frame]:
    """The frames as they are shown, from the one on screen until the stream ends.

    A program that is too slow for them misses frames and delays nobody.

    Args:
        format: `mjpeg`: each frame a JPEG. `rgb24`: raw pixels. `fmp4`: pieces of a fragmented MP4.
        alpha: Each frame stacked on its matte, twice as high.
        reconnect_s: How long a lost connection is tried again; the frames between are missed.

    Raises:
        StreamFailed: The stream has failed.
        ApiError: There is no such stream, or it may not be watched.
        ConnectionFailed: The connection was lost for longer than `reconnect_s`.
    """
    return only(Frame, events_and_frames(stream, format, alpha=alpha, reconnect_s=reconnect_s))


def events(stream: StreamState, *, reconnect_s: float = 60) -> Items[Event]:
    """What happens to the stream until it ends. Raises as `frames` does."""
    return only(Event, observed(watch(stream.id, None, alpha=False, reconnect_s=reconnect_s), stream.observe))
