"""Fifty viewers of one stream, one more who never reads, and what each costs the gateway.

    python -m server.bench.fanout --transport h264 --viewers 50

Starts a gateway with a pretended engine in a process of its own, has one viewer watch for some seconds and then all of
them, and prints how many frames each got and how much processor time the gateway took. The picture is grainy, so that
the encoder is at its ceiling of bits. Viewers over WebRTC are thin, so that the figures are the gateway's: they decrypt
packets and compare whole frames byte by byte, which are the same for all only if they were encoded once. They decode
nothing and ask for no packet again, so that whatever is lost on the way counts as lost.
"""

import argparse
import asyncio
import base64
import datetime
import os
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import websockets
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.codecs.vpx import vp8_depayload
from PIL import Image

from server.backends.fake import FakeBackend
from server.bench.gateway import Gateway, running

TRANSPORTS = {"h264": "H264", "vp8": "VP8", "fmp4": "", "mjpeg": ""}
"""WebRTC with one of two codecs, or the WebSocket with one of two formats."""
PACE_SECONDS = 0.05
"""Between two viewers who come: fifty handshakes at once would be another measurement."""


@dataclass
class Got:
    """What one viewer got: a frame's identity and the time of its arrival."""

    frames: list[tuple[int, float]] = field(default_factory=list)
    bytes: int = 0

    def within(self, start: float, end: float) -> dict[int, float]:
        return {frame: at for frame, at in self.frames if start <= at < end}


class Packets:
    """Puts RTP packets together to frames. A frame of which a packet is missing, or might be, is none."""

    def __init__(self, got: Got, codec: str) -> None:
        self._got = got
        # VP8's payloads start with a number of the picture that counts from elsewhere for each viewer.
        self._depayload = vp8_depayload if codec == "VP8" else bytes
        self._next: int | None = None
        self._whole = False
        self._payloads: list[bytes] = []
        self.lost = 0

    async def take(self, data: bytes, arrival_time_ms: int) -> None:
        """The next packet, decrypted: RFC 3550, section 5.1. Stands in for aiortc's handling of it."""
        number = int.from_bytes(data[2:4], "big")
        if self._next is not None and number != self._next:
            self.lost += (number - self._next) % 65536
            self._whole = False
        start = 12 + 4 * (data[0] & 15)
        if data[0] & 16:  # header extensions, which differ from viewer to viewer
            start += 4 + 4 * int.from_bytes(data[start + 2 : start + 4], "big")
        self._payloads.append(self._depayload(data[start:]))
        self._next = (number + 1) % 65536
        if data[1] & 128:  # the last of its frame
            frame = b"".join(self._payloads)
            if self._whole:
                self._got.frames.append((hash(frame), time.monotonic()))
                self._got.bytes += len(frame)
            self._payloads, self._whole = [], True


class Grain(FakeBackend):
    """A test picture of which no frame can be told from the one before it."""

    def _picture(self, stream: Any, frame: int) -> bytes:
        if not hasattr(self, "_grain"):
            bands = [Image.effect_noise((2 * self.width, 2 * self.height), 40) for _ in "RGB"]
            self._grain = Image.merge("RGB", bands)
        # Steps with no common divisor: the same corner does not come again for hours.
        left, top = frame * 101 % self.width, frame * 67 % self.height
        return self._grain.crop((left, top, left + self.width, top + self.height)).tobytes()


def processor_seconds(pid: int) -> float:
    """Of all its threads, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def played_and_encoded(gateway: Gateway, transport: str) -> tuple[int, int]:
    """Frames that the gateway has played, and how often it has encoded one this way, for all viewers together."""
    codec = "h264" if transport == "fmp4" else transport
    figures = gateway.figures()
    encoded = figures.get(f'livereel_encode_seconds_count{{codec="{codec}"}}', 0)
    return int(figures["livereel_frames_shown_total"]), int(encoded)


async def watch_rtc(base: str, stream: dict[str, Any], codec: str, packets: Packets) -> RTCPeerConnection:
    """Connect a viewer over WebRTC."""
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
    # aiortc's own receiver costs many times what the gateway's sender does: it would be all that is measured.
    video.receiver.transport._handle_rtp_data = packets.take  # type: ignore[method-assign]
    await peer.setRemoteDescription(RTCSessionDescription(response.text, "answer"))
    return peer


async def watch_socket(stream: dict[str, Any], format: str, got: Got) -> None:
    """Read the WebSocket until cancelled."""
    async with websockets.connect(f"{stream['ws_url']}?format={format}", compression=None, max_size=None) as socket:
        async for message in socket:
            if isinstance(message, bytes):
                got.frames.append((int.from_bytes(message[8:16], "big"), time.monotonic()))
                got.bytes += len(message)


def never_reading(base: str, stream: dict[str, Any]) -> socket.socket:
    """A WebSocket viewer of raw frames who shakes hands and then never reads."""
    host, port = base.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    key = base64.b64encode(os.urandom(16)).decode()
    client.sendall(
        f"GET /v1/streams/{stream['id']}/ws?format=rgb24 HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return client


async def measure(gateway: Gateway, transport: str, viewers: int, seconds: float, *, deaf: bool) -> dict[str, Any]:
    """Have this many watch a new stream, and say what they got and what it took."""
    base, pid = gateway.base, gateway.pid
    async with httpx.AsyncClient(base_url=base, timeout=30) as http:
        stream = (await http.post("/v1/streams", json={"prompt": "a ball", "seed": 1})).raise_for_status().json()
        while (await http.get(f"/v1/streams/{stream['id']}")).json()["state"] != "live":
            await asyncio.sleep(0.05)
        received = [Got() for _ in range(viewers)]
        packets = [Packets(got, TRANSPORTS[transport]) for got in received]
        peers: list[RTCPeerConnection] = []
        readers: list[asyncio.Task[None]] = []
        for number in range(viewers):
            if codec := TRANSPORTS[transport]:
                peers.append(await watch_rtc(base, stream, codec, packets[number]))
            else:
                readers.append(asyncio.create_task(watch_socket(stream, transport, received[number])))
            await asyncio.sleep(PACE_SECONDS)
        client = never_reading(base, stream) if deaf else None
        await asyncio.sleep(3)
        played, encoded = await asyncio.to_thread(played_and_encoded, gateway, transport)
        start, before = time.monotonic(), processor_seconds(pid)
        own, size = time.process_time(), sum(got.bytes for got in received)
        await asyncio.sleep(seconds)
        end, after = time.monotonic(), processor_seconds(pid)
        own, size = time.process_time() - own, sum(got.bytes for got in received) - size
        counts = await asyncio.to_thread(played_and_encoded, gateway, transport)
        await asyncio.sleep(1)
        for task in readers:
            task.cancel()
        await asyncio.gather(*(peer.close() for peer in peers), *readers, return_exceptions=True)
        if client:
            client.close()
        await http.delete(f"/v1/streams/{stream['id']}")
    # Frames that somebody got in the window, and of those, what each viewer got: by when does not matter.
    shown = set().union(*(got.within(start, end) for got in received))
    all_of_it = [{frame for frame, _ in got.frames} for got in received]
    gaps = sorted(
        later - earlier for got in received for earlier, later in pairwise(sorted(got.within(start, end).values()))
    )
    return {
        "viewers": len(received),
        "frames played": counts[0] - played,
        "frames encoded, for all": counts[1] - encoded,
        "frames that came to anybody": len(shown),
        "packets lost on the way, of all viewers": sum(each.lost for each in packets),
        "Mbit/s to each viewer": round(8e-6 * size / len(received) / (end - start), 2),
        "frames that every viewer got, %": round(100 * len(shown.intersection(*all_of_it)) / len(shown), 2),
        "frames that the worst viewer got, %": round(
            100 * min(len(shown & frames) for frames in all_of_it) / len(shown), 2
        ),
        "gap between frames, ms, p50 / p99 / max": [
            round(1000 * gaps[min(len(gaps) - 1, int(share * len(gaps)))], 1) for share in (0.5, 0.99, 1.0)
        ],
        "gateway, processor s per s": round((after - before) / (end - start), 3),
        "viewers' process, the same": round(own / (end - start), 3),
    }


async def run(options: argparse.Namespace, gateway: Gateway) -> None:
    width, height = options.size
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {width}x{height} at {options.fps}/s, {options.transport}")
    alone = await measure(gateway, options.transport, 1, options.seconds, deaf=False)
    crowd = await measure(gateway, options.transport, options.viewers, options.seconds, deaf=True)
    for name in alone:
        print(f"{name:42s} {alone[name]!s:24s} {crowd[name]}")
    name = "gateway, processor s per s"
    each = (crowd[name] - alone[name]) / max(1, options.viewers - 1)
    print(f"{'processor s per viewer and minute':42s} {'':24s} {60 * each:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=TRANSPORTS, default="h264")
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fps", type=int, default=16)
    parser.add_argument(
        "--size", type=lambda text: tuple(map(int, text.split("x"))), default=(832, 480), help="WIDTHxHEIGHT (832x480)"
    )
    options = parser.parse_args()
    width, height = options.size
    backend = partial(Grain, width=width, height=height, fps=options.fps, chunk_seconds=0.1)
    with running(backend, idle_timeout_s=0) as gateway:
        asyncio.run(run(options, gateway))


if __name__ == "__main__":
    main()
