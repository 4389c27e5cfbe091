"""WebRTC connections that send a stream: to a viewer (WHEP) or to a server (WHIP). Encoded frames become RTP.

This is the only file that uses aiortc's internals. `tests/server/media/test_webrtc.py` pins those it relies on: the
DTLS role follows the offer; `RTCRtpSender._send_keyframe` is called for PLI and FIR; a connection's certificates;
`RTCRtpSender._retransmit` is called for each packet of a NACK; a receiver works without its bitrate estimator; and
`aioice.Connection.get_component_candidates`, `data_received` and `_check_list`.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aioice import Connection
from aiortc import (
    RTCCertificate,
    RTCConfiguration,
    RTCDtlsTransport,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.sdp import SessionDescription, candidate_from_sdp
from av.packet import Packet

from server.errors import ApiError
from server.media.encoder import Codec, EncodedFrame
from server.media.sdp import InvalidOfferError, NoCommonCodecError, Offer, Served, with_level
from server.media.viewer import Viewer
from server.rate_limit import TokenBucket

# At INFO it logs every pair of addresses that it tries, which would disclose viewers' addresses.
logging.getLogger("aioice").setLevel(logging.WARNING)

MAX_LINES = 600
"""Of an SDP; browsers send about 250 for video and audio."""
MAX_CANDIDATES = 32
"""Per connection. Each makes the server send packets to an address of the client's choice."""
NEGOTIATION_SECONDS = 10.0
RETRANSMISSIONS_PER_MINUTE = 6000
"""Per viewer, and also the largest burst: 100 a second, while a stream of 2.5 Mbit/s has 260 packets a second."""
CREDENTIAL_SECONDS = 3600
"""Validity of TURN credentials: long enough to connect, too short to be worth sharing."""
CIPHERS = (
    b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA:"
    b"ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-CHACHA20-POLY1305:ECDHE-RSA-AES128-SHA:ECDHE-RSA-AES256-SHA"
)
"""aiortc's cipher suites (ECDSA only), and those for peers with an RSA certificate, such as GStreamer."""

MIME_CODECS: dict[str, Codec] = {"video/h264": "h264", "video/vp8": "vp8"}


@dataclass(frozen=True, slots=True)
class IceServer:
    """A STUN or TURN server. STUN needs no credentials."""

    url: str
    username: str = ""
    credential: str = ""


def ice_servers(urls: Sequence[str], secret: str, user: str, now: float) -> list[IceServer]:
    """The servers with expiring credentials for `user` (coturn's `use-auth-secret`). `now` is unix time in seconds."""
    username = f"{int(now) + CREDENTIAL_SECONDS}:{user}"
    digest = hmac.new(secret.encode(), username.encode(), hashlib.sha1).digest()
    credential = base64.b64encode(digest).decode()
    return [IceServer(url, username, credential) if url.startswith("turn") else IceServer(url) for url in urls]


class Certificate(RTCCertificate):
    """A certificate whose connections also accept peers with RSA certificates."""

    def _create_ssl_context(self, srtp_profiles: list[Any]) -> Any:
        context = super()._create_ssl_context(srtp_profiles)
        context.set_cipher_list(CIPHERS)
        return context


class EncodedTrack(MediaStreamTrack):
    """A viewer's queue as an aiortc track. aiortc splits the encoded frames into RTP packets and encodes nothing."""

    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        self.viewer: asyncio.Future[Viewer] = asyncio.get_running_loop().create_future()
        self.exhausted = asyncio.Event()
        """Set when the stream has ended."""

    async def recv(self) -> "Packet[Any]":
        """Wait for the next encoded frame. Raises `MediaStreamError` after the last."""
        viewer = await asyncio.shield(self.viewer)
        item = await viewer.next()
        if not isinstance(item, EncodedFrame):
            self.exhausted.set()
            raise MediaStreamError
        return item.packet


class SendingConnection:
    """A WebRTC connection that sends one stream. Always `close` it."""

    def __init__(self, servers: Sequence[IceServer], default: Codec, *, local: bool) -> None:
        """`default` is the codec until one is negotiated. `local` says that the other side is on this machine."""
        # Without a list, aiortc would contact a STUN server of Google's.
        ice_servers = [RTCIceServer(each.url, each.username, each.credential) for each in servers]
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=ice_servers))
        # Must be set before `addTransceiver`, which reads it.
        self._connection._RTCPeerConnection__certificates = [Certificate.generateCertificate()]  # type: ignore[attr-defined]
        self._track = EncodedTrack()
        self._transceiver = self._connection.addTransceiver(self._track, "sendonly")
        self._sender = self._transceiver.sender
        # Nothing is received, so save the memory of its thousand counters.
        self._transceiver.receiver._RTCRtpReceiver__remote_bitrate_estimator = None  # type: ignore[attr-defined]
        self._local = local
        self.viewer = Viewer(default, events=False)
        """The queue of what is to be sent; its format is the negotiated codec."""
        self.connected = asyncio.Event()
        self.closed = self._track.exhausted
        """Set when the connection is lost or closed, or when the stream has ended."""
        self._connection.on("connectionstatechange", self._on_state)

    def on_keyframe_request(self, request: Callable[[], None]) -> None:
        """Call `request` whenever the other side needs a keyframe (RTCP PLI or FIR)."""
        self._sender._send_keyframe = request  # type: ignore[method-assign]

    async def close(self) -> None:
        """Close the connection. Safe to call again."""
        self.closed.set()
        self._track.viewer.cancel()
        await self._connection.close()
        self._break_reference_cycles()

    def _break_reference_cycles(self) -> None:
        """Break the reference cycles of a closed connection, so that its memory is freed at once.

        A connection holds 250 KiB, of which the garbage collector sees a tenth, so it would collect it too late.
        """
        for transceiver in self._connection.getTransceivers():
            transport = transceiver.sender.transport
            transport.remove_all_listeners()
            ice = _ice_of(transport)
            ice._check_list.clear()
            for name in ("get_component_candidates", "data_received"):
                vars(ice).pop(name, None)
        for name in ("_retransmit", "_send_keyframe"):
            vars(self._sender).pop(name, None)

    def _set_codec(self, codec: Codec) -> None:
        self.viewer = Viewer(codec, events=False)
        self._track.viewer.set_result(self.viewer)

    def _offer_loopback(self) -> None:
        """Offer loopback addresses too if the other side is on this machine."""
        if self._local:
            ice = _ice_of(self._sender.transport)
            ice.get_component_candidates = _with_loopback(ice.get_component_candidates)  # type: ignore[method-assign]

    def _on_state(self) -> None:
        match self._connection.connectionState:
            case "connected":
                self.connected.set()
            case "failed" | "closed":
                self.closed.set()


def _ice_of(transport: RTCDtlsTransport) -> Connection:
    """The transport's aioice connection."""
    connection: Connection = transport.transport.iceGatherer._connection
    return connection


class Peer(SendingConnection):
    """A connection to a viewer, who makes the offer: call `negotiate`."""

    def __init__(
        self, servers: Sequence[IceServer], public_address: str | None, *, local: bool, level: int | None = 31
    ) -> None:
        """`level` is the stream's level_idc in H.264; None while the model's size is not known."""
        # With a configured public address there is no need for STUN or TURN.
        super().__init__([] if public_address else servers, "vp8", local=local)
        self._public_address = public_address
        self._level = level
        self._candidates = 0
        self._offer: Offer | None = None
        self._served: Served | None = None
        self.answer = ""
        """The answer's SDP, after `negotiate`."""
        self._retransmissions = TokenBucket(RETRANSMISSIONS_PER_MINUTE, time.monotonic())

    async def negotiate(self, offer: str) -> None:
        """Answer the offer: sets `answer` and `viewer`. Raises `ApiError` if it cannot be answered."""
        whole, served = self._offer, self._served = self._check_offer(offer)
        alone = self._for_aiortc(whole.alone(served))
        try:
            async with asyncio.timeout(NEGOTIATION_SECONDS):
                await self._connection.setRemoteDescription(RTCSessionDescription(alone, "offer"))
                self._patch_transport()
                await self._connection.setLocalDescription()
        except TimeoutError:
            message = "The server could not gather its addresses in time: try again."
            raise ApiError(503, "gathering_timeout", message, headers={"Retry-After": "5"}) from None
        except OSError:  # out of file descriptors, which is not the offer's fault
            raise
        except Exception:  # aiortc's parser and checks raise nearly anything
            raise invalid_sdp("WebRTC cannot be set up from it") from None
        answer = self._connection.localDescription.sdp
        [video] = SessionDescription.parse(answer).media
        if not video.ice_candidates:
            raise ApiError(503, "no_address", "The server has no address that it could offer for WebRTC.")
        if self._public_address:
            answer = with_public_address(answer, self._public_address)
        self.answer = whole.answer(answer, served)
        self._set_codec(MIME_CODECS[video.rtp.codecs[0].mimeType.lower()])

    async def trickle(self, fragment: str) -> None:
        """Add ICE candidates that the viewer sends later (RFC 8840). Raises `ApiError` for any other fragment."""
        lines = fragment.splitlines()
        if len(lines) > MAX_LINES or any(not re.match(r"[a-z]=", line) for line in lines if line):
            raise invalid_sdp("it is no SDP fragment", "invalid_sdpfrag")
        if self._offer is None or self._served is None:
            return
        try:
            candidates = self._offer.candidates(lines, self._served)
        except ValueError:
            message = "The server does not restart ICE: open a new session instead."
            raise ApiError(422, "ice_restart_unsupported", message) from None
        for line in candidates:
            if self._accept_candidate(line):
                candidate = candidate_from_sdp(line.removeprefix("a=candidate:"))
                candidate.sdpMid = self._served.section.mid
                with contextlib.suppress(ValueError):  # a kind that aioice does not know
                    await self._connection.addIceCandidate(candidate)

    def _patch_transport(self) -> None:
        """Add our checks to the transport that carries the video, which may be the audio's; it is known only now."""
        self._offer_loopback()
        ice = _ice_of(self._sender.transport)
        receive, retransmit = ice.data_received, self._sender._retransmit

        def receive_nonempty(data: bytes, component: int) -> None:
            """Ignore empty datagrams, which anyone can send: aiortc reads the first byte and would fail."""
            if data:
                receive(data, component)

        async def retransmit_limited(sequence_number: int) -> None:
            """Limit the rate: one small NACK can request thousands of large packets."""
            if not self._retransmissions.take(time.monotonic()):
                await retransmit(sequence_number)

        ice.data_received = receive_nonempty  # type: ignore[method-assign]
        self._sender._retransmit = retransmit_limited  # type: ignore[method-assign]

    def _check_offer(self, text: str) -> tuple[Offer, Served]:
        """Validate the offer, and choose the section that is served. Raises `ApiError`."""
        if text.count("\n") > MAX_LINES:
            raise invalid_sdp(f"it has more than {MAX_LINES} lines")
        if not text.startswith("v=0") or "\0" in text:
            raise invalid_sdp("it does not start with `v=0`, or has a NUL")
        try:
            offer = Offer(text)
            return offer, offer.serve(self._level)
        except InvalidOfferError as error:
            raise invalid_sdp(str(error)) from None
        except NoCommonCodecError as error:
            if self._level is None:
                message = "The size of the stream is not known yet: offer VP8, or try again when it is live."
                raise ApiError(409, "stream_starting", message, headers={"Retry-After": "2"}) from None
            raise ApiError(400, "no_common_codec", str(error)) from None

    def _for_aiortc(self, offer: str) -> str:
        """The offer of one section in the form that aiortc gets. Raises `ApiError`."""
        try:
            [video] = SessionDescription.parse(offer).media
        except Exception:  # the parser raises nearly anything
            raise invalid_sdp("it cannot be parsed") from None
        if not (video.ice and video.ice.usernameFragment and video.dtls and video.dtls.fingerprints):
            raise invalid_sdp("`ice-ufrag`, `fingerprint` or `setup` is missing")
        lines = offer.splitlines()
        kept = [line for line in lines if not line.startswith("a=candidate:") or self._accept_candidate(line)]
        # More candidates may be trickled. If the viewer can take either DTLS role, make it the client: as a client,
        # aiortc would offer cipher suites that peers with an RSA certificate cannot use, were it not for `CIPHERS`.
        kept = [line for line in kept if line != "a=end-of-candidates"]
        return "\r\n".join("a=setup:active" if line == "a=setup:actpass" else line for line in kept) + "\r\n"

    def _accept_candidate(self, line: str) -> bool:
        """Whether to try this candidate; counts it. A viewer left out can still reach the server's own candidates."""
        self._candidates += (accepted := is_usable(line))
        return accepted and self._candidates <= MAX_CANDIDATES


class Publisher(SendingConnection):
    """A connection to a server that receives the stream (WHIP). The gateway makes the offer."""

    def __init__(self, servers: Sequence[IceServer], *, local: bool, level: int) -> None:
        """`level` is the stream's level_idc in H.264."""
        super().__init__(servers, "h264", local=local)
        self._level = level
        known = RTCRtpSender.getCapabilities("video").codecs
        # Only codecs that the gateway encodes; H.264 first, because RTMP outputs use it too.
        order = ["video/h264", "video/vp8", "video/rtx"]
        codecs = [codec for codec in known if codec.mimeType.lower() in order]
        preferred = sorted(codecs, key=lambda codec: order.index(codec.mimeType.lower()))
        self._transceiver.setCodecPreferences(preferred)
        self._offer_loopback()

    async def offer(self) -> str:
        """Create the offer, with all of this machine's candidates; returns its SDP."""
        await self._connection.setLocalDescription(await self._connection.createOffer())
        return with_level(self._connection.localDescription.sdp, self._level)

    async def accept(self, answer: str) -> None:
        """Apply the server's answer: sets `viewer`. Raises `ValueError` if it cannot be used."""
        lines = answer.splitlines()
        if len(lines) > MAX_LINES:
            raise ValueError(f"it has more than {MAX_LINES} lines")
        candidates = [line for line in lines if line.startswith("a=candidate:") and is_usable(line, local=self._local)]
        kept = [line for line in lines if not line.startswith("a=candidate:") or line in candidates[:MAX_CANDIDATES]]
        try:
            answer = "\r\n".join(kept) + "\r\n"
            await self._connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
            video = next(media for media in SessionDescription.parse(answer).media if media.kind == "video")
            codec = MIME_CODECS[video.rtp.codecs[0].mimeType.lower()]
        except Exception as error:  # aiortc's parser and checks raise nearly anything
            raise ValueError("WebRTC cannot be set up from it") from error
        self._set_codec(codec)


def is_usable(candidate: str, *, local: bool = False) -> bool:
    """Whether a line of SDP is a UDP candidate at an address that the other side could have.

    `local` says that the other side is on this machine, so loopback addresses are usable.
    """
    match = re.fullmatch(
        r"a=candidate:\S{1,64} 1 udp \d{1,10} (\S{1,64}) (\d{1,5}) typ (host|srflx|relay)( .*)?", candidate, re.I
    )
    if match is None or not 1024 <= int(match[2]) <= 65535:
        return False
    try:
        address = ipaddress.ip_address(match[1])
    except ValueError:
        return False  # an mDNS name, for example, which would be queried on the server's network
    if address.is_loopback:
        return local
    return not (address.is_link_local or address.is_multicast or address.is_unspecified)


def with_public_address(sdp: str, address: str) -> str:
    """Replace this machine's own addresses in an SDP by `address`. Ports and the addresses of relays stay."""
    version = ipaddress.ip_address(address).version

    def rewrite(match: re.Match[str]) -> str:
        host = ipaddress.ip_address(match[2])
        return match[0] if host.version != version or host.is_loopback else f"{match[1]}{address}{match[3]}"

    sdp = re.sub(r"(?m)^(a=candidate:\S+ \d+ udp \d+ )(\S+)( \d+ typ host)", rewrite, sdp)
    return re.sub(r"(?m)^c=IN IP[46] [^\s]+", f"c=IN IP{version} {address}", sdp)


def invalid_sdp(what: str, code: str = "invalid_sdp") -> ApiError:
    """The error for a body that is no usable SDP; `what` says why."""
    return ApiError(400, code, f"The body is not an SDP offer that can be answered: {what}.")


def _with_loopback(gather: Any) -> Any:
    """Add 127.0.0.1, which aioice omits, to the gathered candidates: a local viewer may have no other address."""

    async def gather_with_loopback(component: int, addresses: list[str], timeout: int = 5) -> Any:
        return await gather(component, list(dict.fromkeys([*addresses, "127.0.0.1"])), timeout)

    return gather_with_loopback
