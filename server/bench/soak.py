"""Half an hour of live streams while the engine is killed every few minutes, and what was left behind at the end.

    python -m server.bench.soak --minutes 30 --engine mini

Streams that last from beginning to end are watched in every format and steered, while viewers and shorter streams come
and go. Every `--kill-every` seconds the engine process gets a SIGKILL, or in turn a SIGSTOP, which the gateway notices
after some seconds of silence. Nothing may stall outside of that, streams must go on soon after the gateway has given
the engine up, and in the end nothing may be left: no task, descriptor, thread, process, folder or memory. The exit
status is 1 when one of that is not so.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from server.backends.base import Backend
from server.backends.local import SILENT_SECONDS, LocalBackend
from server.bench.clients import SOCKETS, Client, Noted
from server.bench.engine import COMMAND
from server.bench.gateway import Gateway, Sample, growth, look, quantile, report, running, settled

RESUME_SECONDS = 5.0
"""From the news that the engine is lost to the first chunk of the next one."""
GRACE_SECONDS = 3.0
"""After it has resumed, a stream may still stall until its lead is back."""
GROWTH_MIB_PER_MINUTE = 1.0


def backend(engine: str) -> Backend:
    """The engine by name: `mini`, or `pretended` in a process of its own."""
    return LocalBackend("mini") if engine == "mini" else LocalBackend("mini", command=COMMAND)


@dataclass
class Soak:
    """One run."""

    gateway: Gateway
    http: httpx.AsyncClient
    noted: Noted = field(default_factory=Noted)
    samples: list[Sample] = field(default_factory=list)
    kills: list[tuple[float, signal.Signals]] = field(default_factory=list)
    lasting: set[str] = field(default_factory=set)
    """Streams that are watched from beginning to end."""
    engines: set[int] = field(default_factory=set)
    """Every engine process that has been seen."""

    async def run(self, minutes: float, kill_every: float, streams: int) -> None:
        """The whole time."""
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
            self._kill(kill_every, ends_at),
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

    async def _kill(self, every: float, ends_at: float) -> None:
        for fate in itertools.cycle((signal.SIGKILL, signal.SIGSTOP)):
            # Not so late that nobody would see it go on.
            if time.monotonic() + every > ends_at - every / 2:
                return
            await asyncio.sleep(every)
            children = self.gateway.children()
            self.engines |= set(children)
            self.kills.append((time.monotonic(), fate))
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, fate)


def disturbed(soak: Soak, at: float) -> bool:
    """Whether an engine was being replaced then."""
    for killed, fate in soak.kills:
        noticed = killed + (SILENT_SECONDS + 2 if fate is signal.SIGSTOP else 1)
        resumed = min((then for then, _ in soak.noted.resumed if then > killed), default=noticed + RESUME_SECONDS)
        if killed <= at <= max(resumed, noticed) + GRACE_SECONDS:
            return True
    return False


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
        await asyncio.sleep(5)
        soak, rings = Soak(gateway, http), shared(gateway)
        before, figures = await asyncio.to_thread(look, gateway), await asyncio.to_thread(gateway.figures)
        await soak.run(options.minutes, options.kill_every, options.streams)
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
            [sum(f is s for _, f in soak.kills) for s in (signal.SIGKILL, signal.SIGSTOP)],
            True,
        ),
        (
            "engines replaced, as the gateway counts",
            int(later["livereel_engine_restarts_total"]),
            int(later["livereel_engine_restarts_total"]) == len(soak.kills),
        ),
        ("streams that lost their engine, times", len(noted.losses), len(noted.losses) >= len(soak.kills)),
        (
            "from the loss to the next chunk, s, median / worst",
            [round(x, 2) for x in (statistics.median(took), max(took))] if took else [],
            bool(took) and max(took) <= options.resume,
        ),
        ("stalls seen in all / outside of a loss", [len(noted.stalls), len(calm)], not calm),
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
        ("engine processes", engines, len(engines) == 1),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--engine", choices=("mini", "pretended"), default="mini")
    parser.add_argument("--kill-every", type=float, default=180, metavar="S")
    parser.add_argument("--streams", type=int, default=1, help="that last; the engine must have places for them (1)")
    parser.add_argument("--resume", type=float, default=RESUME_SECONDS, metavar="S", help="bar for it (5)")
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
