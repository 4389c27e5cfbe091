"""What carries out the steps: HTTP by httpx and WebSockets by websockets, both loaded when they are first needed."""

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from livereel.errors import ConnectionFailed, LivereelError, api_error
from livereel.protocol import Closed, Reply, Request

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AbstractContextManager

    import httpx
    from websockets.asyncio.client import ClientConnection as AsyncConnection
    from websockets.sync.client import ClientConnection

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "LIVEREEL_URL"
KEY_VARIABLE = "LIVEREEL_API_KEY"

TIMEOUT_SECONDS = 60.0
CONNECT_SECONDS = 10.0
PING_SECONDS = 10.0
"""A WebSocket whose ping is not answered for as long is taken for lost."""


class Socket(Protocol):
    """A WebSocket."""

    def receive(self) -> str | bytes | Closed: ...
    def close(self) -> None: ...


class AsyncSocket(Protocol):
    """A WebSocket."""

    async def receive(self) -> str | bytes | Closed: ...
    async def close(self) -> None: ...


class Transport(Protocol):
    """How a `Client` reaches its server. `livereel.testing` has one without a network."""

    url: str

    def request(self, request: Request) -> Reply:
        """Send a request. Raises `ConnectionFailed`."""

    def connect(self, path: str) -> Socket:
        """Open a WebSocket. Raises `ConnectionFailed` or `ApiError`."""

    def sleep(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """How an `AsyncClient` reaches its server."""

    url: str

    async def request(self, request: Request) -> Reply: ...
    async def connect(self, path: str) -> AsyncSocket: ...
    async def sleep(self, seconds: float) -> None: ...
    async def close(self) -> None: ...


class Server:
    """Where the server is, and what it is sent with every request."""

    def __init__(self, url: str | None, api_key: str | None, timeout: float) -> None:
        """`url` and `api_key` come from the environment if they are None. Raises `LivereelError`."""
        url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise LivereelError(f"The server's URL must be such as {DEFAULT_URL}, not {url!r}")
        self.url = url.rstrip("/")
        self.timeout = timeout
        api_key = api_key or os.environ.get(KEY_VARIABLE)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise LivereelError(f"The API key has characters that no key has: check {KEY_VARIABLE} or `api_key`")
        self.headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._closed = False

    def check_open(self) -> None:
        """Raises `LivereelError` if the client is closed."""
        if self._closed:
            raise LivereelError("The client is closed: use it within its `with` block.")

    def http_options(self) -> dict[str, Any]:
        """Arguments of an httpx client."""
        import httpx

        timeout = httpx.Timeout(self.timeout, connect=CONNECT_SECONDS)
        return {"headers": {"user-agent": "livereel-python", **self.headers}, "timeout": timeout}

    def request_options(self, request: Request) -> dict[str, Any]:
        """Arguments of httpx's `stream` for a request."""
        options = {"params": request.params, "headers": request.headers}
        return {
            "method": request.method,
            "url": self.url + request.path,
            **options,
            **({} if request.json is None else {"json": request.json}),
        }

    def socket_options(self, path: str) -> dict[str, Any]:
        """Arguments of websockets' `connect`."""
        return {
            "uri": "ws" + self.url.removeprefix("http") + path,
            "additional_headers": self.headers,
            "compression": None,
            "max_size": None,  # one frame of RGB24 is larger than the default
            "open_timeout": CONNECT_SECONDS,
            "close_timeout": 1,
            "ping_interval": PING_SECONDS,
            "ping_timeout": PING_SECONDS,
        }

    def unreachable(self, error: Exception) -> ConnectionFailed:
        """The exception for a connection that could not be opened, or broke."""
        detail = str(error) or type(error).__name__
        return ConnectionFailed(
            f"Cannot reach a Livereel server at {self.url} ({detail}): is it running, and is the URL right? "
            f"{URL_VARIABLE} sets another."
        )

    def refused(self, error: Exception) -> Exception:
        """The exception for a WebSocket that could not be opened: `ApiError` if the server refused it for good."""
        response = getattr(error, "response", None)  # websockets' InvalidStatus
        status = getattr(response, "status_code", 0)
        if 400 <= status < 500 and status != 429:
            return api_error(status, None, {})
        return self.unreachable(error)


def reply_of(response: "httpx.Response", body: bytes) -> Reply:
    """The answer of an httpx response."""
    headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
    return Reply(response.status_code, headers, body)


class HttpTransport(Server):
    """The synchronous transport. Its requests are safe to send from several threads."""

    def __init__(self, url: str | None = None, api_key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        super().__init__(url, api_key, timeout)
        self._http: httpx.Client | None = None
        self._sockets: set[_Socket] = set()

    def request(self, request: Request) -> Reply:
        import httpx

        self.check_open()
        self._http = self._http or httpx.Client(**self.http_options())
        try:
            with self._http.stream(**self.request_options(request)) as response:
                if request.sink is None or response.status_code >= 300:
                    return reply_of(response, response.read())
                request.sink.begin(reply := reply_of(response, b""))
                for piece in response.iter_bytes():
                    request.sink.file.write(piece)
                return reply
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self.unreachable(error) from error

    def connect(self, path: str) -> Socket:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        self.check_open()
        try:
            return _Socket(connect(**self.socket_options(path)), self._sockets)
        except (OSError, WebSocketException) as error:
            raise self.refused(error) from error

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def close(self) -> None:
        self._closed = True
        for socket in list(self._sockets):
            socket.close()
        if self._http is not None:
            self._http.close()


class _Socket:
    """An open connection of websockets, whose `connect` is meant as a context manager."""

    def __init__(self, manager: "AbstractContextManager[ClientConnection]", open: "set[_Socket]") -> None:
        """`open` has the sockets of the client that are not closed yet."""
        self._manager = manager
        self._connection = manager.__enter__()
        self._open = open
        open.add(self)

    def receive(self) -> str | bytes | Closed:
        from websockets.exceptions import ConnectionClosed

        try:
            return self._connection.recv()
        except ConnectionClosed as closed:
            return closed_by(closed.rcvd) if self in self._open else Closed()

    def close(self) -> None:
        # At the end of the program its threads stand still, and to wait for the connection's would take for ever.
        if self in self._open and not sys.is_finalizing():
            self._open.discard(self)
            self._manager.__exit__(None, None, None)


class AsyncHttpTransport(Server):
    """The asynchronous transport, for asyncio."""

    def __init__(self, url: str | None = None, api_key: str | None = None, timeout: float = TIMEOUT_SECONDS) -> None:
        super().__init__(url, api_key, timeout)
        self._http: httpx.AsyncClient | None = None
        self._sockets: set[_AsyncSocket] = set()

    async def request(self, request: Request) -> Reply:
        import httpx

        self.check_open()
        self._http = self._http or httpx.AsyncClient(**self.http_options())
        try:
            async with self._http.stream(**self.request_options(request)) as response:
                if request.sink is None or response.status_code >= 300:
                    return reply_of(response, await response.aread())
                request.sink.begin(reply := reply_of(response, b""))
                async for piece in response.aiter_bytes():
                    request.sink.file.write(piece)
                return reply
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self.unreachable(error) from error

    async def connect(self, path: str) -> AsyncSocket:
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        self.check_open()
        try:
            manager = connect(**self.socket_options(path))
            return _AsyncSocket(manager, await manager.__aenter__(), self._sockets)
        except (OSError, WebSocketException) as error:
            raise self.refused(error) from error

    async def sleep(self, seconds: float) -> None:
        import asyncio

        await asyncio.sleep(seconds)

    async def close(self) -> None:
        self._closed = True
        for socket in list(self._sockets):
            await socket.close()
        if self._http is not None:
            await self._http.aclose()


class _AsyncSocket:
    def __init__(
        self,
        manager: "AbstractAsyncContextManager[AsyncConnection]",
        connection: "AsyncConnection",
        open: "set[_AsyncSocket]",
    ) -> None:
        self._manager = manager
        self._connection = connection
        self._open = open
        open.add(self)

    async def receive(self) -> str | bytes | Closed:
        from websockets.exceptions import ConnectionClosed

        try:
            return await self._connection.recv()
        except ConnectionClosed as closed:
            return closed_by(closed.rcvd) if self in self._open else Closed()

    async def close(self) -> None:
        if self in self._open:
            self._open.discard(self)
            await self._manager.__aexit__(None, None, None)


def closed_by(frame: Any) -> Closed:
    """How a connection closed, by websockets' close frame; None if there was none."""
    return Closed(frame.code, frame.reason) if frame is not None else Closed()
