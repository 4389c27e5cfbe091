"""Watching as MJPEG over HTTP (`multipart/x-mixed-replace`): for an `<img>` and for simple programs."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.responses import LongLivedResponse, abort_and_wait
from server.api.routing import Route, streams_of, wants_alpha
from server.errors import stream_ended
from server.media.frames import HEADER
from server.media.viewer import Viewer
from server.streams.stream import Stream

BOUNDARY = "frame"
SEND_SECONDS = 10.0
"""A viewer is disconnected if one picture takes longer than this to send."""

REPEAT_SECONDS = 5.0
"""While a stream shows nothing new, its last picture is sent again this often: proxies cut silent connections."""


class MjpegResponse(LongLivedResponse):
    """One viewer's JPEGs, until the stream ends."""

    media_type = f"multipart/x-mixed-replace; boundary={BOUNDARY}"

    def __init__(self, stream: Stream, viewer: Viewer) -> None:
        super().__init__()
        self._stream, self._viewer = stream, viewer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.audience.remove(self._viewer)
            self._viewer.clear()

    async def send_all(self, scope: Scope, send: Send) -> None:
        if not await self.start(scope, send):
            return
        try:
            part = b""
            while True:
                try:
                    async with asyncio.timeout(REPEAT_SECONDS):
                        item = await self._viewer.next()
                except TimeoutError:
                    if not part:
                        continue
                else:
                    if item is None:
                        break
                    assert isinstance(item, bytes)
                    part = part_of(item)
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": f"--{BOUNDARY}--\r\n".encode()})
        except TimeoutError:
            self._stream.audience.drop(self._viewer)
            await abort_and_wait(scope)


def part_of(packet: bytes) -> bytes:
    """One part of the multipart body: a JPEG packet of `server.media.frames` without its header."""
    picture, pts = packet[HEADER.size :], HEADER.unpack_from(packet)[5]
    fields = f"Content-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\nX-Pts: {pts}"
    return f"--{BOUNDARY}\r\n{fields}\r\n\r\n".encode() + picture + b"\r\n"


async def watch(request: Request, id: str) -> Response:
    """Watch a stream as JPEGs: `multipart/x-mixed-replace`, each part with its time in 1/90000 s as `X-Pts`."""
    stream = streams_of(request).get(id)
    if stream.session.state.over:
        raise stream_ended(stream.session.ended_reason)
    viewer = Viewer("mjpeg", events=False, alpha=wants_alpha(request))
    if request.method == "HEAD":
        await stream.audience.packet_on_screen(viewer)  # fails as GET does, but does not count as watching
    else:
        await stream.attach(viewer)
    return MjpegResponse(stream, viewer)


ROUTES = [
    Route("GET", "/v1/streams/{id}/mjpeg", watch, None, 200, (400, 404, 409, 503), {"response_class": MjpegResponse})
]
