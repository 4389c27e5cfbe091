"""Headless Chromium."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

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
