"""The server's connections: uvicorn's protocols, made safe against peers that drip, do not read, or come in crowds.

uvicorn waits without end for the head of a request, and for a peer to read what was written. Here every phase has a
deadline: the head, the whole request, and a write that does not move.
"""

import asyncio
import functools
import ipaddress
import json

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from server.errors import ApiError

ABORT = "livereel.abort"
"""ASGI extension that these protocols offer: drops the connection without waiting for the peer."""

HEAD_SECONDS = 10.0
"""From the first byte that is expected to the end of the headers."""
REQUEST_SECONDS = 60.0
"""From the end of the headers to the end of the body, whatever the application waits for."""
WRITE_SECONDS = 15.0
"""A peer that reads nothing for this long is let go."""

MAX_HEADER_LINE = 8000
"""Of a WebSocket's handshake: the websockets library takes no longer ones."""

MAX_CONNECTIONS = 512
"""Of everybody; a process may have 1024 files open where nobody says otherwise."""
MAX_CONNECTIONS_PER_PEER = 64
"""Of one address, or one /64 of IPv6. This machine is excepted: a proxy on it speaks for many."""

MAX_PONG_BYTES = 1 << 20
MAX_FRAGMENTS = 64
"""Of one message: empty ones cost memory and count for no size."""


class HttpProtocol(H11Protocol):
    """uvicorn's, with deadlines and with bounds on the number of connections."""

    _deadline: asyncio.TimerHandle | None = None
    _receiving: object = None
    """What the deadline is for: the connection while a head is awaited, else the request whose body is."""
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            """Offer the way out of a response that its peer does not read: a close would wait for it."""
            scope.setdefault("extensions", {})[ABORT] = {"call": transport.abort}
            await app(scope, receive, send)

        self.app = with_abort
        if crowded(self, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_PEER):
            self._refuse(503, "too_many_connections", "There are too many connections: try again soon.")
        else:
            self._expect(self)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over, unless the library there would choke on the request."""
        longest = max(len(name) + len(value) for name, value in event.headers)
        if event.method != b"GET" or max(longest, len(event.target)) > MAX_HEADER_LINE:
            self._refuse(400, "invalid_request", "This is no WebSocket handshake that the server understands.")
            return
        self._expect(None)
        self.resume_writing()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect(None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self._stalled or self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, as an error object."""
        self._refuse(400, "invalid_request", "This is no HTTP request that the server understands.")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._linger()

    def _look(self) -> None:
        """See what the peer owes now."""
        if self.transport.get_protocol() is not self:
            return  # it has become a WebSocket
        if self.transport.is_closing():
            self._expect(None)
            self._linger()
        elif self.conn.their_state is h11.SEND_BODY:
            self._expect(self.cycle)
        elif self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._expect(self)
        elif self.conn.their_state is not h11.IDLE:
            self._expect(None)

    def _expect(self, what: object) -> None:
        """Set the deadline for it; one that is set for the same thing stays, however much has come meanwhile."""
        if what is self._receiving:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._receiving = what
        seconds = HEAD_SECONDS if what is self else REQUEST_SECONDS
        self._deadline = self.loop.call_later(seconds, self._late) if what is not None else None

    def _late(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(408, "request_timeout", "The request took too long to arrive.")
        else:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of another answer
            return
        body = json.dumps({"error": ApiError(status, code, message).error}).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("x-content-type-options", "nosniff"),
            ("cache-control", "no-store"),
            ("connection", "close"),
        ]
        if status == 503:
            headers.append(("retry-after", "5"))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # for the application nobody is there any more
            self.cycle.message_event.set()
        try:
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # HEAD, which has no body
        self._expect(None)
        self.transport.close()
        self._linger()

    def _linger(self) -> None:
        """A close waits until the peer has read everything: not for ever."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(WRITE_SECONDS, self.transport.abort)


def crowded(protocol: H11Protocol, in_all: int, per_peer: int) -> bool:
    """Whether a new connection, itself counted, is one too many."""
    if len(protocol.connections) > in_all:
        return True
    mine = peer(protocol.client)
    return (
        mine is not None
        and sum(peer(getattr(other, "client", None)) == mine for other in protocol.connections) > per_peer
    )


def peer(client: tuple[str, int] | None) -> str | None:
    """Who counts as one; None for this machine."""
    return network(client[0]) if client else None


@functools.lru_cache(MAX_CONNECTIONS * 2)
def network(host: str) -> str | None:
    """The address, or the /64 that IPv6 gives to one customer; None for this machine."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return None
    return str(ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False))


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's, made safe against peers that do not read or send what costs us and not them."""

    def handle_connect(self, event: Request) -> None:
        """Offer the application a way to drop the connection: a close would wait for the peer to read."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope.setdefault("extensions", {})[ABORT] = {"call": self.transport.abort}

    def handle_ping(self) -> None:
        """Answer, unless the answers pile up because the peer only asks."""
        if self.transport.get_write_buffer_size() > MAX_PONG_BYTES:
            self.transport.abort()
        else:
            super().handle_ping()

    def handle_cont(self, event: Frame) -> None:
        """Go on with a message, unless it comes in crumbs."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.transport.abort()
        else:
            super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        """A handshake that makes no sense has no frames to close it with."""
        if self.conn.close_sent is None:
            self.transport.abort()
        else:
            super().handle_parser_exception()
