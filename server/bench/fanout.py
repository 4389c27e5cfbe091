"""What each viewer costs the gateway: one viewer of a stream against fifty, of whom one more never reads.

    python -m server.bench.fanout --transport h264 --viewers 50

Starts a gateway with a fake engine in a process of its own. First one viewer watches for some seconds, then all of
them. Prints how many frames each received and how much processor time the gateway used. The picture is noise, so that
the encoder reaches its bitrate ceiling. WebRTC viewers do as little as possible, so that the figures are the gateway's:
they decrypt packets and compare whole frames byte by byte, which are equal for all viewers only if they were encoded
once. They decode nothing and request no retransmission, so every packet lost on the way counts as lost.
"""

import argparse
import asyncio
import base64
import datetime
import os
import socket
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import websockets
from aiortc import RTCPeerConnection
from PIL import Image

from server.backends.fake import FakeBackend
from server.bench.clients import CODECS, ReceivedFrames, RtpDepacketizer, open_live_stream, watch_webrtc
from server.bench.gateway import Gateway, running

TRANSPORTS = (*CODECS, "fmp4", "mjpeg")
"""WebRTC with one of two codecs, or the WebSocket with one of two formats."""
PACE_SECONDS = 0.05
"""Between two viewers that connect: fifty handshakes at once would be another measurement."""


class NoiseBackend(FakeBackend):
    """A fake engine whose frames are noise, so that no frame predicts the next."""

    def _picture(self, stream: Any, frame: int) -> bytes:
        if not hasattr(self, "_noise"):
            bands = [Image.effect_noise((2 * self.width, 2 * self.height), 40) for _ in "RGB"]
            self._noise = Image.merge("RGB", bands)
        # Steps without a common divisor: no crop repeats for hours.
        left, top = frame * 101 % self.width, frame * 67 % self.height
        return self._noise.crop((left, top, left + self.width, top + self.height)).tobytes()


def processor_seconds(pid: int) -> float:
    """Processor time of all threads of a process, in user and system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def played_and_encoded(gateway: Gateway, transport: str) -> tuple[int, int]:
    """Frames that the gateway has played, and frames that it has encoded for this transport."""
    codec = "h264" if transport == "fmp4" else transport
    figures = gateway.figures()
    encoded = figures.get(f'livereel_encode_seconds_count{{codec="{codec}"}}', 0)
    return int(figures["livereel_frames_shown_total"]), int(encoded)


async def watch_socket(stream: dict[str, Any], format: str, received: ReceivedFrames) -> None:
    """Read the WebSocket until cancelled."""
    async with websockets.connect(f"{stream['ws_url']}?format={format}", compression=None, max_size=None) as socket:
        async for message in socket:
            if isinstance(message, bytes):
                received.frames.append((int.from_bytes(message[8:16], "big"), time.monotonic()))
                received.bytes += len(message)


def connect_without_reading(base: str, stream: dict[str, Any]) -> socket.socket:
    """Connect a WebSocket viewer of raw frames that completes the handshake and then never reads."""
    host, port = base.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    key = base64.b64encode(os.urandom(16)).decode()
    client.sendall(
        f"GET /v1/streams/{stream['id']}/ws?format=rgb24 HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    return client


async def measure(
    gateway: Gateway, transport: str, viewers: int, seconds: float, *, with_stuck_viewer: bool
) -> dict[str, Any]:
    """Have this many viewers watch a new stream; returns the figures by name."""
    base, pid = gateway.base, gateway.pid
    async with httpx.AsyncClient(base_url=base, timeout=30) as http:
        stream = await open_live_stream(http, "a ball")
        received = [ReceivedFrames() for _ in range(viewers)]
        depacketizers = [RtpDepacketizer(each, CODECS.get(transport, "")) for each in received]
        peers: list[RTCPeerConnection] = []
        readers: list[asyncio.Task[None]] = []
        for number in range(viewers):
            if codec := CODECS.get(transport):
                peers.append(await watch_webrtc(base, stream, codec, depacketizers[number]))
            else:
                readers.append(asyncio.create_task(watch_socket(stream, transport, received[number])))
            await asyncio.sleep(PACE_SECONDS)
        stuck = connect_without_reading(base, stream) if with_stuck_viewer else None
        await asyncio.sleep(3)
        played, encoded = await asyncio.to_thread(played_and_encoded, gateway, transport)
        start, before = time.monotonic(), processor_seconds(pid)
        own, size = time.process_time(), sum(each.bytes for each in received)
        await asyncio.sleep(seconds)
        end, after = time.monotonic(), processor_seconds(pid)
        own, size = time.process_time() - own, sum(each.bytes for each in received) - size
        counts = await asyncio.to_thread(played_and_encoded, gateway, transport)
        await asyncio.sleep(1)
        for task in readers:
            task.cancel()
        await asyncio.gather(*(peer.close() for peer in peers), *readers, return_exceptions=True)
        if stuck:
            stuck.close()
        await http.delete(f"/v1/streams/{stream['id']}")
    shown, common, worst = completeness(received, start, end)
    return {
        "viewers": len(received),
        "frames played": counts[0] - played,
        "frames encoded, for all": counts[1] - encoded,
        "frames that came to anybody": shown,
        "packets lost on the way, of all viewers": sum(each.lost for each in depacketizers),
        "Mbit/s to each viewer": round(8e-6 * size / len(received) / (end - start), 2),
        "frames that every viewer got, %": common,
        "frames that the worst viewer got, %": worst,
        "gap between frames, ms, p50 / p99 / max": gap_quantiles(received, start, end),
        "gateway, processor s per s": round((after - before) / (end - start), 3),
        "viewers' process, the same": round(own / (end - start), 3),
    }


def completeness(received: list[ReceivedFrames], start: float, end: float) -> tuple[int, float, float]:
    """Frames that any viewer received from `start` to `end`; of these, the percentage that every viewer received at any
    time, and the percentage that the worst viewer received."""
    shown = set().union(*(each.within(start, end) for each in received))
    by_viewer = [{frame for frame, _ in each.frames} for each in received]
    common, worst = len(shown.intersection(*by_viewer)), min(len(shown & frames) for frames in by_viewer)
    return len(shown), round(100 * common / len(shown), 2), round(100 * worst / len(shown), 2)


def gap_quantiles(received: list[ReceivedFrames], start: float, end: float) -> list[float]:
    """Milliseconds between consecutive frames of a viewer, over all viewers: p50, p99 and maximum."""
    gaps = sorted(
        later - earlier for each in received for earlier, later in pairwise(sorted(each.within(start, end).values()))
    )
    return [round(1000 * gaps[min(len(gaps) - 1, int(share * len(gaps)))], 1) for share in (0.5, 0.99, 1.0)]


async def run(options: argparse.Namespace, gateway: Gateway) -> None:
    """Measure one viewer, then all, and print both."""
    width, height = options.size
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {width}x{height} at {options.fps}/s, {options.transport}")
    alone = await measure(gateway, options.transport, 1, options.seconds, with_stuck_viewer=False)
    crowd = await measure(gateway, options.transport, options.viewers, options.seconds, with_stuck_viewer=True)
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
    backend = partial(NoiseBackend, width=width, height=height, fps=options.fps, chunk_seconds=0.1)
    with running(backend, idle_timeout_s=0) as gateway:
        asyncio.run(run(options, gateway))


if __name__ == "__main__":
    main()
