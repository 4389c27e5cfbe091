"""What the tests of the studio page share: how to start a gateway, and what a user does and sees."""

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GATEWAY = """
import signal, sys
import server.__main__ as main
from server.backends.fake import FakeBackend

backend = FakeBackend(restart_after=4, vocabulary=frozenset("a an red blue ball cube cone on grass".split()))
main.create_backend = lambda config: backend
crash = lambda *_: backend._task.get_loop().call_soon_threadsafe(backend.crash)
signal.signal(signal.SIGUSR1, crash)
sys.exit(main.main())
"""


def start_gateway(port: int, *arguments: str) -> subprocess.Popen[str]:
    """A gateway with the fake engine, ready. SIGUSR1 crashes the engine, which is back after four seconds."""
    command = [sys.executable, "-c", GATEWAY, "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Livereel is ready")
    return process


def state(page: Any, wanted: str, seconds: float = 10) -> None:
    page.wait_for_selector(f"body[data-state={wanted}]", timeout=seconds * 1000)


def eventually(condition: Any, seconds: float = 10) -> None:
    # Playwright's own wait_for_function evaluates a string in the page, which the page's policy forbids.
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def states(page: Any) -> list[str]:
    return page.evaluate("fetch('/v1/streams').then(r => r.json()).then(r => r.data.map(s => s.state))")


def play(page: Any, prompt: str) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")


def number(page: Any, figure: str) -> float:
    text = page.text_content(f"#{figure}")  # the drawer of the figures may be closed
    found = re.match(r"[\d.]+", text)
    assert found, text
    return float(found[0])


def colours(page: Any) -> int:
    """How many different colours a diagonal of the picture has."""
    script = """() => {
        const context = document.getElementById("picture").getContext("2d");
        const {data} = context.getImageData(0, 0, 256, 256);
        return new Set(Array.from({length: 256}, (_, i) => data.slice(i * 257 * 4, i * 257 * 4 + 3).join())).size;
    }"""
    return page.evaluate(script)
