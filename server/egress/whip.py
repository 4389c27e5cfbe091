"""Pushes one stream to a WHIP server (RFC 9725): one attempt, from the offer to the end.

Sends the frames that viewers get, already encoded. It connects to the address that `destination.resolve` returned and
to no other, and follows no redirect.
"""

import asyncio
import contextlib
import ipaddress
import re
from collections.abc import Sequence

import h11

from server.aio import first_of
from server.egress.destination import CONNECT_SECONDS, Destination, Feed, UnreachableError, connect
from server.media.webrtc import IceServer, Publisher

MAX_ANSWER_BYTES = 64 * 1024


async def push_whip(target: Destination, address: str, token: str, servers: Sequence[IceServer], feed: Feed) -> None:
    """Push until the stream ends. Raises `UnreachableError` if the server cannot be reached or ends the connection."""
    publisher = Publisher(servers, local=ipaddress.ip_address(address).is_loopback)
    session = ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        offer = await publisher.offer()
        fields = {**headers, "Content-Type": "application/sdp", "Accept": "application/sdp"}
        status, location, body = await _request(target, address, "POST", target.path, fields, offer.encode())
        if status != 201:
            why = "redirects, which is not followed" if status // 100 == 3 else f"answers with status {status}"
            raise UnreachableError("not_accepted", f"{target.authority} {why}")
        session = _session_path(target, location)
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
        await publisher.close()
        if session:
            with contextlib.suppress(UnreachableError):
                await _request(target, address, "DELETE", session, headers, b"")


def _session_path(target: Destination, location: str) -> str:
    """The path of the WHIP session if it is on the same server, else empty: no other server is contacted."""
    own = f"https://{target.authority}"
    path = location.removeprefix(own) if location.lower().startswith(own) else location
    return path if re.fullmatch(r"/(?!/)[!-~]{0,1023}", path) else ""


async def _request(
    target: Destination, address: str, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, str, bytes]:
    """Send one HTTP request; returns status, `Location` and body. Raises `UnreachableError`."""
    reader, writer = await connect(target, address)
    connection = h11.Connection(h11.CLIENT)
    fields = {"Host": target.authority, "Content-Length": str(len(body)), "Connection": "close", **headers}
    request = h11.Request(method=method, target=path, headers=list(fields.items()))
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
