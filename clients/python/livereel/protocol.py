"""The protocol without I/O: what the client does next, as generators of steps that a synchronous and an asynchronous
driver carry out alike.

A procedure (`Steps`) yields a step and is sent its outcome: a `Reply` to a `Request`, a message or `Closed` to a
`Receive`, None to any other step; or `ConnectionFailed`, as a value, if a step failed. What it returns is the result. A
procedure with many results (`Items`) yields each as `Deliver`.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar
from urllib.parse import quote

from livereel.errors import ApiError, ConnectionFailed, LivereelError, StreamFailed, VideoFailed, api_error
from livereel.events import Ended, Event, StreamError, parse_event
from livereel.frames import Format, Frame, parse_frame
from livereel.models import Video
from livereel.parsing import parse

T = TypeVar("T")

BACKOFF = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each attempt to connect anew; the last one repeats."""
LONGEST_RETRY_AFTER = 10.0
"""A server that asks to wait longer than this gets no automatic retry."""
POLL_SECONDS = 0.5


# steps


@dataclass(slots=True)
class Sink:
    """Where the body of a successful answer is written while it arrives."""

    file: BinaryIO
    etag: str | None = None

    def begin(self, reply: "Reply") -> None:
        """Continue at the end of the file if the answer has the part that is missing, else start anew."""
        if reply.status != 206:
            self.file.seek(0)
            self.file.truncate()
        self.etag = reply.headers.get("etag")


@dataclass(frozen=True, slots=True)
class Request:
    """Send an HTTP request."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    sink: Sink | None = None

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does the same as sending it once."""
        return self.method in ("GET", "PUT", "DELETE") or "idempotency-key" in self.headers


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request. Names of headers are in lower case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        """The decoded body; None if it is no JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def error(self) -> ApiError | None:
        """The exception that the answer stands for; None for a success."""
        return api_error(self.status, self.json, self.headers) if self.status >= 400 else None


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a WebSocket, in place of the one that was open before."""

    path: str


@dataclass(frozen=True, slots=True)
class Receive:
    """Wait for the next message of the WebSocket."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The WebSocket is closed. Without a close code the connection was lost."""

    code: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Deliver(Generic[T]):
    """Hand a result to the caller."""

    item: T


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The procedure has ended, with this result."""

    value: T


Step = Request | Connect | Receive | Sleep
Steps = Generator[Step, Any, T]
Items = Generator[Step | Deliver[T], Any, None]


def advance(steps: Generator[Any, Any, T], outcome: Any) -> Any:
    """The next step of a procedure; `Done` at its end."""
    try:
        return steps.send(outcome)
    except StopIteration as end:
        return Done(end.value)


# requests


def retrying(steps: Generator[Any, Any, T], limit: int) -> Generator[Any, Any, T]:
    """The procedure, with each failed request sent up to `limit` times more where that does no harm."""
    outcome: Any = None
    while not isinstance(step := advance(steps, outcome), Done):
        outcome = yield step
        if isinstance(step, Request):
            for attempt in range(limit):
                if (seconds := retry_delay(step, outcome, attempt)) is None:
                    break
                yield Sleep(seconds)
                outcome = yield step
    value: T = step.value
    return value


def retry_delay(request: Request, outcome: Reply | ConnectionFailed, attempt: int) -> float | None:
    """Seconds until the request is sent again; None if it is not.

    After 429 and 503 the server has done nothing. After a lost connection, or what a proxy answers for one, it may
    have: only a repeatable request is sent again.
    """
    delay = BACKOFF[min(attempt, len(BACKOFF) - 1)]
    if request.sink is not None:
        return None  # `download` continues where the connection broke
    if isinstance(outcome, ConnectionFailed):
        return delay if request.repeatable else None
    if (error := outcome.error) is None or error.status not in (429, 502, 503, 504):
        return None
    if error.status in (502, 504) and not request.repeatable:
        return None
    delay = delay if error.retry_after is None else error.retry_after
    return delay if delay <= LONGEST_RETRY_AFTER else None


def segment(text: str) -> str:
    """A piece of a path, such as an id that somebody typed, that stays one piece."""
    if not text or set(text) == {"."}:
        raise LivereelError(f"{text!r} is no id")
    return quote(text, safe="")


def exchange(request: Request) -> Steps[Reply]:
    """The answer to a request. Raises `ApiError` or `ConnectionFailed`."""
    outcome = yield request
    if isinstance(outcome, ConnectionFailed):
        raise outcome
    reply: Reply = outcome
    if error := reply.error:
        raise error
    return reply


def download(path: str, to: str | Path, params: Mapping[str, str], limit: int) -> Steps[Path]:
    """Download a film to a file, also one that still grows. Each of `limit` connections in a row may break.

    The file appears under its name when it is complete; what is there already is kept until then.
    """
    to = Path(to)
    part = to.with_name(to.name + ".part")
    try:
        with part.open("w+b") as file:
            sink, failures = Sink(file), 0
            while True:
                before = file.tell()
                headers = {"range": f"bytes={before}-", "if-range": sink.etag} if before and sink.etag else {}
                try:
                    yield from exchange(Request("GET", path, params, headers=headers, sink=sink))
                    break
                except (ConnectionFailed, ApiError) as error:
                    temporary = isinstance(error, ConnectionFailed) or error.code == "video_not_ready"
                    failures = failures + 1 if file.tell() <= before else 0
                    if not temporary or failures > limit:
                        raise
                    yield Sleep(BACKOFF[min(failures, len(BACKOFF) - 1)])
        part.replace(to)
    finally:
        part.unlink(missing_ok=True)
    return to


def follow_video(id: str) -> Items[Video]:
    """The clip now, and again after every change until it is over. Raises `VideoFailed`."""
    last: Video | None = None
    while last is None or not last.over:
        video = parse(Video, (yield from exchange(Request("GET", f"/v1/videos/{segment(id)}"))).json)
        if video != last:
            yield Deliver(video)
        last = video
        if not video.over:
            yield Sleep(POLL_SECONDS)
    if last.error is not None:
        raise VideoFailed(last.error.code, last.error.message, retryable=bool(last.extra.retryable))


def wait_for_video(id: str) -> Steps[Video]:
    """The clip when it is completed. Raises `VideoFailed`."""
    items, outcome, last = follow_video(id), None, None
    while not isinstance(step := advance(items, outcome), Done):
        outcome = None
        if isinstance(step, Deliver):
            last = step.item
        else:
            outcome = yield step
    assert isinstance(last, Video)
    return last


# streams


def watch(id: str, format: Format | None, *, alpha: bool, reconnect_s: float) -> Items[Event | Frame]:
    """The events and frames of a stream until it ends; without a format, only its events.

    A lost connection is opened again for up to `reconnect_s` seconds in a row. A frame that was delivered before the
    loss is not delivered again. Raises `StreamFailed`, `ApiError` or `ConnectionFailed`.
    """
    query = f"format={format or 'events'}{'&alpha=stacked' if alpha else ''}"
    path = f"/v1/streams/{segment(id)}/ws?{query}"
    newest, failures, waited = -1, 0, 0.0
    while True:
        outcome = yield Connect(path)
        refusal: StreamError | None = None
        failure: StreamError | None = None
        while not isinstance(outcome, ConnectionFailed | Closed):
            if isinstance(outcome := (yield Receive()), bytes):
                frame = parse_frame(outcome)
                if frame.format == "fmp4" or frame.pts > newest:
                    newest, failures, waited = frame.pts, 0, 0.0
                    yield Deliver(frame)
            elif isinstance(outcome, str):
                event = parse_event(_object(outcome))
                if isinstance(event, StreamError):
                    failure = event
                    if event.seq == 0:  # not the stream's: the server does not let this viewer in
                        refusal = event
                        continue
                yield Deliver(event)
                if isinstance(event, Ended):
                    if event.reason == "failed":
                        raise _stream_failure(event, failure)
                    return
        if isinstance(outcome, Closed) and outcome.code == 1000:
            return
        lost = outcome if isinstance(outcome, ConnectionFailed) else _closed(outcome, refusal)
        if not isinstance(lost, ConnectionFailed) or waited >= reconnect_s:
            raise lost
        delay = BACKOFF[min(failures, len(BACKOFF) - 1)]
        failures, waited = failures + 1, waited + delay
        yield Sleep(delay)


def only(kind: type[T], items: Items[Any]) -> Items[T]:
    """Those of the results that are of this kind."""
    outcome: Any = None
    while not isinstance(step := advance(items, outcome), Done):
        outcome = None
        if not isinstance(step, Deliver):
            outcome = yield step
        elif isinstance(step.item, kind):
            yield Deliver(step.item)


def observed(items: Items[Event | Frame], observe: Any) -> Items[Event | Frame]:
    """The results, each event of which is shown to `observe` first."""
    outcome: Any = None
    while not isinstance(step := advance(items, outcome), Done):
        if isinstance(step, Deliver) and isinstance(step.item, Event):
            observe(step.item)
        outcome = yield step


def _object(text: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise LivereelError("The server sent an event that is no JSON object: is this a Livereel server?")
    return fields


CLOSED_BY_SERVER = {1008: 400, 4401: 401, 4403: 403, 4404: 404}
"""HTTP status that a close code stands for."""


def _closed(closed: Closed, refusal: StreamError | None) -> LivereelError:
    """What a closed connection means: an `ApiError` where a further attempt would fail alike."""
    code = refusal.code if refusal else closed.reason
    message = refusal.message if refusal else f"The server closed the connection ({closed.code} {closed.reason})."
    if (status := CLOSED_BY_SERVER.get(closed.code or 0)) is None:
        return ConnectionFailed(message if closed.code else "The connection to the server was lost.")
    error = {"code": code, "message": message, "param": refusal.fields.get("param") if refusal else None}
    return api_error(status, {"error": error}, {})


def _stream_failure(ended: Ended, failure: StreamError | None) -> StreamFailed:
    if failure is not None:
        return StreamFailed(failure.code, failure.message)
    return StreamFailed("failed", "The stream has failed.")
