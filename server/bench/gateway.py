"""Runs a gateway in a process of its own for benchmarks, and measures it: metrics, memory, descriptors, children."""

import asyncio
import contextlib
import multiprocessing
import os
import re
import signal
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server import logs
from server.__main__ import Server, freeze_heap, listen, uvicorn_config
from server.backends.base import Backend
from server.config import Config

START_SECONDS = 300.0
"""Limit for the engine to become ready: one with large weights takes minutes."""


@dataclass(frozen=True)
class Gateway:
    """A running gateway. Figures come from `/metrics`; descriptors and children from `/proc`."""

    base: str
    pid: int

    def figures(self) -> dict[str, float]:
        """All samples of `/metrics`, by name with labels."""
        text = urllib.request.urlopen(self.base + "/metrics", timeout=30).read().decode()
        return {name: float(value) for name, value in re.findall(r"(?m)^([a-z]\S*) (\S+)$", text)}

    def descriptors(self) -> list[str]:
        """The targets of its open file descriptors, sorted; sockets without their inode numbers."""
        folder, found = Path(f"/proc/{self.pid}/fd"), []
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                found.append(re.sub(r":\[\d+\]", "", os.readlink(entry)))
        return sorted(found)

    def children(self) -> list[int]:
        """Process ids of its children, oldest first: the engine, then the standby."""
        return children(self.pid)


def children(pid: int) -> list[int]:
    """Process ids of a process's children, oldest first, including unreaped ones."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if int(fields[1]) == pid:
                    found.append((int(fields[19]), int(entry.name)))
    return [pid for _, pid in sorted(found)]


def quantile(before: Mapping[str, float], after: Mapping[str, float], name: str, share: float) -> float:
    """Upper bound of a quantile of a histogram, over the observations between two scrapes; `share` is from 0 to 1."""
    buckets = []
    for key, count in after.items():
        if found := re.fullmatch(rf'{name}_bucket{{le="(.+)"}}', key):
            buckets.append((float(found[1]), count - before.get(key, 0.0)))
    total = max((count for _, count in buckets), default=0.0)
    return min((bound for bound, count in buckets if count and count >= share * total), default=0.0)


SETTLE_SECONDS = 20.0
"""How long a gateway may take to free the resources of clients that have left."""


@dataclass(frozen=True)
class Sample:
    """The resources that a gateway held at one time."""

    at: float
    """Monotonic time in seconds."""
    resident: float
    engine: float
    """Resident bytes of the gateway (`resident`) and of its engine."""
    descriptors: int
    tasks: int
    threads: int


def take_sample(gateway: Gateway) -> Sample:
    """Measure what the gateway holds now."""
    figures = gateway.figures()
    return Sample(
        time.monotonic(),
        figures["process_resident_memory_bytes"],
        figures["livereel_engine_resident_bytes"],
        len(gateway.descriptors()),
        int(figures["livereel_tasks"]),
        int(figures["livereel_threads"]),
    )


async def settled_sample(gateway: Gateway, before: Sample) -> Sample:
    """Measure once the gateway holds no more than before, or after `SETTLE_SECONDS`."""
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(1)
        now = await asyncio.to_thread(take_sample, gateway)
        small = now.tasks <= before.tasks and now.descriptors <= before.descriptors and now.threads <= before.threads
        if small or time.monotonic() > until:
            return now


def growth(samples: list[Sample], name: str) -> float:
    """Growth of a field in MiB per minute: the slope of a line fitted to the second half of the samples."""
    later = samples[len(samples) // 2 :]
    if len(later) < 3:
        return 0.0
    minutes = [sample.at / 60 for sample in later]
    return statistics.linear_regression(minutes, [getattr(sample, name) / 2**20 for sample in later]).slope


Figure = tuple[str, object, bool]
"""Name, value, and whether the value is acceptable."""


def leak_figures(before: Sample, after: Sample, samples: Sequence[Sample] = ()) -> list[Figure]:
    """Tasks, descriptors and threads before, at most (if there are samples) and after. None may have grown."""
    figures: list[Figure] = []
    for name in ("tasks", "descriptors", "threads"):
        start, end = getattr(before, name), getattr(after, name)
        most = [max(getattr(sample, name) for sample in samples)] if samples else []
        figures.append((f"{name} before / {'most / ' if samples else ''}after", [start, *most, end], end <= start))
    return figures


def report(figures: list[Figure]) -> int:
    """Print the figures; returns the exit status, 1 if any is not acceptable."""
    for name, figure, good in figures:
        print(f"{name:52s} {figure!s}{'' if good else '   <- NOT AS IT SHOULD BE'}")
    return int(not all(good for _, _, good in figures))


def serve(
    address: "multiprocessing.Queue[str]", backend: Callable[[], Backend], settings: dict[str, Any], silent: bool
) -> None:
    """Run the gateway until it is told to stop: the main function of its process."""
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
    """Start a gateway and stop it afterwards. `backend` is called in its process; `settings` are fields of `Config`."""
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
