"""Glass-to-glass latency: from the generation of a frame until a browser's canvas shows it, by transport.

    python -m server.bench.latency

The fake engine stamps frame number, time and prompt on its pictures (`server.backends.fake.stamp`). Headless Chromium,
on the same machine and so with the same clock, watches over each transport and reads the stamps back from a canvas. At
the same time a program reads raw frames from the WebSocket; the difference is what transport, codec and browser add to
the lead that playback keeps. Then the prompt is changed, and the time from the request until the canvas shows the new
prompt is measured.
"""

import argparse
import asyncio
import contextlib
import datetime
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import websockets

from server.backends.fake import STAMP_BITS, STAMP_FIELDS, STAMP_ROWS, FakeBackend
from server.bench.clients import open_live_stream
from server.bench.gateway import Gateway, running

TRANSPORTS = ("vp8", "h264", "fmp4", "mjpeg")
HEADER_BYTES = 16
CYCLE_MS = 1 << STAMP_FIELDS[1]

PLAYERS = """
const columns = %(columns)d, rows = %(rows)d;
const canvas = document.createElement("canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });
window.seen = [];
function read(source, width, height) {
  canvas.width = width; canvas.height = height;
  context.drawImage(source, 0, 0, width, height);
  const now = performance.timeOrigin + performance.now();
  const side = Math.floor(width / columns);
  const { data } = context.getImageData(0, 0, width, side * rows);
  const bytes = [];
  for (let k = 0; k < columns * rows; k += 1) {
    const x = (k %% columns) * side + (side >> 1), y = Math.floor(k / columns) * side + (side >> 1);
    if (k %% 8 === 0) bytes.push(0);
    bytes[bytes.length - 1] = bytes[bytes.length - 1] * 2 + (data[4 * (y * width + x) + 1] > 127 ? 1 : 0);
  }
  const sum = bytes.pop();
  if (bytes.reduce((a, b) => a + b) %% 256 !== sum) { window.damaged = (window.damaged || 0) + 1; return; }
  const frame = bytes[0] * 256 + bytes[1];
  const last = window.seen[window.seen.length - 1];
  if (last && last[0] === frame) return;
  window.seen.push([frame, ((bytes[2] * 256 + bytes[3]) * 256 + bytes[4]) * 256 + bytes[5], bytes[6], now]);
}
function video() {
  const element = document.createElement("video");
  element.muted = true; element.playsInline = true;
  document.body.append(element);
  const next = () => {
    read(element, element.videoWidth, element.videoHeight);
    element.requestVideoFrameCallback(next);
  };
  element.requestVideoFrameCallback(next);
  return element;
}
async function webrtc(url, mime) {
  const peer = new RTCPeerConnection({ iceServers: [] });
  const receiver = peer.addTransceiver("video", { direction: "recvonly" });
  receiver.setCodecPreferences(RTCRtpReceiver.getCapabilities("video").codecs.filter(
    (codec) => codec.mimeType === mime || codec.mimeType === "video/rtx"));
  const element = video();
  peer.ontrack = ({ track }) => { element.srcObject = new MediaStream([track]); element.play(); };
  await peer.setLocalDescription();
  await new Promise((done) => {
    if (peer.iceGatheringState === "complete") done();
    peer.onicegatheringstatechange = () => { if (peer.iceGatheringState === "complete") done(); };
  });
  const headers = { "content-type": "application/sdp" };
  const response = await fetch(url, { method: "POST", headers, body: peer.localDescription.sdp });
  if (!response.ok) throw new Error(await response.text());
  await peer.setRemoteDescription({ type: "answer", sdp: await response.text() });
}
async function fmp4(url) {
  const element = video(), source = new MediaSource(), waiting = [];
  element.src = URL.createObjectURL(source);
  await new Promise((open) => { source.onsourceopen = open; });
  let buffer = null;
  const append = () => { if (!buffer.updating && waiting.length) buffer.appendBuffer(waiting.shift()); };
  const onAppended = () => {
    const { buffered } = element;
    // Jump to the newest frame, at the start and whenever playback has fallen behind it.
    if (buffered.length && (element.paused || buffered.end(buffered.length - 1) - element.currentTime > 0.3)) {
      element.currentTime = Math.max(buffered.start(0), buffered.end(buffered.length - 1) - 0.07);
      element.play();
    }
    append();
  };
  const socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") return;
    waiting.push(data.slice(16));
    if (!buffer) {
      buffer = source.addSourceBuffer(mediaType(new Uint8Array(waiting[0])));
      buffer.onupdateend = onAppended;
    }
    append();
  };
}
// As in clients/js/video.js: the profile and level that the init segment states after the name of the avcC box.
function mediaType(init) {
  const at = String.fromCharCode(...init).indexOf("avcC") + 5;
  const profile = Array.from(init.subarray(at, at + 3), (byte) => byte.toString(16).padStart(2, "0"));
  return `video/mp4; codecs="avc1.${profile.join("")}"`;
}
function mjpeg(url) {
  const image = new Image();
  const readFrame = () => {
    if (image.naturalWidth) read(image, image.naturalWidth, image.naturalHeight);
    requestAnimationFrame(readFrame);
  };
  document.body.append(image);
  image.src = url;
  requestAnimationFrame(readFrame);
}
"""

Sightings = list[tuple[int, int, int, float]]
"""Frame number, time of generation (ms, modulo `CYCLE_MS`), prompt, and time at which it was seen (ms since 1970)."""


def read_stamp(rgb: bytes, width: int) -> tuple[int, int, int] | None:
    """Frame number, time and prompt of a raw picture, RGB24; None if its stamp is damaged."""
    columns = STAMP_BITS // STAMP_ROWS
    side = width // columns
    bits = 0
    for k in range(STAMP_BITS):
        x, y = k % columns * side + side // 2, k // columns * side + side // 2
        bits = bits * 2 + (rgb[3 * (y * width + x) + 1] > 127)
    data = bits.to_bytes(STAMP_BITS // 8)
    if sum(data[:-1]) % 256 != data[-1]:
        return None
    return int.from_bytes(data[:2]), int.from_bytes(data[2:6]), data[6]


def milliseconds(since: float, until: float) -> float:
    """Milliseconds between two times modulo `CYCLE_MS`, which is 49 days."""
    return (until - since + CYCLE_MS / 2) % CYCLE_MS - CYCLE_MS / 2


@dataclass
class Observation:
    """What was seen over one transport."""

    canvas: Sightings
    raw: Sightings
    damaged: int
    """Pictures on the canvas whose stamp could not be read."""
    steered: list[float] = field(default_factory=list)
    """Milliseconds from each request for a prompt until the canvas showed it."""

    @property
    def sent(self) -> int:
        """Frames that the gateway sent between the first and the last that the canvas showed."""
        return sum(self.canvas[0][0] <= frame <= self.canvas[-1][0] for frame, *_ in self.raw) if self.canvas else 0

    @property
    def from_engine(self) -> list[float]:
        """Milliseconds from a frame's generation until the canvas showed it."""
        return [milliseconds(made, at) for _, made, _, at in self.canvas]

    @property
    def from_gateway(self) -> list[float]:
        """Milliseconds from the arrival of the same frame at the program that reads raw frames."""
        arrived = {frame: at for frame, _, _, at in self.raw}
        return [at - arrived[frame] for frame, _, _, at in self.canvas if frame in arrived]


def percentiles(values: list[float]) -> str:
    """Median and 95th percentile, as text."""
    ordered = sorted(values)
    if not ordered:
        return "-"
    return " / ".join(f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))]:.0f}" for share in (0.5, 0.95))


async def read_raw(url: str, seen: Sightings) -> None:
    """Read raw frames until cancelled."""
    async with websockets.connect(f"{url}?format=rgb24", compression=None, max_size=None) as socket:
        async for item in socket:
            if isinstance(item, bytes):
                now = time.time() * 1000
                if stamp := read_stamp(item[HEADER_BYTES:], int.from_bytes(item[2:4])):
                    seen.append((*stamp, now))


async def watch(browser: Any, gateway: Gateway, transport: str, seconds: float, steers: int) -> Observation:
    """Watch a new stream over one transport, for so many seconds and then for so many prompt changes."""
    async with httpx.AsyncClient(base_url=gateway.base, timeout=30) as http:
        stream = await open_live_stream(http, "prompt 0")
        raw: Sightings = []
        reader = asyncio.create_task(read_raw(stream["ws_url"], raw))
        # The page must be of the gateway's origin for its requests to be allowed; its CSP is not what is measured.
        context = await browser.new_context(bypass_csp=True)
        page = await context.new_page()
        await page.goto(gateway.base + "/livez")
        players = PLAYERS % {"columns": STAMP_BITS // STAMP_ROWS, "rows": STAMP_ROWS}
        await page.evaluate(f"async (stream) => {{ {players} await {START[transport]}; }}", stream)
        await asyncio.sleep(3)
        await page.evaluate("window.seen.length = 0")
        await asyncio.sleep(seconds)
        canvas: Sightings = [tuple(each) for each in await page.evaluate("window.seen")]
        found = Observation(canvas, list(raw), await page.evaluate("window.damaged || 0"))
        for number in range(steers):
            found.steered.append(await steer(page, http, stream["id"], f"prompt {number + 1}"))
        await context.close()
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        await http.delete(f"/v1/streams/{stream['id']}")
    return found


async def steer(page: Any, http: httpx.AsyncClient, stream: str, prompt: str) -> float:
    """Change the prompt; returns the milliseconds until the canvas shows it."""
    before = (await page.evaluate("window.seen"))[-1][2]
    await asyncio.sleep(random.uniform(0, 0.75))  # anywhere in a chunk
    asked_at = time.time() * 1000
    await http.patch(f"/v1/streams/{stream}", json={"prompt": prompt})
    async with asyncio.timeout(20):
        while True:
            latest = await page.evaluate("window.seen.slice(-64)")
            if later := [at for _, _, shown, at in latest if shown != before and at > asked_at]:
                return float(later[0] - asked_at)
            await asyncio.sleep(0.1)


START = {
    "vp8": "webrtc(stream.whep_url, 'video/VP8')",
    "h264": "webrtc(stream.whep_url, 'video/H264')",
    "fmp4": "fmp4(stream.ws_url + '?format=fmp4')",
    "mjpeg": "mjpeg(`/v1/streams/${stream.id}/mjpeg`)",
}


async def run(options: argparse.Namespace, gateway: Gateway) -> int:
    """Measure each transport in turn and print its figures; returns the exit status."""
    from playwright.async_api import async_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        print("install Chromium first (Debian: apt-get install chromium)", file=sys.stderr)
        return 1
    print(f"{'':8s} {'engine to canvas':>18s} {'gateway to canvas':>18s} {'steer to picture':>18s}   seen / damaged")
    good = True
    async with async_playwright() as api:
        arguments = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]
        browser = await api.chromium.launch(executable_path=chromium, args=arguments)
        for transport in options.transport or TRANSPORTS:
            found = await watch(browser, gateway, transport, options.seconds, options.steers)
            figures = [percentiles(each) for each in (found.from_engine, found.from_gateway, found.steered)]
            print(
                f"{transport:8s} {figures[0]:>18s} {figures[1]:>18s} {figures[2]:>18s}   "
                f"{len(found.canvas)} of {found.sent} / {found.damaged}",
                flush=True,
            )
            good &= len(found.canvas) > 0
        await browser.close()
    print("ms, median / 95th percentile")
    return int(not good)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="one of them; may be repeated (all)")
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--steers", type=int, default=10)
    parser.add_argument("--chunk-seconds", type=float, default=0.35, help="the pretended engine's; mini's is 0.37")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, 256x256 at 16/s, {options.chunk_seconds} s a chunk")
    backend = partial(FakeBackend, stamped=True, chunk_seconds=options.chunk_seconds)
    with running(backend, idle_timeout_s=0) as gateway:
        return asyncio.run(run(options, gateway))


if __name__ == "__main__":
    sys.exit(main())
