"""The WebSocket side: one socket per viewer, events as text, frames as bytes."""

import asyncio
import contextlib
import time

import msgspec
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from server.api.http import drop, streams_of, wants_alpha, ws_url
from server.auth.access import FORBIDDEN, UNAUTHENTICATED
from server.errors import ApiError
from server.media.viewer import Viewer, Watching
from server.streams.registry import Streams

FORMATS: dict[str, Watching] = {"mjpeg": "mjpeg", "rgb24": "rgb24", "fmp4": "fmp4", "events": "events"}
"""`?format=`: the last is for who watches otherwise."""

POLICY, TRY_LATER, NOT_FOUND = 1008, 1013, 4404

SEND_SECONDS = 10.0
"""A viewer to whom nothing could be sent for this long is let go."""
CLOSE_SECONDS = 1.0
MAX_MESSAGES, MESSAGES_SECONDS = 100, 10.0
"""A viewer has nothing to say; more messages than this within this many seconds are an attack or a bug."""


async def watch(websocket: WebSocket) -> None:
    """Serve one viewer until it leaves, the stream ends, or it falls too far behind."""
    with contextlib.suppress(WebSocketDisconnect):
        await websocket.accept()
        await serve(websocket, streams_of(websocket))


async def serve(websocket: WebSocket, streams: Streams) -> None:
    name = websocket.query_params.get("format", "mjpeg")
    try:
        stream = streams.get(websocket.path_params["id"])
        if name not in FORMATS:
            raise ApiError(400, "invalid_value", f"`format` must be one of {', '.join(FORMATS)}.", param="format")
        viewer = Viewer(FORMATS[name], alpha=wants_alpha(websocket))
        await streams.attach(stream, viewer, ws_url(websocket, stream.session.id))
    except ApiError as error:
        await refuse(websocket, error)
        return
    try:
        ending = await talk(websocket, viewer)
    finally:
        streams.detach(stream, viewer)
        viewer.forget()
    if ending is None:
        return
    code, reason = ending
    if code == TRY_LATER:
        streams.viewer_too_slow()
    await hang_up(websocket, code, reason)


async def talk(websocket: WebSocket, viewer: Viewer) -> tuple[int, str] | None:
    """Send what there is until somebody hangs up; returns the close code and why, None when the client has left.

    That it has left is no exception of the tasks here: the exception would hold this frame, and this frame the task,
    so that the socket and all around it would stay until the garbage collector looks through everything.
    """
    sender, listener = asyncio.create_task(send_all(websocket, viewer)), asyncio.create_task(listen(websocket))
    try:
        done, _ = await asyncio.wait((sender, listener), return_when=asyncio.FIRST_COMPLETED)
        return (sender if sender in done else listener).result()
    finally:
        sender.cancel()
        listener.cancel()
        await asyncio.gather(sender, listener, return_exceptions=True)


async def send_all(websocket: WebSocket, viewer: Viewer) -> tuple[int, str] | None:
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


async def listen(websocket: WebSocket) -> tuple[int, str] | None:
    """Ignore what the client says, unless it never stops; None when it leaves."""
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


async def refuse(websocket: WebSocket, error: ApiError) -> None:
    """Say what is wrong as an event, and close."""
    detail = error.body["error"]
    event = {"type": "error", "seq": 0, "ts": time.time(), **{k: detail[k] for k in ("code", "message", "param")}}
    await websocket.send_text(msgspec.json.encode({**event, "retryable": error.status_code >= 500}).decode())
    codes = {401: UNAUTHENTICATED, 403: FORBIDDEN, 404: NOT_FOUND, 429: TRY_LATER, 503: TRY_LATER}
    code = codes.get(error.status_code, POLICY)
    await hang_up(websocket, code, error.code)


async def refuse_handshake(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """Say so to a socket that is not accepted yet: scripts of a page see no status of a handshake, only this."""
    websocket = WebSocket(scope, receive, send)
    await websocket.receive()  # its wish to connect
    await websocket.send({"type": "websocket.accept"})
    with contextlib.suppress(WebSocketDisconnect):
        await refuse(websocket, error)


async def cut_off(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """End a socket in the middle of whatever it does; or a response, which is not to look complete."""
    if scope["type"] == "websocket":
        await hang_up(WebSocket(scope, receive, send), UNAUTHENTICATED, error.code)
    else:
        drop(scope)


async def hang_up(websocket: WebSocket, code: int, reason: str) -> None:
    """Close, politely if the peer still reads, and for certain in any case."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await websocket.close(code, reason)
    except (TimeoutError, RuntimeError, WebSocketDisconnect):
        pass
    else:
        return
    drop(websocket.scope)
