"""Headless Chromium."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.studio import start_gateway

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser with the arguments of the module's `GRAPHICS`; without a GPU where it has none."""
    # These tests run only when their marker is given, so a missing program is a failure and not a skip.
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "install Chromium first (Debian: apt-get install chromium)"
    with sync_playwright() as api:
        graphics = getattr(request.module, "GRAPHICS", ["--disable-gpu"])
        arguments = ["--no-sandbox", "--disable-background-networking", *graphics]
        browser = api.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def gateway_arguments() -> tuple[str, ...]:
    """Options of the gateway besides its port; a module may have others."""
    return ()


@pytest.fixture
def gateway(gateway_arguments: tuple[str, ...]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A gateway with the fake engine, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start_gateway(port, *gateway_arguments)
    yield process, port
    process.kill()
    process.communicate()


@pytest.fixture
def page(browser: Any, gateway: tuple[subprocess.Popen[str], int]) -> Iterator[Any]:
    """The studio page, on the screen of a computer. `complaints` are the errors in its console."""
    page = browser.new_page(base_url=f"http://127.0.0.1:{gateway[1]}", viewport={"width": 1280, "height": 860})
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto("/")
    yield page
    page.close()
