"""Headless Chromium."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A module that needs a GPU, pretended or not, says with which arguments in `GRAPHICS`."""
    # Whoever asks for these tests by their marker wants them run: what is missing is a failure, not a skip.
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "install Chromium first (Debian: apt-get install chromium)"
    with sync_playwright() as api:
        graphics = getattr(request.module, "GRAPHICS", ["--disable-gpu"])
        arguments = ["--no-sandbox", "--disable-background-networking", *graphics]
        browser = api.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()
