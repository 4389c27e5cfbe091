"""Runs a `LocalBackend` over the stub engine and collects what it delivers."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from engine import wire
from server.backends.base import EngineEvent
from server.backends.local import LocalBackend
from server.bench.gateway import children

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, str(Path(__file__).parents[1] / "stub_engine.py"))


class Delivered:
    """Collects what the backend delivers."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.pixels = b""
        self._news = asyncio.Event()

    def __call__(self, event: EngineEvent, pixels: bytes) -> None:
        if not isinstance(event, wire.Heartbeat):
            self.events.append(event)
        self.pixels = pixels or self.pixels
        self._news.set()

    async def until(self, *types: type) -> None:
        """Wait for exactly these events, in this order."""
        async with asyncio.timeout(15):
            while len(self.events) < len(types):
                self._news.clear()
                await self._news.wait()
        assert [type(event) for event in self.events] == list(types)


@asynccontextmanager
async def running(behaviour: str, **options: object) -> AsyncIterator[tuple[LocalBackend, Delivered]]:
    settings = {"silent_seconds": 5.0, "hung_seconds": 0.5, "backoff_seconds": (0.02, 5.0), **options}
    backend, delivered = LocalBackend(behaviour, command=COMMAND, **settings), Delivered()
    await backend.start(delivered)
    try:
        yield backend, delivered
    finally:
        await backend.stop()
        assert backend.pid is None
        assert children(os.getpid()) == []


async def standby_of(backend: LocalBackend) -> int:
    """Wait until the standby can take over, and return its process id."""
    async with asyncio.timeout(15):
        while (pid := backend.standby_pid) is None:
            await asyncio.sleep(0.01)
    return pid


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def shared_memory() -> list[str]:
    """Every trace of shared memory: files by name, and what this process has open or mapped."""
    names = [path.name for path in Path("/dev/shm").iterdir() if "livereel" in path.name]
    seen = Path("/proc/self/maps").read_text().splitlines()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing
            seen.append(os.readlink(path))
    return names + [line for line in seen if "livereel-frames" in line]
