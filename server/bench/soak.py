"""Half an hour of live streams while the engine is killed every few minutes: do streams resume, and does anything leak?

    python -m server.bench.soak --minutes 30 --engine mini

Long streams run from beginning to end, are watched in every format and steered, while viewers and short streams come
and go. Every `--kill-every` seconds the engine process gets a SIGKILL or, in turn, a SIGSTOP, which the gateway notices
after some seconds of silence; its standby takes over. With `--both` the standby gets a SIGKILL too every third time, so
that a new engine must be started. The exit status is 1 if a stream stalled at any other time, if streams resumed too
late after a signal, or if any task, descriptor, thread, process, folder or memory was left at the end.
"""

import argparse
import asyncio
import contextlib
import datetime
import itertools
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from server.backends.base import Backend
from server.backends.local import SILENT_SECONDS, SILENT_WITH_STANDBY_SECONDS, LocalBackend
from server.bench.clients import FORMATS, Client, Outcomes
from server.bench.engine import COMMAND
from server.bench.gateway import (
    Figure,
    Gateway,
    Sample,
    growth,
    leak_figures,
    quantile,
    report,
    running,
    settled_sample,
    take_sample,
)

RESUME_SECONDS = 5.0
"""Limit from the signal to the first chunk of the standby."""
RESTART_SECONDS = 25.0
"""The same limit if the standby is lost too, so that a new engine must start."""
STANDBY_SECONDS = 180.0
"""Limit for a standby to be ready; it starts at the lowest priority, on a busy machine."""
GRACE_SECONDS = 3.0
"""A stream may still stall for this long after it has resumed, until its lead has recovered."""
GROWTH_MIB_PER_MINUTE = 1.0
STALL_CAUSE_SECONDS = 5.0
"""Whatever delays a chunk happens within this time before the stall."""
STEAL_SHARE = 0.1
"""A stall does not count if the virtual machine's steal time just before it exceeded this share of its processors."""


def backend(engine: str) -> Backend:
    """The engine by name: `mini`, or the fake engine as a process (`pretended`)."""
    if engine == "mini":
        return LocalBackend("mini", standby=True)
    return LocalBackend("mini", command=COMMAND, standby=True)


@dataclass(frozen=True)
class InjectedFailure:
    """A signal sent to the engine, and its monotonic time."""

    at: float
    signal: signal.Signals
    both: bool = False
    """Whether the standby was killed too."""

    @property
    def noticed_by(self) -> float:
        """The latest time at which the gateway notices."""
        silent = SILENT_SECONDS if self.both else SILENT_WITH_STANDBY_SECONDS
        return self.at + (silent + 2 if self.signal is signal.SIGSTOP else 1)


@dataclass
class Soak:
    """One run."""

    gateway: Gateway
    http: httpx.AsyncClient
    outcomes: Outcomes = field(default_factory=Outcomes)
    started_at: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    failures: list[InjectedFailure] = field(default_factory=list)
    long_streams: set[str] = field(default_factory=set)
    """Ids of the streams that run from beginning to end."""
    engines: set[int] = field(default_factory=set)
    """Ids of all engine processes seen."""
    steal_samples: list[tuple[float, float]] = field(default_factory=list)
    """Sampled every second: monotonic time, and steal time of all processors until then in seconds."""

    async def run(self, minutes: float, kill_every: float, streams: int, both: bool) -> None:
        """Run clients and inject failures for so many minutes."""
        self.started_at = time.monotonic()
        client = Client(self.http, self.outcomes)
        long_streams = [stream for _ in range(streams) if (stream := await client.open())]
        if len(long_streams) < streams:
            raise SystemExit(f"the server took {len(long_streams)} of {streams} streams")
        self.long_streams = {stream["id"] for stream in long_streams}
        ends_at = time.monotonic() + 60 * minutes
        seconds = 60 * minutes
        work = [
            *(self._follow(client, stream, seconds) for stream in long_streams),
            *(self._visit(Client(self.http, self.outcomes), long_streams, ends_at) for _ in range(4)),
            self._steer(client, long_streams, ends_at),
            self._sample(ends_at),
            self._sample_steal_time(ends_at),
            self._inject_failures(kill_every, ends_at, both),
        ]
        await asyncio.gather(*work)
        for stream in long_streams:
            await client.close(stream)

    async def _follow(self, client: Client, stream: dict[str, Any], seconds: float) -> None:
        frames = await client.watch(stream, "mjpeg", seconds)
        self.outcomes.done["frames of lasting streams"] += frames

    async def _visit(self, client: Client, long_streams: list[dict[str, Any]], ends_at: float) -> None:
        """Watch one stream after the other, sometimes a short one of its own."""
        while (left := ends_at - time.monotonic()) > 15:
            stream = random.choice(long_streams)
            own = None
            if random.random() < 0.2 and (own := await client.open(duration_s=random.choice((2, 30)))):
                stream = own
            seconds = min(left - 10, random.uniform(2, 20))
            await client.watch(stream, random.choice(FORMATS), seconds)
            if own:
                await client.close(own)
            await asyncio.sleep(random.uniform(0, 2))

    async def _steer(self, client: Client, long_streams: list[dict[str, Any]], ends_at: float) -> None:
        while time.monotonic() < ends_at - 20:
            await asyncio.sleep(random.uniform(5, 15))
            await client.steer(random.choice(long_streams)["id"])

    async def _sample(self, ends_at: float) -> None:
        while time.monotonic() < ends_at - 2:
            self.engines |= set(self.gateway.children())
            self.samples.append(await asyncio.to_thread(take_sample, self.gateway))
            await asyncio.sleep(5)

    async def _sample_steal_time(self, ends_at: float) -> None:
        while time.monotonic() < ends_at:
            self.steal_samples.append((time.monotonic(), steal_seconds()))
            await asyncio.sleep(1)

    def steal_share(self, at: float) -> float:
        """Steal time as a share of the machine's processor time, in the seconds before `at`."""
        within = [total for then, total in self.steal_samples if at - STALL_CAUSE_SECONDS - 1 <= then <= at + 1]
        return (within[-1] - within[0]) / (len(within) - 1) / (os.cpu_count() or 1) if len(within) > 1 else 0.0

    async def _inject_failures(self, every: float, ends_at: float, both: bool) -> None:
        for count, number in enumerate(itertools.cycle((signal.SIGKILL, signal.SIGSTOP)), 1):
            await asyncio.sleep(every)
            if not await standby_connected(self.gateway):
                self.outcomes.faults[f"no spare after {every + STANDBY_SECONDS:g} s"] += 1
            # Not so late that the streams would end before they resume.
            if time.monotonic() > ends_at - every / 2:
                return
            children = self.gateway.children()
            self.engines |= set(children)
            failure = InjectedFailure(time.monotonic(), number, both and count % 3 == 0)
            self.failures.append(failure)
            for child, sent in zip(children, (number, signal.SIGKILL) if failure.both else (number,), strict=False):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, sent)


async def standby_connected(gateway: Gateway) -> bool:
    """Wait until engine and standby have connected, which removes their sockets; False if that takes too long."""
    until = time.monotonic() + STANDBY_SECONDS
    while time.monotonic() < until:
        if len(gateway.children()) == 2 and not list(Path(tempfile.gettempdir()).glob("livereel-*/engine.sock")):
            return True
        await asyncio.sleep(0.5)
    return False


def steal_seconds() -> float:
    """Steal time since the machine started, of all processors; 0 if it is not a virtual machine on Linux."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def during_recovery(soak: Soak, at: float) -> bool:
    """Whether an engine was being replaced at this time."""
    for failure in soak.failures:
        late = failure.noticed_by + RESUME_SECONDS
        back = min((then for then, _ in soak.outcomes.resumed if then > failure.at), default=late)
        if failure.at <= at <= max(back, failure.noticed_by) + GRACE_SECONDS:
            return True
    return False


def resume_delays(soak: Soak, failure: InjectedFailure) -> list[float]:
    """Seconds from the signal until each long stream resumed. Short streams may have no viewer to see it."""
    following = min((other.at for other in soak.failures if other.at > failure.at), default=float("inf"))
    first: dict[str, float] = {}
    for then, stream in sorted(soak.outcomes.resumed):
        if failure.at < then < following:
            first.setdefault(stream, then - failure.at)
    return [first.get(stream, float("inf")) for stream in soak.long_streams]


def median_and_max(seconds: list[float]) -> list[float]:
    """Median and maximum, rounded; empty if there are none."""
    return [round(x, 2) for x in (statistics.median(seconds), max(seconds))] if seconds else []


def resume_figures(soak: Soak, limit: float) -> Iterator[Figure]:
    """Figures of the delays until streams resumed, by kind of failure."""
    for name, number, both in (
        ("SIGKILL", signal.SIGKILL, False),
        ("SIGSTOP", signal.SIGSTOP, False),
        ("SIGKILL, spare too,", signal.SIGKILL, True),
        ("SIGSTOP, spare killed,", signal.SIGSTOP, True),
    ):
        failures = [failure for failure in soak.failures if (failure.signal, failure.both) == (number, both)]
        if delays := [seconds for failure in failures for seconds in resume_delays(soak, failure)]:
            good = max(delays) <= (RESTART_SECONDS if both else limit)
            yield f"from {name} to the next chunk, s, median / worst", median_and_max(delays), good


def shared_memory_descriptors(gateway: Gateway) -> int:
    """How many of the gateway's descriptors are memory that it shares with an engine."""
    return sum("memfd" in name for name in gateway.descriptors())


async def measure(options: argparse.Namespace, gateway: Gateway) -> tuple[Soak, list[Figure]]:
    """Warm up, run, and let the gateway settle; returns the run and its figures."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=gateway.base, timeout=60, limits=limits) as http:
        warm = Client(http, Outcomes())
        if stream := await warm.open():
            for _ in range(2):  # so that every thread that stays has been started
                await asyncio.gather(*(warm.watch(stream, format, 4) for format in FORMATS))
            await warm.close(stream)
        await standby_connected(gateway)
        await asyncio.sleep(5)
        soak, memory = Soak(gateway, http), shared_memory_descriptors(gateway)
        before, figures = await asyncio.to_thread(take_sample, gateway), await asyncio.to_thread(gateway.figures)
        await soak.run(options.minutes, options.kill_every, options.streams, options.both)
        has_standby = await standby_connected(gateway)
        after, later = await settled_sample(gateway, before), await asyncio.to_thread(gateway.figures)
    slope, engine = growth(soak.samples, "resident"), growth(soak.samples, "engine")
    memory_after = shared_memory_descriptors(gateway)
    engines = gateway.children()
    return soak, [
        *failure_figures(soak, int(later["livereel_engine_restarts_total"]), options.resume),
        *stall_figures(soak),
        ("done", dict(soak.outcomes.done), True),
        ("refused, as stated", dict(soak.outcomes.refused), True),
        ("faults", dict(soak.outcomes.faults), not soak.outcomes.faults),
        ("event loop lag p99, s, at most", quantile(figures, later, "livereel_event_loop_lag_seconds", 0.99), True),
        ("gateway, MiB before / after", [round(each.resident / 2**20) for each in (before, after)], True),
        ("gateway, growth in MiB a minute", round(slope, 3), slope < GROWTH_MIB_PER_MINUTE),
        ("engine, growth in MiB a minute", round(engine, 3), engine < GROWTH_MIB_PER_MINUTE),
        *leak_figures(before, after),
        ("descriptors of shared memory before / after", [memory, memory_after], memory_after <= memory),
        ("processes of engine and spare", engines, has_standby and len(engines) == 2),
    ]


def failure_figures(soak: Soak, replaced: int, limit: float) -> Iterator[Figure]:
    """Figures of the injected failures, and of how soon streams resumed. `replaced` is the gateway's own count."""
    numbers = (signal.SIGKILL, signal.SIGSTOP)
    losses = soak.outcomes.losses
    delays = [
        min((then for then, id in soak.outcomes.resumed if id == stream and then > at), default=float("inf")) - at
        for at, stream in losses
        if stream in soak.long_streams  # the others may have no viewer to see it
    ]
    yield (
        "engines killed / stopped",
        [sum(failure.signal is number for failure in soak.failures) for number in numbers],
        True,
    )
    yield "of these with their spares", sum(failure.both for failure in soak.failures), True
    yield "engines replaced, as the gateway counts", replaced, replaced == len(soak.failures)
    yield "streams that lost their engine, times", len(losses), len(losses) >= len(soak.failures)
    yield "from the news to the next chunk, s, median / worst", median_and_max(delays), True
    yield from resume_figures(soak, limit)


def stall_figures(soak: Soak) -> Iterator[Figure]:
    """Figures of the stalls outside of engine failures, and of steal time, which excuses them."""
    stalls = soak.outcomes.stalls
    unexplained = sorted(at for at, _ in stalls if not during_recovery(soak, at))
    yield "stalls seen in all / outside of a loss", [len(stalls), len(unexplained)], True
    yield (
        "these, by minute and percent of the processors that the host took then",
        [(int((at - soak.started_at) // 60), round(100 * soak.steal_share(at))) for at in unexplained],
        all(soak.steal_share(at) > STEAL_SHARE for at in unexplained),
    )
    stolen = soak.steal_samples[-1][1] - soak.steal_samples[0][1]
    yield "processor seconds that the host took, in all", round(stolen, 1), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engine", choices=("mini", "pretended"), default="mini")
    parser.add_argument("--kill-every", type=float, default=180, metavar="S")
    parser.add_argument("--streams", type=int, default=1, help="long streams, within the engine's capacity (1)")
    parser.add_argument("--resume", type=float, default=RESUME_SECONDS, metavar="S", help="limit for it (5)")
    parser.add_argument("--both", action="store_true", help="every third time, kill the standby too")
    parser.add_argument("--log", action="store_true", help="show the gateway's log")
    options = parser.parse_args()
    if options.kill_every < 30:
        parser.error("--kill-every below 30 trips the gateway's circuit breaker, which allows three losses in a minute")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {options.engine}, {options.minutes:g} minutes, {options}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # for the gateway, which creates the folder of its engine's socket there
        tempfile.tempdir = None
        with running(partial(backend, options.engine), silent=not options.log, idle_timeout_s=0) as gateway:
            soak, figures = asyncio.run(measure(options, gateway))
            in_use = len(list(Path(folder).glob("livereel-*")))
        left = [str(path) for path in Path(folder).glob("livereel-*")]
    figures += [
        ("folders of engines, while serving / afterwards", [in_use, left], in_use == 1 and not left),
        ("processes left", alive := [pid for pid in soak.engines if Path(f"/proc/{pid}").exists()], not alive),
    ]
    return report(figures)


if __name__ == "__main__":
    sys.exit(main())
