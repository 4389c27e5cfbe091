"""Pushing one stream to a server elsewhere, over RTMP and by WHIP (RFC 9725): one attempt, from connecting to the end.

Both send the packets that viewers get, encoded once. They connect to the address that `destination.resolve` gave and to
no other, and follow no redirect.
"""

import asyncio
import contextlib
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Protocol

import h11

from server import sandbox as apart
from server.egress import rtmp_worker as push
from server.egress.destination import Destination, UnreachableError
from server.media.encoder import EncodedFrame
from server.media.viewer import Viewer
from server.media.webrtc import IceServer, Publisher

CONNECT_SECONDS = 15.0
"""From the first packet to the server's word that it takes the stream."""
STALL_SECONDS = 10.0
"""A server to whom no frame could be sent for this long is given up."""
KEY_SECONDS = 2.0
"""RTMP services want a keyframe this often."""
GOODBYE_SECONDS, FINISH_SECONDS = 1.0, 3.0
"""For the process to end, and for the rest of what it sent to arrive."""
MAX_ANSWER_BYTES = 64 * 1024


class Feed(Protocol):
    """What a push takes the stream from, and tells how it gets on."""

    @property
    def fps(self) -> int: ...

    async def attach(self, viewer: Viewer) -> None:
        """Have this viewer given the stream's frames. Raises `ApiError` when it has too many."""

    def request_key(self, viewer: Viewer) -> None:
        """The other side can show nothing before the next keyframe."""

    def live(self) -> None:
        """The server takes the stream."""


async def connect(where: Destination, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the pinned address; over TLS it must prove to be the host. Raises `UnreachableError`."""
    secure = where.scheme != "rtmp"
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncio.open_connection(
                address,
                where.port,
                ssl=ssl.create_default_context() if secure else None,
                server_hostname=where.host.strip("[]") if secure else None,
            )
    except ssl.SSLCertVerificationError:
        raise UnreachableError("certificate_refused", f"the certificate of {where.host} is not valid for it") from None
    except (OSError, TimeoutError):
        raise UnreachableError("not_connected", f"{where.authority} cannot be connected to") from None


# RTMP


async def push_rtmp(where: Destination, address: str, feed: Feed) -> None:
    """Push until the stream is over. Raises `UnreachableError` when the server is not there, or no more."""
    viewer = Viewer("h264", events=False)
    async with _relay(where, address) as port:
        process = await apart.start(Path(push.__file__))
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(push.message(push.Opening(f"rtmp://127.0.0.1:{port}{where.path}", feed.fps)))
        feeding = asyncio.create_task(_feed(feed, viewer, process.stdin))
        keys = asyncio.create_task(_ask_for_keys(feed, viewer))
        try:
            await feed.attach(viewer)
            await _watch(where, feed, process.stdout)
        finally:
            for task in (feeding, keys):
                task.cancel()
            await asyncio.gather(feeding, keys, return_exceptions=True)
            process.stdin.close()  # whereupon it says goodbye to the server and ends
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GOODBYE_SECONDS):
                    await process.wait()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def _relay(where: Destination, address: str) -> AsyncIterator[int]:
    """A port of this machine that leads to the destination, for one client: libav can neither be told the address of a
    name nor to check a certificate."""
    reader, writer = await connect(where, address)
    pumps: list[asyncio.Task[None]] = []

    def on_client(inner_reader: asyncio.StreamReader, inner_writer: asyncio.StreamWriter) -> None:
        server.close()
        if pumps:
            inner_writer.close()
            return
        pumps.append(asyncio.create_task(_pump(inner_reader, writer)))
        pumps.append(asyncio.create_task(_pump(reader, inner_writer)))

    server = await asyncio.start_server(on_client, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
        # The client has said goodbye and is gone: that must still arrive.
        if pumps:
            await asyncio.wait(pumps[:1], timeout=FINISH_SECONDS)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(FINISH_SECONDS):
                await writer.wait_closed()
    finally:
        server.close()
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        writer.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _feed(feed: Feed, viewer: Viewer, pipe: asyncio.StreamWriter) -> None:
    """Frames into the process; its input ends with the stream."""
    with contextlib.suppress(OSError):  # it is gone: `_watch` says why
        while isinstance(item := await viewer.next(), EncodedFrame):
            packet = item.packet
            pipe.write(push.message(push.AccessUnit(packet.pts or 0, item.key, bytes(packet))))
            await pipe.drain()
    pipe.close()


async def _ask_for_keys(feed: Feed, viewer: Viewer) -> None:
    while True:
        await asyncio.sleep(KEY_SECONDS)
        feed.request_key(viewer)


async def _watch(where: Destination, feed: Feed, output: asyncio.StreamReader) -> None:
    """Read what the process says until it is done."""
    live = False
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS if live else CONNECT_SECONDS):
                line = await output.readline()
        except TimeoutError:
            raise UnreachableError("stalled", f"{where.authority} takes no data") from None
        match line.split():
            case [b"live"]:
                live = True
                feed.live()
            case [b"frame"]:
                pass
            case []:
                return
            case _ if live:
                raise UnreachableError("connection_lost", f"{where.authority} ended the connection")
            case _:
                message = f"{where.authority} does not take the stream: is the key right?"
                raise UnreachableError("not_accepted", message)


# WHIP


async def push_whip(where: Destination, address: str, token: str, servers: Sequence[IceServer], feed: Feed) -> None:
    """Push until the stream is over. Raises `UnreachableError` when the server is not there, or no more."""
    publisher = Publisher(servers, local=ipaddress.ip_address(address).is_loopback)
    session = ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        offer = await publisher.offer()
        fields = {**headers, "Content-Type": "application/sdp", "Accept": "application/sdp"}
        status, location, body = await _request(where, address, "POST", where.path, fields, offer.encode())
        if status != 201:
            why = "redirects, which is not followed" if status // 100 == 3 else f"answers with status {status}"
            raise UnreachableError("not_accepted", f"{where.authority} {why}")
        session = _path_of(where, location)
        try:
            await publisher.accept(body.decode())
        except ValueError:
            raise UnreachableError(
                "invalid_answer", f"{where.authority} answers with no SDP that can be used"
            ) from None
        publisher.on_keyframe_request(lambda: feed.request_key(publisher.viewer))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_SECONDS):
                await _first(publisher.connected, publisher.over)
        if not publisher.connected.is_set() or publisher.over.is_set():
            raise UnreachableError("not_connected", f"{where.authority} cannot be reached by UDP")
        await feed.attach(publisher.viewer)
        feed.live()
        await publisher.over.wait()
        if publisher.viewer.close_code is None:
            raise UnreachableError("connection_lost", f"{where.authority} ended the connection")
    finally:
        await publisher.close()
        if session:
            with contextlib.suppress(UnreachableError):
                await _request(where, address, "DELETE", session, headers, b"")


async def _first(one: asyncio.Event, other: asyncio.Event) -> None:
    tasks = [asyncio.create_task(one.wait()), asyncio.create_task(other.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _path_of(where: Destination, location: str) -> str:
    """The path of the session, when it is on the same server; empty otherwise: nothing else is opened."""
    own = f"https://{where.authority}"
    path = location.removeprefix(own) if location.lower().startswith(own) else location
    return path if re.fullmatch(r"/(?!/)[!-~]{0,1023}", path) else ""


async def _request(
    where: Destination, address: str, method: str, path: str, headers: dict[str, str], body: bytes
) -> tuple[int, str, bytes]:
    """Status, `Location` and body. Raises `UnreachableError`."""
    reader, writer = await connect(where, address)
    connection = h11.Connection(h11.CLIENT)
    fields = {"Host": where.authority, "Content-Length": str(len(body)), "Connection": "close", **headers}
    request = h11.Request(method=method, target=path, headers=list(fields.items()))
    status, location, answer = 0, "", b""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            for event in (request, h11.Data(body), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            await writer.drain()
            while not isinstance(got := connection.next_event(), h11.EndOfMessage | h11.ConnectionClosed):
                match got:
                    case h11.NEED_DATA:
                        connection.receive_data(await reader.read(65536))
                    case h11.Response():
                        status = got.status_code
                        location = dict(got.headers).get(b"location", b"").decode("latin-1")
                    case h11.Data():
                        answer += got.data
                        if len(answer) > MAX_ANSWER_BYTES:
                            raise UnreachableError("invalid_answer", f"{where.authority} answers at too great length")
    except (OSError, TimeoutError, h11.RemoteProtocolError):
        raise UnreachableError("not_connected", f"{where.authority} does not answer as HTTP should") from None
    finally:
        writer.transport.abort()
    return status, location, answer
