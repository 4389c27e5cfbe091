"""Watching over a WebSocket: events as text messages, frames as binary messages."""

import asyncio
import contextlib
import time

import msgspec
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from server.aio import first_of
from server.api.responses import abort_connection
from server.api.routing import streams_of, wants_alpha, ws_url
from server.errors import ApiError
from server.media.viewer import Viewer, ViewerFormat
from server.streams.registry import Registry

FORMATS: dict[str, ViewerFormat] = {"mjpeg": "mjpeg", "rgb24": "rgb24", "fmp4": "fmp4", "events": "events"}
"""Values of `?format=`. `events` sends no frames, for clients that get them another way."""

POLICY, TRY_LATER, UNAUTHENTICATED, FORBIDDEN, NOT_FOUND = 1008, 1013, 4401, 4403, 4404
"""Close codes."""
CLOSE_CODES = {401: UNAUTHENTICATED, 403: FORBIDDEN, 404: NOT_FOUND, 429: TRY_LATER, 503: TRY_LATER}
"""Close code by HTTP status; `POLICY` for any other error."""

SEND_SECONDS = 10.0
"""A viewer is disconnected if one message takes longer than this to send."""
CLOSE_SECONDS = 1.0
MAX_MESSAGES, MESSAGES_SECONDS = 100, 10.0
"""A viewer has nothing to send; more messages than this in this many seconds are an attack or a bug."""


async def watch(websocket: WebSocket) -> None:
    """Serve one viewer until it disconnects, the stream ends, or it falls too far behind."""
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.accept()
        await serve(websocket, streams_of(websocket))


async def serve(websocket: WebSocket, streams: Registry) -> None:
    """Attach a viewer to the stream in the path and serve it over an accepted socket."""
    format = websocket.query_params.get("format", "mjpeg")
    try:
        stream = streams.get(websocket.path_params["id"])
        if format not in FORMATS:
            raise ApiError(400, "invalid_value", f"`format` must be one of {', '.join(FORMATS)}.", param="format")
        viewer = Viewer(FORMATS[format], alpha=wants_alpha(websocket))
        await stream.attach(viewer, ws_url(websocket, stream.session.id))
    except ApiError as error:
        await reject(websocket, error)
        return
    try:
        close = await exchange(websocket, viewer)
    finally:
        stream.audience.remove(viewer)
        viewer.clear()
    if close is None:
        return
    code, reason = close
    if code == TRY_LATER:
        stream.audience.drop(viewer)
    await close_or_abort(websocket, code, reason)


async def exchange(websocket: WebSocket, viewer: Viewer) -> tuple[int, str] | None:
    """Send and receive until one side is done; returns the close code and reason, None if the client disconnected.

    The tasks return None for a disconnect instead of raising: the exception's traceback would refer to this frame and
    the frame to the task, a cycle that keeps the socket alive until the garbage collector runs.
    """
    return await first_of(send_all(websocket, viewer), receive_all(websocket))


async def send_all(websocket: WebSocket, viewer: Viewer) -> tuple[int, str] | None:
    """Send the viewer's events and frames; returns the close code and reason, None if the client disconnected."""
    while (item := await viewer.next()) is not None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                if isinstance(item, str):
                    await websocket.send_text(item)
                elif isinstance(item, bytes):
                    await websocket.send_bytes(item)
        except TimeoutError:
            return TRY_LATER, "too slow"
        except WebSocketDisconnect:
            return None
    if viewer.overrun:
        return TRY_LATER, "too slow"
    return viewer.close_code or 1000, ""


async def receive_all(websocket: WebSocket) -> tuple[int, str] | None:
    """Discard the client's messages; returns a close code and reason if there are too many, None on disconnect."""
    count, since = 0, time.monotonic()
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        now = time.monotonic()
        if now - since > MESSAGES_SECONDS:
            count, since = 0, now
        count += 1
        if count > MAX_MESSAGES:
            return POLICY, "too many messages"


async def reject(websocket: WebSocket, error: ApiError) -> None:
    """Send the error as an event, then close an accepted socket."""
    detail = error.error
    event = {"type": "error", "seq": 0, "ts": time.time(), **{k: detail[k] for k in ("code", "message", "param")}}
    await websocket.send_text(msgspec.json.encode({**event, "retryable": error.status_code >= 500}).decode())
    await close_or_abort(websocket, CLOSE_CODES.get(error.status_code, POLICY), error.code)


async def reject_handshake(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Accept a socket only to reject it: scripts cannot read the HTTP status of a failed handshake."""
    websocket = WebSocket(scope, receive, send)
    await websocket.receive()  # `websocket.connect`
    await websocket.send({"type": "websocket.accept"})
    with contextlib.suppress(WebSocketDisconnect):
        await reject(websocket, error)


async def close_or_abort(websocket: WebSocket, code: int, reason: str) -> None:
    """Close the socket; abort the connection if the peer does not take the close frame in time."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await websocket.close(code, reason)
    except (TimeoutError, RuntimeError, WebSocketDisconnect):
        abort_connection(websocket.scope)
