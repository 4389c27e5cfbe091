"""One viewer over WebRTC: an offer becomes an answer, and packets that are encoded already become RTP.

This is the only file that knows aiortc from inside. What it takes from there that is no public interface is pinned by
`tests/server/test_rtc.py`: the role in DTLS follows the offer, `RTCRtpSender._send_keyframe` is called for PLI and FIR,
a connection's certificates, `RTCRtpSender._retransmit` is called for each packet of a NACK, a receiver can do without
its estimator of the bitrate, and `aioice.Connection.get_component_candidates`, `data_received` and `_check_list`.
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
from server.media.viewer import Viewer
from server.rate_limit import TokenBucket

# It tells of every pair of addresses that it tries, which are viewers'.
logging.getLogger("aioice").setLevel(logging.WARNING)

MAX_LINES = 600
"""Of an offer; browsers send about 250 for video and audio."""
MAX_CANDIDATES = 32
"""Of one viewer: more would make us knock at as many doors for whoever asks."""
NEGOTIATION_SECONDS = 10.0
RETRANSMISSIONS_PER_MINUTE = 6000
"""To one viewer, as many at once at most: a hundred a second, where a stream of 2.5 Mbit/s has 260 packets."""
CREDENTIAL_SECONDS = 3600
"""How long TURN credentials are good for: long enough to connect, not to live on."""
CIPHERS = (
    b"ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-ECDSA-AES128-SHA:ECDHE-ECDSA-AES256-SHA:"
    b"ECDHE-RSA-AES128-GCM-SHA256:ECDHE-RSA-CHACHA20-POLY1305:ECDHE-RSA-AES128-SHA:ECDHE-RSA-AES256-SHA"
)
"""aiortc's, which leave out peers whose certificate is RSA (GStreamer's are), and theirs."""

MIME_CODECS: dict[str, Codec] = {"video/h264": "h264", "video/vp8": "vp8"}


@dataclass(frozen=True, slots=True)
class IceServer:
    """A STUN or TURN server as a client is told about it; STUN has no credentials."""

    url: str
    username: str = ""
    credential: str = ""


def ice_servers(urls: Sequence[str], secret: str, user: str, now: float) -> list[IceServer]:
    """The servers with credentials for `user` that expire (coturn's `use-auth-secret`). `now` is unix time."""
    username = f"{int(now) + CREDENTIAL_SECONDS}:{user}"
    digest = hmac.new(secret.encode(), username.encode(), hashlib.sha1).digest()
    credential = base64.b64encode(digest).decode()
    return [IceServer(url, username, credential) if url.startswith("turn") else IceServer(url) for url in urls]


class Certificate(RTCCertificate):
    """A certificate whose connections also take peers with RSA."""

    def _create_ssl_context(self, srtp_profiles: list[Any]) -> Any:
        context = super()._create_ssl_context(srtp_profiles)
        context.set_cipher_list(CIPHERS)
        return context


class EncodedTrack(MediaStreamTrack):
    """What a viewer still has to be sent, as aiortc takes it: it only cuts these packets to RTP's size."""

    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        self.viewer: asyncio.Future[Viewer] = asyncio.get_running_loop().create_future()
        self.exhausted = asyncio.Event()
        """The stream is over."""

    async def recv(self) -> "Packet[Any]":
        """The next packet, as soon as it is there; raises `MediaStreamError` after the last."""
        viewer = await asyncio.shield(self.viewer)
        item = await viewer.next()
        if not isinstance(item, EncodedFrame):
            self.exhausted.set()
            raise MediaStreamError
        return item.packet


class Line:
    """A connection that a stream is sent over. `close` it in any case."""

    def __init__(self, servers: Sequence[IceServer], first: Codec, *, local: bool) -> None:
        """`first` is sent unless another codec is agreed upon; `local` says that the other side is on this machine."""
        # Without a list aiortc would ask a server of Google's.
        ours = [RTCIceServer(each.url, each.username, each.credential) for each in servers]
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=ours))
        # Read when the first transceiver is made.
        self._connection._RTCPeerConnection__certificates = [Certificate.generateCertificate()]  # type: ignore[attr-defined]
        self._track = EncodedTrack()
        self._transceiver = self._connection.addTransceiver(self._track, "sendonly")
        self._sender = self._transceiver.sender
        # Nothing is received. Its thousand counters would wait for the garbage collector, as all of a connection does.
        self._transceiver.receiver._RTCRtpReceiver__remote_bitrate_estimator = None  # type: ignore[attr-defined]
        self._local = local
        self.viewer = Viewer(first, events=False)
        """What is to be sent; its format is the codec that was agreed upon."""
        self.connected = asyncio.Event()
        self.over = self._track.exhausted
        """The line is lost or closed, or the stream has ended."""
        self._connection.on("connectionstatechange", self._on_state)

    def on_keyframe_request(self, request: Callable[[], None]) -> None:
        """Have `request` called whenever the other side reports that it can show nothing (PLI, FIR)."""
        self._sender._send_keyframe = request  # type: ignore[method-assign]

    async def close(self) -> None:
        """Hang up. Safe to call again."""
        self.over.set()
        self._track.viewer.cancel()
        await self._connection.close()
        self._untie()

    def _untie(self) -> None:
        """Undo the circles of what is closed, so that it goes with its last user.

        It is 250 KiB a connection, of which the garbage collector sees a tenth: by what it counts, it need not hurry.
        """
        for transceiver in self._connection.getTransceivers():
            transport = transceiver.sender.transport
            transport.remove_all_listeners()
            ice = _ice_of(transport)
            ice._check_list.clear()
            for ours in ("get_component_candidates", "data_received"):
                vars(ice).pop(ours, None)
        for ours in ("_retransmit", "_send_keyframe"):
            vars(self._sender).pop(ours, None)

    def _agree(self, codec: Codec) -> None:
        self.viewer = Viewer(codec, events=False)
        self._track.viewer.set_result(self.viewer)

    def _offer_loopback(self) -> None:
        """Let this machine's loopback addresses be tried too, where the other side is local."""
        if self._local:
            ice = _ice_of(self._sender.transport)
            ice.get_component_candidates = _with_loopback(ice.get_component_candidates)  # type: ignore[method-assign]

    def _on_state(self) -> None:
        match self._connection.connectionState:
            case "connected":
                self.connected.set()
            case "failed" | "closed":
                self.over.set()


def _ice_of(transport: RTCDtlsTransport) -> Connection:
    """aioice's end of it."""
    connection: Connection = transport.transport.iceGatherer._connection
    return connection


class Peer(Line):
    """One connection to a viewer. Make it with `negotiate`."""

    def __init__(self, servers: Sequence[IceServer], public_address: str | None, *, local: bool) -> None:
        # Who says where we can be reached needs no servers at all.
        super().__init__([] if public_address else servers, "vp8", local=local)
        self._public_address = public_address
        self._candidates = 0
        self._first_mid = ""
        self._user_fragment = ""
        self.answer = ""
        """SDP, once negotiated."""
        self._again = TokenBucket(RETRANSMISSIONS_PER_MINUTE, time.monotonic())

    async def negotiate(self, offer: str) -> None:
        """Answer the offer: sets `answer` and `viewer`. Raises `ApiError` when it cannot be answered."""
        offer = self._vet(offer)
        try:
            async with asyncio.timeout(NEGOTIATION_SECONDS):
                await self._connection.setRemoteDescription(RTCSessionDescription(offer, "offer"))
                self._harden()
                await self._connection.setLocalDescription()
        except TimeoutError:
            message = "The server could not gather its addresses in time: try again."
            raise ApiError(503, "gathering_timeout", message, headers={"Retry-After": "5"}) from None
        except OSError:  # want of descriptors is no fault of the offer
            raise
        except Exception as error:  # its parser and its checks raise nearly anything
            if "send parameters" in str(error):
                message = "The offer has no codec that the server sends: offer VP8 or H.264 with packetization-mode=1."
                raise ApiError(400, "no_common_codec", message) from None
            raise invalid_sdp("WebRTC cannot be set up from it") from None
        answer = self._connection.localDescription.sdp
        video = next(media for media in SessionDescription.parse(answer).media if media.kind == "video")
        if video.direction != "sendonly":
            raise invalid_sdp("its video must be recvonly")
        if not video.ice_candidates:
            raise ApiError(503, "no_address", "The server has no address that it could offer for WebRTC.")
        self.answer = with_public_address(answer, self._public_address) if self._public_address else answer
        self._agree(MIME_CODECS[video.rtp.codecs[0].mimeType.lower()])

    async def trickle(self, fragment: str) -> None:
        """Take further candidates of the viewer (RFC 8840). Raises `ApiError` for anything else."""
        lines = fragment.splitlines()
        if len(lines) > MAX_LINES or any(not re.match(r"[a-z]=", line) for line in lines if line):
            raise invalid_sdp("it is no SDP fragment", "invalid_sdpfrag")
        for line in lines:
            if line.startswith("a=ice-ufrag:") and line.removeprefix("a=ice-ufrag:").strip() != self._user_fragment:
                message = "The server does not restart ICE: open a new session instead."
                raise ApiError(422, "ice_restart_unsupported", message)
        for line in lines:
            if line.startswith("a=candidate:") and self._wanted(line):
                candidate = candidate_from_sdp(line.removeprefix("a=candidate:"))
                candidate.sdpMid = self._first_mid
                with contextlib.suppress(ValueError):  # of a kind that our ICE does not know
                    await self._connection.addIceCandidate(candidate)

    def _harden(self) -> None:
        """Put our own hands on what is now known to carry the video: it may be the transport of the sound."""
        self._offer_loopback()
        ice = _ice_of(self._sender.transport)
        receive, retransmit = ice.data_received, self._sender._retransmit

        def receive_something(data: bytes, component: int) -> None:
            """An empty datagram, which anybody may send, would end the connection: aiortc looks at its first byte."""
            if data:
                receive(data, component)

        async def retransmit_within_bounds(sequence_number: int) -> None:
            """One small packet can ask for thousands of large ones."""
            if not self._again.take(time.monotonic()):
                await retransmit(sequence_number)

        ice.data_received = receive_something  # type: ignore[method-assign]
        self._sender._retransmit = retransmit_within_bounds  # type: ignore[method-assign]

    def _vet(self, offer: str) -> str:
        """The offer as aiortc is to see it. Raises `ApiError` when it is none that a viewer would send."""
        lines = offer.splitlines()
        if len(lines) > MAX_LINES:
            raise invalid_sdp(f"it has more than {MAX_LINES} lines")
        if not offer.startswith("v=0") or "\0" in offer:
            raise invalid_sdp("it does not start with `v=0`, or has a NUL")
        try:
            description = SessionDescription.parse(offer)
        except Exception:  # the parser raises nearly anything
            raise invalid_sdp("it cannot be parsed") from None
        media = description.media
        if any(len(set(group.items)) < len(group.items) for group in description.group):
            raise invalid_sdp("a group names a section twice")
        kinds = sorted(each.kind for each in media)
        if kinds not in (["video"], ["audio", "video"]):
            raise invalid_sdp("it must have one video section, and at most one for audio beside it")
        if not all(each.ice and each.ice.usernameFragment and each.dtls and each.dtls.fingerprints for each in media):
            raise invalid_sdp("`ice-ufrag`, `fingerprint` or `setup` is missing")
        if next(each for each in media if each.kind == "video").direction not in (None, "recvonly", "sendrecv"):
            raise invalid_sdp("its video must be recvonly")
        self._first_mid = media[0].rtp.muxId
        self._user_fragment = (media[0].ice and media[0].ice.usernameFragment) or ""
        kept = [line for line in lines if not line.startswith("a=candidate:") or self._wanted(line)]
        # More may be trickled. And who could take either role leaves DTLS's passive one to us: as a client, aiortc
        # would offer cipher suites that peers with an RSA certificate cannot use, were it not for `CIPHERS`.
        kept = [line for line in kept if line != "a=end-of-candidates"]
        return "\r\n".join("a=setup:active" if line == "a=setup:actpass" else line for line in kept) + "\r\n"

    def _wanted(self, line: str) -> bool:
        """Whether to try this candidate. Who is left out can still reach us, where we can be reached."""
        self._candidates += (fit := usable(line))
        return fit and self._candidates <= MAX_CANDIDATES


class Publisher(Line):
    """One connection to a server that takes a stream: we make the offer."""

    def __init__(self, servers: Sequence[IceServer], *, local: bool) -> None:
        super().__init__(servers, "h264", local=local)
        known = RTCRtpSender.getCapabilities("video").codecs
        # What we have encoded already must be what is agreed upon; H.264 first, as for RTMP.
        order = ["video/h264", "video/vp8", "video/rtx"]
        codecs = [codec for codec in known if codec.mimeType.lower() in order]
        preferred = sorted(codecs, key=lambda codec: order.index(codec.mimeType.lower()))
        self._transceiver.setCodecPreferences(preferred)
        self._offer_loopback()

    async def offer(self) -> str:
        """Our SDP, with every address that we have."""
        await self._connection.setLocalDescription(await self._connection.createOffer())
        return self._connection.localDescription.sdp

    async def accept(self, answer: str) -> None:
        """Take the server's answer: sets `viewer`. Raises `ValueError` when it is none that can be used."""
        lines = answer.splitlines()
        if len(lines) > MAX_LINES:
            raise ValueError(f"it has more than {MAX_LINES} lines")
        candidates = [line for line in lines if line.startswith("a=candidate:") and usable(line, local=self._local)]
        kept = [line for line in lines if not line.startswith("a=candidate:") or line in candidates[:MAX_CANDIDATES]]
        try:
            answer = "\r\n".join(kept) + "\r\n"
            await self._connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))
            video = next(media for media in SessionDescription.parse(answer).media if media.kind == "video")
            codec = MIME_CODECS[video.rtp.codecs[0].mimeType.lower()]
        except Exception as error:  # its parser and its checks raise nearly anything
            raise ValueError("WebRTC cannot be set up from it") from error
        self._agree(codec)


def usable(candidate: str, *, local: bool = False) -> bool:
    """Whether a line of SDP is a candidate to try: an address of UDP that could be the other side's.

    `local` says that it is known to be on this machine.
    """
    match = re.fullmatch(
        r"a=candidate:\S{1,64} 1 udp \d{1,10} (\S{1,64}) (\d{1,5}) typ (host|srflx|relay)( .*)?", candidate, re.I
    )
    if match is None or not 1024 <= int(match[2]) <= 65535:
        return False
    try:
        address = ipaddress.ip_address(match[1])
    except ValueError:
        return False  # an mDNS name, say: it would be asked for on our network
    if address.is_loopback:
        return local
    return not (address.is_link_local or address.is_multicast or address.is_unspecified)


def with_public_address(sdp: str, address: str) -> str:
    """The answer with `address` in place of this machine's own, ports as they are; addresses of relays stay."""
    version = ipaddress.ip_address(address).version

    def rewrite(match: re.Match[str]) -> str:
        host = ipaddress.ip_address(match[2])
        return match[0] if host.version != version or host.is_loopback else f"{match[1]}{address}{match[3]}"

    sdp = re.sub(r"(?m)^(a=candidate:\S+ \d+ udp \d+ )(\S+)( \d+ typ host)", rewrite, sdp)
    return re.sub(r"(?m)^c=IN IP[46] [^\s]+", f"c=IN IP{version} {address}", sdp)


def invalid_sdp(what: str, code: str = "invalid_sdp") -> ApiError:
    """A body that cannot be used."""
    return ApiError(400, code, f"The body is not an SDP offer that can be answered: {what}.")


def _with_loopback(gather: Any) -> Any:
    """For a viewer on this machine, which may have no other address: aioice leaves loopback out."""

    async def gather_with_loopback(component: int, addresses: list[str], timeout: int = 5) -> Any:
        return await gather(component, list(dict.fromkeys([*addresses, "127.0.0.1"])), timeout)

    return gather_with_loopback
