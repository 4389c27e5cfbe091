"""What the studio page says about the stream's state, the connection and the API key."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.studio import ROOT, colours, eventually, play, state

pytestmark = pytest.mark.browser

Gateway = tuple[subprocess.Popen[str], int]


def badge(page: Any) -> tuple[str, str]:
    """The badge's text, and the colour of its dot."""
    colour = "getComputedStyle(document.querySelector('#badge .dot')).backgroundColor"
    return page.inner_text("#badge-text"), page.evaluate(colour)


GREEN, AMBER, RED = "rgb(99, 214, 160)", "rgb(240, 184, 102)", "rgb(255, 128, 128)"


def test_the_badge_says_that_the_engine_restarts(page: Any, gateway: Gateway) -> None:
    play(page, "a red ball")
    state(page, "live")
    eventually(lambda: badge(page) == ("live", GREEN))
    gateway[0].send_signal(signal.SIGUSR1)
    eventually(lambda: badge(page) == ("engine restarting", AMBER), 3)
    # Pausing, resuming and running out of frames change nothing of that.
    page.click("#pause")
    state(page, "paused")
    assert badge(page) == ("engine restarting", AMBER)
    page.click("#pause")
    state(page, "live")
    assert badge(page) == ("engine restarting", AMBER)
    eventually(lambda: page.inner_text("#message-title") == "The engine is restarting", 5)
    assert badge(page) == ("engine restarting", AMBER)
    eventually(lambda: badge(page) == ("live", GREEN))
    assert page.inner_text("#message-title") == ""
    assert not page.is_visible("#alert")


def test_who_reconnects_is_told_that_the_engine_restarts(page: Any, gateway: Gateway) -> None:
    page.add_init_script("""
        window.sockets = [];
        WebSocket = class extends WebSocket { constructor(url) { super(url); sockets.push(this); } };
    """)
    page.reload()
    play(page, "a red ball")
    state(page, "live")
    gateway[0].send_signal(signal.SIGUSR1)
    eventually(lambda: badge(page)[0] == "engine restarting", 3)
    before = page.evaluate("sockets.at(-1).close(); sockets.length")
    eventually(lambda: badge(page) == ("reconnecting", RED), 3)
    eventually(lambda: badge(page)[0] != "reconnecting", 3)
    assert page.evaluate("sockets.length") == before + 1
    assert badge(page) == ("engine restarting", AMBER)
    eventually(lambda: badge(page) == ("live", GREEN))


def test_the_badge_says_that_the_connection_is_lost(page: Any, gateway: Gateway) -> None:
    play(page, "a red ball")
    state(page, "live")
    gateway[0].kill()
    eventually(lambda: badge(page) == ("reconnecting", RED), 3)
    assert page.inner_text("#message-title") == "Connection lost"


def test_a_connection_that_is_silent_is_lost(page: Any, gateway: Gateway) -> None:
    """Nothing closes the socket when the way to the server is cut."""
    play(page, "a red ball")
    state(page, "live")
    eventually(lambda: colours(page) > 2)
    gateway[0].send_signal(signal.SIGSTOP)
    try:
        eventually(lambda: badge(page) == ("reconnecting", RED), 15)
        assert page.inner_text("#message-title") == "Connection lost"
    finally:
        gateway[0].send_signal(signal.SIGCONT)
    eventually(lambda: badge(page) == ("live", GREEN), 20)
    assert page.inner_text("#message-title") == ""


def test_a_paused_stream_is_no_lost_connection(page: Any) -> None:
    play(page, "a red ball")
    state(page, "live")
    page.click("#pause")
    state(page, "paused")
    for _ in range(40):
        page.wait_for_timeout(200)
        assert badge(page) == ("paused", AMBER)


# the API key


@pytest.fixture
def keys(tmp_path: Path) -> tuple[str, str]:
    """The file, and the key in it."""
    path = str(tmp_path / "keys.toml")
    add = [sys.executable, "-m", "server", "keys", "add", "studio", "--keys", path]
    printed = subprocess.run(add, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return path, next(word for word in printed.split() if word.startswith("lr_"))


class TestKey:
    @pytest.fixture
    def gateway_arguments(self, keys: tuple[str, str]) -> tuple[str, ...]:
        return ("--keys", keys[0])

    @pytest.mark.parametrize("wrong", ["lr_wrong", "schlüssel→"])
    def test_a_wrong_key_is_called_wrong_and_asked_for_again(
        self, page: Any, keys: tuple[str, str], wrong: str
    ) -> None:
        page.wait_for_selector("#ask[open]")
        assert not page.is_visible("#key-wrong")
        page.fill("#key", wrong)
        page.press("#key", "Enter")
        page.wait_for_selector("#ask[open] #key-wrong:not([hidden])")
        assert "wrong" in page.inner_text("#ask")
        assert "cannot be reached" not in page.inner_text("body")
        page.fill("#key", keys[1])
        page.press("#key", "Enter")
        eventually(lambda: "256" in page.inner_text("#model"))
        assert not page.is_visible("#ask")
        play(page, "a red ball")
        state(page, "live")

    def test_who_gives_no_key_is_asked_again_at_the_next_try(self, page: Any, keys: tuple[str, str]) -> None:
        page.wait_for_selector("#ask[open]")
        page.click("#ask button:not(.primary)")
        eventually(lambda: page.inner_text("#model") == "the server needs an API key")
        page.wait_for_timeout(6000)  # the page asks the server every five seconds
        assert not page.is_visible("#ask")
        play(page, "a red ball")
        page.wait_for_selector("#ask[open]")
        page.fill("#key", keys[1])
        page.press("#key", "Enter")
        state(page, "live")
