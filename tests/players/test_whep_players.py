"""Players that are not ours watch by WHEP for a minute, in a network namespace of their own: `make test-players`.

The gateway and the player each have an end of a veth pair, so that neither sees the loopback of the other, and that
addresses, keys and codecs are what they are between two machines.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.players, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("PLAYER_SECONDS", "60"))
GATEWAY, PLAYER = "10.213.7.1", "10.213.7.2"
PORT, FPS = 8000, 16
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SYSTEM_PYTHON = "/usr/bin/python3"
GSTREAMER = (
    "python3-gst-1.0 gir1.2-gst-plugins-bad-1.0 gstreamer1.0-plugins-base gstreamer1.0-plugins-good "
    "gstreamer1.0-plugins-bad gstreamer1.0-nice gstreamer1.0-libav"
)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, check=False, capture_output=True, text=True)


def missing(packages: str) -> None:
    """What can be installed is a failure; what cannot be is none of ours."""
    if shutil.which("apt-get") is None:
        pytest.skip(f"this system has no {packages}")
    pytest.fail(f"install these first: apt-get install {packages}")


@pytest.fixture(scope="module")
def namespaces() -> Iterator[tuple[str, str]]:
    """The names of two network namespaces with a wire between them."""
    if shutil.which("ip") is None:
        missing("iproute2")
    names = tuple(f"lr{os.getpid()}{end}" for end in "gp")

    def ip(*words: str) -> None:
        assert (done := run("ip", *words)).returncode == 0, done.stderr

    if (made := run("ip", "netns", "add", names[0])).returncode:
        pytest.fail(f"network namespaces are not permitted here, run this as root: {made.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "wire0", "netns", names[0], "type", "veth", "peer", "name", "wire0", "netns", names[1])
        for name, address in zip(names, (GATEWAY, PLAYER), strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire0")
            ip("-n", name, "link", "set", "wire0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            run("ip", "netns", "delete", name)


@dataclass
class Gateway:
    """A gateway in its namespace, as somebody in the other reaches it."""

    key: str
    namespace: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """A request from the player's side."""
        script = (
            "import sys, urllib.request as r\n"
            "method, url, key, body = sys.argv[1:]\n"
            "headers = {'Content-Type': 'application/json', 'Authorization': 'Bearer ' + key}\n"
            "request = r.Request(url, body.encode() or None, headers, method=method)\n"
            "print(r.urlopen(request, timeout=10).read().decode())"
        )
        url = f"http://{GATEWAY}:{PORT}{path}"
        words = [sys.executable, "-c", script, method, url, self.key, json.dumps(body) if body else ""]
        done = run("ip", "netns", "exec", self.namespace, *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def live_stream(self) -> str:
        id = self.call("POST", "/v1/streams", {"prompt": "a red ball", "seed": 5})["id"]
        deadline = time.monotonic() + 20
        while self.call("GET", f"/v1/streams/{id}")["frames_shown"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return id


@pytest.fixture(scope="module")
def gateway(namespaces: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    add = [sys.executable, "-m", "server", "keys", "add", "player", "--keys", str(keys)]
    printed = subprocess.run(add, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    key = next(word for word in printed.split() if word.startswith("lr_"))
    command = [sys.executable, "-m", "server", "--backend", "fake", "--host", GATEWAY, "--port", str(PORT)]
    process = subprocess.Popen(
        ["ip", "netns", "exec", namespaces[0], *command, "--keys", str(keys)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Livereel is ready")
    yield Gateway(key, namespaces[1])
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture
def stream(gateway: Gateway) -> Iterator[str]:
    id = gateway.live_stream()
    yield id
    gateway.call("DELETE", f"/v1/streams/{id}")


def judge(who: str, posted: float, frames: list[float], size: tuple[int, int]) -> None:
    """Print the figures of a minute, then hold them against the bar. Times are in seconds.

    The freeze is WebRTC's (`freezeCount`): a gap of at least the larger of 3 times the mean and the mean + 150 ms.
    """
    assert len(frames) > 1, f"{who} showed {len(frames)} frames"
    gaps = sorted(later - earlier for earlier, later in pairwise(frames))
    mean = statistics.fmean(gaps)
    p50, p99 = (gaps[min(len(gaps) - 1, int(share * len(gaps)))] for share in (0.5, 0.99))
    freezes = sum(gap >= max(3 * mean, mean + 0.15) for gap in gaps)
    first = frames[0] - posted
    print(
        f"\n{who}: {len(frames)} frames of {size[0]}x{size[1]} in {frames[-1] - frames[0]:.1f} s, first after "
        f"{first * 1e3:.0f} ms, gap p50 / p99 / max {p50 * 1e3:.1f} / {p99 * 1e3:.1f} / {gaps[-1] * 1e3:.1f} ms, "
        f"{freezes} freezes"
    )
    assert size == (256, 256)
    assert first <= 1.0
    assert freezes == 0
    assert p99 <= 1.5 / FPS
    assert len(frames) >= 0.99 * FPS * (frames[-1] - frames[0])
    assert frames[-1] - frames[0] >= 0.95 * SECONDS - 1


PLAY = """async ([url, key, codec, seconds]) => {
    const peer = new RTCPeerConnection({iceServers: []});
    const {codecs} = RTCRtpReceiver.getCapabilities("video");
    const wanted = codecs.filter(c => c.mimeType === `video/${codec}` || /rtx/.test(c.mimeType));
    peer.addTransceiver("video", {direction: "recvonly"}).setCodecPreferences(wanted);
    const video = document.createElement("video");
    video.muted = true;
    document.body.replaceChildren(video);
    const frames = [];
    const note = now => { frames.push(now); video.requestVideoFrameCallback(note); };
    video.requestVideoFrameCallback(note);
    peer.ontrack = ({track}) => { video.srcObject = new MediaStream([track]); video.play(); };
    await peer.setLocalDescription();
    const headers = {"Content-Type": "application/sdp", "Authorization": `Bearer ${key}`};
    const posted = performance.now();
    const answer = await fetch(url, {method: "POST", headers, body: peer.localDescription.sdp});
    if (answer.status !== 201) throw new Error(await answer.text());
    await peer.setRemoteDescription({type: "answer", sdp: await answer.text()});
    await new Promise(done => setTimeout(done, seconds * 1000));
    const stats = [...(await peer.getStats()).values()];
    const inbound = stats.find(s => s.type === "inbound-rtp");
    const mime = stats.find(s => s.id === inbound.codecId).mimeType;
    peer.close();
    await fetch(answer.headers.get("Location"), {method: "DELETE", headers});
    return {posted, frames, size: [video.videoWidth, video.videoHeight], mime, freezes: inbound.freezeCount,
            lost: inbound.packetsLost, keys: inbound.keyFramesDecoded, decoded: inbound.framesDecoded,
            buffer: 1000 * inbound.jitterBufferDelay / inbound.jitterBufferEmittedCount};
}"""


@pytest.fixture(scope="module")
def browser(namespaces: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    if CHROMIUM is None:
        missing("chromium")
    inside = tmp_path_factory.mktemp("browser") / "chromium"
    inside.write_text(f'#!/bin/sh\nexec ip netns exec {namespaces[1]} {CHROMIUM} "$@"\n')
    inside.chmod(0o755)
    arguments = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=inside, args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize("codec", ["VP8", "H264"])
def test_chromium_plays(browser: Any, gateway: Gateway, stream: str, codec: str) -> None:
    page = browser.new_page(base_url=f"http://{GATEWAY}:{PORT}")
    page.goto("/docs")
    seen = page.evaluate(PLAY, [f"/v1/streams/{stream}/whep", gateway.key, codec, SECONDS])
    page.close()
    frames = [at / 1e3 for at in seen["frames"]]
    print(
        f"\nChromium says: {seen['decoded']} decoded, {seen['keys']} keyframes, {seen['lost']} packets lost, "
        f"{seen['freezes']} freezes, {seen['buffer']:.0f} ms in the jitter buffer"
    )
    judge(f"Chromium, {codec}", seen["posted"] / 1e3, frames, tuple(seen["size"]))
    assert seen["mime"] == f"video/{codec}"
    assert seen["freezes"] == 0


@pytest.mark.parametrize("codec", ["VP8", "H264"])
def test_gstreamer_plays(gateway: Gateway, stream: str, codec: str) -> None:
    probe = [SYSTEM_PYTHON, "-c", "import gi; gi.require_version('GstWebRTC', '1.0')"]
    if not Path(SYSTEM_PYTHON).exists() or run(*probe).returncode:
        missing(GSTREAMER)
    url = f"http://{GATEWAY}:{PORT}/v1/streams/{stream}/whep"
    player = [SYSTEM_PYTHON, str(Path(__file__).with_name("gst_player.py")), url, gateway.key, codec, str(SECONDS)]
    done = run("ip", "netns", "exec", gateway.namespace, *player)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    [size] = seen["sizes"] or [(0, 0)]
    judge(f"GStreamer, {codec}", seen["posted"], seen["frames"], tuple(size))
