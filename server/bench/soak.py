"""Half an hour of live streams while the engine is killed every few minutes, and what was left behind at the end.

    python -m server.bench.soak --minutes 30 --engine mini

Streams that last from beginning to end are watched in every format and steered, while viewers and shorter streams come
and go. Every `--kill-every` seconds the engine process gets a SIGKILL, or in turn a SIGSTOP, which the gateway notices
after some seconds of silence; its spare takes over. With `--both` the spare gets a SIGKILL as well every third time,
and a new engine must be started. Nothing may stall outside of that, streams must go on soon after the signal, and in
the end nothing may be left: no task, descriptor, thread, process, folder or memory. The exit status is 1 when one of
that is not so.
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
from server.bench.clients import SOCKETS, Client, Noted
from server.bench.engine import COMMAND
from server.bench.gateway import Gateway, Sample, growth, look, quantile, report, running, settled

RESUME_SECONDS = 5.0
"""From the signal to the first chunk of the spare."""
ANEW_SECONDS = 25.0
"""The same where the spare is lost as well."""
SPARE_SECONDS = 180.0
"""A spare may take this long to be ready, at the lowest priority on a busy machine."""
GRACE_SECONDS = 3.0
"""After it has resumed, a stream may still stall until its lead is back."""
GROWTH_MIB_PER_MINUTE = 1.0
BEFORE_SECONDS = 5.0
"""What delays a chunk happens within this time before the stall."""
STOLEN_SHARE = 0.1
"""A stall counts for nothing when the host of a virtual machine took more of its processors than this just before."""


def backend(engine: str) -> Backend:
    """The engine by name: `mini`, or `pretended` in a process of its own."""
    if engine == "mini":
        return LocalBackend("mini", standby=True)
    return LocalBackend("mini", command=COMMAND, standby=True)


@dataclass(frozen=True)
class Kill:
    """What was done to the engine, and when on the monotonic clock."""

    at: float
    fate: signal.Signals
    both: bool = False
    """Whether the spare was killed with it."""

    @property
    def noticed(self) -> float:
        """When the gateway knows of it at the latest."""
        silent = SILENT_SECONDS if self.both else SILENT_WITH_STANDBY_SECONDS
        return self.at + (silent + 2 if self.fate is signal.SIGSTOP else 1)


@dataclass
class Soak:
    """One run."""

    gateway: Gateway
    http: httpx.AsyncClient
    noted: Noted = field(default_factory=Noted)
    began: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    lasting: set[str] = field(default_factory=set)
    """Streams that are watched from beginning to end."""
    engines: set[int] = field(default_factory=set)
    """Every engine process that has been seen."""
    stolen: list[tuple[float, float]] = field(default_factory=list)
    """Every second, by the monotonic clock: processor seconds that the host has given to others until then."""

    async def run(self, minutes: float, kill_every: float, streams: int, both: bool) -> None:
        """The whole time."""
        self.began = time.monotonic()
        client = Client(self.http, self.noted)
        lasting = [stream for _ in range(streams) if (stream := await client.open())]
        if len(lasting) < streams:
            raise SystemExit(f"the server took {len(lasting)} of {streams} streams")
        self.lasting = {stream["id"] for stream in lasting}
        ends_at = time.monotonic() + 60 * minutes
        seconds = 60 * minutes
        work = [
            *(self._follow(client, stream, seconds) for stream in lasting),
            *(self._visit(Client(self.http, self.noted), lasting, ends_at) for _ in range(4)),
            self._steer(client, lasting, ends_at),
            self._sample(ends_at),
            self._see_what_is_stolen(ends_at),
            self._kill(kill_every, ends_at, both),
        ]
        await asyncio.gather(*work)
        for stream in lasting:
            await client.call("closed", "DELETE", f"/v1/streams/{stream['id']}")

    async def _follow(self, client: Client, stream: dict[str, Any], seconds: float) -> None:
        frames = await client.watch(stream, "mjpeg", seconds)
        self.noted.done["frames of lasting streams"] += frames

    async def _visit(self, client: Client, lasting: list[dict[str, Any]], ends_at: float) -> None:
        """Come and go, and now and then ask for a stream of one's own."""
        while (left := ends_at - time.monotonic()) > 15:
            stream = random.choice(lasting)
            own = None
            if random.random() < 0.2 and (own := await client.open(duration_s=random.choice((2, 30)))):
                stream = own
            seconds = min(left - 10, random.uniform(2, 20))
            await client.watch(stream, random.choice((*SOCKETS, "img", "h264", "vp8")), seconds)
            if own:
                await client.call("closed", "DELETE", f"/v1/streams/{own['id']}")
            await asyncio.sleep(random.uniform(0, 2))

    async def _steer(self, client: Client, lasting: list[dict[str, Any]], ends_at: float) -> None:
        while time.monotonic() < ends_at - 20:
            await asyncio.sleep(random.uniform(5, 15))
            await client.steer(random.choice(lasting)["id"])

    async def _sample(self, ends_at: float) -> None:
        while time.monotonic() < ends_at - 2:
            self.engines |= set(self.gateway.children())
            self.samples.append(await asyncio.to_thread(look, self.gateway))
            await asyncio.sleep(5)

    async def _see_what_is_stolen(self, ends_at: float) -> None:
        while time.monotonic() < ends_at:
            self.stolen.append((time.monotonic(), stolen_seconds()))
            await asyncio.sleep(1)

    def stolen_before(self, at: float) -> float:
        """Of the machine's processor time in the seconds before, the part that it did not get."""
        within = [total for then, total in self.stolen if at - BEFORE_SECONDS - 1 <= then <= at + 1]
        return (within[-1] - within[0]) / (len(within) - 1) / (os.cpu_count() or 1) if len(within) > 1 else 0.0

    async def _kill(self, every: float, ends_at: float, both: bool) -> None:
        for count, fate in enumerate(itertools.cycle((signal.SIGKILL, signal.SIGSTOP)), 1):
            await asyncio.sleep(every)
            if not await with_spare(self.gateway):
                self.noted.faults[f"no spare after {every + SPARE_SECONDS:g} s"] += 1
            # Not so late that nobody would see it go on.
            if time.monotonic() > ends_at - every / 2:
                return
            children = self.gateway.children()
            self.engines |= set(children)
            self.kills.append(kill := Kill(time.monotonic(), fate, both and count % 3 == 0))
            for child, signal_ in zip(children, (fate, signal.SIGKILL) if kill.both else (fate,), strict=False):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal_)


async def with_spare(gateway: Gateway) -> bool:
    """Wait until an engine serves and a spare waits: two processes, both connected, so that their folders are gone."""
    until = time.monotonic() + SPARE_SECONDS
    while time.monotonic() < until:
        if len(gateway.children()) == 2 and not list(Path(tempfile.gettempdir()).glob("livereel-*/engine.sock")):
            return True
        await asyncio.sleep(0.5)
    return False


def stolen_seconds() -> float:
    """Processor seconds that a virtual machine was ready to use and did not get since it started; 0 elsewhere."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path("/proc/stat").read_text().split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")
    return 0.0


def disturbed(soak: Soak, at: float) -> bool:
    """Whether an engine was being replaced then."""
    for kill in soak.kills:
        late = kill.noticed + RESUME_SECONDS
        back = min((then for then, _ in soak.noted.resumed if then > kill.at), default=late)
        if kill.at <= at <= max(back, kill.noticed) + GRACE_SECONDS:
            return True
    return False


def resumed(soak: Soak, kill: Kill) -> list[float]:
    """Seconds from the signal until each lasting stream went on; of the others nobody may be watching any more."""
    following = min((other.at for other in soak.kills if other.at > kill.at), default=float("inf"))
    first: dict[str, float] = {}
    for then, stream in sorted(soak.noted.resumed):
        if kill.at < then < following:
            first.setdefault(stream, then - kill.at)
    return [first.get(stream, float("inf")) for stream in soak.lasting]


def spread(seconds: list[float]) -> list[float]:
    """Median and worst."""
    return [round(x, 2) for x in (statistics.median(seconds), max(seconds))] if seconds else []


def went_on(soak: Soak, bar: float) -> Iterator[tuple[str, object, bool]]:
    """How soon after which signal, for the report."""
    for name, fate, both in (
        ("SIGKILL", signal.SIGKILL, False),
        ("SIGSTOP", signal.SIGSTOP, False),
        ("SIGKILL, spare too,", signal.SIGKILL, True),
        ("SIGSTOP, spare killed,", signal.SIGSTOP, True),
    ):
        took = [s for kill in soak.kills if (kill.fate, kill.both) == (fate, both) for s in resumed(soak, kill)]
        if took:
            good = max(took) <= (ANEW_SECONDS if both else bar)
            yield f"from {name} to the next chunk, s, median / worst", spread(took), good


def shared(gateway: Gateway) -> int:
    """How many of its descriptors are of memory that it shares with an engine."""
    return sum("memfd" in name for name in gateway.descriptors())


async def measure(options: argparse.Namespace, gateway: Gateway) -> tuple[Soak, list[tuple[str, object, bool]]]:
    """Run it; returns what was found as name, figure, and whether that is as it should be."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=gateway.base, timeout=60, limits=limits) as http:
        warm = Client(http, Noted())
        if stream := await warm.open():
            for _ in range(2):  # so that every thread that stays is there
                formats = (*SOCKETS, "img", "h264", "vp8")
                await asyncio.gather(*(warm.watch(stream, format, 4) for format in formats))
            await warm.call("closed", "DELETE", f"/v1/streams/{stream['id']}")
        await with_spare(gateway)
        await asyncio.sleep(5)
        soak, rings = Soak(gateway, http), shared(gateway)
        before, figures = await asyncio.to_thread(look, gateway), await asyncio.to_thread(gateway.figures)
        await soak.run(options.minutes, options.kill_every, options.streams, options.both)
        spared = await with_spare(gateway)
        after, later = await settled(gateway, before), await asyncio.to_thread(gateway.figures)
    noted = soak.noted
    calm = [at for at, _ in noted.stalls if not disturbed(soak, at)]
    took = [
        min((then for then, id in noted.resumed if id == of and then > at), default=float("inf")) - at
        for at, of in noted.losses
        if of in soak.lasting  # of the others nobody may be watching any more
    ]
    slope, engine = growth(soak.samples, "resident"), growth(soak.samples, "engine")
    memory = shared(gateway)
    engines = gateway.children()
    return soak, [
        (
            "engines killed / stopped",
            [sum(kill.fate is fate for kill in soak.kills) for fate in (signal.SIGKILL, signal.SIGSTOP)],
            True,
        ),
        ("of these with their spares", sum(kill.both for kill in soak.kills), True),
        (
            "engines replaced, as the gateway counts",
            int(later["livereel_engine_restarts_total"]),
            int(later["livereel_engine_restarts_total"]) == len(soak.kills),
        ),
        ("streams that lost their engine, times", len(noted.losses), len(noted.losses) >= len(soak.kills)),
        ("from the news to the next chunk, s, median / worst", spread(took), True),
        *went_on(soak, options.resume),
        ("stalls seen in all / outside of a loss", [len(noted.stalls), len(calm)], True),
        (
            "these, by minute and percent of the processors that the host took then",
            [(int((at - soak.began) // 60), round(100 * soak.stolen_before(at))) for at in sorted(calm)],
            all(soak.stolen_before(at) > STOLEN_SHARE for at in calm),
        ),
        (
            "processor seconds that the host took, in all",
            round(soak.stolen[-1][1] - soak.stolen[0][1], 1),
            True,
        ),
        ("done", dict(noted.done), True),
        ("refused, as stated", dict(noted.refused), True),
        ("faults", dict(noted.faults), not noted.faults),
        ("event loop lag p99, s, at most", quantile(figures, later, "livereel_event_loop_lag_seconds", 0.99), True),
        ("gateway, MiB before / after", [round(each.resident / 2**20) for each in (before, after)], True),
        ("gateway, growth in MiB a minute", round(slope, 3), slope < GROWTH_MIB_PER_MINUTE),
        ("engine, growth in MiB a minute", round(engine, 3), engine < GROWTH_MIB_PER_MINUTE),
        ("tasks before / after", [before.tasks, after.tasks], after.tasks <= before.tasks),
        (
            "descriptors before / after",
            [before.descriptors, after.descriptors],
            after.descriptors <= before.descriptors,
        ),
        ("threads before / after", [before.threads, after.threads], after.threads <= before.threads),
        ("descriptors of shared memory before / after", [rings, memory], memory <= rings),
        ("processes of engine and spare", engines, spared and len(engines) == 2),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engine", choices=("mini", "pretended"), default="mini")
    parser.add_argument("--kill-every", type=float, default=180, metavar="S")
    parser.add_argument("--streams", type=int, default=1, help="that last; the engine must have places for them (1)")
    parser.add_argument("--resume", type=float, default=RESUME_SECONDS, metavar="S", help="bar for it (5)")
    parser.add_argument("--both", action="store_true", help="every third time the spare is killed as well")
    parser.add_argument("--log", action="store_true", help="show the gateway's log")
    options = parser.parse_args()
    if options.kill_every < 30:
        parser.error("--kill-every below 30 trips the gateway's breaker, which allows three losses in a minute")
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {options.engine}, {options.minutes:g} minutes, {options}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder  # of the gateway, which keeps its engine's socket there
        tempfile.tempdir = None
        with running(partial(backend, options.engine), silent=not options.log, idle_timeout_s=0) as gateway:
            soak, found = asyncio.run(measure(options, gateway))
            held = len(list(Path(folder).glob("livereel-*")))
        left = [str(path) for path in Path(folder).glob("livereel-*")]
    found += [
        ("folders of engines, while serving / afterwards", [held, left], held == 1 and not left),
        ("processes left", alive := [pid for pid in soak.engines if Path(f"/proc/{pid}").exists()], not alive),
    ]
    return report(found)


if __name__ == "__main__":
    sys.exit(main())
