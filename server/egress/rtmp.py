"""Pushes one stream to an RTMP server: one attempt, from connecting to the end.

libav speaks RTMP, in a sandboxed process (`server.egress.rtmp_worker`) that receives the encoded frames through a pipe.
It connects to a relay on this machine; the relay connects to the address that `destination.resolve` returned and to
no other.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from server import sandbox
from server.egress import rtmp_worker
from server.egress.destination import CONNECT_SECONDS, Destination, Feed, UnreachableError, connect
from server.media.encoder import EncodedFrame
from server.media.viewer import Viewer

STALL_SECONDS = 10.0
"""A server that accepts no frame for this long is given up."""
KEY_SECONDS = 2.0
"""RTMP services want a keyframe this often."""
EXIT_SECONDS, FLUSH_SECONDS = 1.0, 3.0
"""Time for the process to exit, and for the rest of what it sent to arrive."""


async def push_rtmp(target: Destination, address: str, feed: Feed, *, silent_audio: bool) -> None:
    """Push until the stream ends, with a silent audio track if asked for. Raises `UnreachableError` if the server
    cannot be reached or ends the connection."""
    viewer = Viewer("h264", events=False)
    async with _relay(target, address) as port:
        process = await sandbox.start(Path(rtmp_worker.__file__))
        assert process.stdin is not None and process.stdout is not None
        opening = rtmp_worker.Opening(f"rtmp://127.0.0.1:{port}{target.path}", tc_url(target), silent_audio)
        process.stdin.write(rtmp_worker.pack(opening))
        writing = asyncio.create_task(_write_frames(viewer, process.stdin))
        keys = asyncio.create_task(_request_keys(feed, viewer))
        try:
            await feed.attach(viewer)
            await _watch(target, feed, process.stdout)
        finally:
            for task in (writing, keys):
                task.cancel()
            await asyncio.gather(writing, keys, return_exceptions=True)
            process.stdin.close()  # the worker then closes the RTMP connection and exits
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXIT_SECONDS):
                    await process.wait()
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()


def tc_url(target: Destination) -> str:
    """The `tcUrl` of RTMP's `connect` command (RTMP 1.0, section 7.2.1.1): scheme, host, port and application.

    The application is what libav takes for it: the path's first name, or its first two of three or more.
    """
    first, _, rest = target.path[1:].partition("/")
    second, more, _ = rest.partition("/")
    application = f"{first}/{second}" if more and ":" not in second else first
    return f"{target.scheme}://{target.host}:{target.port}/{application}"


@contextlib.asynccontextmanager
async def _relay(target: Destination, address: str) -> AsyncIterator[int]:
    """A local port that forwards one client to the destination.

    It exists because libav can neither be given the address of a name nor check a certificate.
    """
    reader, writer = await connect(target, address)
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
        # The client has exited; what it sent last must still arrive.
        if pumps:
            await asyncio.wait(pumps[:1], timeout=FLUSH_SECONDS)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
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


async def _write_frames(viewer: Viewer, pipe: asyncio.StreamWriter) -> None:
    """Write frames to the worker, and close the pipe when the stream ends."""
    with contextlib.suppress(OSError):  # the worker has exited: `_watch` finds out why
        while isinstance(item := await viewer.next(), EncodedFrame):
            packet = item.packet
            pipe.write(rtmp_worker.pack(rtmp_worker.AccessUnit(packet.pts or 0, item.key, bytes(packet))))
            await pipe.drain()
    pipe.close()


async def _request_keys(feed: Feed, viewer: Viewer) -> None:
    while True:
        await asyncio.sleep(KEY_SECONDS)
        feed.request_key(viewer)


async def _watch(target: Destination, feed: Feed, output: asyncio.StreamReader) -> None:
    """Read the worker's status lines until it exits. Raises `UnreachableError` when it stalls or fails."""
    live = False
    while True:
        try:
            async with asyncio.timeout(STALL_SECONDS if live else CONNECT_SECONDS):
                line = await output.readline()
        except TimeoutError:
            raise UnreachableError("stalled", f"{target.authority} takes no data") from None
        match line.split():
            case [b"live"]:
                live = True
                feed.on_live()
            case [b"frame"]:
                pass
            case []:
                return
            case _ if live:
                raise UnreachableError("connection_lost", f"{target.authority} ended the connection")
            case _:
                message = f"{target.authority} does not take the stream: is the key right?"
                raise UnreachableError("not_accepted", message)
