"""The overlay in Chromium: its transparency over every transport, and how it recovers from a lost connection."""

import io
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from engine import wire
from server.backends.fake import FakeBackend, _Stream

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
GRAPHICS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""WebGL in software, as in OBS on a machine without a GPU."""
PROMPT, SEED = "a ball", 3


@dataclass
class Gateway:
    process: subprocess.Popen[str]
    base: str
    key: str

    def call(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        data = msgspec.json.encode(body) if body else None
        request = urllib.request.Request(self.base + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read()
        return dict(msgspec.json.decode(text)) if text else {}


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    keys = ["--keys", str(tmp_path / "keys.toml")]
    add = [sys.executable, "-m", "server", "keys", "add", "studio", *keys]
    printed = subprocess.run(add, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    key = next(word for word in printed.split() if word.startswith("lr_"))
    process = subprocess.Popen(
        [sys.executable, "-m", "server", "--backend", "fake", "--port", "0", *keys],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Livereel is ready"), line
    yield Gateway(process, line.split()[-1].rstrip("/"), key)
    process.kill()
    process.communicate()


def drawn(frame: int) -> Image.Image:
    """The picture that the fake engine drew."""
    backend = FakeBackend()
    picture = backend._picture(_Stream(wire.Open("s", "mini", PROMPT, SEED), PROMPT, 0, 0), frame)
    return Image.frombytes("RGB", (256, 256), picture)


def open_stream(gateway: Gateway) -> tuple[dict[str, Any], str]:
    """A stream whose background is transparent, and a token to view it."""
    stream = gateway.call("POST", "/v1/streams", prompt=PROMPT, seed=SEED)
    red, green, blue = (int(value) for value in drawn(0).getpixel((0, 0)))  # type: ignore[union-attr]
    color = f"#{red:02x}{green:02x}{blue:02x}"
    gateway.call("PUT", f"/v1/streams/{stream['id']}/matte", color=color, tolerance=0.08, softness=0.05)
    token = gateway.call("POST", f"/v1/streams/{stream['id']}/tokens", scope="view")["token"]
    return stream, token


def overlay(browser: Any, gateway: Gateway, stream: dict[str, Any], token: str, without: str = "") -> Any:
    page = browser.new_page(base_url=gateway.base, viewport={"width": 256, "height": 256})
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on(
        "console", lambda message: page.complaints.append(message.text) if "Content Security" in message.text else None
    )
    page.add_init_script(without)
    page.goto(f"/overlay/{stream['id']}?token={token}")
    return page


def eventually(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state(page: Any) -> str:
    return str(page.evaluate("document.body.dataset.state"))


def ball_of(picture: Image.Image) -> list[tuple[int, int]]:
    """Pixels well inside the ball."""
    ground, low = picture.getpixel((0, 0)), picture.getpixel((0, 255))
    return [
        (x, y)
        for x in range(8, 248, 4)
        for y in range(8, 248, 4)
        if all(picture.getpixel((x + dx, y + dy)) not in (ground, low) for dx in (-6, 6) for dy in (-6, 6))
    ]


@pytest.mark.parametrize(
    ("transport", "without"),
    [
        ("whep", ""),
        ("fmp4", "delete window.RTCPeerConnection"),
        ("mjpeg", "delete window.RTCPeerConnection; delete window.MediaSource"),
    ],
)
def test_the_background_is_transparent(browser: Any, gateway: Gateway, transport: str, without: str) -> None:
    stream, token = open_stream(gateway)
    page = overlay(browser, gateway, stream, token, without)
    eventually(lambda: state(page) == "playing")
    assert page.evaluate("document.body.dataset.transport") == transport
    # Held where the whole ball can be seen.
    eventually(lambda: 12 <= gateway.call("GET", f"/v1/streams/{stream['id']}")["frames_shown"] % 48 <= 30)
    gateway.call("PATCH", f"/v1/streams/{stream['id']}", paused=True)
    page.wait_for_timeout(2500)
    expected = drawn(gateway.call("GET", f"/v1/streams/{stream['id']}")["frames_shown"] - 1)
    shot = Image.open(io.BytesIO(page.screenshot(omit_background=True)))
    assert shot.mode == "RGBA" and shot.size == (256, 256)
    ball = ball_of(expected)
    assert len(ball) > 20
    for point in ball:
        pixel, wanted = shot.getpixel(point), expected.getpixel(point)
        assert isinstance(pixel, tuple) and isinstance(wanted, tuple)
        assert pixel[3] == 255
        assert max(abs(a - b) for a, b in zip(pixel, wanted, strict=False)) < 24
    xs, ys = [x for x, _ in ball], [y for _, y in ball]
    outside = [
        (x, y)
        for x in range(2, 254, 6)
        for y in range(2, 254, 6)
        if not (min(xs) - 24 < x < max(xs) + 24 and min(ys) - 24 < y < max(ys) + 24)
    ]
    alphas = [shot.getpixel(point)[3] for point in outside]  # type: ignore[index]
    assert len(alphas) > 500 and max(alphas) == 0
    # A pause is no lost connection.
    assert state(page) == "playing"
    assert page.complaints == []
    page.close()


def test_a_lost_connection_is_made_again(browser: Any, gateway: Gateway) -> None:
    stream, token = open_stream(gateway)
    sessions: list[str] = []
    page = browser.new_page(base_url=gateway.base, viewport={"width": 256, "height": 256})
    page.on("response", lambda r: sessions.append(r.headers["location"]) if r.status == 201 else None)
    page.goto(f"/overlay/{stream['id']}?token={token}")
    eventually(lambda: state(page) == "playing")
    gateway.call("DELETE", sessions[0])
    page.wait_for_selector("body[data-state=lost]", timeout=10_000)
    page.wait_for_selector("body[data-state=playing]", timeout=10_000)
    assert len(sessions) == 2
    assert page.evaluate("document.body.dataset.transport") == "whep"
    # With the stream it is over, and the picture goes.
    gateway.call("DELETE", f"/v1/streams/{stream['id']}")
    page.wait_for_selector("body[data-state=over]", timeout=20_000)
    page.wait_for_timeout(600)
    assert Image.open(io.BytesIO(page.screenshot(omit_background=True))).getextrema()[3] == (0, 0)
    page.close()


def test_a_source_that_obs_does_not_show_takes_no_frames(browser: Any, gateway: Gateway) -> None:
    stream, token = open_stream(gateway)
    page = overlay(browser, gateway, stream, token)
    eventually(lambda: state(page) == "playing")

    def viewers() -> int:
        return int(gateway.call("GET", f"/v1/streams/{stream['id']}")["viewers"])

    def tell(shown: str) -> None:
        page.evaluate(f"dispatchEvent(new CustomEvent('obsSourceVisibleChanged', {{detail: {{visible: {shown}}}}}))")

    eventually(lambda: viewers() == 1)
    tell("false")
    eventually(lambda: viewers() == 0)
    tell("true")
    eventually(lambda: viewers() == 1)
    page.close()


def test_without_a_token_there_is_nothing_to_see(browser: Any, gateway: Gateway) -> None:
    stream, _ = open_stream(gateway)
    page = overlay(browser, gateway, stream, "")
    page.wait_for_selector("body[data-state=over]", timeout=10_000)
    assert Image.open(io.BytesIO(page.screenshot(omit_background=True))).getextrema()[3] == (0, 0)
    page.close()
