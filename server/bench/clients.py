"""Clients as benchmarks need them: many at once, each of whom notes what nobody promised."""

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

from server.bench.fanout import Got, Packets, watch_rtc

PROMPTS = ("a red ball", "a blue cube on sand", "a green ring at night", "a yellow cone on water", "a teal cylinder")
CODECS = {"h264": "H264", "vp8": "VP8"}
SOCKETS = ("mjpeg", "rgb24", "fmp4", "events")

REFUSALS = {"queue_full", "stream_queued", "stream_ended", "stream_not_found", "too_many_connecting"}
"""What a busy server says to a client who did nothing wrong: stated in the API, and so no fault."""


@dataclass
class Noted:
    """What happened to all clients together."""

    done: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    """What nobody promised; there should be none."""
    stalls: list[tuple[float, str]] = field(default_factory=list)
    """Monotonic time and stream of every stall that began."""
    losses: list[tuple[float, str]] = field(default_factory=list)
    """The same of the news that the engine is lost."""
    resumed: list[tuple[float, str]] = field(default_factory=list)
    """The same of the first chunk after that."""


class Client:
    """One client: a connection of its own to the API, and a look at one stream after the other."""

    def __init__(self, http: httpx.AsyncClient, noted: Noted) -> None:
        self.http, self.noted = http, noted

    async def call(self, what: str, method: str, path: str, **request: Any) -> httpx.Response | None:
        """The response, or None when the server refused, as it may."""
        try:
            response = await self.http.request(method, path, **request)
        except httpx.TransportError as error:
            self.noted.faults[f"{what}: {type(error).__name__}"] += 1
            return None
        if response.is_success:
            self.noted.done[what] += 1
            return response
        self._not_done(what, response)
        return None

    def _not_done(self, what: str, response: httpx.Response) -> None:
        """Note why."""
        code = response.json().get("error", {}).get("code")
        if code in REFUSALS:
            self.noted.refused[code] += 1
        else:
            self.noted.faults[f"{what}: {response.status_code} {code}"] += 1

    async def open(self, **fields: Any) -> dict[str, Any] | None:
        """A new stream, or None."""
        body = {"prompt": random.choice(PROMPTS), **fields}
        response = await self.call("opened", "POST", "/v1/streams", json=body)
        return response.json() if response else None

    async def steer(self, stream: str) -> None:
        """Change the prompt, in any way."""
        body = {"prompt": random.choice(PROMPTS), "transition": random.choice(("soft", "recache", "cut"))}
        await self.call("steered", "PATCH", f"/v1/streams/{stream}", json=body)

    async def watch(self, stream: dict[str, Any], format: str, seconds: float) -> int:
        """Watch for so long, or until the stream is over; returns the frames that came."""
        try:
            if format == "img":
                return await self._images(stream, seconds)
            if format in CODECS:
                return await self._rtc(stream, format, seconds)
            return await self._socket(stream, format, seconds)
        except (httpx.TransportError, OSError, websockets.WebSocketException) as error:
            self.noted.faults[f"{format}: {type(error).__name__} {error}"[:80]] += 1
            return 0

    async def _socket(self, stream: dict[str, Any], format: str, seconds: float) -> int:
        frames, lost = 0, False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                try:
                    async with websockets.connect(
                        f"{stream['ws_url']}?format={format}", compression=None, max_size=None
                    ) as socket:
                        self.noted.done[f"watched {format}"] += 1
                        async for item in socket:
                            if isinstance(item, bytes):
                                frames += 1
                                struct.unpack_from("!BBHHHQ", item)
                            else:
                                lost = self._event(stream["id"], msgspec.json.decode(item), lost)
                except websockets.ConnectionClosed as closed:
                    code = closed.rcvd.code if closed.rcvd else 1006
                    if code == 4404:
                        self.noted.refused["stream_not_found"] += 1
                    else:
                        self.noted.faults[f"{format} socket closed with {code}"] += 1
        return frames

    def _event(self, stream: str, event: dict[str, Any], lost: bool) -> bool:
        """Note what is news; returns whether the engine is lost."""
        now = time.monotonic()
        match event:
            case {"type": "stall", "phase": "began"}:
                self.noted.stalls.append((now, stream))
            case {"type": "error", "code": "engine_restarted"}:
                self.noted.losses.append((now, stream))
                return True
            case {"type": "error", "code": str(code)} if code not in REFUSALS:
                self.noted.faults[f"event {code}"] += 1
            case {"type": "chunk"} if lost:
                self.noted.resumed.append((now, stream))
                return False
        return lost

    async def _images(self, stream: dict[str, Any], seconds: float) -> int:
        frames = 0
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(seconds),
                self.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response,
            ):
                if response.is_success:
                    self.noted.done["watched img"] += 1
                    async for data in response.aiter_bytes():
                        frames += data.count(b"\r\n\r\n\xff\xd8")
                else:
                    await response.aread()
                    self._not_done("img", response)
        return frames

    async def _rtc(self, stream: dict[str, Any], codec: str, seconds: float) -> int:
        got = Got()
        try:
            peer = await watch_rtc(str(self.http.base_url), stream, CODECS[codec], Packets(got, CODECS[codec]))
        except httpx.HTTPStatusError as error:
            self._not_done(codec, error.response)
            return 0
        self.noted.done[f"watched {codec}"] += 1
        await asyncio.sleep(seconds)
        await peer.close()
        return len(got.frames)
