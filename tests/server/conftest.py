"""A gateway on a loopback port with a pretended engine, inside the test's own event loop."""

import asyncio
import contextlib
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import aioice.ice
import httpx
import pytest
import websockets
from aiortc import MediaStreamTrack, RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.rtp import RtcpPsfbPacket
from fastapi import FastAPI

from server.__main__ import Server, listen, uvicorn_config
from server.auth.keys import add_key
from server.backends.fake import FakeBackend
from server.config import Config
from server.streams.registry import Registry
from server.tracing import Tracing


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def holders() -> Callable[..., dict[str, dict[str, str]]]:
    """Makes keys in a file, each given as name, owner and scope; returns each one's headers by name."""

    def make(path: Path, *given: tuple[str, str, str]) -> dict[str, dict[str, str]]:
        return {
            name: {"authorization": f"Bearer {add_key(path, name, owner, [scope], 4, 1000)}"}
            for name, owner, scope in given
        }

    return make


@pytest.fixture
def error_of() -> Callable[[httpx.Response, int], dict[str, Any]]:
    """Checks that a response is an error object of the API with this status, and returns its `error`."""

    def error_of(response: Any, status: int) -> dict[str, Any]:
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        body = response.json()
        assert body.keys() == {"error", "request_id"}
        assert body["request_id"] == response.headers["x-request-id"]
        error = body["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        response.text.encode()  # nothing that was echoed is no Unicode
        return error

    return error_of


@dataclass
class Watched:
    """What a viewer was sent."""

    events: list[dict[str, Any]] = field(default_factory=list)
    frames: list[tuple[float, bytes]] = field(default_factory=list)
    """Arrival time on the loop's clock, packet."""
    order: list[str] = field(default_factory=list)
    """Event types and "frame", as they came."""
    close_code: int | None = None

    def of(self, type: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == type]

    @property
    def pts(self) -> list[int]:
        return [struct.unpack("!BBHHHQ", packet[:16])[5] for _, packet in self.frames]


@dataclass
class Gateway:
    address: str
    backend: FakeBackend
    streams: Registry
    http: httpx.AsyncClient
    app: FastAPI

    async def live(self, **fields: Any) -> dict[str, Any]:
        """A stream that has its first frames."""
        stream = await self.open(**fields)

        async def is_live() -> bool:
            return (await self.get(stream))["state"] == "live"

        await self.until(is_live)
        return stream

    def stream_of(self, stream: dict[str, Any]) -> Any:
        """The gateway's own record of a stream."""
        return self.streams.get(stream["id"])

    async def open(self, prompt: str = "a red ball", **fields: Any) -> dict[str, Any]:
        response = await self.http.post("/v1/streams", json={"prompt": prompt, **fields})
        assert response.status_code == 201, response.text
        return response.json()

    async def get(self, stream: dict[str, Any]) -> dict[str, Any]:
        return (await self.http.get(f"/v1/streams/{stream['id']}")).json()

    async def patch(self, stream: dict[str, Any], **fields: Any) -> httpx.Response:
        return await self.http.patch(f"/v1/streams/{stream['id']}", json=fields)

    def connect(self, stream: dict[str, Any], query: str = "", **options: Any) -> websockets.connect:
        return websockets.connect(stream["ws_url"] + query, compression=None, **options)

    async def watch(
        self,
        stream: dict[str, Any],
        query: str = "",
        *,
        until: Callable[[Watched], bool] = lambda _: False,
        seen: Watched | None = None,
    ) -> Watched:
        """Read until the socket closes or `until` says enough."""
        seen = seen or Watched()
        loop = asyncio.get_running_loop()
        async with self.connect(stream, query) as socket:
            try:
                while not until(seen):
                    async with asyncio.timeout(10):
                        item = await socket.recv()
                    if isinstance(item, str):
                        event = json.loads(item)
                        seen.events.append(event)
                        seen.order.append(event["type"])
                    else:
                        seen.frames.append((loop.time(), item))
                        seen.order.append("frame")
            except websockets.ConnectionClosed as closed:
                seen.close_code = closed.rcvd.code if closed.rcvd else None
        return seen

    async def until(self, condition: Callable[[], Awaitable[bool] | bool], seconds: float = 5.0) -> None:
        """Wait for something to become true."""
        async with asyncio.timeout(seconds):
            while True:
                result = condition()
                if result if isinstance(result, bool) else await result:
                    return
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def gateway(
    backend: FakeBackend | None = None, *, ready: bool = True, tracing: Tracing | None = None, **settings: Any
) -> AsyncIterator[Gateway]:
    backend = backend or FakeBackend(width=64, height=48, chunk_seconds=0.02)
    config = Config(port=0, **settings)
    listener = listen(config.host, 0)
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    uvicorn_settings, streams = uvicorn_config(config, backend, tracing)
    server = Server(uvicorn_settings, streams)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with httpx.AsyncClient(base_url=f"http://{address}", timeout=20) as client:
            running = Gateway(address, backend, streams, client, uvicorn_settings.app)
            await running.until(lambda: server.started)
            if ready:
                await running.until(lambda: backend.health().ready)
            yield running
    finally:
        server.should_exit = True
        await task
        # Whoever forgets a task of a stream fails here.
        left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("player")]
        assert left == []


@pytest.fixture
def run_gateway() -> Callable[..., contextlib.AbstractAsyncContextManager[Gateway]]:
    """Start a gateway: `async with run_gateway(backend, idle_timeout_s=1) as gateway`."""
    return gateway


SDP = {"content-type": "application/sdp"}


class RtcViewer:
    """aiortc in the part of a browser: `async with RtcViewer(gateway, stream, "VP8") as viewer`."""

    def __init__(self, gateway: Gateway, stream: dict[str, Any], *codecs: str, audio: bool = False) -> None:
        self.http = gateway.http
        self.url: str = stream["whep_url"]
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        if audio:
            self.peer.addTransceiver("audio", "recvonly")
        video = self.peer.addTransceiver("video", "recvonly")
        known = RTCRtpReceiver.getCapabilities("video").codecs
        wanted = [codec for name in codecs for codec in known if codec.name == name]
        video.setCodecPreferences([*wanted, *[codec for codec in known if codec.name == "rtx"]])
        self.receiver = video.receiver
        self.answer = ""
        self.session = self.etag = self.accept_patch = ""
        self._track: asyncio.Future[MediaStreamTrack] = asyncio.get_running_loop().create_future()
        self.peer.on("track", lambda track: track.kind == "video" and self._track.set_result(track))

    async def offer(self) -> str:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return self.peer.localDescription.sdp

    async def connect(self, offer: str) -> None:
        response = await self.http.post(self.url, content=offer, headers=SDP)
        assert response.status_code == 201, response.text
        self.answer, self.session = response.text, response.headers["location"]
        self.etag, self.accept_patch = response.headers["etag"], response.headers["accept-patch"]
        await self.peer.setRemoteDescription(RTCSessionDescription(self.answer, "answer"))

    async def __aenter__(self) -> Self:
        await self.connect(await self.offer())
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.peer.close()

    async def frames(self, count: int) -> list[Any]:
        """The next pictures, decoded."""
        track = await self._track
        async with asyncio.timeout(10 * count):
            return [await track.recv() for _ in range(count)]

    async def cannot_go_on(self, kind: int) -> None:
        """Say so, as PLI or FIR."""
        [source] = {stats.ssrc for stats in (await self.receiver.getStats()).values() if stats.type == "inbound-rtp"}
        packet = RtcpPsfbPacket(fmt=kind, ssrc=1, media_ssrc=source)
        await self.receiver.transport._send_rtp(bytes(packet))


@pytest.fixture
def rtc_viewer(monkeypatch: pytest.MonkeyPatch) -> type[RtcViewer]:
    """A viewer over WebRTC, which is on this machine and may have no other address."""
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])
    return RtcViewer
