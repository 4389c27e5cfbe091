"""Watching over WebRTC by WHEP (draft-ietf-wish-whep): a viewer posts an SDP offer and gets the stream.

Each session is a resource with an unguessable URL, and its ETag names its one ICE session: ICE is not restarted.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from server.aio import first_of
from server.api.routing import Route, principal_of, streams_of, url_of, wants_alpha
from server.config import Config, is_loopback
from server.errors import ApiError, stream_ended, too_many_viewers
from server.media.webrtc import Peer, ice_servers, invalid_sdp
from server.metrics import Metrics
from server.streams.audience import MAX_VIEWERS
from server.streams.session import State
from server.streams.stream import Stream

logger = logging.getLogger("livereel.whep")

SDP = "application/sdp"
FRAGMENT = "application/trickle-ice-sdpfrag"

CONNECT_SECONDS = 15.0
"""A session is closed if its connection is not established by then."""
MAX_CONNECTING = 64
"""Sessions that may be connecting at once, over all streams: each holds sockets."""
MAX_CONNECTING_PER_KEY = 32
"""The same limit for one API key and its tokens, so that one key cannot lock out the others."""


@dataclass(slots=True, eq=False)
class WhepSession:
    """One viewer's WebRTC connection to one stream."""

    stream: Stream
    peer: Peer
    key: int | None
    """Serial of the API key that it was opened with; None where no keys are configured."""
    etag: str
    """Strong, as RFC 9725 (WHIP, section 4.3.1) wants it: it names the ICE session."""
    task: asyncio.Task[None] | None = None

    def matches(self, if_match: str) -> bool:
        """Whether an `If-Match` header means this session (RFC 9110, section 13.1.1: by strong comparison)."""
        return if_match.strip() == "*" or self.etag in re.findall(r'(?:W/)?"[^"]*"', if_match)


class WhepSessions:
    """The WHEP sessions of one gateway, by their unguessable ids."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._sessions: dict[str, WhepSession] = {}

    async def open(
        self, stream: Stream, offer: str, *, local: bool, alpha: bool = False, key: int | None = None
    ) -> tuple[str, WhepSession]:
        """Open a session for a viewer's SDP offer; returns its id and the session.

        `local` says that the viewer is on this machine, `alpha` that it wants frames stacked on their mattes; `key` is
        the serial of the API key that it was authorized with. Raises `ApiError` if the session cannot be opened.
        """
        connecting = [session for session in self._sessions.values() if not session.peer.connected.is_set()]
        if len(stream.audience.viewers) + sum(session.stream is stream for session in connecting) >= MAX_VIEWERS:
            raise too_many_viewers()
        of_key = sum(session.key == key for session in connecting) if key is not None else 0
        if len(connecting) >= MAX_CONNECTING or of_key >= MAX_CONNECTING_PER_KEY:
            message = "Too many viewers are connecting at once: try again soon."
            raise ApiError(503, "too_many_connecting", message, headers={"Retry-After": "2"})
        config = self._config
        servers = ice_servers(config.ice_servers, config.turn_secret, "gateway", time.time())
        level = stream.h264_level(alpha=alpha)
        peer = Peer(servers, config.public_address, local=local, level=level)
        id = secrets.token_urlsafe(24)
        session = self._sessions[id] = WhepSession(stream, peer, key, f'"{secrets.token_hex(8)}"')
        try:
            await peer.negotiate(offer)
        except BaseException:
            del self._sessions[id]
            await peer.close()
            raise
        peer.viewer.alpha = alpha
        session.task = asyncio.create_task(self._serve(id, session), name=f"whep {stream.session.id}")
        return id, session

    def get(self, stream: str, id: str) -> WhepSession:
        """The session `id` of the stream with the id `stream`. Raises `ApiError` 404."""
        session = self._sessions.get(id)
        if session is None or session.stream.session.id != stream:
            message = "No session has this id: it never existed, or it is over. Open one with a POST."
            raise ApiError(404, "session_not_found", message)
        return session

    async def end(self, session: WhepSession) -> None:
        """Close a session, and wait until its resources are released."""
        session.peer.closed.set()
        assert session.task is not None
        await asyncio.wait([session.task])

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The sessions; see `KeyHolder`."""
        for session in self._sessions.values():
            yield session.key, session.peer.closed.set

    async def stop(self) -> None:
        """Close every session."""
        sessions = list(self._sessions.values())
        for session in sessions:
            session.peer.closed.set()
        await asyncio.gather(*(session.task for session in sessions if session.task), return_exceptions=True)

    async def _serve(self, id: str, session: WhepSession) -> None:
        stream, peer = session.stream, session.peer
        opened_at = time.monotonic()
        peer.on_keyframe_request(lambda: stream.audience.request_key(peer.viewer))
        try:
            await first_of(peer.connected.wait(), peer.closed.wait(), timeout=CONNECT_SECONDS)
            if peer.connected.is_set() and not peer.closed.is_set():
                seconds = time.monotonic() - opened_at
                self._metrics.first_frame_phase_seconds.labels("connect").observe(seconds)
                await stream.attach(peer.viewer)
                await peer.closed.wait()
        except ApiError as error:
            logger.info("a viewer was not accepted: %s", error.detail)
        finally:
            stream.audience.remove(peer.viewer)
            peer.viewer.clear()
            del self._sessions[id]
            try:
                await peer.close()
            except Exception:
                logger.exception("a WebRTC connection did not close")


def whep_sessions_of(request: Request) -> WhepSessions:
    """The application's WHEP sessions."""
    sessions = request.app.state.whep_sessions
    assert isinstance(sessions, WhepSessions)
    return sessions


# /v1/streams/{id}/whep


async def offer(request: Request, id: str) -> Response:
    """Watch a stream over WebRTC: post an SDP offer to receive video, and get the answer."""
    stream = watchable(request, id)
    text = await read_sdp(request)
    local = request.client is not None and is_loopback(request.client.host)
    key = principal_of(request).key
    alpha = wants_alpha(request)
    id_of_session, session = await whep_sessions_of(request).open(
        stream, text, local=local, alpha=alpha, key=key.serial if key else None
    )
    headers = {
        "Location": url_of(request, f"/v1/streams/{id}/whep/{id_of_session}"),
        "ETag": session.etag,
        "Accept-Patch": FRAGMENT,
    }
    response = Response(session.peer.answer, 201, headers, SDP)
    add_links(request, response, id_of_session[:8])
    return response


async def options(request: Request, id: str) -> Response:
    """The accepted media type, and as `Link` headers the STUN and TURN servers to use."""
    response = Response(status_code=200, headers={"Accept-Post": SDP, "Allow": "POST, GET, HEAD, OPTIONS"})
    # A CORS preflight carries no credentials, so it gets no TURN credentials either.
    if "access-control-request-method" not in request.headers:
        add_links(request, response, "options")
    return response


async def head(request: Request, id: str) -> Response:
    """Whether the stream can be watched over WebRTC now."""
    watchable(request, id)
    return Response(status_code=200, media_type=SDP)


async def get(request: Request, id: str) -> Response:
    """Empty: post an offer to watch the stream."""
    watchable(request, id)
    return Response(status_code=204)


def watchable(request: Request, id: str) -> Stream:
    """The stream, if it is live or about to be. Raises `ApiError` if it has ended or is queued."""
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
    """The request body as text. Raises `ApiError` if it is not UTF-8."""
    try:
        return (await request.body()).decode()
    except UnicodeDecodeError:
        raise invalid_sdp("it is not UTF-8") from None


def add_links(request: Request, response: Response, user: str) -> None:
    """Add `Link` headers for the STUN and TURN servers, the latter with credentials that expire."""
    config: Config = request.app.state.config
    for server in ice_servers(config.ice_servers, config.turn_secret, user, time.time()):
        link = f'<{server.url}>; rel="ice-server"'
        if server.credential:
            link += f'; username="{server.username}"; credential="{server.credential}"; credential-type="password"'
        response.headers.append("Link", link)


# /v1/streams/{id}/whep/{session}


async def trickle(request: Request, id: str, session: str) -> Response:
    """Add ICE candidates of the viewer (trickle ICE). ICE restart is not supported: another `ice-ufrag` gets 422."""
    found = whep_sessions_of(request).get(id, session)
    # Players made from MediaMTX's send `*` with every fragment, as RFC 9725 has it for restarts; the fragment decides.
    if not found.matches(request.headers.get("if-match", "*")):
        message = "The session has another ETag, which came with the answer: send that, or leave `If-Match` out."
        raise ApiError(412, "no_such_etag", message)
    await found.peer.trickle(await read_sdp(request))
    return Response(status_code=204)


async def end_session(request: Request, id: str, session: str) -> Response:
    """Close a session."""
    sessions = whep_sessions_of(request)
    await sessions.end(sessions.get(id, session))
    return Response(status_code=200)


async def session_options(request: Request, id: str, session: str) -> Response:
    """The media type and methods that a session accepts."""
    return Response(status_code=200, headers={"Accept-Patch": FRAGMENT, "Allow": "PATCH, DELETE, OPTIONS"})


def text_body(media_type: str) -> dict[str, object]:
    """Route options of an endpoint whose request body is text of this media type."""
    content = {media_type: {"schema": {"type": "string"}}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}, "response_class": Response}


EMPTY: dict[str, object] = {"response_class": Response}
DISCOVERY: dict[str, object] = {**EMPTY, "include_in_schema": False}
ENDPOINT = "/v1/streams/{id}/whep"
SESSION = ENDPOINT + "/{session}"

ROUTES = [
    Route("POST", ENDPOINT, offer, None, 201, (400, 404, 409, 413, 415, 503), text_body(SDP), SDP),
    Route(
        "POST", ENDPOINT + "/", offer, None, 201, options={**text_body(SDP), "include_in_schema": False}, accepts=SDP
    ),
    Route("OPTIONS", ENDPOINT + "/", options, options=DISCOVERY),
    Route("HEAD", ENDPOINT + "/", head, None, 200, options=DISCOVERY),
    Route("GET", ENDPOINT + "/", get, None, 204, options=DISCOVERY),
    Route("OPTIONS", ENDPOINT, options, options=DISCOVERY),
    Route("HEAD", ENDPOINT, head, None, 200, options=DISCOVERY),
    Route("GET", ENDPOINT, get, None, 204, (404, 409), EMPTY),
    Route("PATCH", SESSION, trickle, None, 204, (400, 404, 412, 413, 415, 422), text_body(FRAGMENT), FRAGMENT),
    Route("DELETE", SESSION, end_session, None, 200, (404,), EMPTY),
    Route("OPTIONS", SESSION, session_options, options=DISCOVERY),
]
