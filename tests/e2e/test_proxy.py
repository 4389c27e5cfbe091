"""Page, overlay and docs in Chromium behind a reverse proxy that serves them under /live/."""

import contextlib
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.studio import colours, eventually, play, state

pytestmark = pytest.mark.browser

GRAPHICS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
"""WebGL in software, for the overlay."""


class ReverseProxy:
    """Serves a local port under /live/ at another, one connection a request, and says so in `X-Forwarded-*`."""

    def __init__(self, upstream: int, *, strip: bool) -> None:
        """With `strip` the prefix is taken off before a request is passed on."""
        self._upstream, self._strip = upstream, strip
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        head = b""
        with client, contextlib.suppress(OSError):
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(65536)):
                    return
                head += data
            request, _, rest = head.partition(b"\r\n")
            if b" /live/" not in request:
                client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if self._strip:
                request = request.replace(b" /live/", b" /", 1)
            rest = re.sub(rb"(?im)^host:.*\r\n", b"", rest)
            added = f"Host: localhost:{self._upstream}\r\nX-Forwarded-Host: 127.0.0.1:{self.port}\r\n"
            added += "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\nX-Forwarded-Prefix: /live\r\n"
            if b"upgrade: websocket" not in rest.lower():
                rest = re.sub(rb"(?im)^connection:.*\r\n", b"", rest)
                added += "Connection: close\r\n"
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                server.sendall(request + b"\r\n" + added.encode() + rest)
                threading.Thread(target=pump, args=(client, server), daemon=True).start()
                pump(server, client)


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes until the source ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(params=[True, False], ids=["stripped", "passed on"])
def proxied(request: pytest.FixtureRequest, gateway: tuple[subprocess.Popen[str], int]) -> Iterator[str]:
    """The URL below which a proxy serves the gateway."""
    proxy = ReverseProxy(gateway[1], strip=request.param)
    yield f"http://127.0.0.1:{proxy.port}/live/"
    proxy.close()


@pytest.fixture
def page(browser: Any, proxied: str) -> Iterator[Any]:
    """An empty page. `complaints` has the errors in its console, and requests that missed the prefix or failed."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.complaints = []

    def note(response: Any) -> None:
        if not response.url.startswith(proxied) or response.status >= 400:
            page.complaints.append(f"{response.status} {response.url}")

    page.on("response", note)
    page.on("websocket", lambda s: None if "/live/v1/" in s.url else page.complaints.append(s.url))
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    yield page
    page.close()


def test_the_page_plays(page: Any, proxied: str) -> None:
    page.goto(proxied)
    play(page, "a red ball")
    state(page, "live")
    eventually(lambda: colours(page) > 2)
    play(page, "a blue ball")
    page.wait_for_selector("text=on screen", timeout=10_000)
    page.click("#stop")
    assert page.complaints == []


def test_the_overlay_and_the_reference_load(page: Any, proxied: str) -> None:
    page.goto(f"{proxied}docs")
    page.wait_for_selector("#docs details")
    assert page.locator("#docs details").count() > 20
    page.click("text=Live preview")
    page.wait_for_selector("#prompt")
    assert page.url == proxied
    made = page.request.post(f"{proxied}v1/streams", data={"prompt": "a ball"}).json()
    assert made["whep_url"] == f"{proxied}v1/streams/{made['id']}/whep"
    page.goto(f"{proxied}overlay/{made['id']}")
    page.wait_for_selector("body[data-state=playing]", timeout=20_000)
    assert page.evaluate("document.body.dataset.transport") == "whep"
    assert page.complaints == []
