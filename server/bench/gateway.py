"""A gateway in a process of its own, as benchmarks measure it: its address, its figures, what it holds."""

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import logs
from server.__main__ import Server, freeze_heap, listen, uvicorn_config
from server.backends.base import Backend
from server.config import Config

START_SECONDS = 300.0
"""An engine with weights may take this long."""


@dataclass(frozen=True)
class Gateway:
    """One that runs. Its figures are those of `/metrics`, its open files and children those of the system."""

    base: str
    pid: int

    def figures(self) -> dict[str, float]:
        """Every sample by name and labels."""
        text = urllib.request.urlopen(self.base + "/metrics", timeout=30).read().decode()
        return {name: float(value) for name, value in re.findall(r"(?m)^([a-z]\S*) (\S+)$", text)}

    def descriptors(self) -> list[str]:
        """What its file descriptors stand for, sockets without their numbers."""
        folder, found = Path(f"/proc/{self.pid}/fd"), []
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                found.append(re.sub(r":\[\d+\]", "", os.readlink(entry)))
        return sorted(found)

    def children(self) -> list[int]:
        """Processes that it started and that have not been waited for, the oldest first: the engine, then its spare."""
        return children(self.pid)


def children(pid: int) -> list[int]:
    """Processes whose parent this one is, the oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == pid:
                    found.append((int(fields[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def quantile(before: Mapping[str, float], after: Mapping[str, float], name: str, share: float) -> float:
    """Upper bound, in the histogram's unit, of this share of what was observed in between."""
    buckets = []
    for key, count in after.items():
        if found := re.fullmatch(rf'{name}_bucket{{le="(.+)"}}', key):
            buckets.append((float(found[1]), count - before.get(key, 0.0)))
    total = max((count for _, count in buckets), default=0.0)
    return min((bound for bound, count in buckets if count and count >= share * total), default=0.0)


SETTLE_SECONDS = 20.0
"""How long a gateway may take to let go of what its clients left behind."""


@dataclass(frozen=True)
class Sample:
    """What a gateway held at a time."""

    at: float
    """On the monotonic clock."""
    resident: float
    engine: float
    """Bytes in memory of the two processes."""
    descriptors: int
    tasks: int
    threads: int


def look(gateway: Gateway) -> Sample:
    """What the gateway holds now."""
    figures = gateway.figures()
    return Sample(
        time.monotonic(),
        figures["process_resident_memory_bytes"],
        figures["livereel_engine_resident_bytes"],
        len(gateway.descriptors()),
        int(figures["livereel_tasks"]),
        int(figures["livereel_threads"]),
    )


async def settled(gateway: Gateway, before: Sample) -> Sample:
    """What the gateway holds once it had time to let go: as little as before, it is hoped."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(1)
        now = await asyncio.to_thread(look, gateway)
        small = now.tasks <= before.tasks and now.descriptors <= before.descriptors and now.threads <= before.threads
        if small or time.monotonic() > until:
            return now


def growth(samples: list[Sample], name: str) -> float:
    """MiB a minute, over the second half, as the line through it has it."""
    later = samples[len(samples) // 2 :]
    if len(later) < 3:
        return 0.0
    minutes = [sample.at / 60 for sample in later]
    return statistics.linear_regression(minutes, [getattr(sample, name) / 2**20 for sample in later]).slope


def report(found: list[tuple[str, object, bool]]) -> int:
    """Print it; returns the exit status."""
    for name, figure, good in found:
        print(f"{name:52s} {figure!s}{'' if good else '   <- NOT AS IT SHOULD BE'}")
    return int(not all(good for _, _, good in found))


def serve(
    address: "multiprocessing.Queue[str]", backend: Callable[[], Backend], settings: dict[str, Any], silent: bool
) -> None:
    """The gateway's process, from here on."""
    if not silent:
        logs.set_up("text")
    config = Config(port=0, **settings)
    listener = listen(config.host, config.port)
    server_settings, streams = uvicorn_config(config, backend())
    server = Server(server_settings, streams)

    async def run() -> None:
        async def announce() -> None:
            if await streams.engine.came_up():
                freeze_heap()
                address.put(f"http://{config.host}:{listener.getsockname()[1]}")

        announcing = asyncio.create_task(announce())
        await server.serve(sockets=[listener])
        announcing.cancel()

    asyncio.run(run())


@contextlib.contextmanager
def running(backend: Callable[[], Backend], *, silent: bool = True, **settings: Any) -> Iterator[Gateway]:
    """Start a gateway, and end it in order. `backend` is made in its process; `settings` are of `Config`."""
    spawn = multiprocessing.get_context("spawn")
    address: multiprocessing.Queue[str] = spawn.Queue()
    process = spawn.Process(target=serve, args=(address, backend, settings, silent))
    process.start()
    try:
        assert process.pid is not None
        yield Gateway(address.get(timeout=START_SECONDS), process.pid)
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        process.join(20)
        if process.exitcode is None:
            process.kill()
            process.join()
