"""Clients of the gateway for benchmarks: viewers for every transport, and a client that records faults."""

import asyncio
import contextlib
import random
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import websockets
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.codecs.vpx import vp8_depayload

PROMPTS = ("a red ball", "a blue cube on sand", "a green ring at night", "a yellow cone on water", "a teal cylinder")
CODECS = {"h264": "H264", "vp8": "VP8"}
SOCKETS = ("mjpeg", "rgb24", "fmp4", "events")
"""Formats over the WebSocket."""
FORMATS = (*SOCKETS, "img", *CODECS)
"""Everything that `Client.watch` can watch; `img` is MJPEG over HTTP."""

REFUSALS = {"queue_full", "stream_queued", "stream_ended", "stream_not_found", "too_many_connecting"}
"""Error codes that the API documents for a busy server: not faults."""


async def open_live_stream(http: httpx.AsyncClient, prompt: str) -> dict[str, Any]:
    """Open a stream and wait until it is live."""
    response = await http.post("/v1/streams", json={"prompt": prompt, "seed": 1})
    stream: dict[str, Any] = response.raise_for_status().json()
    while (await http.get(f"/v1/streams/{stream['id']}")).json()["state"] != "live":
        await asyncio.sleep(0.05)
    return stream


@dataclass
class ReceivedFrames:
    """What one viewer received: each frame's identity and arrival time, and the number of bytes."""

    frames: list[tuple[int, float]] = field(default_factory=list)
    bytes: int = 0

    def within(self, start: float, end: float) -> dict[int, float]:
        """Arrival times of the frames that arrived from `start` to `end`, by identity."""
        return {frame: at for frame, at in self.frames if start <= at < end}


class RtpDepacketizer:
    """Assembles RTP packets to frames, and discards frames of which a packet is or may be missing."""

    def __init__(self, received: ReceivedFrames, codec: str) -> None:
        self._received = received
        # VP8 payloads start with a picture number that has another origin for each viewer.
        self._depayload = vp8_depayload if codec == "VP8" else bytes
        self._next: int | None = None
        self._complete = False
        self._payloads: list[bytes] = []
        self.lost = 0
        """Packets that did not arrive."""

    async def handle_packet(self, data: bytes, arrival_time_ms: int) -> None:
        """Take the next decrypted packet (RFC 3550, section 5.1). Replaces aiortc's own handler."""
        number = int.from_bytes(data[2:4], "big")
        if self._next is not None and number != self._next:
            self.lost += (number - self._next) % 65536
            self._complete = False
        start = 12 + 4 * (data[0] & 15)
        if data[0] & 16:  # header extensions, which differ from viewer to viewer
            start += 4 + 4 * int.from_bytes(data[start + 2 : start + 4], "big")
        self._payloads.append(self._depayload(data[start:]))
        self._next = (number + 1) % 65536
        if data[1] & 128:  # the marker: last packet of its frame
            frame = b"".join(self._payloads)
            if self._complete:
                self._received.frames.append((hash(frame), time.monotonic()))
                self._received.bytes += len(frame)
            self._payloads, self._complete = [], True


async def watch_webrtc(
    base: str, stream: dict[str, Any], codec: str, depacketizer: RtpDepacketizer
) -> RTCPeerConnection:
    """Connect a viewer over WebRTC. Raises `httpx.HTTPStatusError` if the gateway refuses it."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    video = peer.addTransceiver("video", "recvonly")
    capabilities = RTCRtpReceiver.getCapabilities("video")
    assert capabilities is not None
    video.setCodecPreferences([each for each in capabilities.codecs if each.name in (codec, "rtx")])
    await peer.setLocalDescription(await peer.createOffer())
    async with httpx.AsyncClient(base_url=base, timeout=30) as http:
        headers = {"content-type": "application/sdp"}
        response = await http.post(stream["whep_url"], content=peer.localDescription.sdp, headers=headers)
    if not response.is_success:
        await peer.close()
        response.raise_for_status()
    # aiortc's receiver costs many times what the gateway's sender does: the benchmark would measure little else.
    video.receiver.transport._handle_rtp_data = depacketizer.handle_packet  # type: ignore[method-assign]
    await peer.setRemoteDescription(RTCSessionDescription(response.text, "answer"))
    return peer


@dataclass
class Outcomes:
    """What happened to all clients together."""

    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """Everything that the API does not document; there should be none."""
    stalls: list[tuple[float, str]] = field(default_factory=list)
    """Monotonic time and stream id of the start of every stall."""
    losses: list[tuple[float, str]] = field(default_factory=list)
    """The same for every event that says the engine was lost."""
    resumed: list[tuple[float, str]] = field(default_factory=list)
    """The same for the first chunk after each loss."""


class Client:
    """A client with its own connection to the API. It watches one stream at a time."""

    def __init__(self, http: httpx.AsyncClient, outcomes: Outcomes) -> None:
        self.http, self.outcomes = http, outcomes

    async def call(self, what: str, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The response, or None if the request failed or was refused, which is recorded under `what`."""
        try:
            response = await self.http.request(method, path, **request)
        except httpx.TransportError as error:
            self.outcomes.faults[f"{what}: {type(error).__name__}"] += 1
            return None
        if response.is_success:
            self.outcomes.done[what] += 1
            return response
        self._record_failure(what, response)
        return None

    def _record_failure(self, what: str, response: httpx.Response) -> None:
        code = response.json().get("error", {}).get("code")
        if code in REFUSALS:
            self.outcomes.refused[code] += 1
        else:
            self.outcomes.faults[f"{what}: {response.status_code} {code}"] += 1

    async def open(self, **fields: Any) -> dict[str, Any] | None:
        """Open a stream with a random prompt; None if that fails."""
        body = {"prompt": random.choice(PROMPTS), **fields}
        response = await self.call("opened", "POST", "/v1/streams", json=body)
        return response.json() if response else None

    async def close(self, stream: dict[str, Any]) -> None:
        """Close a stream."""
        await self.call("closed", "DELETE", f"/v1/streams/{stream['id']}")

    async def steer(self, stream: str) -> None:
        """Change the prompt at random, in a random transition."""
        body = {"prompt": random.choice(PROMPTS), "transition": random.choice(("soft", "recache", "cut"))}
        await self.call("steered", "PATCH", f"/v1/streams/{stream}", json=body)

    async def watch(self, stream: dict[str, Any], format: str, seconds: float) -> int:
        """Watch for so long, or until the stream ends; returns the number of frames received."""
        try:
            if format == "img":
                return await self._watch_mjpeg(stream, seconds)
            if format in CODECS:
                return await self._watch_webrtc(stream, format, seconds)
            return await self._watch_socket(stream, format, seconds)
        except (httpx.TransportError, OSError, websockets.WebSocketException) as error:
            self.outcomes.faults[f"{format}: {type(error).__name__} {error}"[:80]] += 1
            return 0

    async def _watch_socket(self, stream: dict[str, Any], format: str, seconds: float) -> int:
        frames, lost = 0, False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                try:
                    async with websockets.connect(
                        f"{stream['ws_url']}?format={format}", compression=None, max_size=None
                    ) as socket:
                        self.outcomes.done[f"watched {format}"] += 1
                        async for item in socket:
                            if isinstance(item, bytes):
                                frames += 1
                                struct.unpack_from("!BBHHHQ", item)
                            else:
                                lost = self._record_event(stream["id"], msgspec.json.decode(item), lost)
                except websockets.ConnectionClosed as closed:
                    code = closed.rcvd.code if closed.rcvd else 1006
                    if code == 4404:
                        self.outcomes.refused["stream_not_found"] += 1
                    else:
                        self.outcomes.faults[f"{format} socket closed with {code}"] += 1
        return frames

    def _record_event(self, stream: str, event: dict[str, Any], lost: bool) -> bool:
        """Record stalls, engine losses and resumptions; returns whether the engine is lost now."""
        now = time.monotonic()
        match event:
            case {"type": "stall", "phase": "began"}:
                self.outcomes.stalls.append((now, stream))
            case {"type": "error", "code": "engine_restarted"}:
                self.outcomes.losses.append((now, stream))
                return True
            case {"type": "error", "code": str(code)} if code not in REFUSALS:
                self.outcomes.faults[f"event {code}"] += 1
            case {"type": "chunk"} if lost:
                self.outcomes.resumed.append((now, stream))
                return False
        return lost

    async def _watch_mjpeg(self, stream: dict[str, Any], seconds: float) -> int:
        frames = 0
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(seconds),
                self.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response,
            ):
                if response.is_success:
                    self.outcomes.done["watched img"] += 1
                    async for data in response.aiter_bytes():
                        frames += data.count(b"\r\n\r\n\xff\xd8")
                else:
                    await response.aread()
                    self._record_failure("img", response)
        return frames

    async def _watch_webrtc(self, stream: dict[str, Any], codec: str, seconds: float) -> int:
        received = ReceivedFrames()
        depacketizer = RtpDepacketizer(received, CODECS[codec])
        try:
            peer = await watch_webrtc(str(self.http.base_url), stream, CODECS[codec], depacketizer)
        except httpx.HTTPStatusError as error:
            self._record_failure(codec, error.response)
            return 0
        self.outcomes.done[f"watched {codec}"] += 1
        await asyncio.sleep(seconds)
        await peer.close()
        return len(received.frames)
