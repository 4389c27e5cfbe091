"""Pushes one stream to a WHIP server (RFC 9725): one attempt, from the offer to the end.

Sends the frames that viewers get, already encoded. It connects to the address that `destination.resolve` returned and
to no other, and follows redirects on the same server only.
"""

import asyncio
import contextlib
import ipaddress
from collections.abc import Sequence
from urllib.parse import urljoin

import h11

from server.aio import first_of
from server.egress.destination import (
    CONNECT_SECONDS,
    Destination,
    Feed,
    UnreachableError,
    connect,
    parse_destination,
)
from server.errors import ApiError
from server.media.webrtc import IceServer, Publisher

MAX_ANSWER_BYTES = 64 * 1024
MAX_REDIRECTS = 5


async def push_whip(target: Destination, address: str, token: str, servers: Sequence[IceServer], feed: Feed) -> None:
    """Push until the stream ends. Raises `UnreachableError` if the server cannot be reached or ends the connection."""
    publisher = Publisher(servers, local=ipaddress.ip_address(address).is_loopback, level=feed.h264_level)
    session: Destination | None = None
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        offer = await publisher.offer()
        fields = {**headers, "Content-Type": "application/sdp", "Accept": "application/sdp"}
        for _ in range(MAX_REDIRECTS + 1):
            status, location, body = await _request(target, address, "POST", fields, offer.encode())
            if status not in (307, 308) or (redirected := _same_server(target, location)) is None:
                break
            target = redirected
        if status != 201:
            why = "redirects, which is not followed" if status // 100 == 3 else f"answers with status {status}"
            raise UnreachableError("not_accepted", f"{target.authority} {why}")
        session = _same_server(target, location)
        try:
            await publisher.accept(body.decode())
        except ValueError:
            raise UnreachableError(
                "invalid_answer", f"{target.authority} answers with no SDP that can be used"
            ) from None
        publisher.on_keyframe_request(lambda: feed.request_key(publisher.viewer))
        await first_of(publisher.connected.wait(), publisher.closed.wait(), timeout=CONNECT_SECONDS)
        if not publisher.connected.is_set() or publisher.closed.is_set():
            raise UnreachableError("not_connected", f"{target.authority} cannot be reached by UDP")
        await feed.attach(publisher.viewer)
        feed.on_live()
        await publisher.closed.wait()
        if publisher.viewer.close_code is None:
            raise UnreachableError("connection_lost", f"{target.authority} ended the connection")
    finally:
        try:
            await publisher.close()
        finally:
            if session is not None:
                with contextlib.suppress(UnreachableError):
                    await _request(session, address, "DELETE", headers, b"")


def _same_server(target: Destination, location: str) -> Destination | None:
    """What a `Location` in the answer of `target` names (RFC 9110, section 10.2.2: it may be relative); None if it is
    on another server, since none other is contacted."""
    if not location:
        return None
    try:
        url = urljoin(f"https://{target.authority}{target.path}", location)
        return parse_destination(url, (f"{target.host}:{target.port}",))
    except (ApiError, ValueError):
        return None


async def _request(
    target: Destination, address: str, method: str, headers: dict[str, str], body: bytes
) -> tuple[int, str, bytes]:
    """Send one HTTP request; returns status, `Location` and body. Raises `UnreachableError`."""
    reader, writer = await connect(target, address)
    connection = h11.Connection(h11.CLIENT)
    fields = {"Host": target.authority, "Content-Length": str(len(body)), "Connection": "close", **headers}
    request = h11.Request(method=method, target=target.path, headers=list(fields.items()))
    status, location, answer = 0, "", b""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            for part in (request, h11.Data(body), h11.EndOfMessage()):
                writer.write(connection.send(part) or b"")
            await writer.drain()
            while not isinstance(event := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                match event:
                    case h11.NEED_DATA:
                        connection.receive_data(await reader.read(65536))
                    case h11.Response():
                        status = event.status_code
                        location = dict(event.headers).get(b"location", b"").decode("latin-1")
                    case h11.Data():
                        answer += event.data
                        if len(answer) > MAX_ANSWER_BYTES:
                            raise UnreachableError("invalid_answer", f"{target.authority} answers at too great length")
    except (OSError, TimeoutError, h11.RemoteProtocolError):
        raise UnreachableError("not_connected", f"{target.authority} does not answer as HTTP should") from None
    finally:
        writer.transport.abort()
    return status, location, answer
