"""WHEP (draft-ietf-wish-whep): a viewer posts an SDP offer and gets the stream over WebRTC.

Each session is a resource of its own, with an address that nobody can guess. There is no ICE restart, hence no ETag.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Container

from starlette.requests import Request
from starlette.responses import Response

from server.api.routing import Route, principal_of, streams_of, wants_alpha
from server.config import Config, is_loopback
from server.errors import ApiError, stream_ended, too_many_viewers
from server.media.webrtc import Peer, ice_servers, invalid_sdp
from server.metrics import Metrics
from server.streams.registry import MAX_VIEWERS, Stream, Streams
from server.streams.session import State

logger = logging.getLogger("livereel.whep")

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"

CONNECT_SECONDS = 15.0
"""A session whose connection is not up by then is given up."""
MAX_CONNECTING = 64
"""WhepSessions whose connection is not up yet, of all streams together: each holds sockets."""
MAX_CONNECTING_PER_KEY = 32
"""The same of one API key and of the tokens made with it, so that it leaves room for others."""


class WhepSessions:
    """The WHEP sessions of one gateway."""

    def __init__(self, config: Config, streams: Streams, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._streams = streams
        self._peers: dict[tuple[str, str], Peer] = {}
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._keys: dict[tuple[str, str], int] = {}
        """Serials of the API keys that sessions were opened under."""

    async def open(
        self, stream: Stream, offer: str, *, local: bool, alpha: bool = False, key: int | None = None
    ) -> tuple[str, str]:
        """Answer a viewer's offer: the new session's id, and the SDP.

        `local` says that it is on this machine, `alpha` that it takes mattes; `key` is the serial of the API key that
        lets it watch.
        """
        id = stream.session.id
        connecting = [session for session, peer in self._peers.items() if not peer.connected.is_set()]
        if len(stream.viewers) + sum(session[0] == id for session in connecting) >= MAX_VIEWERS:
            raise too_many_viewers()
        of_key = sum(self._keys.get(session) == key for session in connecting) if key is not None else 0
        if len(connecting) >= MAX_CONNECTING or of_key >= MAX_CONNECTING_PER_KEY:
            message = "Too many viewers are connecting at once: try again soon."
            raise ApiError(503, "too_many_connecting", message, headers={"Retry-After": "2"})
        session = secrets.token_urlsafe(24)
        config = self._config
        servers = ice_servers(config.ice_servers, config.turn_secret, "gateway", time.time())
        peer = self._peers[id, session] = Peer(servers, config.public_address, local=local)
        if key is not None:
            self._keys[id, session] = key
        try:
            await peer.negotiate(offer)
        except BaseException:
            del self._peers[id, session]
            self._keys.pop((id, session), None)
            await peer.close()
            raise
        peer.viewer.alpha = alpha
        self._tasks[id, session] = asyncio.create_task(self._serve(stream, session, peer), name=f"whep {id}")
        return session, peer.answer

    def get(self, stream: str, session: str) -> Peer:
        """The session's connection."""
        peer = self._peers.get((stream, session))
        if peer is None:
            message = "No session has this id: it never existed, or it is over. Open one with a POST."
            raise ApiError(404, "session_not_found", message)
        return peer

    async def end(self, stream: str, session: str) -> None:
        """Hang up, and wait until everything is free."""
        self.get(stream, session).over.set()
        await asyncio.wait([self._tasks[stream, session]])

    def keep_keys(self, serials: Container[int]) -> None:
        """End the sessions of all other keys: these were taken away."""
        for session, key in self._keys.items():
            if key not in serials:
                self._peers[session].over.set()

    async def stop(self) -> None:
        """End every session."""
        for peer in self._peers.values():
            peer.over.set()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _serve(self, stream: Stream, session: str, peer: Peer) -> None:
        key = stream.session.id, session
        asked_at = time.monotonic()
        peer.on_keyframe_request(lambda: self._streams.request_key(stream, peer.viewer))
        try:
            await either(peer.connected, peer.over, CONNECT_SECONDS)
            if peer.connected.is_set() and not peer.over.is_set():
                seconds = time.monotonic() - asked_at
                self._metrics.first_frame_phase_seconds.labels("connect").observe(seconds)
                await self._streams.attach(stream, peer.viewer)
                await peer.over.wait()
        except ApiError as error:
            logger.info("a viewer was not taken: %s", error.detail)
        finally:
            self._streams.detach(stream, peer.viewer)
            peer.viewer.forget()
            del self._peers[key], self._tasks[key]
            self._keys.pop(key, None)
            try:
                await peer.close()
            except Exception:
                logger.exception("a WebRTC connection did not close")


async def either(one: asyncio.Event, other: asyncio.Event, seconds: float) -> None:
    """Wait for one of two events, but no longer than this."""
    waiting = [asyncio.create_task(one.wait()), asyncio.create_task(other.wait())]
    try:
        await asyncio.wait(waiting, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


def sessions_of(request: Request) -> WhepSessions:
    """The application's sessions."""
    sessions = request.app.state.whep_sessions
    assert isinstance(sessions, WhepSessions)
    return sessions


# the endpoint of a stream


async def offer(request: Request, id: str) -> Response:
    """Watch a stream over WebRTC: an SDP offer that receives video becomes an answer that sends it."""
    stream = watchable(request, id)
    text = await read_sdp(request)
    local = request.client is not None and is_loopback(request.client.host)
    key = principal_of(request).key
    alpha = wants_alpha(request)
    opened = sessions_of(request).open(stream, text, local=local, alpha=alpha, key=key.serial if key else None)
    session, answer = await opened
    response = Response(answer, 201, media_type=SDP)
    response.headers["Location"] = f"/v1/streams/{id}/whep/{session}"
    add_links(request, response, session[:8])
    return response


async def options(request: Request, id: str) -> Response:
    """What can be posted here, and with which servers to find a way through NAT."""
    response = Response(status_code=200, headers={"Accept-Post": SDP, "Allow": "POST, GET, HEAD, OPTIONS"})
    # A preflight comes without the credentials that the secrets of TURN are for.
    if "access-control-request-method" not in request.headers:
        add_links(request, response, "options")
    return response


async def head(request: Request, id: str) -> Response:
    """Whether WebRTC can be asked for here."""
    watchable(request, id)
    return Response(status_code=200, media_type=SDP)


async def get(request: Request, id: str) -> Response:
    """Nothing: a stream is watched by posting an offer."""
    watchable(request, id)
    return Response(status_code=204)


def watchable(request: Request, id: str) -> Stream:
    """The stream, if it has frames now or will have them in a moment."""
    stream = streams_of(request).get(id)
    session = stream.session
    if session.state.over:
        raise stream_ended(session.ended_reason)
    if session.state is State.QUEUED:
        wait = session.queue.wait if session.queue and session.queue.wait else 2.0
        message = "The stream waits in the queue and has no picture yet: try again when it is live."
        raise ApiError(409, "stream_queued", message, headers={"Retry-After": str(max(1, round(wait)))})
    return stream


async def read_sdp(request: Request) -> str:
    try:
        return (await request.body()).decode()
    except UnicodeDecodeError:
        raise invalid_sdp("it is not UTF-8") from None


def add_links(request: Request, response: Response, user: str) -> None:
    """Tell the viewer about STUN and TURN servers, the latter with credentials that expire."""
    config: Config = request.app.state.config
    for server in ice_servers(config.ice_servers, config.turn_secret, user, time.time()):
        link = f'<{server.url}>; rel="ice-server"'
        if server.credential:
            link += f'; username="{server.username}"; credential="{server.credential}"; credential-type="password"'
        response.headers.append("Link", link)


# a session


async def trickle(request: Request, id: str, session: str) -> Response:
    """Further ICE candidates of the viewer. ICE is not restarted: that is a 422."""
    peer = sessions_of(request).get(id, session)
    match = request.headers.get("if-match")
    if match == "*":
        message = "The server does not restart ICE: open a new session instead."
        raise ApiError(422, "ice_restart_unsupported", message)
    if match is not None:
        raise ApiError(412, "no_such_etag", "WhepSessions have no ETag here: leave `If-Match` out.")
    await peer.trickle(await read_sdp(request))
    return Response(status_code=204)


async def hang_up(request: Request, id: str, session: str) -> Response:
    """End a session."""
    await sessions_of(request).end(id, session)
    return Response(status_code=200)


async def session_options(request: Request, id: str, session: str) -> Response:
    """What a session takes."""
    return Response(status_code=200, headers={"Accept-Patch": FRAGMENT, "Allow": "PATCH, DELETE, OPTIONS"})


def body(media_type: str) -> dict[str, object]:
    """A request body for OpenAPI."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "response_class": Response}


EMPTY: dict[str, object] = {"response_class": Response}
DISCOVERY: dict[str, object] = {**EMPTY, "include_in_schema": False}
ENDPOINT = "/v1/streams/{id}/whep"
SESSION = ENDPOINT + "/{session}"

ROUTES = [
    Route("POST", ENDPOINT, offer, None, 201, (400, 404, 409, 413, 415, 503), body(SDP), SDP),
    Route("OPTIONS", ENDPOINT, options, options=DISCOVERY),
    Route("HEAD", ENDPOINT, head, None, 200, options=DISCOVERY),
    Route("GET", ENDPOINT, get, None, 204, (404, 409), EMPTY),
    Route("PATCH", SESSION, trickle, None, 204, (400, 404, 412, 413, 415, 422), body(FRAGMENT), FRAGMENT),
    Route("DELETE", SESSION, hang_up, None, 200, (404,), EMPTY),
    Route("OPTIONS", SESSION, session_options, options=DISCOVERY),
]
