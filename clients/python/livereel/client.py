"""The synchronous client."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from livereel import operations, stream
from livereel.errors import ConnectionFailed
from livereel.models import StreamInfo
from livereel.protocol import (
    Connect,
    Deliver,
    Done,
    Items,
    Receive,
    Request,
    Sleep,
    Step,
    Steps,
    advance,
    follow_video,
    retrying,
    wait_for_video,
)
from livereel.stream import StreamState
from livereel.transport import TIMEOUT_SECONDS, HttpTransport, Socket, Transport

P = ParamSpec("P")
T = TypeVar("T")


class Connection:
    """Carries out the steps of one procedure."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._socket: Socket | None = None

    def perform(self, step: Step) -> Any:
        """The outcome of a step; `ConnectionFailed` is one."""
        try:
            match step:
                case Request():
                    return self._transport.request(step)
                case Connect():
                    self.close()
                    self._socket = self._transport.connect(step.path)
                case Receive():
                    assert self._socket is not None
                    return self._socket.receive()
                case Sleep():
                    self._transport.sleep(step.seconds)
        except ConnectionFailed as error:
            return error
        return None

    def close(self) -> None:
        """Close the WebSocket, if one is open."""
        if self._socket is not None:
            self._socket.close()


class Resource:
    """Something whose methods are operations of the API."""

    def __init__(self, transport: Transport, max_retries: int) -> None:
        self._transport = transport
        self._max_retries = max_retries

    def _run(self, steps: Steps[T]) -> T:
        steps, outcome = retrying(steps, self._max_retries), None
        connection = Connection(self._transport)
        try:
            while not isinstance(step := advance(steps, outcome), Done):
                outcome = connection.perform(step)
        finally:
            steps.close()
        value: T = step.value
        return value

    def _iterate(self, items: Items[T]) -> Iterator[T]:
        steps, outcome = retrying(items, self._max_retries), None
        connection = Connection(self._transport)
        try:
            while not isinstance(step := advance(steps, outcome), Done):
                outcome = None
                if isinstance(step, Deliver):
                    yield step.item
                else:
                    outcome = connection.perform(step)
        finally:
            steps.close()
            connection.close()


def method(operation: Callable[P, Steps[T]]) -> Callable[Concatenate[Any, P], T]:
    """A method that carries out an operation, with its signature and documentation."""

    @functools.wraps(operation)
    def call(self: Resource, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(operation(*args, **kwargs))

    return call


def stream_method(operation: Callable[Concatenate[str, P], Steps[T]]) -> Callable[Concatenate[Any, P], T]:
    """A method of a stream that carries out an operation on it."""

    @functools.wraps(operation)
    def call(self: "Stream", /, *args: P.args, **kwargs: P.kwargs) -> T:
        result = self._run(operation(self.id, *args, **kwargs))
        if isinstance(result, StreamInfo):
            self.info = result
        return result

    return call


def items(operation: Callable[P, Items[T]]) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """A method that iterates over the results of an operation."""

    @functools.wraps(operation)
    def call(self: Resource, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(operation(*args, **kwargs))

    return call


def stream_items(
    operation: Callable[Concatenate[StreamState, P], Items[T]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """A method of a stream that iterates over what it sends."""

    @functools.wraps(operation)
    def call(self: "Stream", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return self._iterate(operation(self, *args, **kwargs))

    return call


def opening(operation: Callable[P, Steps[StreamInfo]], *, ours: bool) -> Callable[Concatenate[Any, P], "Stream"]:
    """A method of the client that opens a stream, or finds one."""

    @functools.wraps(operation)
    def call(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Stream:
        return Stream(self._transport, self._max_retries, self._run(operation(*args, **kwargs)), ours=ours)

    return call


class Stream(Resource, StreamState):
    """A live stream. As a context manager it ends the stream at the end if it was opened by this client."""

    def __init__(self, transport: Transport, max_retries: int, info: StreamInfo, *, ours: bool) -> None:
        Resource.__init__(self, transport, max_retries)
        StreamState.__init__(self, info)
        self._ours = ours

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ours and not self.info.over:
            self.end()

    frames = stream_items(stream.frames)
    events = stream_items(stream.events)
    watch = stream_items(stream.events_and_frames)
    refresh = stream_method(operations.get_stream)
    steer = stream_method(operations.steer)
    schedule = stream_method(operations.schedule)
    pause = stream_method(operations.pause)
    resume = stream_method(operations.resume)
    end = stream_method(operations.end_stream)
    set_matte = stream_method(operations.set_matte)
    remove_matte = stream_method(operations.remove_matte)
    token = stream_method(operations.create_token)
    push = stream_method(operations.push)
    outputs = stream_method(operations.list_outputs)
    output = stream_method(operations.get_output)
    remove_output = stream_method(operations.remove_output)
    record = stream_method(operations.record)
    recordings = stream_method(operations.list_recordings_of_stream)


class Models(Resource):
    """What the server draws with."""

    list = method(operations.list_models)
    get = method(operations.get_model)


class Loras(Resource):
    """The server's LoRAs."""

    list = method(operations.list_loras)
    set = method(operations.set_loras)


class Recordings(Resource):
    """Live streams that are, or were, written to files."""

    list = method(operations.list_recordings)
    get = method(operations.get_recording)
    stop = method(operations.stop_recording)
    delete = method(operations.delete_recording)
    download = method(operations.download_recording)


class Videos(Resource):
    """Clips: films of a known length that are made in the background."""

    create = method(operations.create_video)
    list = method(operations.list_videos)
    get = method(operations.get_video)
    wait = method(wait_for_video)
    delete = method(operations.delete_video)
    remix = method(operations.remix_video)
    download = method(operations.download_video)
    generate = method(operations.generate)
    progress = items(follow_video)


class Client(Resource):
    """A Livereel server.

    with Client() as client, client.stream("a red ball on grass") as stream:
        for frame in stream.frames():
            ...
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        max_retries: int = 2,
        transport: Transport | None = None,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: Of the server; the variable LIVEREEL_URL when absent, else http://127.0.0.1:8000.
            api_key: An API key, or a token for one stream; the variable LIVEREEL_API_KEY when absent.
            timeout: Seconds that the server may be silent within an answer.
            max_retries: How often a request is sent again where that does no harm.
            transport: In place of the network; see `livereel.testing`.

        Raises:
            LivereelError: The URL or the key is none.
        """
        super().__init__(transport or HttpTransport(url, api_key, timeout), max_retries)
        shared = self._transport, max_retries
        self.models = Models(*shared)
        self.loras = Loras(*shared)
        self.recordings = Recordings(*shared)
        self.videos = Videos(*shared)

    @property
    def url(self) -> str:
        """Of the server, without a slash at the end."""
        return self._transport.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Streams go on."""
        self._transport.close()

    stream = opening(operations.create_stream, ours=True)
    attach = opening(operations.get_stream, ours=False)
    streams = method(operations.list_streams)
    readiness = method(operations.readiness)
