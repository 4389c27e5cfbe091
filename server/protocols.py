"""uvicorn's HTTP and WebSocket protocols, hardened against slow and numerous peers.

uvicorn waits indefinitely for a request's headers, and for a peer to read what was sent. Here each phase has a
deadline: the headers, the whole request, and a write that makes no progress. Connections are limited in number.
"""

import asyncio
import contextlib
import functools
import ipaddress
import json
import os
import resource
import socket
import struct

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from server.errors import ApiError
from server.rate_limit import TokenBucket

ABORT = "livereel.abort"
"""ASGI extension that these protocols offer: drops the connection at once, over HTTP with a reset."""

HEAD_SECONDS = 10.0
"""Deadline for the headers of a request, from the moment that they are expected."""
REQUEST_SECONDS = 60.0
"""Deadline for the body, from the end of the headers."""
WRITE_SECONDS = 15.0
"""A connection is aborted if its peer reads nothing for this long."""

MAX_HEADER_LINE = 8000
"""Of a WebSocket handshake: the websockets library accepts no longer lines."""

MAX_CONNECTIONS = 512
"""Over all peers. By default a process may have 1024 files open."""
MAX_CONNECTIONS_PER_PEER = 64
"""Per IPv4 address or IPv6 /64. This machine and trusted proxies are exempt: they serve many peers."""

RESERVED_DESCRIPTORS = 96
"""Descriptors that no connection takes, or a quarter of all where few are allowed: engine processes, films and WebRTC
need some, and libzmq ends the process when it has none left."""
ACCEPTS_PER_TURN = 8
"""Connections that are accepted before the first of them is refused: far fewer than are reserved."""

MAX_PONG_BYTES = 1 << 20
MAX_FRAGMENTS = 64
"""Per message. Empty fragments cost memory but do not count towards the size limit."""


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP protocol with deadlines and limits on the number of connections."""

    _deadline: asyncio.TimerHandle | None = None
    _awaited: object = None
    """What the deadline is for: this protocol while headers are awaited, the request cycle while its body is."""
    _write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        app = self.app

        async def with_abort(scope: Scope, receive: Receive, send: Send) -> None:
            """Add the `ABORT` extension, to break off a response so that the peer sees an error."""
            scope.setdefault("extensions", {})[ABORT] = {"call": functools.partial(reset, transport)}
            await app(scope, receive, send)

        self.app = with_abort
        if too_many_connections(self) or takes_reserve(transport.get_extra_info("socket").fileno()):
            self._refuse(503, "too_many_connections", "There are too many connections: try again soon.")
        else:
            self._await(self)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._update_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_deadline()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Upgrade, unless the websockets library would fail on the request."""
        longest = max(len(name) + len(value) for name, value in event.headers)
        if event.method != b"GET" or max(longest, len(event.target)) > MAX_HEADER_LINE:
            self._refuse(400, "invalid_request", "This is no WebSocket handshake that the server understands.")
            return
        self._await(None)
        self.resume_writing()
        super().handle_websocket_upgrade(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await(None)
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self._write_deadline or self.loop.call_later(WRITE_SECONDS, reset, self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Answer malformed HTTP with an error object."""
        self._refuse(400, "invalid_request", "This is no HTTP request that the server understands.")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_if_unread()

    def _update_deadline(self) -> None:
        """Set the deadline for what the peer has to send next, if anything."""
        if self.transport.get_protocol() is not self:
            return  # upgraded to a WebSocket
        if self.transport.is_closing():
            self._await(None)
            self._abort_if_unread()
        elif self.conn.their_state is h11.SEND_BODY:
            self._await(self.cycle)
        elif self.conn.their_state is h11.IDLE and (self.cycle is None or self.conn.trailing_data[0]):
            self._await(self)
        elif self.conn.their_state is not h11.IDLE:
            self._await(None)

    def _await(self, what: object) -> None:
        """Start the deadline for `what`, None for nothing. Receiving a part of it does not extend the deadline."""
        if what is self._awaited:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._awaited = what
        seconds = HEAD_SECONDS if what is self else REQUEST_SECONDS
        self._deadline = self.loop.call_later(seconds, self._on_deadline) if what is not None else None

    def _on_deadline(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(408, "request_timeout", "The request took too long to arrive.")
        else:
            self._break_off()

    def _break_off(self) -> None:
        """Drop the connection, by a reset unless the response is complete: that would take it from the peer."""
        if self.conn.our_state is h11.SEND_BODY:
            reset(self.transport)
        else:
            self.transport.abort()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Send an error response without calling the application, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self._break_off()  # another response has begun
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
            self.cycle.disconnected = True  # tells the application that the client has left
            self.cycle.message_event.set()
        try:
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:
            pass  # the response to HEAD has no body
        self._await(None)
        self.transport.close()
        self._abort_if_unread()

    def _abort_if_unread(self) -> None:
        """Bound how long a closing connection waits for its peer to read what was sent."""
        if self.transport.is_closing() and self.transport.get_write_buffer_size():
            self.loop.call_later(WRITE_SECONDS, reset, self.transport)


def reset(transport: asyncio.Transport) -> None:
    """Drop a connection with a TCP reset, without waiting for the peer.

    A response over HTTP/1.0 may end with its connection (RFC 9112, section 6.3), so after an orderly close a truncated
    film would look complete. A reset is an error to every client and proxy.
    """
    if connection := transport.get_extra_info("socket"):
        with contextlib.suppress(OSError):  # it is closed already
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def too_many_connections(protocol: H11Protocol) -> bool:
    """Whether this new connection exceeds a limit. `protocol.connections` already contains it."""
    if len(protocol.connections) > MAX_CONNECTIONS:
        return True
    own = peer(protocol.client)
    trusted = tuple(protocol.config.forwarded_allow_ips or ())
    if own is None or protocol.client is None or is_proxy(protocol.client[0], trusted):
        return False
    return sum(peer(getattr(other, "client", None)) == own for other in protocol.connections) > MAX_CONNECTIONS_PER_PEER


def takes_reserve(descriptor: int) -> bool:
    """Whether a descriptor that was just opened is one of those that are reserved.

    The system gives the lowest that is free, so all below it are in use.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit != resource.RLIM_INFINITY and descriptor >= limit - min(RESERVED_DESCRIPTORS, limit // 4)


def descriptors_are_short() -> bool:
    """Whether only reserved descriptors are left."""
    try:
        descriptor = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    os.close(descriptor)
    return takes_reserve(descriptor)


@functools.lru_cache(MAX_CONNECTIONS * 2)
def is_proxy(host: str, proxies: tuple[str, ...]) -> bool:
    """Whether an IP address belongs to one of these addresses and networks, which serve many peers."""
    address = ipaddress.ip_address(host.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in ipaddress.ip_network(each, strict=False) for each in proxies)


def peer(client: tuple[str, int] | None) -> str | None:
    """The network that counts as one peer; None for this machine."""
    return network(client[0]) if client else None


@functools.lru_cache(MAX_CONNECTIONS * 2)
def network(host: str) -> str | None:
    """The IPv4 address, or the IPv6 /64, which is what one customer gets; None for this machine."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return None
    return str(ipaddress.ip_network((address, 64 if address.version == 6 else 32), strict=False))


MAX_FRAMES_PER_MINUTE = 600
"""Frames of any kind that a WebSocket's peer may send at once, and then a minute: a ping a second leaves room."""
FLOOD_CLOSE_SECONDS = 1.0


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket protocol with limits for peers that do not read, or that send what is costly to handle."""

    _frames: TokenBucket | None = None

    def handle_connect(self, event: Request) -> None:
        """Add the `ABORT` extension: closing would wait for the peer to read."""
        super().handle_connect(event)
        if hasattr(self, "scope"):
            self.scope.setdefault("extensions", {})[ABORT] = {"call": self.transport.abort}

    def handle_ping(self) -> None:
        """Send a pong, unless unread pongs pile up because the peer does not read."""
        if self.transport.get_write_buffer_size() > MAX_PONG_BYTES:
            self.transport.abort()
        elif self._takes_frame():
            super().handle_ping()

    def handle_pong(self, event: Frame) -> None:
        """Take the answer to a ping."""
        if self._takes_frame():
            super().handle_pong(event)

    def handle_text(self, event: Frame) -> None:
        """Receive a text, or its first fragment."""
        if self._takes_frame():
            super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        """Receive a binary message, or its first fragment."""
        if self._takes_frame():
            super().handle_bytes(event)

    def handle_cont(self, event: Frame) -> None:
        """Receive a further fragment, unless the message has too many."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self.transport.abort()
        elif self._takes_frame():
            super().handle_cont(event)

    def _takes_frame(self) -> bool:
        """Count a frame of the peer. False if it sends too many: the connection then closes with 1008 (RFC 6455).

        Viewers have nothing to send, and each frame costs time of the event loop that all streams share.
        """
        if self._frames is None:
            self._frames = TokenBucket(MAX_FRAMES_PER_MINUTE, self.loop.time())
        if self.transport.is_closing():
            return False
        if self._frames.take(self.loop.time()) == 0:
            return True
        if not self.close_sent:
            self.conn.send_close(1008, "too many messages")
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.close_sent = True
        self.transport.close()
        self.loop.call_later(FLOOD_CLOSE_SECONDS, self.transport.abort)  # the peer may read nothing
        return False

    def send_receive_event_to_app(self) -> None:
        """Pass a message on; text that is not UTF-8 closes the connection with 1007 (RFC 6455, section 8.1).

        uvicorn does so too, but logs a traceback for what is the peer's fault.
        """
        if self.curr_msg_data_type == "text" and not self.close_sent:
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self.conn.send_close(1007)
                self.handle_parser_exception()
                return
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Abort after a malformed handshake, which cannot be answered with a close frame."""
        if self.conn.close_sent is None:
            self.transport.abort()
        else:
            super().handle_parser_exception()
